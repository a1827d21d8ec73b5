"""The attention kernels that torch has for documents of different lengths, side by side on a GPU."""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks import train_gpu
from finetuning.model.attention_choice import AttentionRow, installed_kernels, measured_choice
from finetuning.model.cuda_graph import recorded


class PackedAttention:
    """Queries, keys, values and bounds at the shapes of Qwen3-4B, and the kernels that torch has for them.

    FlashAttention-2 is what `varlen_attn` runs; cuDNN's kernels for documents of different lengths are
    reached through the operators below it, and their backward pass also takes what the former kept.
    """

    def __init__(self, tokens: int, longest: int, most: int) -> None:
        torch.manual_seed(0)
        work = train_gpu.Work(300, 1500, tokens, 1, 0)
        lengths = work.documents().lengths.tolist()
        ends = [
            sum(lengths[: i + 1]) for i in range(len(lengths)) if sum(lengths[: i + 1]) < tokens
        ]
        bounds = [0, *ends] + [tokens] * (most - len(ends))  # the last documents are empty
        self.bounds = torch.tensor(bounds, device="cuda", dtype=torch.int32)
        self.places = (self.bounds, self.bounds, longest, longest)
        self.scale = 128**-0.5
        self.q, self.k, self.v, self.grad = (
            torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
            for heads in (32, 8, 8, 32)
        )
        self.unused = torch.zeros(2, dtype=torch.uint64, device="cuda")

    def flash(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (T, heads, 128) and log-sum-exp (heads, T)."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            self.q, self.k, self.v, *self.places, 0.0, True, False, scale=self.scale
        )
        return out, lse

    def flash_backward(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = (self.grad, self.q, self.k, self.v, out, lse)
        return torch.ops.aten._flash_attention_backward(
            *tensors, *self.places, 0.0, True, self.unused, self.unused, scale=self.scale
        )

    def cudnn(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output as above and log-sum-exp (T, heads, 1)."""
        out, lse, *_ = torch.ops.aten._cudnn_attention_forward(
            self.q, self.k, self.v, None, *self.places, True, 0.0, True, False, scale=self.scale
        )
        return out, lse

    def cudnn_backward(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = (self.grad, self.q, self.k, self.v, out, lse, self.unused, self.unused, None)
        return torch.ops.aten._cudnn_attention_backward(
            *tensors, *self.places, 0.0, True, scale=self.scale
        )


def attention(_: argparse.Namespace) -> dict:
    """Microseconds of the kernels, replayed in a graph, and how far cuDNN's results are from the others."""
    if not torch.cuda.is_available():
        return {"not measured": "there is no CUDA device"}
    found: dict = {"cudnn": torch.backends.cudnn.version(), "installed": installed_kernels()}
    for tokens, longest, most in ((2048, 1536, 6), (8192, 8192, 28), (8192, 1536, 28)):
        case = PackedAttention(tokens, longest, most)
        out, lse = case.flash()
        gradients = case.flash_backward(out, lse)
        seen = {"flash forward": attempt(case.flash, (out,))}
        seen["flash backward"] = attempt(
            lambda c=case, o=out, s=lse: c.flash_backward(o, s), gradients
        )
        turned = lse.t().contiguous().unsqueeze(2)
        seen["cudnn forward"] = attempt(lambda c=case: c.cudnn()[:1], (out,))
        seen["cudnn backward behind flash"] = attempt(
            lambda c=case, o=out, s=turned: c.cudnn_backward(o, s), gradients
        )
        row = AttentionRow(32, 8, 128, tuple(case.bounds.tolist()), longest)
        seen["choice"] = asdict(measured_choice(installed_kernels(), row, case.q.device))
        seen["cudnn forward and backward"] = attempt(
            lambda c=case: c.cudnn_backward(*c.cudnn()), gradients
        )
        found[f"{tokens} tokens, {most} documents of up to {longest}"] = seen
        print(seen, flush=True)  # a kernel that breaks off takes the process with it
    return found


def attempt(work: Callable[[], tuple], expected: tuple[torch.Tensor, ...]) -> dict:
    """Largest difference from what is expected, as a share of its norm, and the time; or what it raised."""
    try:
        start = time.perf_counter()
        results = work()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        shares = [
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(results, expected, strict=False)
        ]
        found = {
            "difference": max(shares),
            "finite": all(bool(r.isfinite().all()) for r in results),
            "us_one_by_one": 1e6 * seconds_of(work, 20),
            "first_ms": 1000 * first,
            "host_ms_a_call": 1000 * host,
        }
    except RuntimeError as error:
        return {"error": str(error)[:300]}
    try:
        graph = recorded(work, torch.cuda.Stream())
    except RuntimeError as error:
        return found | {"not_captured": str(error)[:300]}
    return found | {"us": 1e6 * seconds_of(graph.replay, 50)}


def seconds_of(work: Callable[[], object], times: int = 20) -> float:
    """Of one call on the device, by its own clock, after three that are not counted."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / times
