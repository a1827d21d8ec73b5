"""Files of other versions, and of strangers: state, adapters, runs, events. One line, never a traceback.

uv run pytest tests/runs/test_strange_files.py            # some random damage, alike on every machine
uv run pytest -m long tests/runs/test_strange_files.py    # a minute for each kind of file
"""

import copy
import hashlib
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save

from finetuning.common.errors import UserError
from finetuning.common.files import sealed_json
from finetuning.config import DirectTrainingConfig
from finetuning.events.event_file import (
    Rewind,
    event_files,
    frame,
    masked_crc,
    read_records,
    rewind_events,
)
from finetuning.events.reading import read_end_texts, read_run
from finetuning.model.adapter_config import read_adapter_config
from finetuning.model.loading import load_tokenizer
from finetuning.model.resolve import named_model
from finetuning.monitoring.alerts import AlertMonitor
from finetuning.monitoring.convergence import ConvergenceMonitor
from finetuning.runs import comparison
from finetuning.runs.identity import check_identity
from finetuning.runs.init_adapter import with_own_settings
from finetuning.runs.recorded import find_runs
from finetuning.runs.report import write_report
from finetuning.training.checkpoint import checkpoint_at
from finetuning.training.state import TrainState
from tests.helpers.read_events import read_histograms

SLOW = 5.0  # seconds that nothing may take
OTHERS = (
    None,
    True,
    -1,
    10**30,
    0.5,
    "",
    "x",
    [],
    [None],
    {},
    {"a": [1]},
    [[1, 2], ["a"]],
    "\ud800",
)


class Draw(random.Random):
    """Chances of one trial, alike on every machine, and what it did with them."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.story = f"trial {number}"


def changed(draw: Draw, value: Any) -> Any:
    """The same JSON with one thing in it otherwise: another value, a name more or less."""
    value = copy.deepcopy(value)
    place, parent, key, way = value, None, None, []
    while isinstance(place, (dict, list)) and place and draw.random() < 0.8:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        parent, key = place, draw.choice(keys)
        place = parent[key]
        way.append(key)
    how, other = draw.random(), draw.choice(OTHERS)
    if parent is not None and how < 0.25:
        draw.story += f", without {way}"
        del parent[key]
        return value
    if how < 0.4 and isinstance(parent, dict):
        way[-1] = key = draw.choice(("more", "step", str(key) + "_"))
    draw.story += f", {other!r} at {way}"
    if parent is None:
        return other
    parent[key] = other
    return value


def trials(quick: int, long: int) -> pytest.MarkDecorator:
    """So many trials, and those of a minute, or of the seconds that FUZZ_SECONDS says."""
    long = long * int(os.environ.get("FUZZ_SECONDS", "60")) // 60
    counts = [pytest.param(quick), pytest.param(long, marks=pytest.mark.long)]
    return pytest.mark.parametrize("count", counts)


def attack(count: int, trial: Callable[[Draw], None]) -> None:
    """So many trials. UserError is right; any other exception, or a long wait, is not."""
    for number in range(count):
        began, draw = time.process_time(), Draw(number)
        try:
            trial(draw)
        except UserError as error:
            assert "\n" not in str(error), draw.story
        except Exception as error:
            raise AssertionError(draw.story) from error
        assert time.process_time() - began < SLOW, draw.story


# -----------------------------------------------------------------------------
# State


def use(saved: Any, folder: Path, wanted: dict) -> None:
    """What a resume does with a state file."""
    state = TrainState.read(saved, folder)
    check_identity(saved["identity"], wanted, folder)
    monitor = ConvergenceMonitor(100, None, state.convergence or None)
    alerts = AlertMonitor(state.alerts or None)
    for step in range(50, 53):
        monitor.observe(step, 1.5, 1e-4)
        row = {"Training/Loss": 1.5, "Training/Gradient_Norm": 1.0, "Eval/Loss": 2.0}
        alerts.observe(step, row | monitor.scalars(), {})
        alerts.table()


@pytest.fixture(scope="module")
def newest(finished: Path) -> Path:
    return max((finished / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)


@trials(150, 3000)
def test_no_state_file_is_a_traceback(newest: Path, count: int):
    saved = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    use(saved, newest, saved["identity"])
    attack(count, lambda draw: use(changed(draw, saved), newest, saved["identity"]))


def without(*way: str) -> Callable[[dict], object]:
    """A change that takes something out of a state."""

    def change(state: dict) -> None:
        for name in way[:-1]:
            state = state[name]
        del state[way[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["convergence"].update(held=[0.0]),
        lambda state: state["convergence"].update(count=100),
        lambda state: state["convergence"].update(width=0.5),
        lambda state: state["convergence"]["bins"].append([]),
        lambda state: state["convergence"]["recent"].append([7, 6.0]),
        lambda state: state["alerts"]["series"]["loss"].append([]),
        lambda state: state["alerts"]["series"].update({"first Eval/Format_Valid_Rate": [7.0] * 3}),
        lambda state: state["alerts"].update(rows={"Loss_Spike": {"times": 1}}),
        without("alerts", "marks", "eval_worse"),
    ],
)
def test_memories_that_no_monitor_could_have_are_refused_at_once(newest, change):
    """Before a step is made: later ones would fail on them."""
    saved = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    change(saved["train_state"])
    with pytest.raises(UserError, match="of another version of this program"):
        use(saved, newest, saved["identity"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state["train_state"].pop("tokens_seen"), "tokens_seen is missing"),
        (lambda state: state["train_state"].update(of_tomorrow=1), "of_tomorrow is not known"),
        (lambda state: state["train_state"].update(step="7"), "step is of another kind"),
        (lambda state: state["train_state"].update(step=-1), "step is below 0"),
        (lambda state: state["train_state"].update(hardest=[[0.5]]), "hardest is of another kind"),
        (lambda state: state.pop("config"), "config is missing"),
    ],
)
def test_a_state_file_of_another_version_says_so(newest, change, expected):
    saved = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    change(saved)
    text = f"of another version of this program .{expected}.*--init-adapter"
    with pytest.raises(UserError, match=text):
        TrainState.read(saved, newest)


def reseal(folder: Path, name: str, content: bytes) -> None:
    """Put other content into a checkpoint, with digests that fit."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name] = {**manifest["files"][name], "bytes": len(content), "sha256": digest}
    (folder / "manifest.json").write_bytes(sealed_json(manifest))
    assert checkpoint_at(folder)


