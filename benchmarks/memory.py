"""Peak memory of a run against vocabulary, length of a row and number of samples: what stays flat.

    uv run python -m benchmarks.memory             # about 5 minutes; samples up to 10^5
    uv run python -m benchmarks.memory --samples 1000 1000000 --axes samples

Every point is a process of its own, and its resident memory at the peak is what the kernel says.
Tables of samples and tokens are mapped files: their pages count in the peak and can be taken back
at any time, so what is no mapped file at the end is shown beside it. The samples axis reads, splits,
tokenizes and plans a JSONL file through the program's own modules, and trains three steps of a small
Qwen3 with its loop pieces. The vocabulary axis trains with a head of so many rows; beside ours stands
the same model with full logits, whose peak grows with tokens x vocabulary. The length axis packs
four documents into a row. The last line is JSON; rss_growth_percent compares the largest number of
samples with the smallest.
"""

import finetuning.common.process  # noqa: F401, I001  before torch
import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path


HIDDEN, LAYERS, STEPS = 64, 2, 3
SAMPLES = (1_000, 10_000, 100_000)
VOCABULARIES = (1_024, 16_384, 65_536, 151_936)
LENGTHS = (512, 1_024, 2_048, 4_096, 8_192)


def peak_rss_mib() -> float:
    """Of this program alone."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux's ru_maxrss would begin with that of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def anonymous_mib() -> float:
    """What is not a mapped file, now; NaN where the system does not say."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = text.partition("RssAnon:")[2].split()
    return int(found[0]) / 2**10 if found else float("nan")


def build_model(vocabulary: int):
    """A Qwen3 with two narrow layers, LoRA on all linear maps."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from finetuning.config import PROJECTIONS

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        use_cache=False,
    )
    lora = LoraConfig(r=8, target_modules=list(PROJECTIONS))
    return get_peft_model(Qwen3ForCausalLM(config), lora)


def train(tokens, plan, model, close_id: int) -> None:
    """Steps as the program does them."""
    import torch

    from finetuning.common.distributed import Distributed
    from finetuning.model.fused_lora import enable_fast_lora
    from finetuning.model.packed_model import PackedLossModel
    from finetuning.training.optimizer import (
        build_optimizer,
        clip_gradients,
        forward_backward,
        update_weights,
    )
    from finetuning.training.step_clock import StepClock

    enable_fast_lora(model)
    packed = PackedLossModel(model, close_id).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        trainable, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
    )
    dist = Distributed(0, 1, 0, torch.device("cpu"))
    for step in range(1, STEPS + 1):
        forward_backward(packed, plan[step], tokens, dist, StepClock())
        update_weights(optimizer, clip_gradients(trainable, 1.0))


def random_documents(vocabulary: int, length: int):
    """One row of four documents; three quarters of the tokens carry loss."""
    import numpy as np

    from finetuning.data.token_table import Segment, TokenizedSamples, TruncationReport

    ids = np.random.default_rng(0).integers(8, vocabulary, length).astype(np.int32)
    segments = np.full((4, length // 4), Segment.THINKING, dtype=np.uint8)
    segments[:, : length // 16] = Segment.PROMPT
    return TokenizedSamples(
        ids=ids,
        segments=segments.ravel(),
        offsets=np.arange(5) * (length // 4),
        sample_index=np.arange(4),
        num_targets=(segments != Segment.PROMPT).sum(1),
        truncation=TruncationReport(),
        close_id=2,
        end_id=1,
        max_seq_length=length,
    )


def one_row(vocabulary: int, length: int) -> None:
    """Train on one row of random documents."""
    from finetuning.config import BatchSettings, DataSettings
    from finetuning.data.packing import StepPlan

    tokens = random_documents(vocabulary, length)
    settings = {
        "data": DataSettings(max_seq_length=length),
        "batch": BatchSettings(max_steps=STEPS),
    }
    plan = StepPlan(tokens.lengths, tokens.num_targets, **settings)
    train(tokens, plan, build_model(vocabulary), tokens.close_id)


def full_logits(vocabulary: int, length: int) -> None:
    """The same documents through the library's own loss."""
    import torch

    tokens = random_documents(vocabulary, length)
    ids = torch.from_numpy(tokens.ids.astype("int64")).view(4, -1)
    labels = torch.where(torch.from_numpy(tokens.segments).view(4, -1) != 0, ids, -100)
    model = build_model(vocabulary)
    for _ in range(STEPS):
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()


