"""What an alert suggests is something else than what is set, and the program takes it."""

import ast
import dataclasses
import re
from itertools import product

import pytest

from finetuning.common import language
from finetuning.config import DirectTrainingConfig
from finetuning.monitoring.advice import ADVICE, advice

SUGGESTED = re.compile(r"\(it is (\S+); try --([a-z-]+) (\S+)\)")
KINDS = {f.name: f.type for f in dataclasses.fields(DirectTrainingConfig)}
RUNS = [  # what else is set decides what may be
    {"lora_r": r, "precision": precision, "kl_anchor": anchor}
    for r, precision, anchor in product((0, 1, 16, 64), ("bf16", "fp32", "fp8"), (0.0, 0.1, 3.0))
    if r or not (anchor or precision == "fp8")
]
VALUES = {
    "learning_rate": [1e-6, 2.5e-5, 3e-4, 1e-3, 0.7, 4.0],
    "warmup_ratio": [0.0, 0.03, 0.05, 0.24, 0.25, 0.3, 0.5, 0.6, 0.99],
    "num_epochs": [0.1, 0.5, 1, 1.0, 1.01, 1.3, 2, 3.0, 15.0, 300.0, 4321],
    "lora_dropout": [0.0, 0.01, 0.05, 0.4, 0.5, 0.6, 0.99],
    "max_grad_norm": [0.0, 1.0, 250.0],
    "max_seq_length": [16, 1_048_576],
}


def suggestions(settings: dict) -> set[tuple[str, str, str]]:
    texts = [advice(name, settings) for name in ADVICE]
    found = {s for text in texts for s in SUGGESTED.findall(text)}
    told = [text.count("; try --") for text in texts]
    assert told == [len(SUGGESTED.findall(text)) for text in texts], texts
    assert not any(re.search(r"\d\.?\d*e\+", text) for text in texts), texts
    return {(flag.replace("-", "_"), value, other) for value, flag, other in found}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run.values())))
def test_every_suggestion_is_another_value_that_is_accepted(run: dict):
    seen = set()
    for name, value in [(n, v) for n, values in VALUES.items() for v in values]:
        if name == "lora_dropout" and value and run["precision"] == "fp8":
            continue  # no such run
        config = DirectTrainingConfig(**run, **{name: value})
        for flag, told, other in suggestions(dataclasses.asdict(config)):
            assert other != told
            taken = ast.literal_eval(other)
            assert isinstance(taken, int) or KINDS[flag] is not int
            assert getattr(DirectTrainingConfig(**{**run, name: value, flag: taken}), flag) == taken
            seen.add(flag)
    assert {"learning_rate", "warmup_ratio", "num_epochs"} <= seen
    assert ("lora_r" in seen) == ("kl_anchor" in seen) == bool(run["lora_r"])
    assert ("lora_dropout" in seen) == (bool(run["lora_r"]) and run["precision"] != "fp8")


def test_steps_are_suggested_where_steps_are_counted():
    """`max_steps` decides then, and what is shown is what it came to."""
    text = advice("Saturation", {"num_epochs": 3.9, "max_steps": 300})
    assert "fewer epochs (--max-steps is 300; try --max-steps 150) or more data" in text
    assert "（--max-steps 现为 300，可试 --max-steps 150）" in language.in_chinese(text)
    assert "(--max-steps is 1) or" in advice("Saturation", {"max_steps": 1})


@pytest.mark.parametrize("length", [{"num_epochs": 3.0}, {"num_epochs": 3.9, "max_steps": 300}])
def test_a_shorter_run_keeps_its_automatic_rate(length: dict):
    """The rule would raise it for fewer passes. A rate that was set stays by itself, as does one that no
    setting tells."""
    run = {**length, "learning_rate": 2e-4}
    for name in ("Saturation", "Overfitting", "Forgetting"):
        told = advice(name, {**run, "automatic": ("seed", "learning_rate")})
        command = "--max-steps 150" if "max_steps" in run else "--num-epochs 1.5"
        assert f"try {command} --learning-rate 0.0002)" in told
        assert f"可试 {command} --learning-rate 0.0002）" in language.in_chinese(told)
        assert advice(name, {**run, "automatic": ("seed",)}) == advice(name, run)
        assert f"try {command})" in advice(name, run)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("lora_r", 64, "lora_r (it is 64; try --lora-r 128)"),
        ("lora_r", 0, "lora_r (it is 0)"),
        ("num_epochs", 1, "epochs (it is 1)"),
        ("num_epochs", 0.5, "epochs (it is 0.5)"),
        ("num_epochs", 300.0, "epochs (it is 300; try --num-epochs 150)"),
        ("warmup_ratio", 0.3, "warm-up (it is 0.3; try --warmup-ratio 0.5)"),
        ("warmup_ratio", 0.6, "warm-up (it is 0.6)"),
        ("lora_dropout", 0.5, "dropout (it is 0.5)"),
        ("kl_anchor", 0.1, "kl_anchor (it is 0.1; try --kl-anchor 0.2)"),
        ("learning_rate", 3e-4, "learning rate (it is 0.0003; try --learning-rate 0.0001)"),
        ("learning_rate", "auto", "learning rate (it is auto)"),
        ("max_seq_length", 1_048_576, "max_seq_length (it is 1048576)"),
    ],
)
def test_a_setting_is_named_with_its_value_and_a_better_one(name: str, value, told: str):
    texts = [advice(alert, {name: value}) for alert in ADVICE]
    assert any(told in text for text in texts), texts
