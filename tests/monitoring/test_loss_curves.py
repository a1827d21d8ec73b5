"""Logs as other tools write them: which numbers are the training's loss, and at which step each stands."""

import io
import json
import math
import random

import pytest
from tqdm import tqdm

from convergence import main
from finetuning.monitoring import convergence, loss_curves
from tests.helpers.foreign_events import write_scalars

STEPS = list(range(10, 301, 10))


def loss(step):
    return round(1 + 2 * math.exp(-step / 60), 4)


CURVE = {step: loss(step) for step in STEPS}


def bar(step, end, label=""):
    done = f"{100 * step // end:3d}%|{'█' * (10 * step // end):<10}|"
    return f"\r{label}{done} {step}/{end} [00:01<01:00,  1.0s/it]"


def line(step, losses=CURVE, steps_per_epoch=100):
    return (
        f"{{'loss': {losses[step]}, 'learning_rate': 5e-05, 'epoch': {step / steps_per_epoch}}}\n"
    )


def curve_of(path, text):
    path.write_text(text)
    return loss_curves.read_curve(path)


def losses_of(curve):
    steps, losses = curve.points.column("Training/Loss")
    return dict(zip(steps.tolist(), losses.tolist(), strict=True))


# --------------------------------------------------------------------------- progress bars


def before_training():
    labels = ("Map: ", "Filter: ", "Tokenizing (num_proc=4): ", "Downloading data: ", "")
    text = "".join(bar(1000, 5000, name) + bar(5000, 5000, name) + "\n" for name in labels)
    return text + "".join(bar(k, 3, "Loading checkpoint shards: ") for k in (1, 2, 3)) + "\n"


def evaluation():
    return "".join(bar(k, 500) for k in range(1, 501, 7)) + bar(500, 500) + "{'eval_loss': 1.2}\n"


