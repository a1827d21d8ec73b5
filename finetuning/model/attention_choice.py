"""Which kernels compute attention on a GPU: torch's own, or those of an installed package.

torch has switches for FlashAttention 3 and 4, whose kernels come with packages of their own. Which kernels
are the fastest depends on the GPU, on versions and on shapes. So each is tried once on a row like the run's,
must give what torch's own give, and the choice is kept.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import (
    activate_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
)

from finetuning.common.cache import cached_value, code_version
from finetuning.common.text import clean_line
from finetuning.model.attention import varlen_kernel
from finetuning.model.cuda_graph import recorded

OWN = "torch"
CLOSE = 0.02  # of a tensor's norm; torch's own kernels are 0.003 from exact in bf16
TOKEN_CLOSE = 0.25  # of one token's norm: a tile that was left out is 1
SMALL = (
    0.5  # of the middle token's norm: smaller ones count as that, as rounding may be all they are
)
REPEATS = 11
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class AttentionRow:
    """A packed row as the run's are: heads, and where its documents begin and end.

    longest: at least the longest document. The last documents may be empty, as those that fill a row's
    number are. window: tokens that some layers see of a document, or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bounds: tuple[int, ...]
    longest: int
    window: int | None = None


@dataclass(frozen=True)
class AttentionChoice:
    """The fastest kernels that are right, by name.

    milliseconds: forward and backward pass of the row, for each that is right; none where there was nothing
    to choose from. refused: why others are not taken.
    """

    name: str = OWN
    milliseconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """For the terminal; empty where torch has its own kernels only."""
        took = [f"{name} {ms:.3f}" for name, ms in self.milliseconds.items()]
        why = [f"{name} was refused ({reason})" for name, reason in self.refused.items()]
        if not took and not why:
            return ""
        measured = (
            f"attention by {self.name}; milliseconds of a row: {', '.join(took) or 'unknown'}"
        )
        return "; ".join([measured, *why])


def choose_attention(row: AttentionRow, device: torch.device, cache_dir: Path) -> AttentionChoice:
    """Switch to the fastest kernels for such rows, measured or as kept from an earlier run.

    A process that comes while another one measures waits for its choice. Raises UserError where the cache
    can't be written.
    """
    names = installed_kernels()
    if not names:
        return AttentionChoice()
    try:
        choice = cached_value(
            cache_dir / f"attention-{_key(names, row, device)}",
            lambda: asdict(measured_choice(names, row, device)),
            lambda kept: AttentionChoice(**kept),
        )
    except RuntimeError as error:  # it may be another time, so it is not kept
        reason = f"no trial: {clean_line(str(error), 200)}"
        return AttentionChoice(refused=dict.fromkeys(names, reason))
    if choice.name != OWN:
        activate_flash_attention_impl(choice.name)
    return choice


def installed_kernels() -> list[str]:
    """Names of what torch can switch to here."""
    return [name for name in list_flash_attention_impls() if _is_installed(name)]


def measured_choice(names: list[str], row: AttentionRow, device: torch.device) -> AttentionChoice:
    """Of torch's own kernels and the named ones; those are switched off again. Raises RuntimeError where
    there is no memory for a trial, or torch's own can't be recorded as a graph."""
    trial = _Trial(row, device)
    expected, milliseconds, refused = trial.results(), {OWN: trial.milliseconds()}, {}
    for name in names:
        try:
            with _switched_to(name):
                if wrong := _difference(trial.results(), expected):
                    refused[name] = wrong
                else:
                    milliseconds[name] = trial.milliseconds()
        except torch.OutOfMemoryError:  # says nothing of the kernels
            raise
        except Exception as error:  # of code that others wrote; it is told
            refused[name] = clean_line(f"{type(error).__name__}: {error}", 200)
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    return AttentionChoice(fastest, milliseconds, refused)


# -----------------------------------------------------------------------------
# A trial


