"""What `gpu_check.py` has each of its processes do; the last line of each is JSON.

python -m scripts.gpu_phases step --work /tmp/check --out /tmp/check --row-tokens 2048 --small
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
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import train_gpu
from finetuning.data.packing import StepPlan
from finetuning.evaluation.generation import WARM
from finetuning.model.attention import ordinary_attention
from finetuning.model.decoding import Decoder, Request
from finetuning.model.sampling import GREEDILY, Sampling
from finetuning.training.engine import TrainingEngine
from finetuning.training.state import TrainState
from scripts.gpu_attention import attention, seconds_of

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
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
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


def model(arguments: argparse.Namespace) -> dict:
    """Random weights of real shapes with the real vocabulary, as a folder that a run can load, and data."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.helpers.qwen3_tokenizer import qwen3_tokenizer

    shape = TINY if arguments.small else train_gpu.QWEN3_4B | SHAPES[arguments.shape]
    config = Qwen3Config(
        **shape,
        eos_token_id=151645,
        pad_token_id=151643,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    start, before = time.monotonic(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(train_gpu.DEVICE):
            weights = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    folder, part = arguments.folder, arguments.folder.with_name(f"{arguments.folder.name}.part")
    for old in (folder, part):
        shutil.rmtree(old, ignore_errors=True)
    weights.save_pretrained(part)
    qwen3_tokenizer().save_pretrained(part)
    number, longest = (60, 10) if arguments.small else (800, 48)
    write_documents(arguments.work / "documents.jsonl", number, longest)
    part.rename(folder)  # whoever finds it finds all of it
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"seconds": time.monotonic() - start, "gib": size / 2**30}


def write_documents(path: Path, count: int, longest: int) -> None:
    """Samples a quarter of which is the question, as the benchmark's documents are; 300 to 1,500 tokens
    with a longest quarter of 48 clauses."""
    rng = random.Random(0)

    def clauses(number: int) -> str:  # of 7.7 tokens
        return "，".join(
            f"{rng.choice(WORDS)}{rng.choice(WORDS)}{rng.randrange(10_000)}" for _ in range(number)
        )

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            quarter = rng.randrange(longest // 5 + 1, longest)
            parts = {"question": quarter, "thinking": 2 * quarter, "answer": quarter}
            sample = {name: clauses(number) for name, number in parts.items()}
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


# -----------------------------------------------------------------------------
# A training step


class Steps:
    """A model in training on the benchmark's documents, with and without the graph."""

    def __init__(self, work: train_gpu.Work, **ways: bool) -> None:
        self.work, self.tokens = work, work.documents()
        self.plan: StepPlan = work.plan(self.tokens)
        self.training: TrainingEngine = train_gpu.in_training(self.plan, **ways)
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

    def passes_ms(self, number: int) -> float:
        """A step's passes on the device, and the peak counted anew before them; no graph's making."""
        if train_gpu.ON_CUDA:
            torch.cuda.reset_peak_memory_stats()
        self.step(number)
        self.clock.count(tokens=self.work.row_tokens, supervised=0, samples=0)
        train_gpu.Record.synchronize()  # the clock reads what the device has come past
        return 1000 * self.clock.read()["Throughput/Step_Seconds_Forward_Backward"]

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
# Long rows, and answers


def work_of(arguments: argparse.Namespace) -> train_gpu.Work:
    """Documents of 300 to 1,500 tokens, the benchmark's own."""
    if arguments.small:
        return train_gpu.Work(30, 150, 512, 8, 2)
    return train_gpu.Work(300, 1500, arguments.row_tokens, 6 + arguments.steps, 2)


def long_row(arguments: argparse.Namespace) -> dict:
    """One document that fills a long row, with recomputed activations: a step without the graph, then one
    with it; to make it takes another pass. What is known is told after each."""
    tokens = 256 if arguments.small else arguments.row_tokens
    steps = Steps(train_gpu.Work(tokens, tokens, tokens, 3, 1), checkpointing=True)
    steps.use_graph(False)
    start = time.perf_counter()
    steps.passes_ms(1)
    found: dict = {"row_tokens": tokens, "first_step_s": time.perf_counter() - start}
    found["without graph"] = passes = {"passes_ms": steps.passes_ms(2)}
    if train_gpu.ON_CUDA:
        passes |= memory(torch.cuda.max_memory_allocated())
    tell(found)
    steps.use_graph(True)
    found["graph"] = passes = {"passes_ms": steps.passes_ms(3)}
    if captured := steps.training.captured:
        passes |= memory(captured.peak_bytes)
    return found | {"not_captured": steps.training.not_captured}


def memory(peak_bytes: int) -> dict[str, float]:
    """The peak, and what the allocator has taken for it."""
    return {
        "peak_gib": peak_bytes / 2**30,
        "reserved_gib": torch.cuda.memory_reserved() / 2**30,
    }


def answers(arguments: argparse.Namespace) -> dict:
    """Seconds of 32 answers of 512 tokens in one batch, drawn as a run draws and greedily: of the first
    batch, in which the graph is tried, and of the next. What is known is told after each."""
    most, rows = (24, 4) if arguments.small else (512, 32)
    training = train_gpu.in_training(work_of(arguments).plan(work_of(arguments).documents()))
    model, prepare = training.packed.model.eval(), training.packed.write_adapters
    request, found = prompts(rows, 40 if arguments.small else 300, most), {}
    with torch.no_grad(), ordinary_attention(model):
        for way, sampling in (("drawn", Sampling(WARM)), ("greedy", GREEDILY)):
            decoder = Decoder(model, prepare, sampling=sampling)
            found[way] = {}
            for batch in ("first", "next"):
                train_gpu.Record.synchronize()
                start = time.perf_counter()
                written = decoder.write(request)
                train_gpu.Record.synchronize()
                found[way][f"{batch}_batch_seconds"] = time.perf_counter() - start
            found[way] |= {"written": list(written.shape), "why_no_graph": decoder.why_no_graph}
            tell(found)
    if train_gpu.ON_CUDA:
        found |= memory(torch.cuda.max_memory_allocated())
    return found


def prompts(rows: int, width: int, most: int) -> Request:
    """Questions of a quarter of the width and more, padded on the left."""
    rng, device = random.Random(0), train_gpu.DEVICE
    ids = torch.randint(8, train_gpu.config().vocab_size, (rows, width), device=device)
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : rng.randrange(width * 3 // 4)] = 0
    return Request(ids, mask, most=most, end_id=train_gpu.END)


def tell(found: dict) -> None:
    """What is known so far, on the standard output: it outlasts the process's limit."""
    print(json.dumps(found), file=sys.__stdout__, flush=True)


PHASES = {f.__name__: f for f in (facts, model, step, attention, long_row, answers)}


def parse_arguments(command: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="of the model that is made")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="4B")
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    return parser.parse_args(command)


def main() -> None:
    arguments = parse_arguments()
    if arguments.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    train_gpu.QWEN3_4B |= SHAPES[arguments.shape]
    with contextlib.redirect_stdout(sys.stderr):
        result = PHASES[arguments.phase](arguments)
    tell(result)


if __name__ == "__main__":
    main()
