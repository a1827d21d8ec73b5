"""The real script from data to final model: what it leaves, how it goes on, and how it says no.

uv run pytest -m "not long" tests/runs/test_run.py
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from direct_finetuning_with_existing_modules import DirectTrainer
from finetuning.config import DirectTrainingConfig
from finetuning.events.metric_table import find_metric
from finetuning.events.reading import read_metrics, read_run
from finetuning.runs import plan
from finetuning.training import engine, optimizer
from finetuning.training.checkpoint import load_checkpoint, save_checkpoint
from tests.helpers.read_events import read_texts
from tests.helpers.tiny_model import FAST

SCRIPT = Path(__file__).parents[2] / "direct_finetuning_with_existing_modules.py"
LOUD = [option for option in FAST if option != "--quiet"]


def interrupt_in_step(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGTERM to this process when the step of that number has its gradients."""
    calls, original = [], optimizer.forward_backward

    def gradients(*args, **kwargs):
        sums = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return sums

    monkeypatch.setattr("finetuning.training.engine.forward_backward", gradients)


def logs_of(output_dir: Path) -> Path:
    (logs,) = (output_dir / "training_logs").iterdir()
    return logs


def losses_of(output_dir: Path) -> dict[int, float]:
    records = read_metrics(logs_of(output_dir) / "metrics.jsonl")
    return {
        r["step"]: r["metrics"]["Training/Loss"] for r in records if "Training/Loss" in r["metrics"]
    }


def strict_json(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# -----------------------------------------------------------------------------
# What a run leaves


def test_files_of_a_run(finished: Path):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "tensorboard_logs",
        "training_logs",
        "checkpoints",
        "final_model",
        "best_model",
        "training_statistics.json",
    }
    logs = logs_of(finished)
    assert {"metrics.jsonl", "training.log", "status.json", "dataset_statistics.json"} <= {
        path.name for path in logs.iterdir()
    }
    assert strict_json(logs / "status.json")["status"] == "completed"
    assert [p.name for p in (finished / "tensorboard_logs").iterdir()] == [logs.name]
    assert len(list((finished / "checkpoints").iterdir())) == 3, "save_total_limit"


def test_statistics_are_strict_json_and_say_what_was_done(finished: Path):
    statistics = strict_json(finished / "training_statistics.json")
    assert set(statistics) >= {"config", "dataset", "model", "throughput", "monitoring", "versions"}
    assert statistics["training"]["steps"] == 6
    assert statistics["config"]["max_seq_length"] == 768
    assert statistics["throughput"]["tokens"] > 0
    assert torch.__version__.startswith(statistics["versions"]["torch"])


def test_every_tag_of_the_run_is_described(finished: Path):
    (run_dir,) = (finished / "tensorboard_logs").iterdir()
    unknown = [
        tag for tag in [*read_run(run_dir), *read_texts(run_dir)] if find_metric(tag) is None
    ]
    assert not unknown


