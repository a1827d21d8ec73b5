"""The convergence score, trend and forecast on known curves, recorded runs and broken input."""

import csv
import dataclasses
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from convergence import main
from finetuning.common.errors import UserError
from finetuning.monitoring import convergence, loss_curves
from finetuning.monitoring.convergence import ConvergenceMonitor, loss_trend
from finetuning.monitoring.curve_fit import Fit

STEPS = np.arange(1, 601)


def noisy(curve, sigma=0.02, seed=1):
    return curve * np.exp(sigma * np.random.default_rng(seed).standard_normal(len(curve)))


def watch(losses, total=None, rates=None, looking=False, **known):
    """A monitor that has seen the losses; `looking`: it was asked where it was due, as a run does."""
    monitor = ConvergenceMonitor(total or len(losses), **known)
    for i, loss in enumerate(losses):
        monitor.observe(i + 1, loss, None if rates is None else rates[i])
        if looking and monitor.is_due():
            monitor.scalars()
    return monitor


def score(losses, **known):
    return watch(losses, **known).scalars()["Monitoring/Convergence_Score"]


def test_exponential_forecast_and_score_are_the_true_ones():
    curve = 1 + 2 * np.exp(-STEPS / 100)
    fit = watch(noisy(curve)[:300], total=600).fit()
    assert fit.forecast_low <= curve[-1] <= fit.forecast_high
    assert abs(fit.forecast - curve[-1]) < 0.05 * 2
    assert abs(fit.score - (1 - math.exp(-3))) < 0.05


def test_power_law_forecast_beats_holding_the_last_value():
    curve = 0.5 + 2 * (1 + STEPS / 20) ** -0.5
    fit = watch(noisy(curve)[:300], total=600).fit()
    assert abs(fit.forecast - curve[-1]) < 0.5 * abs(curve[299] - curve[-1])


def test_score_rises_as_the_model_converges():
    losses = noisy(1 + 2 * np.exp(-STEPS / 100))
    scores = [score(losses[:n], total=600) for n in (60, 150, 300, 600)]
    assert scores == sorted(scores) and scores[0] < 0.8 and scores[-1] > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_a_plateau_from_the_start_and_pure_noise_are_no_convergence(seed):
    assert score(noisy(np.full(600, 2.0), 0.02, seed)) < 0.1
    assert score(noisy(np.full(600, 2.0), 0.1, seed)) < 0.1


def test_divergence_takes_the_score_back():
    curve = np.where(STEPS < 300, 1 + 2 * np.exp(-STEPS / 60), 1 + (STEPS - 300) / 120)
    assert score(noisy(curve)[:300], total=600) > 0.9
    assert score(noisy(curve)) < 0.3


def test_restart_lowers_the_score_until_the_loss_has_come_back():
    curve = 1 + 2 * np.exp(-np.where(STEPS < 300, STEPS, STEPS - 300) / 50)
    scores = [score(noisy(curve)[:n], total=600) for n in (290, 330, 600)]
    assert scores[1] < 0.8 < min(scores[0], scores[2])


def test_learning_rate_drop_is_progress():
    curve = np.where(STEPS < 300, 1.5, 1.2) + 1.5 * np.exp(-STEPS / 40)
    before, after = (watch(noisy(curve)[:n], total=600).fit() for n in (290, 600))
    assert after.level < before.level - 0.2
    assert after.forecast_low <= 1.2 <= after.forecast_high


def test_annealing_to_come_lowers_the_forecast():
    losses = noisy(1 + 2 * np.exp(-STEPS / 100))[:300]
    linear = watch(losses, 600, rates=1e-4 * (1 - STEPS / 600)).fit()
    constant = watch(losses, 600, rates=np.full(600, 1e-4)).fit()
    assert linear.forecast < constant.forecast