class _Trial:
    """Queries, keys, values and a gradient of one row, the same for all kernels."""

    def __init__(self, row: AttentionRow, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.row, self.device = row, device
        self.bounds = torch.tensor(row.bounds, dtype=torch.int32, device=device)
        self.q, self.k, self.v, self.gradient = (
            torch.randn(
                row.bounds[-1],
                heads,
                row.head_dim,
                generator=generator,
                device=device,
                dtype=dtype,
            )
            for heads in (row.heads, row.kv_heads, row.kv_heads, row.heads)
        )
        self.inputs = tuple(t.requires_grad_() for t in (self.q, self.k, self.v))

    def pass_over(self, window: int | None = None) -> Tensors:
        """Output and gradients of the packed row."""
        left, scale = -1 if window is None else window - 1, self.row.head_dim**-0.5
        out = varlen_kernel(*self.inputs, self.bounds, self.row.longest, scale, left)
        return (out.detach(), *torch.autograd.grad(out, self.inputs, self.gradient))

    def results(self) -> list[torch.Tensor]:
        """All that a run asks for: the row, with a window too, and ordinary attention, which the same
        switch decides on."""
        windows = {None, self.row.window}
        found = [t for w in sorted(windows, key=str) for t in self.pass_over(w)]
        q, k, v = (t.detach().transpose(0, 1)[None] for t in self.inputs)
        options = {"is_causal": True, "enable_gqa": self.row.heads != self.row.kv_heads}
        return [*found, F.scaled_dot_product_attention(q, k, v, **options)]

    def milliseconds(self) -> float:
        """Median of forward and backward pass; on CUDA as a graph, in which the host has no part."""
        if self.device.type != "cuda":
            return statistics.median(_host_seconds(self.pass_over) for _ in range(REPEATS)) * 1000
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            self.pass_over()
        torch.cuda.synchronize(self.device)
        graph = recorded(self.pass_over, stream)
        return statistics.median(_device_milliseconds(graph.replay) for _ in range(REPEATS))


def _host_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _device_milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """What is wrong with the results, tensors of (…, T, heads, d) or (…, heads, T, d); empty: nothing.

    All numbers together, and each token for itself: the last ones of a long document are so small that a
    tensor's norm does not show them.
    """
    for one, other in zip(found, expected, strict=True):
        off, norms = (one.float() - other.float()).flatten(), other.float().flatten()
        share = float(off.norm() / norms.norm())
        if not share < CLOSE:
            return f"its results are {share:.1%} off"
        width = other.shape[-1]
        by_token = norms.view(-1, width).norm(dim=1)
        floor = SMALL * by_token.median()
        worst = float((off.view(-1, width).norm(dim=1) / by_token.clamp(min=floor)).max())
        if not worst < TOKEN_CLOSE:
            return f"a token's results are {worst:.1%} off"
    return ""


# -----------------------------------------------------------------------------
# Switches


@contextmanager
def _switched_to(name: str) -> Iterator[None]:
    activate_flash_attention_impl(name)
    try:
        yield
    finally:
        restore_flash_attention_impl()


def _is_installed(name: str) -> bool:
    """Whether the package is there; one that is there and broken is for the trial to refuse."""
    try:
        with _switched_to(name):
            return True
    except ImportError:
        return False
    except Exception:  # of code that others wrote; it is told after the trial
        return True


def _key(names: list[str], row: AttentionRow, device: torch.device) -> str:
    """Of all that the choice depends on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    packages = sorted(
        f"{d.name} {d.version}"
        for d in metadata.distributions()
        if (d.name or "").lower().startswith(("flash", "nvidia-cutlass"))
    )
    code = code_version("model.attention_choice", "model.attention", libraries=("torch",))
    shape = asdict(row) | {
        "bounds": (row.bounds[-1], len(row.bounds))
    }  # whichever documents fill it
    facts = json.dumps([gpu, names, packages, code, shape])
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