def test_no_gpu_tag_without_a_gpu(finished: Path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (run_dir,) = (finished / "tensorboard_logs").iterdir()
    assert not [tag for tag in read_run(run_dir) if "GPU_" in tag and not tag.startswith("Alerts/")]


def test_final_model_loads_with_peft_and_differs_from_its_base(finished: Path, tiny_model: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(finished / "final_model")
    ids = tokenizer("SM4的分组长度", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, finished / "final_model")
        after = tuned(ids).logits
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-6
    newest = load_checkpoint(finished / "checkpoints" / "checkpoint-6")
    saved = newest.tensors["adapter_model"]
    final = PeftModel.from_pretrained(base, finished / "checkpoints" / "checkpoint-6")
    assert len(saved) == 2 * 7 * 2 and final is not None


def test_the_learning_rate_starts_above_zero_and_ends_low(finished: Path):
    records = read_metrics(logs_of(finished) / "metrics.jsonl")
    rates = [r["metrics"].get("Training/Learning_Rate") for r in records]
    rates = [rate for rate in rates if rate is not None]
    assert len(rates) == 3 and all(rate > 0 for rate in rates) and rates[-1] < rates[0]


# -----------------------------------------------------------------------------
# Interrupted and resumed


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, finished, run, monkeypatch):
    interrupt_in_step(3, monkeypatch)
    handler = signal.getsignal(signal.SIGTERM)
    same = ["--num-probes", "1", "--probe-max-new-tokens", "8"]
    assert run(tmp_path, *same) == 0
    assert signal.getsignal(signal.SIGTERM) is handler, "the handler was not given back"
    out = tmp_path / "out"
    assert strict_json(logs_of(out) / "status.json")["status"] == "preempted"
    assert (out / "checkpoints" / "checkpoint-3").is_dir()
    assert not (out / "final_model").exists()
    monkeypatch.undo()
    assert run(tmp_path, "--resume", "latest", *same) == 0
    assert losses_of(out) == losses_of(finished)
    name = "adapter_model.safetensors"
    assert (out / "final_model" / name).read_bytes() == (
        finished / "final_model" / name
    ).read_bytes()
    (run_dir,) = (out / "tensorboard_logs").iterdir()
    for tag, points in read_run(run_dir).items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag


@pytest.mark.slow
def test_automatic_checkpoints_are_rare_where_saving_is_slow(tmp_path, run, monkeypatch):
    def slowly(*args, **kwargs):
        time.sleep(2)  # a twentieth of 40 s, in which a tiny model does far more than 100 steps
        return save_checkpoint(*args, **kwargs)

    monkeypatch.setattr("finetuning.training.checkpoint_manager.save_checkpoint", slowly)
    steps = ["--max-steps", "102", "--save-steps", "auto", "--eval-steps", "0", "--batch-size", "4"]
    assert run(tmp_path, *steps, "--logging-steps", "50") == 0
    saved = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert saved == {"checkpoint-50", "checkpoint-102"}, "the first in time, and the end"


@pytest.mark.slow
def test_a_bad_step_that_is_done_again_is_told_once(tmp_path, run, monkeypatch):
    """NaN in step 5, back to checkpoint 3, and step 5 again without its update."""
    clip, calls = engine.clip_gradients, []

    def spoilt(parameters, max_norm):
        calls.append(1)
        if len(calls) in (5, 7):
            parameters[0].grad.view(-1)[0] = float("nan")
        return clip(parameters, max_norm)

    monkeypatch.setattr(engine, "clip_gradients", spoilt)
    options = ["--logging-steps", "1", "--save-steps", "3", "--eval-steps", "0"]
    assert run(tmp_path, "--nonfinite", "rollback", *options) == 0
    logs = logs_of(tmp_path / "out")
    curves = {}
    for record in read_metrics(logs / "metrics.jsonl"):
        for tag, value in record["metrics"].items():
            curves.setdefault(tag, {})[record["step"]] = value
    assert curves["Monitoring/NonFinite_Steps"] == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1}
    assert curves["Training/Gradient_Norm"][5] is None, "NaN, as strict JSON has it"
    assert sorted(curves["Training/Gradient_Norm_Max"]) == [1, 2, 3, 4, 6], "not known is not 0"
    alerts = [json.loads(line) for line in (logs / "alerts.jsonl").read_text().splitlines()]
    assert [(a["name"], a["step"]) for a in alerts if a["name"] == "NonFinite"] == [
        ("NonFinite", 5)
    ]
    assert strict_json(logs / "status.json")["status"] == "completed"


@pytest.mark.slow
def test_saving_the_best_model_is_no_training_time(tmp_path, run, monkeypatch):
    save = engine.TrainingEngine.save

    def slowly(*arguments):
        time.sleep(3)
        save(*arguments)

    monkeypatch.setattr(engine.TrainingEngine, "save", slowly)
    options = ["--logging-steps", "1", "--save-steps", "0", "--eval-steps", "2"]
    assert run(tmp_path, *options, "--learning-rate", "1e-2") == 0
    assert (tmp_path / "out" / "best_model").is_dir()
    records = read_metrics(logs_of(tmp_path / "out") / "metrics.jsonl")
    steps = [r["metrics"] for r in records if "Throughput/Step_Seconds" in r["metrics"]]
    assert len(steps) == 6 and max(m["Throughput/Step_Seconds"] for m in steps) < 3
    assert max(m["Throughput/Saving_Percent"] for m in steps) > 30