def other_state(folder: Path) -> None:
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    del saved["train_state"]["resume_count"]
    reseal(folder, "state.json", json.dumps(saved).encode())


def other_sums(folder: Path) -> None:
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    saved["train_state"]["interval"].append(0.0)
    reseal(folder, "state.json", json.dumps(saved).encode())


def other_documents(folder: Path) -> None:
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    saved["train_state"]["hardest"] = [[0.5, 1, 10**6, 2.0, None, None, 2.0, None]]
    reseal(folder, "state.json", json.dumps(saved).encode())


def other_tensors(folder: Path) -> None:
    tensors = load_file(folder / "rng.safetensors")
    other = {name: tensor[:7].clone() for name, tensor in tensors.items()}
    reseal(folder, "rng.safetensors", save(other))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_state, "resume_count is missing"),
        (other_sums, "are not those of these data"),
        (other_documents, "are not those of these data"),
        (other_tensors, "its tensors are of another version"),
    ],
)
def test_a_resume_from_another_version_is_one_line_and_exit_code_2(
    change, expected, finished, newest, tiny_run, tmp_path, capfd
):
    """Digests are right: whoever wrote it meant it so."""
    out = tmp_path / "out"
    shutil.copytree(finished / "checkpoints", out / "checkpoints")
    folder = out / "checkpoints" / newest.name
    change(folder)
    probes = ["--num-probes", "1", "--probe-max-new-tokens", "8"]
    assert tiny_run(tmp_path, "--resume", str(folder), *probes) == 2
    said = capfd.readouterr().err
    assert expected in said and "Traceback" not in said


# -----------------------------------------------------------------------------
# Adapters


