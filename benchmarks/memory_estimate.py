"""What --plan estimates, memory and time, against what is measured, in a process of its own for each case.

    uv run python -m benchmarks.memory_estimate            # about 3 minutes on one CPU core
    uv run python -m benchmarks.memory_estimate --device cuda
    uv run python -m benchmarks.memory_estimate --device traced    # Qwen3-4B on a GPU, without one
    python -m benchmarks.memory_estimate --case '{"hidden": 64, "layers": 2, "vocab": 512, "tokens": 512}'

A case writes a Qwen3 with random weights, loads it as a run does, and makes three updates on one packed
row. Measured is what the process takes beyond what it held before the model: resident memory, sampled
every millisecond; on CUDA the allocator's own peak. Then five more updates give the time of one: on a
host processor time over threads, which other work on the machine hardly changes. Traced: the tensors of a
step that computes shapes only, as a GPU would hold them (`tests/traced_step.py`). The last line is JSON.
"""

import finetuning.common.process  # noqa: F401, I001  before torch
import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetuning.common import distributed
from finetuning.config import LoraSettings, ModelSettings
from finetuning.data.packing import build_batch
from finetuning.data.token_table import Segment
from finetuning.model import loading, parallel, resolve
from finetuning.model.demo_model import train_tokenizer
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.packed_model import PackedLossModel
from finetuning.training import forecast, memory_estimate
from finetuning.training.optimizer import build_optimizer, clip_gradients, update_weights
from tests.helpers.traced_step import documents_of, peak_of_a_step

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A model, a row and the settings that memory depends on."""

    hidden: int
    layers: int
    vocab: int
    tokens: int
    lora_r: int = 16
    precision: str = "fp32"
    recomputed: int = 0  # layers
    compiled: bool = False
    fused_lora: bool = True

    @property
    def name(self) -> str:
        kind = f"r{self.lora_r}" if self.lora_r else "full"
        ways = f", ckpt {self.recomputed}" if self.recomputed else ""
        ways += ", compiled" * self.compiled
        ways += "" if self.fused_lora else ", peft's LoRA"
        return f"H{self.hidden} L{self.layers} V{self.vocab} T{self.tokens} {kind} {self.precision}{ways}"


CPU_CASES = (
    Case(256, 4, 2048, 2048),
    Case(512, 8, 16000, 2048),
    Case(512, 8, 16000, 2048, recomputed=8),
    Case(512, 8, 16000, 2048, lora_r=0),
    Case(512, 8, 16000, 2048, lora_r=0, precision="bf16"),
    Case(512, 8, 16000, 2048, precision="bf16"),
    Case(1024, 8, 32000, 1024),
    Case(1024, 8, 32000, 1024, recomputed=8),
)
CUDA_CASES = tuple(
    Case(2560, 36, 151936, 8192, precision="bf16", recomputed=layers, compiled=compiled)
    for layers, compiled in ((36, False), (0, False), (0, True))
)


TRACED_CASES = (
    *(
        Case(2560, 36, 151936, tokens, precision="bf16", recomputed=layers)
        for tokens in (2048, 8192, 16384)
        for layers in (36, 24, 12, 0)
    ),
    Case(2560, 36, 151936, 8192, precision="bf16", fused_lora=False),
)
CASES = {"cpu": CPU_CASES, "cuda": CUDA_CASES, "traced": TRACED_CASES}


def write_model(case: Case, folder: Path) -> None:
    """A Qwen3 of the case's shape, with random weights."""
    tokenizer = train_tokenizer(["分组密码SM4的分组长度和密钥长度都是128比特，共32轮。"] * 4)
    config = config_of(
        case, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    dtype = resolve.weight_dtype(torch.device("cpu"), case.precision)
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_of(case: Case, **more: int) -> Qwen3Config:
    """Heads of 64, grouped by four; the published ones for 2560."""
    published = case.hidden == 2560
    return Qwen3Config(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=9728 if published else 3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=32 if published else case.hidden // 64,
        num_key_value_heads=8 if published else max(1, case.hidden // 256),
        head_dim=128 if published else 64,
        tie_word_embeddings=True,
        **more,
    )


class Peak(threading.Thread):
    """Highest resident memory of this process while it runs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process, self._over = psutil.Process(), threading.Event()
        self.value = 0

    def run(self) -> None:
        while not self._over.is_set():
            self.value = max(self.value, self._process.memory_info().rss)
            time.sleep(0.001)

    def stop(self) -> int:
        """End and return the peak."""
        self._over.set()
        self.join()
        return self.value


def measure(case: Case, folder: Path, device: torch.device) -> dict[str, float]:
    """Estimated and measured bytes of one case."""
    shape = memory_estimate.model_shape(folder, LoraSettings(lora_r=case.lora_r))
    dtype = resolve.weight_dtype(device, case.precision)
    placement = memory_estimate.Placement(
        device.type, dtype.itemsize, compiled=case.compiled, fused_lora=case.fused_lora
    )
    estimate = memory_estimate.estimate_memory(
        shape, placement, case.tokens, recomputed=case.recomputed
    )
    before, peak = psutil.Process().memory_info().rss, Peak()
    peak.start()
    update = build(case, folder, device)
    for _ in range(3):
        update()
    measured = peak.stop() - before
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device)
    took = float(np.median([forecast.seconds_of(update, device) for _ in range(5)]))
    speed, work = forecast.device_speed(device, shape.dims, dtype), operations(case, shape)
    rates = (speed.highest, speed.lowest)
    return {
        "estimated": estimate.total,
        "measured": measured,
        "parts": vars(estimate),
        "seconds": took,
        "seconds_estimated": [work / rate + forecast.STEP_SECONDS for rate in rates],
        "rate": work / took,
        "rates_expected": rates,
    }


def traced(case: Case) -> dict[str, float]:
    """Estimated bytes of one case, and those of the tensors of a step on a GPU."""
    assert case.precision == "bf16" and not case.compiled, "what is traced is eager and in bf16"
    with tempfile.TemporaryDirectory() as folder:
        config_of(case).save_pretrained(folder)
        shape = memory_estimate.model_shape(Path(folder), LoraSettings(lora_r=case.lora_r))
    placement = memory_estimate.Placement("cuda", 2, fused_lora=case.fused_lora)
    estimate = memory_estimate.estimate_memory(
        shape, placement, case.tokens, recomputed=case.recomputed
    )
    peak = peak_of_a_step(
        config_of(case),
        case.tokens,
        lora_r=case.lora_r,
        recomputed=case.recomputed,
        fused_lora=case.fused_lora,
    )
    return {"estimated": estimate.total, "measured": peak, "parts": vars(estimate)}


def operations(case: Case, shape: memory_estimate.ModelShape) -> float:
    """Floating-point operations of an update, recomputation included."""
    samples = documents_of(case.tokens, vocab=case.vocab)
    targets = sum(int((s.segments != Segment.PROMPT).sum()) for s in samples)
    lengths = [len(s.ids) for s in samples]
    return forecast.step_flops(shape, lengths, targets, recomputed=case.recomputed)


def build(case: Case, folder: Path, device: torch.device) -> Callable[[], None]:
    """A model as a run has it; what is returned makes one update."""
    resolved = resolve.resolve_model(str(folder), device)
    tokenizer = loading.load_tokenizer(resolved)
    model = loading.load_model(
        resolved,
        tokenizer,
        ModelSettings(precision=case.precision),
        LoraSettings(lora_r=case.lora_r),
        device=device,
        recomputed_layers=case.recomputed,
        sharded=not case.lora_r and case.precision == "bf16",
    )
    if case.fused_lora:
        enable_fast_lora(model)
    packed = PackedLossModel(model, tokenizer.convert_tokens_to_ids("</think>"))
    if case.compiled:
        packed.compile_layers()
    dtype = resolve.weight_dtype(device, case.precision)
    mode = parallel.parallel_mode("auto", trains_all=not case.lora_r, dtype=dtype, world_size=1)
    dist = distributed.Distributed(0, 1, 0, device)
    packed = parallel.parallelize(packed, mode, dist, dtype).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        parameters, learning_rate=1e-4, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
    )
    samples = documents_of(case.tokens, vocab=case.vocab)
    batch = build_batch(samples, range(len(samples))).to(device)

    def update() -> None:
        packed(batch, len(batch.labels))[0].backward()
        update_weights(optimizer, clip_gradients(parameters, 1.0))

    return update


def in_process(case: Case, device: str) -> dict[str, float]:
    """Measure in a fresh process, so that no case inherits another's memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(case, Path(folder))
        arguments = ["--case", json.dumps(asdict(case)), "--folder", folder, "--device", device]
        command = [sys.executable, "-m", "benchmarks.memory_estimate", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """All cases of a device, or one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=CASES, default=usual)
    parser.add_argument("--case", type=json.loads, help="one case of your own, as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # to measure in this process
    arguments = parser.parse_args()
    cases = (Case(**arguments.case),) if arguments.case else CASES[arguments.device]
    if arguments.folder:
        print(json.dumps(measure(cases[0], arguments.folder, torch.device(arguments.device))))
        return
    print(
        f"{'case':45} {'estimated':>10} {'measured':>10} {'error':>7} {'s an update':>12} {'measured':>9}"
    )
    results = {}
    for case in cases:
        result = (
            traced(case) if arguments.device == "traced" else in_process(case, arguments.device)
        )
        error = result["estimated"] / result["measured"] - 1
        results[case.name] = result | {"error": error}
        sizes = (f"{result[name] / MIB:.0f} MiB" for name in ("estimated", "measured"))
        times = ""
        if "seconds" in result:
            times = "{:>5.2f}-{:.2f} {:>9.2f}".format(
                *result["seconds_estimated"], result["seconds"]
            )
        line = "{:45} {:>10} {:>10} {:>+7.1%} {:>22}"
        print(line.format(case.name, *sizes, error, times), flush=True)
    print(json.dumps({"device": arguments.device, "cases": results}))


if __name__ == "__main__":
    main()