@pytest.mark.slow
def test_changed_settings_of_a_resumed_run_are_said(tmp_path, run, capsys):
    assert run(tmp_path, "--max-steps", "6", "--save-steps", "4") == 0
    checkpoint = str(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    capsys.readouterr()
    command = ["--resume", checkpoint, "--learning-rate", "1e-4", "--save-steps", "4"]
    assert run(tmp_path, *command, first=LOUD) == 0
    said = capsys.readouterr().out
    assert "changed since step 4: learning_rate 0.0003 -> 0.0001" in said
    (run_dir,) = (tmp_path / "out" / "tensorboard_logs").iterdir()
    tables = read_texts(run_dir)["Config/Training_Settings"]
    assert [step for step, _ in tables] == [0, 4]
    assert "| 0.0003 |" in tables[0][1] and "| 0.0001 |" in tables[1][1]
    assert all("alert\\_actions" in text for _, text in tables), "all settings, also empty ones"


@pytest.mark.slow
@pytest.mark.parametrize("while_it", ["imports", "reads"])
def test_ctrl_c_before_the_run_is_one_line(tmp_path, tiny_data, cache_dir, while_it):
    """The first seconds are imports; then data are read. There is nothing to save yet."""
    reads = while_it == "reads"
    script = tmp_path / "script.py"
    # What happens at some moment in the real program: the signal comes within an import, or within a call.
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    source = SCRIPT.read_text(encoding="utf-8")
    if reads:
        place = "            self.plan = plan_run("
        source = source.replace(place, f"            {interrupt}\n{place}")
    else:
        source = source.replace("import functools\n", f"import functools\n{interrupt}\n", 1)
    assert interrupt in source
    script.write_text(f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n{source}")
    options = [
        "--data-path",
        str(tiny_data),
        "--output-dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, str(script), *options, "--cache-dir", str(cache_dir)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    said = "before the first step" if reads else "before anything was to save"
    assert f"interrupted {said}" in done.stderr


@pytest.mark.slow
def test_what_is_too_long_is_counted_at_the_start(tmp_path, tiny_data, run, capsys):
    rows = [json.loads(line) for line in tiny_data.read_text(encoding="utf-8").splitlines()]
    for row in rows[:7]:
        row["answer"] *= 200
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run(tmp_path, "--data-path", str(data), "--max-steps", "1", first=LOUD) == 0
    out, err = capsys.readouterr()
    assert re.search(r"too long +7 of 60 \(11\.7%\) are longer than 768 tokens and left out; ", out)
    assert "warning: data: too long: 7 of 60" in err


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(tmp_path, run):
    assert run(tmp_path, "--resume", "auto") == 0
    final = tmp_path / "out" / "final_model" / "adapter_model.safetensors"
    before, losses = final.read_bytes(), losses_of(tmp_path / "out")
    assert run(tmp_path, "--resume", "auto") == 0
    assert final.read_bytes() == before and losses_of(tmp_path / "out") == losses


def test_resume_with_other_settings_is_refused(tmp_path, finished, run, capfd):
    shutil.copytree(finished, tmp_path / "out")
    assert run(tmp_path, "--resume", "latest", "--lora-r", "4") == 2
    assert "lora_r is 4, the checkpoint has 16" in capfd.readouterr().err
    # As many steps, but of other samples.
    assert run(tmp_path, "--resume", "latest", "--gradient-accumulation-steps", "2") == 2
    assert "rows_per_step is 2, the checkpoint has 1" in capfd.readouterr().err


@pytest.mark.slow
def test_out_of_memory_recomputes_then_halves_the_micro_batches_and_keeps_the_loss(
    tmp_path, finished, run, monkeypatch, capfd
):
    from finetuning.model import loading, packed_model

    original = packed_model.packed_loss

    def small_memory(hidden, *args, **kwargs):
        if hidden.shape[0] > 500 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(packed_model, "packed_loss", small_memory)
    with monkeypatch.context() as interrupted:
        interrupt_in_step(4, interrupted)
        assert run(tmp_path) == 0
    said = capfd.readouterr().err
    assert said.index("step 1: out of memory; activations are now made again") < said.index(
        "step 1: out of memory; micro-batches are now done in 2 parts"
    )
    parts = int(re.findall(r"now done in (\d+) parts", said)[-1])
    recomputing, original_recompute = [], loading.recompute_activations
    monkeypatch.setattr(
        loading,
        "recompute_activations",
        lambda model: recomputing.append(1) or original_recompute(model),
    )
    assert run(tmp_path, "--resume", "latest") == 0
    assert "out of memory" not in capfd.readouterr().err, "the division was forgotten"
    assert recomputing == [1], "the recomputation was forgotten"
    losses, reference = losses_of(tmp_path / "out"), losses_of(finished)
    assert losses.keys() == reference.keys()
    assert all(losses[s] == pytest.approx(reference[s], rel=1e-5) for s in losses)
    (run_dir,) = (tmp_path / "out" / "tensorboard_logs").iterdir()
    rows = read_run(run_dir)["Config/Batch_Size"]
    assert rows == [(0, 1.0), *((step, 1 / parts) for step in losses)]


@pytest.mark.slow
@pytest.mark.parametrize("enough", [True, False])
def test_an_evaluation_that_needs_the_memory_of_the_graph_gets_it(
    tmp_path, run, monkeypatch, enough: bool
):
    """The graph is a stand-in. Where its memory is not enough either, that is no secret."""
    short: list[int] = []
    original = DirectTrainer.evaluate

    def evaluate(self, step: int) -> dict[str, float]:
        measure = self.evaluator.measure

        def needs_memory(*args):
            if self.engine.captured is not None or not enough:
                short.append(step)
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return measure(*args)

        if step == 3:
            monkeypatch.setattr(self.evaluator, "measure", needs_memory)
            self.engine.captured = SimpleNamespace(peak_bytes=0)
        return original(self, step)

    monkeypatch.setattr(DirectTrainer, "evaluate", evaluate)
    if enough:
        assert run(tmp_path) == 0 and short == [3]
        return
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path)
    assert short == [3, 3]


@pytest.mark.slow
def test_numbers_that_are_read_behind_the_next_step_are_the_same(
    tmp_path, finished, run, monkeypatch
):
    """What a GPU's run does, so that it never stands idle while a step is logged."""
    original = DirectTrainer.open
    late: list[int] = []

    def open_late(self, checkpoint) -> None:
        original(self, checkpoint)
        self.reads_are_free, self.logs_late = False, True

    def log_late(self) -> bool:
        late.extend([] if self.unlogged is None else [self.unlogged.step])
        return logs(self)

    logs = DirectTrainer.log_late
    monkeypatch.setattr(DirectTrainer, "open", open_late)
    monkeypatch.setattr(DirectTrainer, "log_late", log_late)
    first = [*FAST, "--logging-steps", "1", "--save-steps", "5"]
    for out, reads_late in (("late", True), ("at once", False)):
        if not reads_late:
            monkeypatch.setattr(DirectTrainer, "open", original)
        assert run(tmp_path / out, first=first) == 0
    assert late == [1, 2, 4], "the other steps are evaluated, saved or the last"
    timed = (
        "Throughput/",
        "System/",
        "Disk/",
        "Host/",
        "Memory/",
        "GPU_",
        "Monitoring/Logging",
        "Epoch/",
    )
    records = []
    for out in ("late", "at once"):
        lines = read_metrics(logs_of(tmp_path / out / "out") / "metrics.jsonl")
        kept = ("Throughput/Tokens_Seen",)
        records.append(
            [
                (
                    r["step"],
                    {t: v for t, v in r["metrics"].items() if t in kept or not t.startswith(timed)},
                )
                for r in lines
            ]
        )
    assert records[0] == records[1] and len(records[0]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("wish", ["auto", "on"])
def test_layers_that_cannot_be_compiled_run_as_they_are(
    tmp_path, finished, run, monkeypatch, capfd, wish
):
    """What only a GPU compiles, with a compiler that fails; asked for by name, that ends the run."""
    from finetuning.model import packed_model

    def broken(graph, inputs):
        raise ValueError("no C compiler")

    compile_layers = packed_model.PackedLossModel.compile_layers
    monkeypatch.setattr(plan, "compiles", lambda *_: True)
    monkeypatch.setattr(
        packed_model.PackedLossModel, "compile_layers", lambda self: compile_layers(self, broken)
    )
    torch._dynamo.reset()
    try:
        code = run(tmp_path, "--compile", wish)
    finally:
        torch.compiler.set_stance("default")
    said = capfd.readouterr().err
    if wish == "on":
        assert code == 3 and "can't be compiled" in said and "Use --compile off" in said
        return
    assert code == 0 and said.count("can't be compiled, training goes on without") == 1
    losses, reference = losses_of(tmp_path / "out"), losses_of(finished)
    assert losses.keys() == reference.keys()
    assert all(losses[s] == pytest.approx(reference[s], rel=1e-5) for s in losses)


@pytest.mark.parametrize(
    ("settings", "efficiency", "compiler", "compiles"),
    [
        ({}, 0.97, True, True),
        ({}, 0.3, True, False),  # short documents without packing
        ({}, 0.97, False, False),  # no Triton, or no C compiler
        ({"use_dora": True}, 0.97, True, False),
        ({"compile": "on", "use_dora": True}, 0.3, False, True),
        ({"compile": "off"}, 0.97, True, False),
    ],
)
def test_layers_are_compiled_where_it_can_be_done_and_is_worth_it(
    monkeypatch, settings, efficiency, compiler, compiles
):
    monkeypatch.setattr(plan, "compiler_is_there", lambda: compiler)
    config, steps = (
        DirectTrainingConfig(**settings),
        SimpleNamespace(constant_efficiency=efficiency),
    )
    assert plan.compiles(config, torch.device("cuda"), torch.bfloat16, steps) == compiles


# -----------------------------------------------------------------------------
# The command itself


@pytest.fixture(scope="module")
def default_run(tmp_path_factory, cache_dir) -> Path:
    """The embedded model on the bundled data through the command line, some steps of it."""
    out = tmp_path_factory.mktemp("default") / "out"
    command = [sys.executable, str(SCRIPT), "--output-dir", str(out), "--cache-dir", str(cache_dir)]
    short = ["--max-steps", "20", "--max-seq-length", "1024", "--num-probes", "0"]
    done = subprocess.run([*command, *short], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DEMONSTRATION MODEL" in done.stdout
    assert "tensorboard --logdir=" in done.stdout
    assert "Traceback" not in done.stderr
    return out


@pytest.mark.slow
def test_held_out_loss_of_a_short_default_run_falls(default_run: Path):
    training = strict_json(default_run / "training_statistics.json")["training"]
    assert training["last_eval_loss"] < 0.9 * training["first_eval_loss"]


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(tmp_path, tiny_model, tiny_data, cache_dir):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--output-dir", str(out), "--cache-dir", str(cache_dir)]
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    options = [*inputs, "--max-steps", "100000", "--num-probes", "0"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list(out.glob("training_logs/*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "--resume latest" in said
    status = strict_json(logs_of(out) / "status.json")
    assert (status["status"], status["signal"]) == ("preempted", "SIGTERM")
    assert (out / "checkpoints" / f"checkpoint-{status['step']}" / "manifest.json").is_file()


# -----------------------------------------------------------------------------
# Real data of others


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("crypto_qa", 48),
        ("formats/alpaca_zh_1000.json", 1000),
        ("formats/sharegpt_toolcall_zh_100.json", 100),
        ("formats/messages_parts_100.jsonl", 100),
        ("formats/messages_reasoning_parts_50.jsonl", 50),
    ],
)
def test_data_of_others_trains_without_hand_editing(tmp_path, shared_data, run, name, samples):
    options = ["--data-path", str(shared_data / name), "--max-steps", "2", "--eval-steps", "0"]
    lengths = ["--max-seq-length", "4096", "--over-length", "truncate_thinking"]
    assert run(tmp_path, *options, *lengths) == 0
    statistics = strict_json(tmp_path / "out" / "training_statistics.json")
    assert statistics["dataset"]["total_samples"] == samples
    assert statistics["training"]["steps"] == 2


# -----------------------------------------------------------------------------
# Bad input


def data_file(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


GOOD = '{"instruction": "什么是SM4？", "output": "分组密码。"}\n'
BAD_DATA = {
    "empty file": ("a.jsonl", b"", "a.jsonl"),
    "no sample in Markdown": ("a.md", "# 只有标题\n".encode(), "a.md"),
    "broken line": ("a.jsonl", (GOOD + '{"instruction": \n').encode(), "a.jsonl:2"),
    "missing field": ("a.jsonl", b'{"instruction": "x"}\n', "a.jsonl:1"),
    "empty answer": ("a.jsonl", b'{"instruction": "x", "output": ""}\n', "a.jsonl:1"),
    "unclosed thinking": (
        "a.md",
        "### Q1: 问\n\n<thinking>\n想\n\nA1: 答\n".encode(),
        "a.md:",
    ),
    "wrong encoding": ("a.jsonl", GOOD.encode("gb18030") + b"\xff", "a.jsonl"),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_is_one_clear_line(tmp_path, run, capfd, fault):
    name, content, place = BAD_DATA[fault]
    path = data_file(tmp_path, name, content)
    code = run(tmp_path, "--data-path", path)
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1, said
    assert place in errors[0] and "Traceback" not in said


def test_other_bad_input_is_one_clear_line(tmp_path, run, tiny_model, capfd):
    no_weights = tmp_path / "model"
    no_weights.mkdir()
    (no_weights / "config.json").write_text((tiny_model / "config.json").read_text())
    toml = tmp_path / "bad.toml"
    toml.write_text("learning_rat = 1\nseed = -1\n")
    cases = {
        "missing": ["--data-path", str(tmp_path / "missing.jsonl")],
        "model.safetensors": ["--model-name", str(no_weights)],
        "can't be had": ["--model-name", "nobody/no-such-model-at-all"],
        "batch_size": ["--batch-size", "0"],
        "learning_rat": ["--config", str(toml)],
        "no usable checkpoint": ["--resume", "latest"],
        "not a usable checkpoint": ["--resume", str(tmp_path)],
        "xyz_proj": ["--target-modules", "xyz_proj"],
        "raise --max-seq-length": ["--max-seq-length", "20"],
    }
    for expected, arguments in cases.items():
        code = run(tmp_path, *arguments)
        said = capfd.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert code == 2 and len(errors) == 1 and expected in errors[0], (expected, code, said)
        assert "Traceback" not in said


@pytest.mark.slow
def test_too_many_broken_samples_refuse_to_start_and_few_are_listed(tmp_path, run, capfd):
    lines = [GOOD.replace("SM4", f"SM4第{i}问") for i in range(30)]
    few = data_file(tmp_path, "few.jsonl", "".join([*lines, "{\n"]).encode())
    many = data_file(tmp_path, "many.jsonl", "".join([*lines, "{\n" * 10]).encode())
    assert run(tmp_path, "--data-path", many) == 2
    assert "10 of 40" in capfd.readouterr().err
    assert run(tmp_path, "--data-path", few, "--max-steps", "1") == 0
    broken = (logs_of(tmp_path / "out") / "broken_samples.jsonl").read_text(encoding="utf-8")
    (record,) = [json.loads(line) for line in broken.splitlines()]
    assert record["line"] == 31 and record["source"].endswith("few.jsonl") and record["reason"]


def test_a_second_run_in_the_same_place_is_refused(tmp_path, run, capfd):
    from finetuning.runs.directory import lock_output

    lock = lock_output(tmp_path / "out")
    try:
        assert run(tmp_path) == 2
    finally:
        lock.release()
    assert "another run is writing there" in capfd.readouterr().err


def test_loss_is_a_number(finished: Path):
    assert all(math.isfinite(loss) for loss in losses_of(finished).values())