@pytest.fixture
def adapter(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(finished / "final_model", folder)
    return folder


def written(folder: Path, content: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@trials(500, 15000)
def test_no_configuration_of_an_adapter_is_a_traceback(adapter: Path, count: int):
    content = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config = DirectTrainingConfig(init_adapter=str(adapter))

    def trial(draw: Draw) -> None:
        written(adapter, changed(draw, content))
        with_own_settings(config, lambda text: None)

    attack(count, trial)


def test_modules_named_by_an_expression_are_those_of_the_tensors(adapter: Path):
    content = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    endless = r"((a|aa|.*)+)+\.(q_proj|v_proj)$"
    found = read_adapter_config(written(adapter, content | {"target_modules": endless}))
    assert isinstance(found, LoraConfig)
    names = {
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name in load_file(adapter / "adapter_model.safetensors")
    }
    assert found.target_modules == names and len(names) > 2
    more = {"layers_to_transform": [0], "layers_pattern": "(a+)+$", "exclude_modules": "(x+x+)+y"}
    found = read_adapter_config(written(adapter, content | more))
    assert found.target_modules == names and not found.layers_pattern and not found.exclude_modules


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"rank_pattern": {"(a+)+$": 4}}, "is an expression"),
        ({"alpha_pattern": {".*": 4}}, "is an expression"),
        ({"r": 10**9}, "no tensor beside it has more than"),
        ({"r": 0}, "below 1"),
        ({"r": "8"}, "r is of another kind"),
        ({"target_modules": {"a": 1}}, "target_modules is of another kind"),
        ({"lora_alpha": None}, "lora_alpha is of another kind"),
    ],
    ids=str,
)
def test_what_an_adapter_may_not_say(adapter: Path, lines: dict, expected: str):
    content = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match=expected):
        read_adapter_config(written(adapter, content | lines))


# -----------------------------------------------------------------------------
# Folders of a run


@trials(12, 300)
def test_no_folder_of_a_run_is_a_traceback(finished: Path, tmp_path: Path, count: int):
    shutil.copytree(finished / "training_logs", tmp_path / "training_logs")
    (run,) = find_runs([tmp_path])
    records = {
        name: json.loads((run.logs / name).read_text(encoding="utf-8"))
        for name in ("configuration.json", "status.json", "dataset_statistics.json")
    }
    alert = {"name": "Loss_Spike", "step": 3, "value": 2.5, "threshold": 1.0, "advice": "Wait."}
    lines = [json.loads(line) for line in (run.logs / "metrics.jsonl").read_text().splitlines()]

    def trial(draw: Draw) -> None:
        name = draw.choice([*records, "alerts.jsonl", "metrics.jsonl"])
        for other, content in records.items():
            (run.logs / other).write_text(
                json.dumps(changed(draw, content) if other == name else content)
            )
        rows = {"alerts.jsonl": [alert], "metrics.jsonl": lines}
        for other, content in rows.items():
            content = changed(draw, content) if other == name else content
            content = content if isinstance(content, list) else [content]
            (run.logs / other).write_text("".join(json.dumps(row) + "\n" for row in content))
        write_report(run)
        runs = comparison.read_all([run], curves=True) * 2
        comparison.page(runs)
        comparison.as_json(runs)

    attack(count, trial)


# -----------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(type="of tomorrow"),
        lambda content: content.update(version="99.0"),
        lambda content: content.update(pre_tokenizer={"type": "of tomorrow"}),
        lambda content: content.pop("model"),
        lambda content: content.update(added_tokens=7),
    ],
)
def test_a_tokenizer_of_another_version_is_one_line(tiny_model: Path, tmp_path: Path, change):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"the tokenizer of .* can't be loaded"):
        load_tokenizer(named_model(str(folder), False))


# -----------------------------------------------------------------------------
# Events


@trials(150, 3500)
def test_no_event_file_is_a_traceback(finished: Path, tmp_path: Path, count: int):
    (run,) = (finished / "tensorboard_logs").iterdir()
    whole = b"".join(path.read_bytes() for path in event_files(run))
    (tmp_path / "whole").write_bytes(whole)
    payloads = [payload for _, payload in read_records(tmp_path / "whole")]
    folder = tmp_path / "run"

    def trial(draw: Draw) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        content = bytearray(whole)
        if draw.random() < 0.5:  # bytes that a disk or a hand has changed
            for _ in range(draw.choice((1, 3, 100))):
                content[draw.randrange(len(content))] = draw.randrange(256)
            del content[draw.choice((len(content), draw.randrange(len(content)))) :]
        else:  # whole records with odd bytes in them
            records = [bytearray(payload) for payload in draw.sample(payloads, 5)]
            for record in records:
                record[draw.randrange(len(record))] = draw.randrange(256)
            content = b"".join(frame(bytes(record)) for record in records)
        (folder / "events.out.tfevents.1.h.1.0").write_bytes(bytes(content))
        for read in (read_run, read_end_texts, read_histograms):
            read(folder)
        rewind_events(folder, Rewind(3))
        read_run(folder)

    attack(count, trial)


def test_a_record_that_claims_to_be_huge_takes_no_memory(tmp_path: Path):
    length = struct.pack("<Q", 2**62)
    path = tmp_path / "events.out.tfevents.1.h.1.0"
    path.write_bytes(length + struct.pack("<I", masked_crc(length)) + b"x" * 100)
    assert list(read_records(path)) == []
