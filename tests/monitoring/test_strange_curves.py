"""No table of losses ends in a traceback, whatever stands in its cells."""

import json
import math
import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetuning.common.errors import UserError
from finetuning.monitoring import convergence, loss_curves

ANY = st.one_of(st.floats(), st.integers(), st.text(max_size=5), st.none(), st.booleans())
POSITIVE = st.one_of(
    st.floats(0, 5), st.floats(0, allow_infinity=False), st.sampled_from([math.nan, math.inf])
)
COLUMNS = {  # sound for the most part, so that the forecast is reached
    "loss": st.one_of(POSITIVE, POSITIVE, POSITIVE, st.none(), st.just("")),
    "learning_rate": st.one_of(st.floats(0, 1e-3), st.floats(), st.none()),
    "grad_norm": st.one_of(st.floats(0, 10), st.floats()),
    "epoch": st.one_of(st.integers(0, 9), st.floats(0, 9), st.floats()),
    "max_steps": st.one_of(st.integers(1, 1000), st.integers(), st.floats()),
    "eval_loss": st.one_of(st.floats(0, 5), st.floats(), st.none()),
}


@st.composite
def tables(draw):
    """Rows of 8 to 40 steps: rising by a common stride, or each one by itself; any size of loss."""
    number = draw(st.integers(8, 40))
    start = draw(st.sampled_from([0, 1, 10, 10**9, 10**13 - 10**4]))
    stride = draw(st.sampled_from([1, 10, 10**6, 10**11]))
    steps = [start + k * stride for k in range(number)]
    if draw(st.booleans()):
        whole = st.integers(0, 100), st.integers(0, 10**13), st.integers()
        steps = draw(st.lists(st.one_of(*whole), min_size=number, max_size=number))
    given_columns = draw(st.sets(st.sampled_from(sorted(COLUMNS)))) | {"loss"}
    constant = {name for name in sorted(given_columns) if draw(st.booleans())} - {"loss"}
    fixed = {name: draw(COLUMNS[name]) for name in sorted(constant)}
    falling = draw(st.sampled_from([None, 1e-320, 1e-30, 1.0, 1e30, 3e38, 1e160, 1e308]))
    rows = []
    for k, step in enumerate(steps):
        row = {name: draw(COLUMNS[name]) for name in sorted(given_columns - constant)}
        if falling:
            row["loss"] = falling * (0.2 + 0.8 * math.exp(-k / 5) + 0.01 * draw(st.floats(0, 1)))
        rows.append({"step": step} | row | fixed)
    return rows


def answered(path, text):
    """Its description as strict JSON without a warning, or one line that says what is wrong."""
    path.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            result = convergence.describe(loss_curves.read_curve(path))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            json.dumps(result, allow_nan=False)


QUICK = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@settings(QUICK, max_examples=60)
@given(tables())
def test_sound_steps_with_any_numbers(tmp_path, rows):
    answered(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@settings(QUICK, max_examples=100)
@given(
    st.lists(st.fixed_dictionaries({"step": ANY, "loss": ANY}, optional={"epoch": ANY, "lr": ANY}))
)
@example([{"step": k / 100, "loss": 1.0} for k in range(30)])
@example([{"step": 10**400, "loss": 10**400}])
@example([{"step": k * 10**17, "loss": 1.0} for k in range(30)])
def test_any_cells(tmp_path, rows):
    answered(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    lines = [",".join(str(row.get(n, "")) for n in ("step", "loss", "epoch", "lr")) for row in rows]
    if not any('"' in line or "\0" in line or "\n" in line or "\r" in line for line in lines):
        answered(tmp_path / "a.csv", "\n".join(["step,loss,epoch,lr", *lines]))


@pytest.mark.parametrize("largest", [1e38, 1e160, 1e308])
def test_a_loss_beyond_float32_has_overflowed(tmp_path, largest):
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n" + "".join(f"{k},{largest / k}\n" for k in range(1, 40)))
    result = convergence.describe(loss_curves.read_curve(path))
    assert result["nonfinite"] == (0 if largest < 3e38 else 39)