@pytest.mark.parametrize("known", [{}, {"steps_per_epoch": 150}])
def test_epochs_to_come_are_foreseen_from_the_staircase(known):
    stairs = 1.2 * 0.7 ** ((STEPS - 1) // 150)
    fit = watch(noisy(stairs)[:310], total=600, **known).fit()
    assert abs(fit.forecast - stairs[-1]) < 0.1 * (stairs[0] - stairs[-1])


def test_a_drop_between_epochs_counts_once_a_loss_has_shown_it():
    """Right behind a boundary nothing has fallen yet: the score must not run ahead and come back."""
    stairs = 1.2 * 0.6 ** ((STEPS[:240] - 1) // 20)
    losses = noisy(stairs, 0.02)
    monitor = ConvergenceMonitor(240, steps_per_epoch=20)
    levels = []
    for i, loss in enumerate(losses):
        monitor.observe(i + 1, loss)
        if i >= 80:
            levels.append((monitor.fit().level, np.min(losses[max(0, i - 2) : i + 1])))
    assert all(level > 0.8 * lowest for level, lowest in levels)


def test_a_smooth_fall_is_not_taken_for_a_staircase():
    curve = 0.2 + 2 * np.exp(-STEPS / 300)
    fit = watch(noisy(curve)[:300], total=600).fit()
    assert abs(fit.forecast - curve[-1]) < 0.1 * (curve[0] - curve[-1])


@pytest.mark.parametrize("curve", [2 * np.exp(-STEPS / 50), 2 - STEPS / 301, np.zeros(600)])
def test_forecasts_are_never_negative(curve):
    for n in (10, 100, 300):
        fit = watch(np.maximum(curve[:n], 0), total=600).fit()
        assert 0 <= fit.forecast_low <= fit.forecast <= fit.forecast_high


def test_what_is_not_known_yet_is_absent():
    assert watch([2.0, 1.9, 1.8]).scalars() == {"Monitoring/Convergence_Score": 0.0}
    falling = 1 + 2 * np.exp(-np.arange(12) / 3)
    few, enough = (watch(falling[:n], total=40).scalars() for n in (10, 11))
    interval = {f"Monitoring/Convergence_Score{end}" for end in ("_Low", "_High")}
    assert "Monitoring/Forecast_Final_Loss" in few and not interval & few.keys()
    assert few["Monitoring/Convergence_Score"] == 0, "no evidence, by the formula"
    assert interval <= enough.keys() and enough["Monitoring/Convergence_Score"] > 0


@pytest.mark.parametrize("rates", [None, 1e-4 * (1 + np.cos(np.pi * STEPS / 600)) / 2])
def test_at_the_last_step_the_forecast_is_the_known_level(rates):
    plateau_then_drop = 1 + 2 / (1 + np.exp((STEPS - 360) / 36))
    for curve in (plateau_then_drop, 3 - STEPS / 300, 1 + 2 * np.exp(-STEPS / 180)):
        fit = watch(noisy(curve), rates=rates).fit()
        known = np.median(noisy(curve)[-50:])
        assert abs(fit.forecast - known) < 0.05
        assert fit.forecast_low <= known <= fit.forecast_high


def test_negative_losses_have_a_trend_but_no_score_and_no_forecast():
    assert watch(-5 + np.exp(-STEPS / 50)).scalars().keys() == {"Monitoring/Loss_Trend"}


def test_non_finite_losses_are_counted_and_not_fitted():
    losses = noisy(1 + 2 * np.exp(-STEPS / 100))
    clean, dirty = ConvergenceMonitor(600), ConvergenceMonitor(600)
    for step, loss in enumerate(losses, 1):
        clean.observe(step, loss)
        dirty.observe(step, loss)
        dirty.observe(step, math.nan if step % 2 else math.inf)
    assert dirty.nonfinite == 600
    assert dirty.scalars() == clean.scalars()


def test_trend_is_the_median_slope_per_100_steps():
    bins = [[1, step, 3 - 0.002 * step, None] for step in range(40)]
    bins[-3][2] = 50.0  # one outlier does not move it
    assert loss_trend(bins) == pytest.approx(-0.2)


@pytest.mark.parametrize("cut", [1, 7, 128, 129, 300, 511])
def test_interrupted_and_uninterrupted_runs_agree(cut):
    losses, rates = noisy(1 + 2 * np.exp(-STEPS / 100)), 1e-4 * (1 - STEPS / 600)
    whole, first = (ConvergenceMonitor(600) for _ in range(2))
    for i in range(600):
        for monitor in (whole, first)[: 1 + (i < cut)]:
            monitor.observe(i + 1, losses[i], rates[i])
            monitor.fit()
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = ConvergenceMonitor(600, state=state)
    for i in range(cut, 600):
        second.observe(i + 1, losses[i], rates[i])
        second.fit()
    assert second.scalars() == pytest.approx(whole.scalars(), abs=1e-9)
    assert second.state_dict() == whole.state_dict()


def test_the_last_digit_of_a_loss_is_no_sudden_rise():
    """Losses of four decimals at the end of a run; 0.0004 is one."""
    losses = [round(2 * math.exp(-i / 20) + 1e-4, 4) for i in range(260)]
    losses[240], losses[250] = 0.0002, 0.0003
    assert watch(losses, total=300).spikes == []
    losses[250] = 0.0005
    assert watch(losses, total=300).spikes == [251]


def test_a_resumed_run_remembers_its_spikes():
    losses = noisy(1 + 2 * np.exp(-STEPS / 100))
    losses[[150, 200, 250]] *= 4
    first = watch(losses[:300], total=600)
    assert first.calm() == pytest.approx(1 / (1 + ((151 + 201 + 251) / 300 / 3) ** 2))
    second = ConvergenceMonitor(600, state=json.loads(json.dumps(first.state_dict())))
    for i in range(300, 400):
        second.observe(i + 1, losses[i])
    assert second.calm() == pytest.approx(1 / (1 + ((151 + 201 + 251) / 400 / 3) ** 2))


def test_at_least_four_of_five_forecasts_hold_what_comes():
    """The interval is one of 80%, as wide below as above; it is counted over 60 noises, 3 deviations."""
    curve = 1 + 2 * np.exp(-STEPS / 100)
    fits = [watch(noisy(curve, 0.05, seed)[:250], total=600).fit() for seed in range(60)]
    share = np.mean([fit.forecast_low <= curve[-1] <= fit.forecast_high for fit in fits])
    assert share >= 0.8 - 3 * math.sqrt(0.8 * 0.2 / 60)
    for fit in fits:
        assert fit.forecast - fit.forecast_low == pytest.approx(fit.forecast_high - fit.forecast)
        assert fit.forecast_high - fit.forecast_low < 0.25 * (curve[0] - curve[-1])
    widths = [fit.forecast_high - fit.forecast_low for fit in fits]
    assert np.mean(widths) < 0.2 * (curve[0] - curve[-1])


def test_the_score_falls_only_where_the_loss_rises():
    for seed, curve in enumerate(
        (2.3 - 0.3 * np.log(STEPS), 1.2 * 0.7 ** ((STEPS - 1) // 150), 1 + 2 / STEPS**0.3)
    ):
        monitor, highest = ConvergenceMonitor(600), 0.0
        for step, loss in enumerate(noisy(curve, 0.01, seed), 1):
            monitor.observe(step, loss)
            fit = monitor.fit() if monitor.is_due() else None
            if fit:
                assert fit.score >= highest - 0.05
                highest = max(highest, fit.score)


def test_a_saved_state_does_not_change_when_the_run_goes_on():
    monitor = watch(noisy(np.full(50, 2.0)), total=600)
    state = monitor.state_dict()
    saved = json.dumps(state)
    for step in range(51, 300):
        monitor.observe(step, 1.0)
    assert json.dumps(state) == saved


def test_state_is_bounded():
    monitor = watch(noisy(np.full(20_000, 2.0)))
    assert len(json.dumps(monitor.state_dict(), allow_nan=False)) < 20_000
    assert sum(b[0] for b in monitor.bins) == 19_998  # the first and the last have one neighbour


# ------------------------------------------------------------------------------------- the tool


def run_tool(capsys, *arguments):
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr()


def write_csv(path, losses):
    path.write_text("step,loss\n" + "".join(f"{i},{x}\n" for i, x in enumerate(losses, 1)))
    return path


def test_csv_trainer_state_and_our_run_give_the_same(tmp_path, capsys):
    losses = noisy(1 + 2 * np.exp(-STEPS / 100))
    table = write_csv(tmp_path / "a.csv", losses)
    foreign = tmp_path / "trainer_state.json"
    history = [{"step": i, "loss": x} for i, x in enumerate(losses, 1)]
    foreign.write_text(json.dumps({"log_history": [*history, {"step": 600, "eval_loss": 1.0}]}))
    ours = tmp_path / "out" / "training_logs" / "run" / "metrics.jsonl"
    ours.parent.mkdir(parents=True)
    rows = [{"step": i, "Training/Loss": x} for i, x in enumerate(losses, 1)]
    ours.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 601, "Trai')
    board = tmp_path / "out" / "tensorboard_logs" / "run"
    board.mkdir(parents=True)
    results = []
    for path in (table, foreign, ours, ours.parent, board, tmp_path / "out"):
        code, printed = run_tool(capsys, path, "--upto", "0.5", "--json")
        assert code == 0
        results.append(json.loads(printed.out))
    assert all(result == results[0] for result in results)
    assert results[0]["step"] == 300 and results[0]["total_steps"] == 600
    low, middle, high = (results[0][f"forecast{end}"] for end in ("_low", "", "_high"))
    assert low < middle < high and results[0]["score"] > 0.8 and results[0]["alerts"] == []


def test_text_output_names_what_is_not_known(tmp_path, capsys):
    code, printed = run_tool(capsys, write_csv(tmp_path / "a.csv", [2.0, 1.9, 1.8]))
    assert code == 0 and "not known yet\n" in printed.out and "(" not in printed.out


def test_an_unfinished_run_is_forecast_for_the_steps_it_planned(tmp_path, capsys):
    curve = 1 + 2 * np.exp(-STEPS / 200)
    losses = noisy(curve)[:200]
    foreign = tmp_path / "trainer_state.json"
    history = [{"step": i, "loss": x} for i, x in enumerate(losses, 1)]
    foreign.write_text(json.dumps({"max_steps": 600, "global_step": 200, "log_history": history}))
    ours = tmp_path / "out" / "training_logs" / "run" / "metrics.jsonl"
    ours.parent.mkdir(parents=True)
    rows = [{"step": i, "metrics": {"Training/Loss": x}} for i, x in enumerate(losses, 1)]
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours.with_name("configuration.json").write_text(json.dumps({"steps": 600}))
    logged = watch(losses, total=600, looking=True).scalars()
    for path in (foreign, ours, ours.parent):
        code, printed = run_tool(capsys, path, "--json")
        result = json.loads(printed.out)
        assert code == 0 and (result["step"], result["total_steps"]) == (200, 600)
        assert result["forecast"] == pytest.approx(logged["Monitoring/Forecast_Final_Loss"])
        assert result["score"] == pytest.approx(logged["Monitoring/Convergence_Score"])
    ours.with_name("configuration.json").write_text("{")
    code, printed = run_tool(capsys, ours)
    assert code == 2 and "configuration.json: can't be read" in printed.err


def test_the_mean_loss_at_the_end_of_a_trainer_run_is_no_logged_loss(tmp_path):
    path = tmp_path / "trainer_state.json"
    history = [{"step": i, "loss": 3.0 * 0.9**i} for i in range(1, 30)]
    end = {"step": 29, "train_loss": 1.0, "train_runtime": 60.0}
    path.write_text(json.dumps({"log_history": [*history, end]}))
    assert loss_curves.read_curve(path).points[-1]["Training/Loss"] == history[-1]["loss"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "x,y\n1,2\n", "columns step and loss"),
        ("a.csv", "step,loss\n1,2\n2,many\n", ":3:"),
        ("a.csv", "step,loss\n", "no loss"),
        ("a.csv", "step,loss\n1,0.5\n2,-0.5\n", "step 2 is negative"),
        ("a.json", "{}", "log_history"),
        ("a.json", "{", "can't be read"),
        ("a.jsonl", '{"step": 1}\n{broken\n{"step": 2}\n', ":2:"),
        ("a.txt", "hello", "give a run directory"),
        ("a.csv", "Step,a - train/loss,b - train/loss\n1,2,3\n", "2 training losses"),
    ],
)
def test_bad_files_are_one_line_and_exit_code_2(tmp_path, capsys, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    code, printed = run_tool(capsys, path)
    assert code == 2 and printed.err.count("\n") == 1 and said in printed.err


@pytest.mark.parametrize("name", ["a.txt", "trainer_state.json"])
def test_a_log_that_is_read_whole_is_bounded(tmp_path, monkeypatch, name):
    rows = [{"step": i, "loss": 1.5} for i in range(1, 60)]
    text = "\n".join(map(str, rows)) if name == "a.txt" else json.dumps({"log_history": rows})
    (tmp_path / name).write_text(text)
    assert len(loss_curves.read_curve(tmp_path / name).points.steps) == 59
    small = replace(loss_curves.CURVE_FILE, limit=len(text) - 1)
    monkeypatch.setattr(loss_curves, "CURVE_FILE", small)
    with pytest.raises(UserError, match=rf"{name}: larger than {len(text) - 1:,} bytes"):
        loss_curves.read_curve(tmp_path / name)


def test_a_line_of_csv_is_bounded(tmp_path):
    """It is never held whole, however long it is."""
    (tmp_path / "a.csv").write_text("step,loss\n1,2\n2," + "9" * 100_000)
    limit = csv.field_size_limit(2**20)  # as where samples were read before
    try:
        with pytest.raises(UserError, match=r"a\.csv: not readable as csv \(a line longer than"):
            loss_curves.read_curve(tmp_path / "a.csv")
    finally:
        csv.field_size_limit(limit)


def test_missing_file_and_bad_share(tmp_path, capsys):
    assert run_tool(capsys, tmp_path / "none")[0] == 2
    assert run_tool(capsys, tmp_path)[0] == 2
    assert run_tool(capsys, write_csv(tmp_path / "a.csv", [1.0] * 30), "--upto", "1.5")[0] == 2


def test_epoch_column_tells_the_steps_per_epoch(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("step,loss,epoch\n" + "".join(f"{i},1.0,{i / 40}\n" for i in range(1, 99)))
    assert loss_curves.read_curve(path).steps_per_epoch == pytest.approx(40)


FOREIGN = {
    "trainer_log.jsonl": lambda i, x: json.dumps(  # LLaMA-Factory
        {"current_steps": 5 * i, "total_steps": 500, "loss": x, "lr": 1e-4, "epoch": i / 20}
    ),
    "wandb.csv": lambda i, x: (
        (
            ""
            if i > 1
            else '"Step","run-7 - train/loss","run-7 - train/loss__MIN","run-7 - train/loss__MAX"\n'
        )
        + f'"{5 * i}","{x}","{x}","{x}"'
    ),
    "history.jsonl": lambda i, x: json.dumps(  # wandb: its own count of calls is no step
        {"_step": 2 * i, "_timestamp": 1.0, "train/global_step": 5 * i, "train/loss": x}
    ),
    "swanlab.csv": lambda i, x: (
        ("" if i > 1 else "step,my-run-loss,my-run-loss_timestamp\n") + f"{5 * i},{x},17{i}"
    ),
    "pasted.txt": lambda i, x: (
        f"\r  1%|▏  | {5 * i}/500 [00:10<01:00]\n"
        f"{{'loss': {x}, 'grad_norm': 'nan', 'learning_rate': '1e-05', 'epoch': {i / 20}}}"
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_logs_of_other_tools_give_the_same_curve(tmp_path, name):
    losses = noisy(1 + 2 * np.exp(-np.arange(1, 61) / 15))
    path = tmp_path / name
    path.write_text("\n".join(FOREIGN[name](i, float(x)) for i, x in enumerate(losses, 1)) + "\n")
    curve = loss_curves.read_curve(path)
    assert [p["step"] for p in curve.points] == list(range(5, 301, 5))
    assert [p["Training/Loss"] for p in curve.points] == pytest.approx(list(losses))
    planned = "500" in FOREIGN[name](1, 1.0)
    assert curve.total_steps == (500 if planned else 300)
    assert convergence.describe(curve)["forecast"] is not None


def test_a_pasted_log_without_progress_counts_its_lines(tmp_path):
    path = tmp_path / "log.txt"
    lines = [f"{{'loss': {3 - i / 50}, 'epoch': {i / 10}}}" for i in range(40)]
    path.write_text(
        "some words\n" + "\n".join(lines) + "\n{'train_runtime': 9.0, 'train_loss': 2.0}\n"
    )
    points = loss_curves.read_curve(path).points
    assert [p["step"] for p in points] == list(range(1, 41)) and points[-1][
        "Training/Loss"
    ] == pytest.approx(2.22)


def test_a_folder_of_tensorboards_is_read_by_its_tags(tmp_path):
    from tests.helpers.foreign_events import write_scalars

    for folder, tag in (("hf", "train/loss"), ("lightning", "train_loss")):
        rows = {
            step: {tag: 3 - step / 50, "train/lr": 1e-4, "eval/loss": 9.0} for step in range(1, 60)
        }
        write_scalars(tmp_path / folder / "runs", rows)
        curve = loss_curves.read_curve(tmp_path / folder)
        assert [p["Training/Loss"] for p in curve.points] == pytest.approx(
            [3 - s / 50 for s in range(1, 60)]
        )
        assert curve.points[0]["Training/Learning_Rate"] == pytest.approx(1e-4)
        assert curve.points[0]["Eval/Loss"] == 9.0
    with pytest.raises(UserError, match="name one"):
        loss_curves.read_curve(tmp_path)


def test_null_loss_of_our_log_counts_as_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "Training/Loss": None if i == 7 else 1.0} for i in range(1, 30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = convergence.describe(loss_curves.read_curve(path))
    assert result["nonfinite"] == 1 and result["alerts"] == ["NonFinite"]


def test_missing_loss_raises_user_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "Eval/Loss": 2.0}\n')
    with pytest.raises(UserError, match="no loss"):
        loss_curves.read_curve(path)


# ----------------------------------------------------------------------------- recorded real runs


def recorded(shared_data, number, upto=1.0):
    path = next((shared_data / "loss_curves").glob(f"{number}_*.csv"))
    return convergence.describe(loss_curves.read_curve(path), upto)


@pytest.mark.parametrize("upto", [0.5, 1.0])
def test_rises_at_the_end_of_each_epoch_are_no_alert_but_no_convergence_either(shared_data, upto):
    """Curve 26: a last row of an epoch that is always harder, each time lower than the time before."""
    result = recorded(shared_data, "26", upto)
    assert result["alerts"] == [] and result["score"] < 0.7


@pytest.mark.parametrize("number", ["15", "18", "20"])
@pytest.mark.parametrize("upto", [0.5, 1.0])
def test_broken_runs_alarm_and_do_not_converge(shared_data, number, upto):
    result = recorded(shared_data, number, upto)
    assert result["alerts"] and result["score"] < 0.7


@pytest.mark.parametrize("number", ["02", "03", "05", "09", "11", "12"])
def test_healthy_runs_are_silent_and_converge(shared_data, number):
    half, end = (recorded(shared_data, number, upto) for upto in (0.5, 1.0))
    assert half["alerts"] == end["alerts"] == []
    assert end["score"] > 0.85 and end["score"] > half["score"] - 0.05


def test_a_forecast_is_fitted_where_there_is_more_to_fit(monkeypatch):
    """Of 20,000 logged losses less than every 30th; the first 128, the last one, and as after a resume."""
    fits: list[float] = []
    no_fit = Fit(**dict.fromkeys((f.name for f in dataclasses.fields(Fit)), 0.0))
    monkeypatch.setattr(convergence, "fit_curve", lambda *_, now, **__: fits.append(now) or no_fit)
    monkeypatch.setattr(convergence, "loss_trend", lambda bins: 0.0)
    total, shown = 20_000, {cut: [] for cut in (None, 77, 5_000)}
    for cut, steps in shown.items():
        monitor = ConvergenceMonitor(total)
        fits.clear()
        for step in range(1, total + 1):
            monitor.observe(step, 1 + 1 / step)
            if monitor.is_due() and monitor.scalars():
                steps.append(step)
            if step == cut:
                fitted = len(fits)
                monitor = ConvergenceMonitor(total, state=monitor.state_dict())
                del fits[fitted:]  # those of the trial of what it remembers
        assert fits == [step for step in steps if step >= convergence.MIN_POINTS]
    steps = shown[None]
    assert shown[77] == shown[5_000] == steps
    assert steps[:128] == list(range(1, 129)) and steps[-1] == total
    assert all(b - a <= total / 64 for a, b in itertools.pairwise(steps))
    assert 128 + 64 * 7 < len(steps) < total / 30


def test_a_resume_of_an_earlier_version_goes_on():
    """Its state also held the fit, which is made anew."""
    first = watch(noisy(1 + 2 * np.exp(-STEPS / 100))[:300], total=600)
    old = first.state_dict() | {"fitted": 290, "fit": {"score": 0.9}}
    assert ConvergenceMonitor(600, state=old).scalars() == first.scalars()
