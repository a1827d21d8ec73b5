"""A run of any length read back in little memory: curves, times, alerts.

uv run pytest tests/runs/test_series.py
"""

import json
import math
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.common.bounds import CURVE_COLUMNS, CURVES, RECORD, SHOWN_ALERTS
from finetuning.common.errors import UserError
from finetuning.runs.recorded import Alerts
from finetuning.runs.report import page
from finetuning.runs.series import RunSeries, Series, TrainingTime
from tests.runs.test_compare_runs import make_run, recorded


def written(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def records_of(values: dict[int, dict]) -> list[dict]:
    return [{"step": s, "time": 1.0 * s, "metrics": m} for s, m in values.items()]


def test_memory_stays_and_no_spike_is_lost():
    series, count = Series(), 60_000
    spikes = {777: 9.0, 31_001: -9.0, 59_998: 12.0}
    tracemalloc.start()
    for start in range(0, count, 100):
        steps = range(start, start + 100)
        series.extend([(s, spikes.get(s, math.sin(s) / 2)) for s in steps if s != 40_000])
        if start == 39_900:
            series.extend([(40_000, None)])
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 1_000_000
    assert len(series) <= 4 * CURVE_COLUMNS.limit
    found = dict(series)
    assert {step: found[step] for step in spikes} == spikes
    assert list(found) == sorted(found)
    assert series[0] == (0, 0.0) and series[-1][0] == count - 1
    assert math.isnan(found[40_000])


@given(
    st.lists(st.tuples(st.integers(0, 40), st.none() | st.floats(-9, 9)), max_size=60),
    st.integers(1, 20),
)
def test_short_ones_are_kept_whole_and_a_rewound_run_takes_back(points, at_once):
    series, expected = Series(), {}
    for start in range(0, len(points), at_once):
        series.extend(points[start : start + at_once])
    for step, value in points:
        expected = {s: v for s, v in expected.items() if s < step} | {step: value}
    shown = [(s, None if math.isnan(v) else v) for s, v in series]
    assert shown == list(expected.items())


def test_points_keep_their_order_among_records_of_other_tags(tmp_path: Path):
    records = records_of(
        {s: {"a": s + 0.5} | ({"b": -1.0 * s} if s % 3 == 0 else {}) for s in range(50)}
    )
    found = RunSeries.read(written(tmp_path / "metrics.jsonl", records))
    assert found.by_tag["a"] == [(s, s + 0.5) for s in range(50)]
    assert found.by_tag["b"] == [(s, -1.0 * s) for s in range(0, 50, 3)]


def test_more_tags_than_are_read_are_told(tmp_path: Path):
    many = {f"Custom/{i}": 1.0 for i in range(CURVES.limit + 7)}
    run = make_run(tmp_path, "20250101_000000", [])
    written(run.logs / "metrics.jsonl", records_of({1: many}))
    (found,) = recorded(tmp_path)
    assert (len(found.series), found.left_out) == (CURVES.limit, 7)
    assert "7 or more tags are not shown" in page(found)


def test_of_many_alerts_the_newest_are_shown(tmp_path: Path):
    run = make_run(tmp_path, "20250101_000000", [1.0])
    alerts = [{"name": "Loss_Spike", "step": i, "advice": f"advice {i}."} for i in range(900)]
    written(run.logs / "alerts.jsonl", alerts)
    (found,) = recorded(tmp_path)
    assert (found.alerts.count, len(found.alerts.newest)) == (900, SHOWN_ALERTS.limit)
    text = page(found)
    assert "advice 899." in text and "advice 399." not in text and "500 of 900" in text


@pytest.mark.parametrize("line", ["[1]\n", "7\n", '{"step":\n', "[" * 100_000 + "\n", "\xff\n"])
def test_alerts_of_another_kind_are_one_line(tmp_path: Path, line: str):
    path = tmp_path / "alerts.jsonl"
    path.write_bytes(line.encode("latin-1"))
    with pytest.raises(UserError, match=r"alerts\.jsonl: broken"):
        Alerts.read(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1e400, "time": 0, "metrics": {}}',
        '{"step": 1, "time": 0, "metrics": {"a": "x"}}',
        '{"step": 1, "time": 0, "metrics": {"a": [1, 2]}}',
        f'{{"step": {10**30}, "time": 0, "metrics": {{"a": 1}}}}',
        f'{{"step": 1, "time": 0, "metrics": {{"a": {10**400}}}}}',
        '{"step": null, "time": 0, "metrics": {}}',
        '{"step": 1, "metrics": {}}',
        '{"step": 1, "time": 0, "metrics": [1]}',
        "7",
        "[" * 100_000,
        '"' + "x" * RECORD.limit + '"',
    ],
    ids=lambda line: line[:40],
)
def test_another_kind_of_metrics_file_is_one_line(tmp_path: Path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="not a metrics file"):
        RunSeries.read(path)


EPOCH, RESUMES = "Epoch/Duration_Seconds", "Monitoring/Resume_Count"


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([(0, {}), (10, {}), (25, {})], 25),
        ([(0, {RESUMES: 0}), (10, {RESUMES: 0}), (500, {}), (510, {RESUMES: 1})], 20),
        ([(0, {}), (500, {EPOCH: 9}), (510, {RESUMES: 1}), (512, {})], 9 + 12),
        ([(0, {}), (500, {}), (501, {EPOCH: 9}), (510, {RESUMES: 1}), (512, {})], 9 + 11),
        ([(500, {RESUMES: 3}), (510, {})], 10),
    ],
)
def test_pauses_are_no_training(records, expected):
    time = TrainingTime()
    for at, metrics in records:
        time.take(float(at), metrics)
    assert time.seconds == expected
