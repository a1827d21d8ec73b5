"""Ranks are many hands on one run: the same samples, the same losses, one record; and no hang.

uv run pytest -m "not long" tests/runs/test_distributed.py
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import direct_finetuning_with_existing_modules as program
from direct_finetuning_with_existing_modules import DirectTrainer, DirectTrainingConfig, main
from finetuning.common.distributed import Distributed
from finetuning.common.errors import UserError
from finetuning.events.reading import read_metrics, read_run
from finetuning.model.demo_model import train_tokenizer
from finetuning.model.packed_model import PackedLossModel
from finetuning.runs import plan
from finetuning.runs.identity import check_ranks
from finetuning.runs.plan import find_model
from finetuning.training.step_clock import StepClock
from tests.helpers.program import Done
from tests.helpers.ranks import GRACE_SECONDS, TORCHRUN, on_ranks

SCRIPT = Path(__file__).parents[2] / "direct_finetuning_with_existing_modules.py"
OPTIONS = [
    *("--max-steps", "8", "--logging-steps", "1", "--eval-steps", "4", "--save-steps", "3"),
    *("--max-seq-length", "512", "--num-probes", "0", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, tiny_data: Path, cache_dir: Path) -> list[str]:
    """The command line of a tiny model and data."""
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    return [*OPTIONS, *inputs, "--cache-dir", str(cache_dir)]


def nothing() -> None:
    """What goes wrong in most runs."""


def run_program(arguments: list[str], fault: Callable[[], None]) -> int:
    """In a rank: the whole program; its exit code."""
    fault()
    return main(arguments)


def train(
    arguments: list[str],
    out: Path,
    ranks: int,
    accumulation: int,
    *more: str,
    fault: Callable[[], None] = nothing,
    grace: float = GRACE_SECONDS,
) -> Done:
    """The whole run with `ranks` processes of one group, see `on_ranks`; 0: one without it."""
    batch = ["--gradient-accumulation-steps", str(accumulation), "--output-dir", str(out)]
    ended = on_ranks(ranks, run_program, [*arguments, *batch, *more], fault, grace=grace)
    codes = [rank.exit_code or rank.result for rank in ended]
    said = ["".join(rank.stdout for rank in ended), "".join(rank.stderr for rank in ended)]
    return Done(next(filter(None, codes), 0), *said)


def launch(
    script: Path, arguments: list[str], out: Path, ranks: int, accumulation: int, *launcher: str
) -> subprocess.CompletedProcess:
    """The same under torchrun."""
    batch = ["--gradient-accumulation-steps", str(accumulation), "--output-dir", str(out)]
    group = [*TORCHRUN, "--nproc-per-node", str(ranks), *launcher]
    command = [*group, str(script), *arguments, *batch]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def curve(out: Path, tag: str = "Training/Loss") -> np.ndarray:
    (logs,) = (out / "training_logs").iterdir()
    records = read_metrics(logs / "metrics.jsonl")
    return np.array([r["metrics"][tag] for r in records if tag in r["metrics"]])


@pytest.fixture(scope="module")
def one_rank(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    done = train(arguments, out, ranks=0, accumulation=4)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


LONG = pytest.mark.long


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "mode"),
    [
        pytest.param(1, "ddp", marks=LONG),
        (1, "fsdp"),
        (2, "ddp"),
        pytest.param(4, "ddp", marks=LONG),
        (2, "fsdp"),
        pytest.param(4, "fsdp", marks=LONG),
    ],
)
def test_the_same_global_batch_gives_the_same_losses(arguments, one_rank, tmp_path, ranks, mode):
    out, more = tmp_path / "out", ["--parallel", mode]
    if (ranks, mode) == (2, "ddp"):  # one of them as people start it
        done = launch(SCRIPT, [*arguments, *more], out, ranks, 4 // ranks)
    else:
        done = train(arguments, out, ranks, 4 // ranks, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = curve(one_rank), curve(tmp_path / "out")
    assert len(alone) == 8
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    for tag in ("Eval/Loss", "Throughput/Tokens_Seen", "Thinking/Loss"):
        np.testing.assert_allclose(curve(tmp_path / "out", tag), curve(one_rank, tag), rtol=1e-6)
    assert len(list((tmp_path / "out" / "tensorboard_logs").iterdir())) == 1


@pytest.mark.slow
def test_a_mean_of_means_would_be_noticed(one_rank):
    """The control of the test above: the parts of a step differ in tokens and in loss."""
    thinking, answer = curve(one_rank, "Thinking/Loss"), curve(one_rank, "Answer/Loss")
    wrong = (thinking + answer) / 2
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(wrong, curve(one_rank), rtol=1e-6)


@pytest.mark.slow
def test_two_ranks_resume_on_one_and_on_two(arguments, one_rank, tmp_path):
    out = tmp_path / "out"
    assert train(arguments, out, 2, 2, "--max-steps", "8").returncode == 0
    checkpoint = out / "checkpoints" / "checkpoint-6"
    for ranks in (0, 2):
        done = train(arguments, out, ranks, 2 if ranks else 4, "--resume", str(checkpoint))
        assert done.returncode == 0, done.stderr[-2000:]
        np.testing.assert_allclose(curve(out), curve(one_rank), rtol=1e-6)


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_nothing_is_lost(arguments, one_rank, tmp_path):
    """Two nodes: only the one whose rank dies counts a restart. Without --resume, and still one run."""
    out = tmp_path / "out"
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}"]
    batch = ["--gradient-accumulation-steps", "2", "--output-dir", str(out)]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *nodes, *place),
                *("--rdzv-conf", f"is_host={int(node == 0)}", "--local-addr", "127.0.0.1"),
                *(str(SCRIPT), *arguments, *batch, "--distributed-timeout", "60"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for node in (0, 1)
    ]
    try:
        below = [agent.pid for agent in agents]  # rank 0 belongs to either
        saved = (out / "checkpoints" / "checkpoint-3").exists
        victim = _rank_process(below, rank=0, until=saved)
        os.kill(victim, signal.SIGKILL)
        said = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    assert [agent.returncode for agent in agents] == [0, 0], said[0][-3000:] + said[1][-3000:]
    (logs,) = (out / "training_logs").iterdir()
    assert json.loads((logs / "status.json").read_text())["status"] == "completed"
    assert curve(out, "Monitoring/Resume_Count")[-1] == 1, (
        "the kill came too late: nothing was resumed"
    )
    np.testing.assert_allclose(curve(out), curve(one_rank), rtol=1e-6)


def fail() -> NoReturn:
    raise RuntimeError("injected fault on rank 1")


def stand_still() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fault_on_rank_1(fault: Callable[[], None]) -> None:
    if os.environ["RANK"] == "1":
        program.learning_rate_at = lambda *_, **__: fault()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fail, stand_still])
def test_a_fault_on_one_rank_ends_all_in_time(arguments, tmp_path, fault):
    """Nobody but the program ends the other rank."""
    options = ["--output-dir", str(tmp_path / "out"), "--distributed-timeout", "10"]
    command, spoil = [*arguments, *options], partial(fault_on_rank_1, fault)
    first, second = on_ranks(2, run_program, command, spoil, grace=20 if fault is fail else 1)
    assert first.exit_code == 1, first.stderr[-3000:]
    assert second.exit_code == (1 if fault is fail else -signal.SIGKILL)
    said = first.stderr + second.stderr
    assert ("injected fault on rank 1" if fault is fail else "imed out") in said, said[-3000:]


DIES_EARLY = """
import os, signal, sys
sys.path.insert(0, {root!r})
import direct_finetuning_with_existing_modules as program

