"""What `gpu_check.py` has each of its processes do; the last line of each is JSON.

python -m scripts.gpu_phases step --work /tmp/check --row-tokens 2048 --small
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import train_gpu
from finetuning.data.packing import StepPlan
from finetuning.model.attention import ordinary_attention
from finetuning.model.cuda_graph import recorded
from finetuning.model.decoding import Decoder
from finetuning.training.engine import TrainingEngine
from finetuning.training.state import TrainState

VERSIONS = (
    *("torch", "triton", "transformers", "peft", "accelerate", "numpy", "trl", "liger_kernel"),
    *("bitsandbytes", "flash_attn", "unsloth"),
)
SHAPES = {  # of Qwen3: what differs from 4B
    "4B": {},
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "8B": {"hidden_size": 4096, "intermediate_size": 12288},
}
TINY = train_gpu.SMALL | {"vocab_size": 151936}
WORDS = (
    *("密钥", "分组", "杂凑", "签名", "证书", "随机数", "协议", "曲线", "填充"),
    *("轮函数", "密文", "明文", "认证", "模数", "素数", "置换", "迭代", "摘要"),
)
COMPARED = 4  # steps whose losses, gradients and weights are compared
PROFILED = 2  # steps that are recorded


# -----------------------------------------------------------------------------
# Machine and model


def facts(_: argparse.Namespace) -> dict:
    """Versions, and the rates that everything else is measured against."""
    found = {
        "versions": {name: version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "c_compiler": shutil.which("gcc"),
    }
    if not torch.cuda.is_available():
        return found | {"gpu": "none"}
    properties = torch.cuda.get_device_properties(0)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return found | {
        "gpu": properties.name,
        "gib": properties.total_memory / 2**30,
        "matmul_tflops": 2 * 8192**3 / seconds_of(lambda: a @ b) / 1e12,
        "copy_tb_s": 2 * source.nbytes / seconds_of(lambda: target.copy_(source)) / 1e12,
    }


def version(name: str) -> str | None:
    """None: not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def model(arguments: argparse.Namespace) -> dict:
    """Random weights of real shapes with the real vocabulary, as a folder that a run can load, and data."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.helpers.qwen3_tokenizer import qwen3_tokenizer

    shape = TINY if arguments.small else train_gpu.QWEN3_4B | SHAPES[arguments.shape]
    config = Qwen3Config(
        **shape,
        tie_word_embeddings=True,
        eos_token_id=151645,
        pad_token_id=151643,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    start = time.monotonic()
    with torch.device(train_gpu.DEVICE):
        weights = Qwen3ForCausalLM(config)
    folder = arguments.work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    weights.save_pretrained(folder)
    qwen3_tokenizer().save_pretrained(folder)
    write_documents(arguments.work / "documents.jsonl", 60 if arguments.small else 800)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"seconds": time.monotonic() - start, "gib": size / 2**30}


def write_documents(path: Path, count: int) -> None:
    """Samples of 300 to 1,500 tokens, a quarter of them the question, as the benchmark's documents are."""
    rng = random.Random(0)

    def clauses(number: int) -> str:  # of 7.7 tokens
        return "，".join(
            f"{rng.choice(WORDS)}{rng.choice(WORDS)}{rng.randrange(10_000)}" for _ in range(number)
        )

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            quarter = rng.randrange(10, 48)
            parts = {"question": quarter, "thinking": 2 * quarter, "answer": quarter}
            sample = {name: clauses(number) for name, number in parts.items()}
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


# -----------------------------------------------------------------------------
# A training step