def many_samples(count: int, folder: str) -> None:
    """Read, split, tokenize, plan and train on `count` samples of a file written before."""
    from transformers import AutoTokenizer

    from finetuning.config import BatchSettings, DataSettings
    from finetuning.data.packing import StepPlan
    from finetuning.data.split import split_samples
    from finetuning.data.training_data import prepare_data, read_data

    cache = Path(folder) / "cache"
    settings = DataSettings(data_path=(f"{folder}/samples-{count}.jsonl",), max_seq_length=512)
    read, _ = read_data(settings, cache_dir=cache)
    split = split_samples(read, settings, cache_dir=cache)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    data = prepare_data(split, tokenizer, settings, cache_dir=cache)
    tokens = data.train.tokens
    plan = StepPlan(
        tokens.lengths,
        tokens.num_targets,
        data.train.documents,
        data=settings,
        batch=BatchSettings(max_steps=STEPS),
    )
    train(tokens, plan, build_model(len(tokenizer)), tokens.close_id)


def write_samples(folder: Path, counts: list[int]) -> None:
    """Files of short samples that differ, and a tokenizer."""
    from tests.helpers.tiny_model import make_tiny_data, make_tiny_model

    make_tiny_model(folder / "model")
    for count in counts:
        make_tiny_data(folder / f"samples-{count}.jsonl", count)


def peaks_of(*point: str) -> tuple[float, float]:
    """MiB at the peak of a process that does one point, and without mapped files at its end."""
    command = [sys.executable, "-m", "benchmarks.memory", "--point", *point]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{point}: {done.stderr[-2000:]}")
    peak, anonymous = map(float, done.stdout.split()[-2:])
    print(f"{' '.join(point[:2]):30}{peak:8.0f} MiB, without files {anonymous:.0f}", flush=True)
    return peak, anonymous


def peak_of(*point: str) -> float:
    """The first of `peaks_of`."""
    return peaks_of(*point)[0]


def run_point(name: str, *numbers: str) -> None:
    """In the child process."""
    if name == "imports":
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    elif name == "samples":
        many_samples(int(numbers[0]), numbers[1])
    else:
        {"row": one_row, "full_logits": full_logits}[name](*map(int, numbers))
    print(peak_rss_mib(), anonymous_mib())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=["vocabulary", "length", "samples"])
    parser.add_argument("--samples", nargs="+", type=int, default=SAMPLES)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--point", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        run_point(*options.point)
        return
    result: dict = {"rss_growth_percent": None, "imports_mib": peak_of("imports")}
    if "vocabulary" in options.axes:
        for kind in ("row", "full_logits"):
            result[f"mib_by_vocabulary_{kind}"] = {
                v: peak_of(kind, str(v), "2048") for v in options.vocabularies
            }
    if "length" in options.axes:
        result["mib_by_length"] = {n: peak_of("row", "4096", str(n)) for n in options.lengths}
    if "samples" in options.axes:
        with tempfile.TemporaryDirectory() as folder:
            write_samples(Path(folder), options.samples)
            peaks = {n: peaks_of("samples", str(n), folder) for n in options.samples}
        result["mib_by_samples"] = {n: peak for n, (peak, _) in peaks.items()}
        result["mib_by_samples_without_files"] = {n: own for n, (_, own) in peaks.items()}
        first, last = peaks[min(peaks)][0], peaks[max(peaks)][0]
        result["rss_growth_percent"] = 100 * (last / first - 1)
    names = ("torch", "transformers", "peft")
    result["versions"] = {name: importlib.metadata.version(name) for name in names}
    result["python"] = platform.python_version()
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
