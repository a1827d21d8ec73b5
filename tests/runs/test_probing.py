"""By what a model is the best, and where nothing can tell.

uv run pytest tests/runs/test_probing.py
"""

from types import SimpleNamespace

import pytest

from finetuning.common.language import in_chinese
from finetuning.config import DirectTrainingConfig
from finetuning.model.sampling import GREEDILY
from finetuning.runs.probing import ENOUGH_JUDGED, Probing

MOST = 9


def probing(fitting: int, others: int = 0) -> Probing:
    """Questions whose reference fits an answer, and others."""
    lengths = [MOST] * fitting + [MOST + 1] * others
    return Probing(tuple(SimpleNamespace(reference_tokens=n) for n in lengths), MOST, GREEDILY)


@pytest.mark.parametrize(
    ("asked", "settings", "held_out", "text", "doubt"),
    [
        (probing(ENOUGH_JUDGED), {}, 5, "by answers (auto)", ""),
        (probing(ENOUGH_JUDGED), {}, 0, "by answers (auto)", ""),
        (probing(3), {}, 5, "by held-out loss (auto, as fewer than 16 answers are judged)", ""),
        (probing(3), {}, 0, "none, as no sample is held out", ""),
        (probing(3), {"early_stopping_patience": 2}, 0, "none, as", "no sample is held out"),
        (probing(0), {"best_by": "loss"}, 0, "none, as", "no sample is held out"),
        (probing(1, 9), {"best_by": "answers"}, 0, "by answers", ""),
        (probing(0, 9), {"best_by": "answers"}, 5, "by answers", "every reference is longer"),
    ],
)
def test_the_start_says_what_decides_and_warns_where_nothing_can(
    asked, settings, held_out, text, doubt
):
    config = DirectTrainingConfig(**settings)
    assert asked.best_text(config.best_by, held_out).startswith(text)
    said = list(asked.doubts(config, held_out))
    assert len(said) == bool(doubt) and all(doubt in one for one in said)
    assert all(in_chinese(one) != one for one in said)
    assert in_chinese(asked.best_text(config.best_by, held_out)) != text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["--max-steps", "3", "--num-epochs", "7"], "3 by --max-steps, "),
        (["--max-steps", "0", "--num-epochs", "0.5"], "by --num-epochs 0.5, "),
    ],
)
def test_the_start_says_which_setting_ends_the_run(settings, text, tiny_run, tmp_path, capsys):
    options = ["--num-probes", "0", "--no-forgetting", "--eval-fraction", "0"]
    assert tiny_run(tmp_path, *options, first=settings) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert text in said and "per epoch" in said