class Steps:
    """A model in training on the benchmark's documents, with and without the graph."""

    def __init__(self, work: train_gpu.Work, *, fp8: bool = False) -> None:
        self.work, self.tokens = work, work.documents()
        self.plan: StepPlan = work.plan(self.tokens)
        self.training: TrainingEngine = train_gpu.in_training(self.plan, fp8=fp8)
        on_cuda = train_gpu.ON_CUDA
        timeline = train_gpu.CudaTimeline() if on_cuda else train_gpu.HostTimeline()
        self.clock, self.state = train_gpu.StepClock(timeline=timeline), TrainState()

    def step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss sum and gradient norm of the planned step, on the device."""
        sums, _ = self.training.forward_backward(
            self.plan[number], self.tokens, self.clock, self.state, lambda: False
        )
        norm = self.training.update(train_gpu.LEARNING_RATE, max_grad_norm=train_gpu.MAX_NORM)
        return torch.stack([s.per_document[..., 0].sum() for _, s in sums]).sum(), norm

    def use_graph(self, wanted: bool) -> None:
        """From the next step on."""
        self.training.captured = None
        self.training.not_captured = "" if wanted and train_gpu.ON_CUDA else "not wanted"

    def course(self, saved: dict) -> dict[str, list[float] | torch.Tensor]:
        """Losses, gradient norms and weights of some steps from a saved state on."""
        self.training.restore(saved, self.state)
        results = [self.step(number) for number in range(2, 2 + COMPARED)]
        weights = torch.cat([p.detach().flatten() for p in self.training.parameters])
        losses, norms = zip(*results, strict=True)
        return {
            "loss": [float(loss) for loss in losses],
            "norm": [float(norm) for norm in norms],
            "weights": weights.clone(),
        }

    def timed(self, first: int) -> dict[str, float]:
        """Seconds of the remaining steps: until they were queued, and until they were done."""
        record = train_gpu.Record
        record.synchronize()
        start = time.perf_counter()
        for number in range(first, self.work.steps + 1):
            self.step(number)
        queued = time.perf_counter() - start
        record.synchronize()
        took, count = time.perf_counter() - start, self.work.steps + 1 - first
        documents = [d for n in range(first, self.work.steps + 1) for d in self.plan[n].documents]
        return {
            "step_ms": 1000 * took / count,
            "host_ms": 1000 * queued / count,
            "tokens_per_second": float(self.tokens.lengths[documents].sum()) / took,
        }

    def profile(self, out: Path) -> dict[str, float]:
        """Kernels and busy time of a step; the tables go to a file."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if train_gpu.ON_CUDA:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            for number in range(2, 2 + PROFILED):
                self.step(number)
            train_gpu.Record.synchronize()
        averages = profiler.key_averages()
        order = "self_device_time_total" if train_gpu.ON_CUDA else "self_cpu_time_total"
        table = averages.table(sort_by=order, row_limit=70, max_name_column_width=90)
        out.write_text(table, encoding="utf-8")
        kernels = [e for e in profiler.events() if "CUDA" in str(e.device_type)]
        busy = sum(event.time_range.elapsed_us() for event in kernels)
        return {"kernels": len(kernels) / PROFILED, "gpu_busy_ms": busy / 1000 / PROFILED}


def copied(tensors: dict) -> dict:
    """A state that later steps leave alone."""
    return {file: {n: t.clone() for n, t in content.items()} for file, content in tensors.items()}


def difference(one: dict, other: dict) -> dict[str, float]:
    """Largest of losses (a share) and norms (a share), and of weights (absolute)."""
    shares = {
        name: max(
            abs(a - b) / max(abs(b), 1e-12) for a, b in zip(one[name], other[name], strict=True)
        )
        for name in ("loss", "norm")
    }
    return shares | {"weights": float((one["weights"] - other["weights"]).abs().max())}


