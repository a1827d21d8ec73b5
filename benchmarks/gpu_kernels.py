"""Kernels side by side at the shapes of Qwen3-4B: adapters, attention, loss, FP8. A GPU, 45 s.

    uv run python -m benchmarks.gpu_kernels                     # all parts, rows of 2,048 and 8,192 tokens
    uv run python -m benchmarks.gpu_kernels --only layer loss   # some of them
    uv run python -m benchmarks.gpu_kernels --only "fp8 adapters" --rows 2048 --limit 200
    uv run python -m benchmarks.gpu_kernels --small --device cpu   # tests this script, measures nothing

lora: one projection group, forward and by-input backward product with its adapters. `none` is the
bare product, `added` adds the adapter afterwards, `joined` is `joined_lora` with its rows already
wide, as the compiled neighbours write them; `joined, 16` has R rounded up to 16 instead of 64.
attention: keys and values as they are and repeated. loss: head, softmax and gradient by torch's
operations and by `triton_kernels`. fp8: products of the same groups by `torch._scaled_mm`, and the
quantisation inside a compiled norm. layer: a whole compiled decoder layer, forward and backward,
the longest rows first. fp8 adapters: products in FP8 with their adapters, `added` as the program does
it and by the two candidates; those that give something else are named and left out. What a step of
all layers takes is told behind it. It runs on a GPU when asked for; on a CPU Triton's interpreter
runs its kernel.

A figure is the median of replays of a CUDA graph, microseconds. What would begin after `--limit`
seconds is left out and named. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.candidates import fp8_group
from finetuning.model import attention
from finetuning.model import loss as model_loss
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.packed_model import PackedLossModel
from tests.helpers.packed import document_bounds

RANK, HEAD_DIM, CLOSE, DOCUMENT, LAYERS = 16, 128, 5, 1024, 36
ADAPTERS = "fp8 adapters, "
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shapes:
    """What is measured, and where."""

    device: torch.device
    rows: tuple[int, ...]
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Inputs, and outputs of each of the projections that share them."""
        queries, keys = self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM
        return {
            "q, k, v": (self.hidden, (queries, keys, keys)),
            "o": (queries, (self.hidden,)),
            "gate, up": (self.hidden, (self.inner, self.inner)),
            "down": (self.inner, (self.hidden,)),
        }

    def random(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """bf16 on the device; never zeros, which are faster."""
        return (scale * torch.randn(*size, device=self.device)).bfloat16()


Case = tuple[str, int, str, Callable[[], object]]  # what, rows, which variant, what is timed


def microseconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of one call; on CUDA from a graph of three calls."""
    if device.type != "cuda":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.median(times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            work()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 3)
    return statistics.median(times[2:])


# -----------------------------------------------------------------------------
# The parts


def lora_cases(shapes: Shapes) -> Iterator[Case]:
    """A group's products with and without adapters; wide rows are there already."""
    for rows in shapes.rows:
        for name, (inputs, sizes) in shapes.groups.items():
            outputs, x, g = sum(sizes), shapes.random(rows, inputs), shapes.random(rows, sum(sizes))
            matrix = shapes.random(outputs, inputs)
            layers = [
                (part, shapes.random(RANK, inputs), shapes.random(len(part), RANK))
                for part in matrix.split(sizes)
            ]
            forward, backward = f"{name}, forward", f"{name}, backward"
            yield forward, rows, "none", lambda x=x, m=matrix: x @ m.t()
            yield backward, rows, "none", lambda g=g, m=matrix: g @ m
            yield forward, rows, "added", lambda x=x, ls=layers: _added_forward(x, ls)
            yield backward, rows, "added", lambda g=g, ls=layers: _added_backward(g, ls)
            for alignment, variant in ((16, "joined, 16"), (64, "joined")):
                extra = -(-len(sizes) * RANK // alignment) * alignment
                m = shapes.random(outputs + extra, inputs + extra)
                wide = [shapes.random(rows, n + extra) for n in (inputs, outputs)]
                yield (
                    forward,
                    rows,
                    variant,
                    lambda m=m, w=wide[0], n=inputs, o=outputs: (
                        w[:, :n] @ m[o:, :n].t(),
                        w @ m[:o].t(),
                    ),
                )
                yield (
                    backward,
                    rows,
                    variant,
                    lambda m=m, w=wide[1], n=inputs, o=outputs: (
                        w[:, :o] @ m[:o, n:],
                        w @ m[:, :n],
                    ),
                )


def _added_forward(x: torch.Tensor, layers: list) -> list[torch.Tensor]:
    """A product for each projection, and its adapter added in place."""
    return [(x @ weight.t()).addmm_(x @ a.t(), b.t()) for weight, a, b in layers]


def _added_backward(grad: torch.Tensor, layers: list) -> torch.Tensor:
    """By the input of all projections; the sum is three adds, which a compiler puts into a neighbour."""
    parts = grad.split([len(weight) for weight, *_ in layers], 1)
    products = [
        (g @ weight).addmm_(g @ b, a) for g, (weight, a, b) in zip(parts, layers, strict=True)
    ]
    return sum(products[1:], products[0])


def attention_cases(shapes: Shapes) -> Iterator[Case]:
    """Documents of 1,024 tokens, forward and backward."""
    for rows in shapes.rows:
        heads = (shapes.heads, shapes.kv_heads, shapes.kv_heads)
        states = [shapes.random(1, h, rows, HEAD_DIM).requires_grad_() for h in heads]
        lengths = [min(DOCUMENT, rows)] * max(1, rows // DOCUMENT)
        bounds = document_bounds(lengths).to(shapes.device)
        kwargs = attention.attention_kwargs(bounds, lengths, lengths[0])
        upstream = shapes.random(1, rows, shapes.heads, HEAD_DIM)

        def attend(repeat: bool, s=states, kw=kwargs, g=upstream) -> object:
            q, k, v = s
            if repeat:
                k, v = attention._repeat_heads(q, k, v)
            out, _ = attention.packed_attention(None, q, k, v, None, **kw)
            return torch.autograd.grad(out, s, g)

        yield "attention", rows, "repeated", lambda f=attend: f(True)
        yield "attention", rows, "as they are", lambda f=attend: f(False)


def loss_cases(shapes: Shapes) -> Iterator[Case]:
    """Three quarters of the rows are targets."""
    weight = shapes.random(shapes.vocab, shapes.hidden, scale=0.02)
    for rows in shapes.rows:
        hidden = shapes.random(rows, shapes.hidden).requires_grad_()
        targets = 3 * rows // 4
        zeros = torch.zeros(targets, dtype=torch.int64, device=shapes.device)
        batch = {
            "target_positions": torch.arange(targets, device=shapes.device),
            "labels": torch.randint(shapes.vocab, (targets,), device=shapes.device),
            **{"segments": zeros + 1, "document": zeros, "thinking_bucket": zeros},
            **{"num_documents": 1, "close_id": CLOSE, "num_targets": targets},
        }

        def loss(by_kernel: bool, h=hidden, b=batch) -> object:
            here = by_kernel and h.is_cuda
            with mock.patch.object(model_loss, "_has_kernel", lambda _: here):
                return torch.autograd.grad(model_loss.packed_loss(h, weight, **b)[0], h)

        yield "loss", rows, "torch", lambda f=loss: f(False)
        yield "loss", rows, "kernel", lambda f=loss: f(True)


def fp8_cases(shapes: Shapes) -> Iterator[Case]:
    """Products alone, then a norm that leaves bf16, and one that leaves FP8 with a scale per row as well."""
    top = torch.finfo(torch.float8_e4m3fn).max

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:])

    def norm_fp8(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.rms_norm(x, x.shape[-1:])
        scale = y.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / top
        return y, (y.float() / scale).to(torch.float8_e4m3fn), scale

    if not _has_fp8(shapes.device):
        return
    compiled = [
        f if shapes.device.type == "cpu" else torch.compile(f, dynamic=False)
        for f in (norm, norm_fp8)
    ]
    for rows in shapes.rows:
        x = shapes.random(rows, shapes.hidden)
        yield "fp8 norm", rows, "bf16", lambda x=x: compiled[0](x)
        yield "fp8 norm", rows, "with fp8", lambda x=x: compiled[1](x)
        for name, (inputs, sizes) in shapes.groups.items():
            outputs = sum(sizes)
            a, b = shapes.random(rows, inputs), shapes.random(outputs, inputs)
            a8, b8 = (t.to(torch.float8_e4m3fn) for t in (a, b))
            one = torch.ones((), device=shapes.device)
            ones = (one.expand(rows, 1).contiguous(), one.expand(1, outputs).contiguous())
            yield f"fp8 {name}", rows, "bf16", lambda a=a, b=b: a @ b.t()
            for variant, scales in (("by tensor", (one, one)), ("by row", ones)):
                yield (
                    f"fp8 {name}",
                    rows,
                    variant,
                    lambda a=a8, b=b8, s=scales: torch._scaled_mm(
                        a, b.t(), *s, out_dtype=torch.bfloat16, use_fast_accum=True
                    ),
                )


def layer_cases(shapes: Shapes) -> Iterator[Case]:
    """One decoder layer as the program compiles it, its adapters added and joined."""
    for rows in sorted(shapes.rows, reverse=True):
        for variant, join in (("added", False), ("joined", True), ("joined, fp8", True)):
            if "fp8" in variant and not _has_fp8(shapes.device):
                continue
            torch._dynamo.reset()
            model = _one_layer(shapes)
            enable_fast_lora(model, join=join, fp8="fp8" in variant)
            packed = PackedLossModel(model, CLOSE).train()
            if shapes.device.type == "cuda":
                packed.compile_layers()
            lengths = [min(DOCUMENT, rows)] * max(1, rows // DOCUMENT)
            bounds = document_bounds(lengths).to(shapes.device)
            kwargs = attention.attention_kwargs(bounds, lengths, lengths[0])
            position = torch.arange(rows, device=shapes.device)[None] % lengths[0]
            decoder = model.get_base_model().model
            x = shapes.random(1, rows, shapes.hidden).requires_grad_()
            with torch.no_grad():
                cos_sin = decoder.rotary_emb(x, position)
            wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
            upstream = shapes.random(1, rows, shapes.hidden)

            def step(layer=decoder.layers[0], x=x, c=cos_sin, kw=kwargs, w=wanted, g=upstream):
                return torch.autograd.grad(layer(x, position_embeddings=c, **kw), w, g)

            yield "layer", rows, variant, step


def fp8_adapter_cases(shapes: Shapes) -> Iterator[Case]:
    """Products alone, with adapters added, and by the candidates, forward and by-input backward."""
    if not _has_fp8(shapes.device):
        return
    for rows in shapes.rows:
        for name, (inputs, sizes) in shapes.groups.items():
            x, gradient = shapes.random(rows, inputs), shapes.random(rows, sum(sizes))
            weights = shapes.random(sum(sizes), inputs).split(sizes)
            for direction, group in fp8_group.directions(x, gradient, weights, RANK).items():
                what = f"{ADAPTERS}{name}, {direction}"
                for variant, work in fp8_group.compared(group, what):
                    yield what, rows, variant, work


def _has_fp8(device: torch.device) -> bool:
    """With a scale for each row: on Hopper and later, and on a CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _one_layer(shapes: Shapes) -> torch.nn.Module:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.inner,
        num_hidden_layers=1,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
    )
    base = Qwen3ForCausalLM(config).to(shapes.device, torch.bfloat16)
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS)).train()


PARTS = {
    "lora": lora_cases,
    "attention": attention_cases,
    "loss": loss_cases,
    "fp8": fp8_cases,
    "layer": layer_cases,  # compiles, so it comes late
    "fp8 adapters": fp8_adapter_cases,  # compiles the most
}

# -----------------------------------------------------------------------------
# The program


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    sizes = (64, 96, 2, 1, 512) if arguments.small else (2560, 9728, 32, 8, 151936)
    rows = (64,) if arguments.small else tuple(arguments.rows)
    shapes = Shapes(device, rows, *sizes)
    began, figures, left_out = time.perf_counter(), [], []
    parts = [part for part in PARTS if arguments.small or part != "fp8 adapters"]
    for part in arguments.only or parts:
        for what, count, variant, work in PARTS[part](shapes):
            if time.perf_counter() - began > arguments.limit:
                left_out.append(f"{what}, {count}, {variant}")
                continue
            figures.append((what, count, variant, microseconds(work, device)))
            print(f"{what:24} {count:6,} {variant:12} {figures[-1][3]:10.1f} us", flush=True)
    products = [figure for figure in figures if figure[0].startswith(ADAPTERS)]
    for line in fp8_group.step_times(products, LAYERS):
        print(line)
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s" + "; left out: " * bool(left_out) + ", ".join(left_out))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    names = ("what", "rows", "variant", "microseconds")
    table = [
        dict(zip(names, (*figure[:3], round(figure[3], 2)), strict=True)) for figure in figures
    ]
    print(
        json.dumps(
            {"gpu": gpu, "torch": torch.__version__, "seconds": seconds, "gpu_kernels": table}
        )
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--rows", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--limit", type=float, default=45.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
