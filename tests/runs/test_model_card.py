"""README.md of a saved model says what is known of it, and nothing that is not for others.

uv run pytest tests/runs/test_model_card.py
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from finetuning.common.bounds import CARD_HEAD
from finetuning.model.resolve import licence_of
from finetuning.runs.before_after import changes, newest_evaluation
from finetuning.runs.directory import RunDirectory
from finetuning.runs.model_card import complete_cards, curves, model_card, public_name
from finetuning.runs.recorded import read_recorded

ORIGIN = {
    "run": "qwen3_4b_thinking_20260101_000000",
    "step": 12,
    "held_out_loss": 1.234567,
    "base": {
        "model": "Qwen/Qwen3-4B-Thinking-2507",
        "model_weights": "0123abcd",
        "licence": "apache-2.0",
    },
    "trained": {
        "steps": 12,
        "lora_r": 16,
        "lora_alpha": 32.0,
        "max_seq_length": 2048,
        "data": "fedc9876",
    },
    "system_prompt": "geheim",
}


def of_base(**base: str) -> dict:
    return ORIGIN | {"base": base}


def test_an_adapter_has_a_card():
    card = model_card(ORIGIN, "adapter", "final_model")
    head = "---\nbase_model: Qwen/Qwen3-4B-Thinking-2507\nlicense: apache-2.0\n"
    assert card.startswith(head) and "library_name: peft" in card
    for fact in (
        "LoRA, rank 16, alpha 32",
        "1.235",
        "12 of 12",
        "0123abcd",
        "fedc9876",
        "hf upload",
    ):
        assert fact in card
    assert "geheim" not in card, "the text of the data is not for the card"


def test_what_it_is_decides_how_it_is_used():
    adapter, whole, merged = (
        model_card(ORIGIN, kind, "made") for kind in ("adapter", "whole", "merged")
    )
    assert "AutoPeftModelForCausalLM" in adapter and "vllm serve" not in adapter
    for card in (whole, merged):
        assert "library_name: transformers" in card and "peft" not in card.casefold()
        assert "vllm serve made" in card and "--reasoning-parser deepseek_r1" in card
        assert "vLLM calls it `reasoning`" in card and "SGLang `reasoning_content`" in card
        assert "sglang.launch_server" in card and "--reasoning-parser deepseek-r1" in card


def test_a_base_that_others_can_not_have_is_not_named_to_the_hub():
    demonstration = model_card(of_base(model="embedded"), "adapter", "final_model")
    assert "base_model:" not in demonstration and "Its answers mean nothing" in demonstration
    local = model_card(of_base(model="/home/somebody/models/Qwen3-4B"), "adapter", "final_model")
    assert "base_model:" not in local and "somebody" not in local and "Qwen3-4B" in local
    assert "licence of the base is not known here" in local
    assert "A trained model" in model_card({}, "merged", "final_model"), (
        "a foreign adapter says little"
    )


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("./models/mine", "mine"),
        ("~/models/mine", "mine"),
        ("a/b/mine", "mine"),
        (r"C:\models\mine", "mine"),
        ("gpt2", "gpt2"),
        ("", ""),
    ],
)
def test_a_path_is_its_last_part(base: str, name: str):
    assert public_name(base) == name


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\nbase_model: x\n---\n# Card\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: mine-1.0\n---\n", "mine-1.0"),
        ("# Card\nlicense: no front matter\n", ""),
        ("---\nlicense: two words\n---\n", ""),
        ("---\ntags: [x]\n---\nlicense: mit\n", ""),
    ],
)
def test_the_licence_is_that_of_the_base_s_card(tmp_path: Path, text: str, licence: str):
    assert licence_of(tmp_path) == ""
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert licence_of(tmp_path) == licence


def test_a_licence_far_down_is_not_looked_for(tmp_path: Path):
    text = f"---\n{'# x' * CARD_HEAD.limit}\nlicense: mit\n---\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert licence_of(tmp_path) == ""


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_the_models_of_a_finished_run_have_the_whole_card(
    out: Path, tiny_data: Path, tiny_model: Path
):
    for name in ("final_model", "best_model"):
        card = (out / name / "README.md").read_text(encoding="utf-8").replace("\\_", "_")
        origin = json.loads((out / name / "origin.json").read_text(encoding="utf-8"))
        for part in (
            "Use",
            "Before and after",
            "Curves",
            "Data",
            "Settings",
            "Limits",
            "Licence",
            "Share",
        ):
            assert f"\n## {part}\n" in card
        assert f"| step | {origin['step']} of 6 |" in card and "| learning_rate | 0.0003 |" in card
        assert "| samples | 60 |" in card and "| held-out loss | " in card
        assert Image.open(out / name / "curves.png").size[0] >= 800
        for file in (out / name).iterdir():
            if file.suffix in (".md", ".txt", ".jinja") or file.name == "origin.json":
                text = file.read_text(encoding="utf-8")
                assert not [p for p in (out, tiny_data, tiny_model) if str(p.parent) in text], file
        for line in tiny_data.read_text(encoding="utf-8").splitlines():
            assert not any(text in card for text in json.loads(line).values())


def test_the_best_model_shows_its_own_evaluation(out: Path):
    (run,) = (path.name for path in (out / "training_logs").iterdir())
    record = read_recorded(RunDirectory(out, run))
    steps = dict(record.series["Eval/Loss"])
    first, step = min(steps), sorted(steps)[1]
    origin = ORIGIN | {"run": run, "step": step}
    row = next(
        line
        for line in model_card(origin, "adapter", "final_model", record).splitlines()
        if "held-out loss |" in line
    )
    assert f"{steps[first]:.4g}" in row and f"{steps[step]:.4g}" in row


@pytest.mark.parametrize(
    ("step", "evaluated", "after"),
    [(20, 20, 1.5), (39, 20, 1.5), (40, 40, 1.2), (59, 40, 1.2), (99, 60, 1.9), (19, None, None)],
)
def test_a_card_never_shows_a_later_evaluation(step: int, evaluated: int | None, after: float):
    series = {"Eval/Loss": [(0, 2.0), (20, 1.5), (40, 1.2), (60, 1.9)]}
    assert newest_evaluation(series, step) == evaluated
    if evaluated is not None:
        assert [(c.before.value, c.after.value) for c in changes(series, evaluated)] == [
            (2.0, after)
        ]


def test_without_an_evaluation_of_the_base_nothing_is_compared():
    """Where the record of a resumed run begins later."""
    assert not changes({"Eval/Loss": [(60, 1.2), (80, 1.1)]})
    assert changes({"Eval/Loss": [(0, 1.2), (80, 1.1)]})


def test_the_lines_name_the_folder():
    for kind in ("adapter", "whole", "merged"):
        card = model_card(ORIGIN, kind, "my model")
        assert "FOLDER" not in card and 'from_pretrained("my model")' in card
        assert "hf upload OWNER/NAME 'my model'" in card
    strange = model_card(ORIGIN, "merged", "a`b\n")
    assert "vllm serve FOLDER" in strange and "a`b" not in strange


def test_what_is_only_for_the_program_is_not_uploaded():
    told = {kind: model_card(ORIGIN, kind, "made") for kind in ("adapter", "whole", "merged")}
    line = "hf upload OWNER/NAME made --exclude origin.json --exclude run.txt\n"
    assert line in told["adapter"] and line in told["whole"]
    assert "hf upload OWNER/NAME made\n" in told["merged"]
    place = "First write into `adapter_config.json`"
    assert place in model_card(of_base(model="Qwen3-4B"), "adapter", "made")
    assert not [kind for kind, card in told.items() if place in card], "the hub has that base"


def test_a_loss_of_an_earlier_step_is_said_to_be_one():
    card = model_card(ORIGIN | {"step": 12, "evaluated_step": 12}, "adapter", "final_model")
    assert "| held-out loss there | 1.235 |" in card
    card = model_card(ORIGIN | {"step": 12, "evaluated_step": 10}, "adapter", "final_model")
    assert "| held-out loss at step 10 | 1.235 |" in card
    assert "| held-out loss so far | 1.235 |" in model_card(ORIGIN, "adapter", "final_model"), (
        "of an older version"
    )
    assert "| held-out loss" not in model_card(
        ORIGIN | {"held_out_loss": None}, "adapter", "final_model"
    )


def test_a_setting_with_a_text_is_not_shown(out: Path):
    (logs,) = (out / "training_logs").iterdir()
    path = logs / "configuration.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    words = {
        "model_name": "/home/x",
        "run_name": "Anna",
        "lr_schedule": "rm -rf",
        "unknown": "Berta",
    }
    record["config"] |= words
    path.write_text(json.dumps(record), encoding="utf-8")
    complete_cards(read_recorded(RunDirectory(out, logs.name)))
    card = (out / "final_model" / "README.md").read_text(encoding="utf-8")
    assert not [text for text in words.values() if text in card]


def test_a_run_without_points_has_a_picture(tmp_path: Path):
    run = RunDirectory(tmp_path, ORIGIN["run"])
    run.logs.mkdir(parents=True)
    (run.logs / "metrics.jsonl").write_text("", encoding="utf-8")
    assert curves(read_recorded(run)).startswith(b"\x89PNG")
    assert "## Before" not in model_card(ORIGIN, "adapter", "final_model", read_recorded(run))


def test_another_run_s_model_keeps_its_card(out: Path):
    (run,) = (path.name for path in (out / "training_logs").iterdir())
    (out / "best_model" / "run.txt").write_text("qwen3_4b_thinking_another\n", encoding="utf-8")
    (out / "best_model" / "README.md").write_text("theirs", encoding="utf-8")
    complete_cards(read_recorded(RunDirectory(out, run)))
    assert (out / "best_model" / "README.md").read_text(encoding="utf-8") == "theirs"