advance = program.DirectTrainer.advance

def die(self, step, planned):
    advance(self, step, planned)
    if step == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        self.tensorboard_writer.flush()
        os.kill(os.getpid(), signal.SIGKILL)

program.DirectTrainer.advance = die
sys.exit(program.main())
"""


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_begins_again(arguments, tmp_path):
    """Not as a second run beside the first."""
    wrapper, out = tmp_path / "wrapper.py", tmp_path / "out"
    wrapper.write_text(DIES_EARLY.format(root=str(SCRIPT.parent)))
    short = ["--max-steps", "4", "--save-steps", "0", "--eval-steps", "0"]
    done = launch(wrapper, [*arguments, *short], out, 1, 1, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exitcode: -9" in done.stderr, "nobody died"
    (run,) = (out / "tensorboard_logs").iterdir()
    scalars = read_run(run)
    assert [step for step, _ in scalars["Training/Loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in scalars["Eval/Loss"]] == [0, 4]
    assert [step for step, _ in scalars["Dataset/Total_Samples"]] == [0]
    assert "begins again: it had no checkpoint yet" in done.stdout
    assert len(curve(out)) == 4 and len(curve(out, "Eval/Loss")) == 2


def no_memory() -> NoReturn:
    print("injected: no memory", flush=True)
    raise torch.OutOfMemoryError("CUDA out of memory (injected)")


def rank_1_is_short_of_memory(*, always: bool) -> None:
    """In step 2, first in a forward pass, then in a backward pass; or in every pass."""
    forward, calls = PackedLossModel.forward, [0]

    def short_forward(self, batch, *rest, **named):
        mine = os.environ["RANK"] == "1" and torch.is_grad_enabled()
        calls[0] += mine
        if mine and (always or calls[0] == 3):  # the first of the two micro-batches of step 2
            no_memory()
        loss, sums = forward(self, batch, *rest, **named)
        if mine and calls[0] == 5:  # the second one, after the first was done again
            weight = next(p for n, p in self.named_parameters() if "lora_B" in n)
            handle = weight.register_hook(lambda gradient: (handle.remove(), no_memory()))
        return loss, sums

    PackedLossModel.forward = short_forward


@pytest.mark.slow
def test_out_of_memory_on_one_rank_is_met_on_all(arguments, one_rank, tmp_path):
    """Also where the other rank is through with its part already."""
    out = tmp_path / "out"
    fault = partial(rank_1_is_short_of_memory, always=False)
    done = train(arguments, out, 2, 2, fault=fault)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks, ddp" in done.stdout
    assert done.stdout.count("injected: no memory") == done.stderr.count("out of memory") == 2
    assert "deprecated" not in done.stderr, done.stderr[-3000:]
    for measure in ("activations are now made again", "in 2 parts"):
        assert done.stderr.count(measure) == 1, done.stderr
    whole, *divided = curve(out, "Config/Batch_Size")
    assert divided == [whole / 2] * 7, "from step 2 on"
    np.testing.assert_allclose(curve(out), curve(one_rank), rtol=1e-6)
    np.testing.assert_allclose(
        curve(out, "Training/Gradient_Norm"), curve(one_rank, "Training/Gradient_Norm"), rtol=1e-5
    )


@pytest.mark.slow
def test_out_of_memory_without_a_way_out_ends_all_ranks(arguments, tmp_path):
    out = tmp_path / "out"
    done = train(arguments, out, 2, 2, fault=partial(rank_1_is_short_of_memory, always=True))
    said = done.stdout + done.stderr
    assert done.returncode == 3
    assert "step 1: out of memory (on another rank). Lower --batch-size" in said, said[-3000:]
    assert "Traceback" not in done.stdout
    (logs,) = (out / "training_logs").iterdir()
    assert json.loads((logs / "status.json").read_text())["status"] == "stopped"


def little_is_free() -> None:
    plan.free_memory = lambda *_: 2**20


@pytest.mark.slow
def test_auto_shards_what_does_not_fit(arguments, tmp_path):
    few = ["--max-steps", "1", "--eval-steps", "0"]
    done = train(arguments, tmp_path / "out", 2, 1, *few, fault=little_is_free)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks, fsdp" in done.stdout, done.stdout


@pytest.mark.slow
def test_all_weights_trained_in_bf16_are_kept_in_fp32(arguments, tmp_path):
    """On one process without torchrun and on two ranks; whole in a checkpoint, and in bf16 in the model."""
    bf16, exact = ["--lora-r", "0", "--precision", "bf16"], ["--lora-r", "0"]
    for name, ranks, options in (("exact", 0, exact), ("one", 0, bf16), ("two", 2, bf16)):
        done = train(arguments, tmp_path / name, ranks, 4 // max(ranks, 1), *options)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks, fsdp" in done.stdout
    for name in ("one", "two"):
        # Weights that lived in bf16 were 6e-4 away after the same steps: small updates were rounded off.
        np.testing.assert_allclose(curve(tmp_path / name), curve(tmp_path / "exact"), rtol=5e-5)
        held = load_file(tmp_path / name / "checkpoints/checkpoint-8/adapter_model.safetensors")
        final = load_file(tmp_path / name / "final_model/model.safetensors")
        assert {t.dtype for t in held.values()} == {torch.float32}
        assert all(torch.equal(final[n], t.bfloat16()) for n, t in held.items())
        config = json.loads((tmp_path / name / "final_model/config.json").read_text())
        assert config["dtype"] == "bfloat16"
    whole = curve(tmp_path / "two")
    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-6"
    done = train(arguments, tmp_path / "two", 2, 2, *bf16, "--resume", str(checkpoint))
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(tmp_path / "two").tolist() == whole.tolist()


def test_ranks_with_other_data_are_refused():
    same = {"data": "a", "steps": 3}
    check_ranks([same, dict(same)])
    with pytest.raises(UserError, match="rank 2 differs from rank 0 in data, steps"):
        check_ranks([same, same, {"data": "b", "steps": 4}])


@pytest.mark.parametrize("wish", ["save", "stop"])
def test_what_an_alert_of_one_rank_asks_for_is_done_by_all(wish, monkeypatch):
    """Memory and waiting times are a rank's own."""
    trainer = DirectTrainer(DirectTrainingConfig(device="cpu"), quiet=True)
    trainer.record = SimpleNamespace(log=lambda step, metrics: set(), stop_alerts=[], raised=[])
    trainer.plan = SimpleNamespace(settings={"best_by": "loss"})
    trainer.metrics = SimpleNamespace(clock=StepClock())
    monkeypatch.setattr(
        Distributed, "any", lambda self, save, stop: [wish == "save", wish == "stop"]
    )
    assert trainer.log(1, {}) == (wish == "save")
    assert trainer.outcome == ("stopped" if wish == "stop" else "")