def step(arguments: argparse.Namespace) -> dict:
    """The graph against plain passes: the same numbers? how much faster? Then where the time goes.

    Attention's backward pass adds up in no fixed order, so that plain passes differ from plain passes
    too: with `--deterministic` nothing may differ.
    """
    steps = Steps(work_of(arguments), fp8=arguments.fp8)
    steps.use_graph(False)
    start = time.perf_counter()
    steps.step(1)
    train_gpu.Record.synchronize()
    first = time.perf_counter() - start
    saved = copied(steps.training.tensors())
    plain, again = steps.course(saved), steps.course(saved)
    shape = arguments.shape.replace(".", "_") + "_fp8" * arguments.fp8
    name = f"{steps.work.row_tokens}_{shape}.txt"
    result: dict = {"first_step_s": first, "plain_against_plain": difference(again, plain)}
    if not arguments.deterministic:
        result["plain"] = steps.timed(6) | steps.profile(arguments.out / f"profile_plain_{name}")
    steps.use_graph(True)
    start = time.perf_counter()
    graphed, repeated = steps.course(saved), steps.course(saved)
    captured = steps.training.captured
    result |= {
        "captured": captured is not None,
        "not_captured": steps.training.not_captured,
        "capture_and_compared_steps_s": time.perf_counter() - start,
        "graph_against_plain": difference(graphed, plain),
        "graph_against_graph": difference(repeated, graphed),
    }
    if not arguments.deterministic:
        result["graph"] = steps.timed(6) | steps.profile(arguments.out / f"profile_graph_{name}")
    if captured is not None:
        result["peak_gib"] = captured.peak_bytes / 2**30
        result["reserved_gib"] = torch.cuda.memory_reserved() / 2**30
        result["waits"] = waits(steps)
    return result


def waits(steps: Steps) -> str:
    """Whether a step waits for the device somewhere, and where."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.step(2)
    except RuntimeError as error:
        return str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "nowhere"


# -----------------------------------------------------------------------------
# Attention


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


def attention(arguments: argparse.Namespace) -> dict:
    """Microseconds of the kernels, replayed in a graph, and how far cuDNN's results are from the others."""
    if not torch.cuda.is_available():
        return {"not measured": "there is no CUDA device"}
    found: dict = {"cudnn": torch.backends.cudnn.version()}
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


def work_of(arguments: argparse.Namespace) -> train_gpu.Work:
    """Documents of 300 to 1,500 tokens, the benchmark's own."""
    if arguments.small:
        return train_gpu.Work(30, 150, 512, 8, 2)
    return train_gpu.Work(300, 1500, arguments.row_tokens, 6 + arguments.steps, 2)


def long_row(arguments: argparse.Namespace) -> dict:
    """One document that fills a long row: time of a step and memory, with recomputed activations."""
    tokens = 256 if arguments.small else arguments.row_tokens
    work = train_gpu.Work(tokens, tokens, tokens, 5, 2)
    found = train_gpu.ours(work, checkpointing=True)
    return found | {"row_tokens": tokens}


def answers(arguments: argparse.Namespace) -> dict:
    """Seconds of 32 answers of 512 tokens in one batch, by graph, and of a token by `generate`."""
    most, rows = (24, 4) if arguments.small else (512, 32)
    training = train_gpu.in_training(work_of(arguments).plan(work_of(arguments).documents()))
    decoder = Decoder(training.packed.model.eval(), training.packed.write_adapters)
    plain = Decoder(decoder.model, decoder.prepare, why_no_graph="to compare")
    rng, device = random.Random(0), train_gpu.DEVICE
    width = 40 if arguments.small else 300
    ids = torch.randint(8, train_gpu.config().vocab_size, (rows, width), device=device)
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : rng.randrange(width * 3 // 4)] = 0
    found: dict = {"rows": rows, "tokens": most}
    with torch.no_grad(), ordinary_attention(decoder.model):
        for name, writer, count in (
            ("first", decoder, most),
            ("second", decoder, most),
            ("generate", plain, most // 32 + 2),
        ):
            train_gpu.Record.synchronize()
            start = time.perf_counter()
            written = writer.write(
                ids, mask, most=count, end_id=train_gpu.END, enough=lambda _: False
            )
            train_gpu.Record.synchronize()
            found |= {
                f"{name}_answers_seconds": time.perf_counter() - start,
                f"{name}_written": written.shape[1],
            }
    if train_gpu.ON_CUDA:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found | {"why_no_graph": decoder.why_no_graph}


PHASES = {f.__name__: f for f in (facts, model, step, attention, long_row, answers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="4B")
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    arguments = parser.parse_args()
    if arguments.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    train_gpu.QWEN3_4B |= SHAPES[arguments.shape]
    with contextlib.redirect_stdout(sys.stderr):
        result = PHASES[arguments.phase](arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