LOGS = {
    "data before": lambda: before_training() + "".join(bar(s, 300) + line(s) for s in STEPS),
    "every step drawn": lambda: (
        before_training()
        + "".join("".join(bar(s - 9 + k, 300) for k in range(10)) + line(s) for s in STEPS)
    ),
    "evaluations between": lambda: "".join(
        bar(s, 300) + line(s) + (evaluation() if s % 50 == 0 else "") for s in STEPS
    ),
    "an evaluation at each loss": lambda: "".join(
        bar(s, 300) + line(s) + evaluation() for s in STEPS
    ),
    "drawn anew behind each": lambda: (
        before_training() + "".join(bar(max(1, s - 9), 300) + line(s) + bar(s, 300) for s in STEPS)
    ),
    "times of each line": lambda: "".join(
        f"2026-01-01 10:{s // 60:02d}:{s % 60:02d},123 INFO " + bar(s, 300)[1:] + "\n" + line(s)
        for s in STEPS
    ),
    "drawn too seldom": lambda: "".join(bar(s - s % 4, 300) + line(s) for s in STEPS),
    "a crash and a resume": lambda: (
        "".join(bar(s, 300) + line(s, dict.fromkeys(STEPS, 9.0)) for s in STEPS[:15])
        + before_training()
        + "".join(bar(s, 300) + line(s) for s in STEPS)
    ),
    "another run before": lambda: (
        "".join(bar(s, 700) + line(s, dict.fromkeys(range(701), 9.0)) for s in range(10, 701, 10))
        + before_training()
        + "".join(bar(s, 300) + line(s) for s in STEPS)
    ),
    "moves of the cursor": lambda: "".join(
        bar(s, 300) + "\x1b[A\n" + bar(3, 7, "\x1b[32mEval: ") + "\x1b[0m\n" + line(s)
        for s in STEPS
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_bar_of_the_training_gives_the_steps(tmp_path, name):
    curve = curve_of(tmp_path / "log.txt", LOGS[name]())
    assert losses_of(curve) == CURVE
    assert curve.total_steps == 300 and not curve.counted


@pytest.mark.parametrize("every", [1, 10])
def test_bars_that_tqdm_draws_as_the_trainer_of_hf_lets_it(tmp_path, every):
    """It runs faster than its bar is drawn, and evaluates 500 rows after every 20th step."""
    printed = io.StringIO()
    list(tqdm(range(1000), desc="Map", file=printed))
    training = tqdm(total=60, file=printed)
    for step in range(1, 61):
        training.update()
        if step % every == 0:
            training.write(f"{{'loss': {loss(step)}, 'epoch': {step / 20}}}", file=printed)
        if step % 20 == 0:
            for _ in tqdm(range(500), leave=False, file=printed):
                pass
            training.write(f"{{'eval_loss': 1.2, 'epoch': {step / 20}}}", file=printed)
    training.close()
    curve = curve_of(tmp_path / "log.txt", printed.getvalue())
    assert losses_of(curve) == {step: loss(step) for step in range(every, 61, every)}
    assert curve.total_steps == 60 and curve.steps_per_epoch == pytest.approx(20)


def uneven(seed=1):
    steps = sorted(random.Random(seed).sample(range(1, 5000), 30))
    return "".join(bar(k, 5000) + line(s) for k, s in zip(steps, STEPS, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        before_training() + "".join(map(line, STEPS)),  # the training's bar is not in the text
        uneven(),
        "".join(bar(s, 100) + line(s, CURVE) for s in STEPS[:10])
        + "".join(bar(s - 100, 100) + line(s) for s in STEPS[10:20])
        + "".join(bar(s - 200, 100) + line(s) for s in STEPS[20:]),  # a bar an epoch
        "".join(bar((s - 1) % 100 + 1, 100, f"Epoch {(s - 1) // 100}: ") + line(s) for s in STEPS),
        "".join(bar(1 + (s - 1) // 100, 3, "Epoch: ") + line(s) for s in STEPS),
    ],
)
def test_lines_are_counted_where_no_bar_goes_with_the_losses(tmp_path, capsys, text):
    curve = curve_of(tmp_path / "log.txt", text)
    assert losses_of(curve) == {k: loss(step) for k, step in enumerate(STEPS, 1)}
    assert curve.counted and curve.total_steps == 30
    assert main([str(tmp_path / "log.txt")]) == 0
    assert "does not show its steps" in capsys.readouterr().out


def test_ms_swift_tells_its_steps_in_pairs(tmp_path):
    rows = [
        {"loss": loss(s), "learning_rate": 1e-5, "global_step/max_steps": f"{s}/600"} for s in STEPS
    ]
    for name, text in (
        ("log.txt", "".join(f"{row}\n" for row in rows)),
        ("logging.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
    ):
        curve = curve_of(tmp_path / name, text)
        assert losses_of(curve) == CURVE and curve.total_steps == 600 and not curve.counted


# --------------------------------------------------------------------------- names of columns


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (("train/loss",), {"train/train_loss": 1.3, "train/train_runtime": 9.0}),
        (("loss",), {"train_loss": 1.3}),
        (("train_loss_step", "train_loss_epoch"), {}),
        (("Loss/train", "Loss/test"), {"Accuracy/train": 0.5}),
        (("loss_train", "loss_val"), {}),
        (("Training Loss", "Validation Loss"), {}),
    ],
)
def test_summaries_beside_a_curve_are_left_out(tmp_path, names, others):
    """In a folder of TensorBoard's and in a table; `others` stand once, in the last row."""
    rows = {s: {names[0]: loss(s)} | dict.fromkeys(names[1:], 5.0) for s in STEPS}
    rows[300] |= others
    write_scalars(tmp_path / "runs", rows)
    assert losses_of(loss_curves.read_curve(tmp_path / "runs")) == pytest.approx(CURVE)
    columns = ["step", *names, *others]
    table = [[s, *(row.get(name, "") for name in columns[1:])] for s, row in rows.items()]
    text = "\n".join(",".join(map(str, row)) for row in [columns, *table])
    assert losses_of(curve_of(tmp_path / "a.csv", text)) == CURVE


@pytest.mark.parametrize("at_its_end", ["train_runtime", "train/train_runtime"])
@pytest.mark.parametrize("summary", ["train_loss", "train/train_loss"])
def test_a_table_of_a_finished_run_of_hf_keeps_its_rows(tmp_path, at_its_end, summary):
    columns = f"_step,train/loss,train/global_step,eval/loss,{at_its_end},{summary}\n"
    rows = [f"{k},{loss(s)},{s},,,\n" for k, s in enumerate(STEPS)]
    text = columns + "".join(rows) + "31,,300,1.2,,\n32,,300,,100.0,1.3\n"
    assert losses_of(curve_of(tmp_path / "a.csv", text)) == CURVE


def test_tensorboards_own_csv(tmp_path):
    text = "Wall time,Step,Value\n" + "".join(f"1.7e9,{s},{loss(s)}\n" for s in STEPS)
    assert losses_of(curve_of(tmp_path / "run.csv", text)) == CURVE
    assert losses_of(curve_of(tmp_path / "run-a-tag-train_loss.csv", text)) == CURVE
    with pytest.raises(loss_curves.UserError, match="columns step and loss"):
        curve_of(tmp_path / "run-a-tag-train_learning_rate.csv", text)


# --------------------------------------------------------------------------- empty cells


@pytest.mark.parametrize("empty", ["", "null", "NaN", "nan", "None"])
def test_an_empty_cell_of_a_table_is_no_loss_that_was_not_finite(tmp_path, empty):
    text = "_step,train/loss,train/lr,train/global_step,eval/loss,train_runtime\n"
    for k, step in enumerate(STEPS):
        text += f"{2 * k},{loss(step)},1e-5,{step},{empty},{empty}\n"
        if step % 100 == 0:
            text += f"{2 * k + 1},{empty},{empty},{step},1.2,{empty}\n"
    text += f"99,{empty},{empty},300,{empty},60.0\n"
    curve = curve_of(tmp_path / "a.csv", text)
    assert losses_of(curve) == CURVE
    assert curve.points.column("Eval/Loss")[1].tolist() == [1.2] * 3
    result = convergence.describe(curve)
    assert result["nonfinite"] == 0 and result["alerts"] == []


@pytest.mark.parametrize("empty", [None, math.nan])
def test_an_evaluation_of_llama_factory_does_not_replace_the_loss_of_its_step(tmp_path, empty):
    rows = []
    for step in STEPS:
        rows.append({"current_steps": step, "loss": loss(step), "eval_loss": empty, "lr": 1e-5})
        if step % 100 == 0:
            rows.append({"current_steps": step, "loss": empty, "eval_loss": 1.2, "lr": empty})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert losses_of(curve_of(tmp_path / "trainer_log.jsonl", text)) == CURVE


@pytest.mark.parametrize(
    "row",
    [
        lambda s, x: {"step": s, "loss": x},
        lambda s, x: {"step": s, "loss": x, "grad_norm": x, "learning_rate": 1e-5},
        lambda s, x: {"step": s, "loss": x, "learning_rate": 1e-5, "eval_loss": math.nan},
    ],
)
def test_a_loss_that_was_not_finite_stays_one(tmp_path, row):
    rows = [row(s, math.nan if s in (200, 210) else loss(s)) for s in STEPS]
    rows.append({"step": 300, "eval_loss": 1.2})
    curve = curve_of(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    result = convergence.describe(curve)
    assert result["nonfinite"] == 2 and result["alerts"] == ["NonFinite"]


# --------------------------------------------------------------------------- steps and epochs


def test_a_step_that_goes_back_is_a_resume(tmp_path):
    """A crash at 150, on from 100, now at 120."""
    rows = [{"current_steps": s, "loss": 9.0, "lr": 1e-5} for s in range(10, 151, 10)]
    rows.insert(12, {"current_steps": 120, "eval_loss": 7.0})
    rows += [{"current_steps": s, "total_steps": 300, "loss": loss(s)} for s in (110, 120)]
    curve = curve_of(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    expected = dict.fromkeys(range(10, 101, 10), 9.0) | {110: loss(110), 120: loss(120)}
    assert losses_of(curve) == expected and len(curve.points.column("Eval/Loss")[1]) == 0
    result = convergence.describe(curve)
    assert (result["step"], result["total_steps"]) == (120, 300)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([10, 20, 10], {10: 2}),
        ([10, 20, 30, 20, 20, 10, 20], {10: 5, 20: 6}),  # a run that crashes again and again
        ([10, 20, 30, 40, 25], {10: 0, 20: 1, 25: 4}),  # on with another stride
        ([30, 10, 20], {10: 1, 20: 2, 30: 0}),  # in no order
    ],
)
def test_few_losses_with_a_resume(tmp_path, steps, kept):
    text = "step,loss\n" + "".join(f"{step},{k}\n" for k, step in enumerate(steps))
    assert losses_of(curve_of(tmp_path / "a.csv", text)) == kept


def test_a_late_evaluation_of_an_earlier_step_is_no_resume(tmp_path):
    rows = [{"step": s, "loss": loss(s)} for s in STEPS]
    rows.insert(20, {"step": 100, "eval_loss": 1.2})
    curve = curve_of(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert losses_of(curve) == CURVE


def test_a_table_from_the_last_step_to_the_first_is_read_whole(tmp_path):
    text = "step,loss\n" + "".join(f"{s},{loss(s)}\n" for s in reversed(STEPS))
    assert losses_of(curve_of(tmp_path / "a.csv", text)) == CURVE


@pytest.mark.parametrize("total", [400, None])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("begins_late", [False, True])
def test_whole_epochs_tell_where_they_end(tmp_path, total, first, begins_late):
    def epoch(step):
        return first + (step if begins_late else step - 1) // 100

    text = "step,loss,epoch,total_steps\n"
    text += "".join(f"{s},{loss(s)},{epoch(s)},{total or ''}\n" for s in range(5, 400, 5))
    assert curve_of(tmp_path / "a.csv", text).steps_per_epoch == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize(
    "epoch",
    [
        lambda s: 0,  # the first is not over
        lambda s: 2 + (s > 1100),  # from 0 or from 1?
        lambda s: (s - 1050) / 100 + 2,  # they begin within its steps
        lambda s: math.sqrt(s),
        lambda s: math.nan,
    ],
)
def test_epochs_that_do_not_fit_the_steps_tell_nothing(tmp_path, epoch):
    steps = range(1030, 1200, 10)
    text = "step,loss,epoch\n" + "".join(f"{s},{loss(s)},{epoch(s)}\n" for s in steps)
    assert curve_of(tmp_path / "a.csv", text).steps_per_epoch is None