ENDS_WITH_THREADS = """
import atexit, sys, threading
sys.path.insert(0, {root!r})
import torch
from finetuning.common.process import exit_process

def work():
    a = torch.randn(100)
    while True:
        a + a

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
atexit.register(print, "cleaned up")
print("done", end=" ")
exit_process(3)
"""


@pytest.mark.slow
def test_a_rank_that_is_done_ends_though_threads_still_hold_tensors():
    """The interpreter's own end aborts such a process (pytorch#38228): -6 instead of its exit code."""
    script = ENDS_WITH_THREADS.format(root=str(SCRIPT.parent))
    for rank in range(3):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=os.environ | {"RANK": str(rank)},
        )
        assert (done.returncode, done.stdout) == (3, "done cleaned up\n"), done.stderr


@pytest.mark.parametrize("elsewhere", ["", "the GPU has 3.0 GiB free"])
def test_all_ranks_take_the_embedded_model_if_one_must(elsewhere, tiny_model, monkeypatch):
    config = DirectTrainingConfig(device="cpu", model_name=str(tiny_model))
    dist = Distributed(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(Distributed, "gather", lambda self, reason: [reason, elsewhere])
    found = find_model(config, dist, False)
    assert found.embedded == bool(elsewhere)
    assert found.reason == (elsewhere or "local folder")


def rank_1_is_slow() -> None:
    forward = PackedLossModel.forward

    def slow_forward(*arguments, **named):
        time.sleep(0.5 * (os.environ["RANK"] == "1"))
        return forward(*arguments, **named)

    PackedLossModel.forward = slow_forward


@pytest.mark.slow
def test_a_slow_rank_is_seen_and_named(arguments, tmp_path):
    out = tmp_path / "out"
    done = train(arguments, out, 2, 2, "--eval-steps", "0", fault=rank_1_is_slow)
    assert done.returncode == 0, done.stderr[-3000:]
    percent = curve(out, "Throughput/Straggler_Percent")
    assert len(percent) == 8
    assert np.median(percent) > 20  # a whole step takes both ranks equally long: it would be 0
    (logs,) = (out / "training_logs").iterdir()
    alerts = [json.loads(line) for line in (logs / "alerts.jsonl").read_text().splitlines()]
    (alert,) = [a for a in alerts if a["name"] == "Slow_Rank"]
    assert alert["evidence"]["slowest_rank"] == 1


@pytest.mark.slow
def test_one_rank_has_no_straggler(one_rank):
    assert len(curve(one_rank, "Throughput/Straggler_Percent")) == 0


def _rank_process(launchers: list[int], rank: int, until) -> int:
    """Process id of a rank below torchrun's agents, once `until()` is true."""
    import psutil

    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if until():
            for child in [c for p in launchers for c in psutil.Process(p).children(recursive=True)]:
                if child.is_running() and child.environ().get("RANK") == str(rank):
                    return child.pid
        time.sleep(0.05)
    raise AssertionError("the group did not get so far")


LOADING = """
import json, sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
import finetuning.common.process
import torch
from finetuning.common import distributed
from finetuning.config import LoraSettings, ModelSettings
from finetuning.model import loading, parallel, resolve
from finetuning.model.packed_model import PackedLossModel

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.001)

dist = distributed.init_distributed("cpu")
resolved = resolve.resolve_model({model!r}, dist.device)
tokenizer = loading.load_tokenizer(resolved)
seen, done = [anonymous()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = PackedLossModel(loading.load_model(
    resolved, tokenizer, ModelSettings(precision="bf16"), LoraSettings(), device=dist.device,
    sharded=True), -1)
parallel.parallelize(model, "fsdp", dist, torch.bfloat16)
done.set()
watcher.join()
total = sum(p.numel() for p in model.parameters())
local = sum(p.to_local().numel() for p in model.parameters())
print(json.dumps([max(seen) - seen[0], local / total]))
distributed.leave()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_shards_are_loaded_without_a_whole_copy_on_any_rank(tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
    )
    model, folder = Qwen3ForCausalLM(config).to(torch.bfloat16), tmp_path / "model"
    size = 2 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size="40MB")
    train_tokenizer(["分组密码SM4的分组长度是128比特。"] * 4).save_pretrained(folder)
    script = tmp_path / "loading.py"
    script.write_text(LOADING.format(root=str(SCRIPT.parent), model=str(folder)))
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "2", str(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == 2
    for peak, share in found:
        assert share == pytest.approx(0.5, abs=0.01)
        assert 0.4 * size < peak < 0.75 * size, (peak, size)
