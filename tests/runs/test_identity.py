"""A run is known by the content of its model, adapter and data, and not by names and places.

uv run pytest -m "not long" tests/runs/test_identity.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetuning.common.errors import UserError
from finetuning.events.reading import read_metrics
from finetuning.runs.identity import changed_settings, check_identity
from finetuning.training.checkpoint import load_checkpoint, save_checkpoint
from tests.helpers.read_events import read_texts
from tests.helpers.tiny_model import make_tiny_data, make_tiny_model

LESS = ("--max-steps", "4", "--save-steps", "2", "--eval-steps", "2")


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A finished run of six steps."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def resumes(run: Callable[..., int], tmp_path: Path, capfd, *more: str) -> str:
    """What a resume that does not go on says."""
    capfd.readouterr()
    assert run(tmp_path, "--resume", "latest", *more) == 2
    said = capfd.readouterr().err.strip()
    assert said.count("\n") == 0 or said.splitlines()[-1].startswith("error: "), said
    return said


# -----------------------------------------------------------------------------
# Model and tokenizer


@pytest.mark.slow
def test_a_model_and_data_that_have_moved_are_the_same(out, tmp_path, tiny_model, tiny_data, run):
    model = shutil.copytree(tiny_model, tmp_path / "node 7" / "model")
    data = shutil.copy(tiny_data, tmp_path / "node 7" / "other-name.jsonl")
    link = tmp_path / "link"
    link.symlink_to(model, target_is_directory=True)
    places = ["--model-name", f"{link}/", "--data-path", str(data)]
    assert run(tmp_path, "--resume", "latest", *places) == 0


def change_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def change_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "{# new #}", encoding="utf-8")


def change_config(model: Path) -> None:
    path = model / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"rms_norm_eps": 1e-4}), encoding="utf-8")


def change_tokenizer(model: Path) -> None:
    """Two tokens of the vocabulary change places: as long a text, other tokens."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, "the model's weights"),
        (change_config, "the model's config.json or code"),
        (change_template, "the chat template"),
        (change_tokenizer, "the tokenizer"),
    ],
)
def test_what_was_replaced_in_the_same_place_is_refused_by_name(
    change, named, out, tmp_path, tiny_model, run, capfd
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change(model)
    assert f"{named} changed" in resumes(run, tmp_path, capfd, "--model-name", str(model))


@pytest.mark.slow
def test_held_out_files_count_by_their_content(tmp_path, run, capfd):
    held_out = make_tiny_data(tmp_path / "held-out.jsonl", 70)
    lines = held_out.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out.write_text("".join(lines[60:65]), encoding="utf-8")
    assert run(tmp_path, *LESS, "--eval-path", str(held_out)) == 0
    moved = shutil.copy(held_out, tmp_path / "moved.jsonl")
    assert run(tmp_path, *LESS, "--resume", "latest", "--eval-path", str(moved)) == 0
    held_out.write_text("".join(lines[64:69]), encoding="utf-8")
    said = resumes(run, tmp_path, capfd, *LESS, "--eval-path", str(held_out))
    assert "the data of eval_path changed" in said


@pytest.fixture
def texts(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes texts of its own for each word into a file; its path."""

    def write(name: str, word: str) -> str:
        rows = [
            {"question": f"{word}{i}是什么？", "answer": f"{word}{i}是{i * i}。"} for i in range(9)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name).write_text(lines, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--forgetting", "--general-path"), "the data of general_path"),
        (
            ("--num-probes", "1", "--probe-max-new-tokens", "2", "--probe-path"),
            "the data of probe_path",
        ),
    ],
)
@pytest.mark.slow
def test_what_a_run_is_measured_by_counts_by_its_content(
    options, named, tmp_path, texts, run, capfd
):
    short = ("--max-steps", "2", "--save-steps", "1", "--eval-steps", "2")
    assert run(tmp_path, *short, *options, texts("a.jsonl", "密钥")) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-2")
    texts("a.jsonl", "天气")
    said = resumes(run, tmp_path, capfd, *short, *options, str(tmp_path / "a.jsonl"))
    assert f"{named} changed since the checkpoint was written" in said
    moved = texts("b.jsonl", "密钥")
    assert run(tmp_path, *short, "--resume", "latest", *options, moved) == 0


def test_a_run_may_be_measured_by_more_or_less_and_old_checkpoints_do_not_say_by_what():
    old = {"model": "m", "model_weights": "a", "steps": 6}
    now = {**old, "general_text": "b", "questions": ""}
    told = []
    check_identity(old, now, "checkpoint-4", warn=told.append)
    assert len(told) == 1 and told[0].endswith("is not known: the data of general_path")
    check_identity({**now, "general_text": ""}, now, "checkpoint-4", warn=pytest.fail)
    check_identity(now, {**now, "general_text": ""}, "checkpoint-4", warn=pytest.fail)
    with pytest.raises(UserError, match="general_path changed"):
        check_identity(now, {**now, "general_text": "c"}, "checkpoint-4")


def test_more_steps_of_a_finished_run_say_what_to_do(out, tmp_path, run, capfd):
    said = resumes(run, tmp_path, capfd, "--max-steps", "9")
    assert "steps is 9, the checkpoint has 6" in said and "--init-adapter final_model" in said


# -----------------------------------------------------------------------------
# Checkpoints of earlier versions

OLD = ("lora_r", "lora_alpha", "use_rslora", "use_dora", "seed", "packing", "max_seq_length",
       "data", "documents", "rows_per_step", "steps", "target_modules", "model")  # fmt: skip


def as_earlier_version(out: Path, **names: object) -> None:
    """Only the newest checkpoint, as it was written before contents counted."""
    (newest,) = out.glob("checkpoints/checkpoint-4")
    found = load_checkpoint(newest)
    state = dict(found.state)
    state["identity"] = {name: state["identity"][name] for name in OLD} | names
    new = ("evaluation_due", "stop_alerts", "changes", "reach")
    state["train_state"] = {k: v for k, v in state["train_state"].items() if k not in new}
    state["config"] |= dict.fromkeys(("device", "precision", "compile"), "auto")
    documents = {"adapter_config.json": json.loads((newest / "adapter_config.json").read_text())}
    tensors = {
        k: {n: t.clone() for n, t in content.items()} for k, content in found.tensors.items()
    }
    shutil.rmtree(out / "checkpoints")
    options = {"tensors": tensors, "documents": documents, "state": state}
    save_checkpoint(out / "checkpoints", 4, run=found.run, **options)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(out, tmp_path, tiny_model, run, capfd):
    as_earlier_version(out)
    assert run(tmp_path, "--resume", "latest") == 0
    said = capfd.readouterr().err
    assert "whether these are the same is not known: the model's weights" in said
    assert load_checkpoint(out / "checkpoints" / "checkpoint-6").state["identity"]["model_weights"]


def test_an_earlier_version_knew_the_model_by_its_name(out, tmp_path, run, capfd):
    as_earlier_version(out, model="/models/tiny")
    said = resumes(run, tmp_path, capfd)
    assert "knew a model by its name only: give that as --model-name" in said


def test_an_earlier_version_wrote_the_settings_instead_of_the_adapters():
    """With init_adapter it recorded lora_r 16 where 4 was trained; that must keep nobody out."""
    old = {"model": "a", "lora_r": 16, "lora_alpha": 32.0, "steps": 6}
    now = {**old, "lora_r": 4, "lora_alpha": 8.0, "init_adapter": "abc", "model_weights": "x"}
    check_identity(old, now, "checkpoint-4")
    with pytest.raises(UserError, match="lora_r is 4, the checkpoint has 16"):
        check_identity(old, {**now, "init_adapter": ""}, "checkpoint-4")


# -----------------------------------------------------------------------------
# The adapter to start from


@pytest.mark.slow
def test_a_resume_may_lie_elsewhere_and_tell_others():
    before = {"mirror": "", "notify": [], "seed": 1}
    now = {"mirror": "s3://a", "notify": ("slack",), "seed": 2}
    assert changed_settings(before, now) == ["seed 1 -> 2"]


def test_more_layers_recomputed_are_no_change():
    """They follow the memory that is free, and an older program wrote "on" for what would be some now."""
    for before, now in (("12 of 36 layers", "13 of 36 layers"), ("on", "12 of 36 layers")):
        settings = [{"gradient_checkpointing": value, "seed": 1} for value in (before, now)]
        assert changed_settings(*settings) == []


@pytest.mark.slow
def test_an_adapter_brings_its_own_settings_into_all_records(finished, tmp_path, run, capfd):
    start = ["--init-adapter", str(finished / "final_model")]
    assert run(tmp_path, *LESS, *start, "--lora-r", "64", "--target-modules", "q_proj") == 0
    assert "lora_r 16, not 64; target_modules" in capfd.readouterr().err
    out = tmp_path / "out"
    (logs,) = (out / "training_logs").iterdir()
    (events,) = (out / "tensorboard_logs").iterdir()
    assert "lora_r 16, not 64" in (logs / "training.log").read_text(encoding="utf-8")
    for path in (logs / "configuration.json", out / "training_statistics.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["config"]["lora_r"] == 16
    assert "| lora\\_r | 16 |" in read_texts(events)["Config/Training_Settings"][0][1]
    (final,) = [
        r for r in read_metrics(logs / "metrics.jsonl") if "Final_Config/lora_r" in r["metrics"]
    ]
    assert final["metrics"]["Final_Config/lora_r"] == 16
    # The same adapter under another name resumes, another one does not.
    moved = shutil.copytree(finished / "final_model", tmp_path / "moved")
    assert run(tmp_path, *LESS, "--resume", "latest", "--init-adapter", str(moved)) == 0
    tensors = load_file(Path(moved) / "adapter_model.safetensors")
    tensors = {name: tensor * 0.5 for name, tensor in tensors.items()}
    save_file(tensors, Path(moved) / "adapter_model.safetensors", {"format": "pt"})
    said = resumes(run, tmp_path, capfd, *LESS, "--init-adapter", str(moved))
    assert "the adapter of init_adapter changed" in said
    assert "this run has no init_adapter" in resumes(run, tmp_path, capfd, *LESS)


@pytest.mark.parametrize("kind", ["final_model", "checkpoints/checkpoint-6", "of others"])
def test_an_adapter_of_another_base_is_refused(kind, finished, tmp_path, tiny_model, run, capfd):
    """Ours say what their base held; those of others name it, and it may lie on this machine."""
    other = make_tiny_model(tmp_path / "other", seed=1)
    folder = Path(
        shutil.copytree(finished / kind.replace("of others", "final_model"), tmp_path / "a")
    )
    if kind == "of others":
        (folder / "origin.json").unlink()
    assert run(tmp_path, "--init-adapter", str(folder), "--model-name", str(other)) == 2
    said = capfd.readouterr().err
    assert "its base model is" in said and str(tiny_model) in said and str(other) in said


@pytest.mark.parametrize(
    ("base", "code", "said"),
    [
        ("/gone/model", 0, "which is not on this machine; whether"),
        ("some/other-model", 0, "which is not on this machine; whether"),
    ],
)
def test_an_adapter_whose_base_is_not_here_is_told(
    base, code, said, finished, tmp_path, run, capfd
):
    folder = Path(shutil.copytree(finished / "final_model", tmp_path / "adapter"))
    (folder / "origin.json").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(config))
    assert run(tmp_path, "--max-steps", "1", "--init-adapter", str(folder)) == code
    assert said in capfd.readouterr().err


def test_an_adapter_does_not_go_with_full_fine_tuning(finished, tmp_path, run, capfd):
    start = ["--init-adapter", str(finished / "final_model"), "--lora-r", "0"]
    assert run(tmp_path, *start) == 2
    assert "lora_r 0 (full fine-tuning) does not go with init_adapter" in capfd.readouterr().err


# -----------------------------------------------------------------------------
# Into another output directory


@pytest.mark.slow
def test_a_resume_into_another_output_directory_takes_everything_along(
    finished, tmp_path, run, capfd
):
    checkpoint = finished / "checkpoints" / "checkpoint-4"
    best = load_checkpoint(checkpoint).state["train_state"]["best_step"]
    same = ["--num-probes", "1", "--probe-max-new-tokens", "8"]
    assert run(tmp_path, "--resume", str(checkpoint), *same) == 0
    out = tmp_path / "out"
    (old,), (new,) = ((p / "training_logs").iterdir() for p in (finished, out))
    steps = [r["step"] for r in read_metrics(new / "metrics.jsonl")]
    assert new.name == old.name and steps == [
        r["step"] for r in read_metrics(old / "metrics.jsonl")
    ]
    (events,) = (out / "tensorboard_logs").iterdir()
    texts = read_texts(events)
    assert {"Dataset/Summary", "Dataset/Mask_Audit", "Config/Training_Settings"} <= texts.keys()
    assert (new / "dataset_statistics.json").is_file()
    said = (new / "training.log").read_text(encoding="utf-8")
    assert "curves, texts and files of the run until step 4 come from" in said
    held = json.loads((finished / "best_model" / "origin.json").read_text())["step"] == best
    assert f"best_model, of step {best}, {'comes from' if held else 'is not below'}" in said


@pytest.mark.slow
def test_a_checkpoint_without_its_run_says_what_is_missing(finished, tmp_path, run):
    alone = tmp_path / "elsewhere" / "checkpoints" / "checkpoint-4"
    shutil.copytree(finished / "checkpoints" / "checkpoint-4", alone)
    assert run(tmp_path, "--resume", str(alone)) == 0
    (logs,) = (tmp_path / "out" / "training_logs").iterdir()
    (events,) = (tmp_path / "out" / "tensorboard_logs").iterdir()
    said = (logs / "training.log").read_text(encoding="utf-8")
    assert "not beside its checkpoint: not carried" in said
    assert "Dataset/Summary" in read_texts(events), "what can be made again is"
    assert (logs / "dataset_statistics.json").is_file()
