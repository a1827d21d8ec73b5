"""Records, whole files, names that sort last, and rewinding a run, without the logger."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from finetuning.events import event_file

ROOT = Path(__file__).resolve().parents[2]


def scalars_event(step: int, **scalars: float) -> bytes:
    event = Event(wall_time=1.0, step=step)
    for tag, value in scalars.items():
        event.summary.value.add(tag=tag, simple_value=value)
    return event_file.frame(event.SerializeToString())


def write_file(run_dir: Path, start: int, *records: bytes) -> Path:
    file = event_file.create_event_file(run_dir, start)
    for record in records:
        file.append(record)
    file.close()
    return file.path


def steps(run_dir: Path, tag: str) -> list[int]:
    events = event_file.surviving_events(event_file.event_files(run_dir))
    return [event.step for event in events for value in event.summary.value if value.tag == tag]


def test_reads_what_tensorboard_writes(tmp_path):
    writer = EventFileWriter(str(tmp_path))
    for step in range(5):
        event = Event(step=step)
        event.summary.value.add(tag="a", simple_value=step)
        writer.add_event(event)
    writer.close()
    assert steps(tmp_path, "a") == [0, 1, 2, 3, 4]


def test_tensorboard_reads_what_is_written(tmp_path):
    path = write_file(tmp_path, 0, *(scalars_event(step, a=step) for step in range(5)))
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [event.step for event in reader.Scalars("a")] == [0, 1, 2, 3, 4]
    assert reader.file_version == 2.0
    assert "tfevents" in path.name


def test_a_record_torn_at_any_byte_costs_only_itself(tmp_path):
    whole = scalars_event(1, a=1)
    path = tmp_path / "records"
    for length in range(len(whole)):
        path.write_bytes(whole + scalars_event(2, a=2)[:length])
        assert [end for end, _ in event_file.read_records(path)] == [len(whole)]


def test_a_flipped_bit_in_the_payload_costs_only_its_record(tmp_path):
    first, second = bytearray(scalars_event(1, a=1)), scalars_event(2, a=2)
    first[20] ^= 1
    path = tmp_path / "records"
    path.write_bytes(bytes(first) + second)
    payloads = [payload for _, payload in event_file.read_records(path)]
    assert payloads[0] is None
    assert Event.FromString(payloads[1]).step == 2


def test_zeros_at_the_tail_are_no_records(tmp_path):
    path = tmp_path / "records"
    path.write_bytes(scalars_event(1, a=1) + bytes(4096))
    assert len(list(event_file.read_records(path))) == 1


def test_every_name_sorts_last(tmp_path):
    """Also within one second and after the clock went back ten years."""
    (tmp_path / "events.out.tfevents.2111111111.host.99999.7").write_bytes(b"")
    names = [write_file(tmp_path, 0).name for _ in range(3)]
    assert [path.name for path in event_file.event_files(tmp_path)][1:] == names


def test_start_withdraws_what_came_before(tmp_path):
    write_file(tmp_path, 0, *(scalars_event(step, a=step) for step in range(10)))
    write_file(tmp_path, 5, scalars_event(5, a=50))
    write_file(tmp_path, 3, scalars_event(3, a=30), scalars_event(8, a=80))
    assert steps(tmp_path, "a") == [0, 1, 2, 3, 8]


def test_rewind_keeps_the_checkpoint_and_nothing_later(tmp_path):
    write_file(tmp_path, 0, *(scalars_event(step, a=step) for step in range(1, 8)))
    second = [scalars_event(8, a=8, sparse=8), scalars_event(9, a=9), scalars_event(12, orphan=1)]
    old = write_file(tmp_path, 8, *second, scalars_event(13, a=13)[:-3])
    assert event_file.rewind_events(tmp_path, event_file.Rewind(9)) == {"a": 9, "sparse": 8}
    assert steps(tmp_path, "a") == list(range(1, 10))
    assert steps(tmp_path, "sparse") == [8]
    assert steps(tmp_path, "orphan") == []
    files = event_file.event_files(tmp_path)
    assert old.stat().st_size == files[0].stat().st_size == 40  # the version record
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [event.step for event in reader.Scalars("a")] == list(range(1, 10))
    assert reader.Tags()["scalars"] == ["a", "sparse"]


def test_rewind_takes_back_the_end_of_the_session(tmp_path):
    ended = scalars_event(3, **{event_file.SESSION_END_TAG: 1, "a": 3})
    write_file(tmp_path, 0, ended, scalars_event(3, **{event_file.SESSION_END_TAG: 1}))
    assert event_file.rewind_events(tmp_path, event_file.Rewind(3)) == {"a": 3}


def test_rewind_after_a_crash_between_rename_and_cut(tmp_path):
    """Old files still whole beside the copy: nothing is doubled."""
    write_file(tmp_path, 0, *(scalars_event(step, a=step) for step in range(1, 8)))
    write_file(tmp_path, 0, *(scalars_event(step, a=step) for step in range(1, 5)))
    (tmp_path / ".compact-1.tmp").write_bytes(b"left by the crash")
    event_file.rewind_events(tmp_path, event_file.Rewind(4))
    assert steps(tmp_path, "a") == [1, 2, 3, 4]
    assert not list(tmp_path.glob(".compact*"))


def test_rewind_of_an_empty_directory(tmp_path):
    assert event_file.rewind_events(tmp_path / "absent", event_file.Rewind(4)) == {}


LIMITED = """
import resource, signal, sys
from pathlib import Path
from finetuning.events import event_file
from tests.events import test_event_file as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Path(sys.argv[1])
def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""


def run_limited(script: str, run_dir: Path) -> str:
    """Run `script` in a process that can limit the size of its files, as a full disk would."""
    pytest.importorskip("resource", reason="no limit on file sizes on this system")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", LIMITED + script, str(run_dir)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.mark.slow
def test_a_failed_append_leaves_no_torn_record(tmp_path):
    script = """
path = run / "f"
file = event_file.AppendFile(path)
file.append(t.scalars_event(1, a=1))
good = file.size
limit(good + 10)
try:
    file.append(t.scalars_event(2, a=2))
except OSError as error:
    print(error.errno, path.stat().st_size - good)
limit(1 << 20)
file.append(t.scalars_event(3, a=3))
print(len(list(event_file.read_records(path))))
"""
    assert run_limited(script, tmp_path).split() == ["27", "0", "2"]


def test_a_disk_that_recovers_has_room_for_all_that_waits(tmp_path, monkeypatch):
    """What was written leaves the backlog: many megabytes later, a short fault still loses nothing."""
    monkeypatch.setattr(event_file, "BACKLOG_BYTES", 1000)
    monkeypatch.setattr(event_file, "RETRY_SECONDS", 0.0)
    path, record, faults = tmp_path / "f", scalars_event(1, a=1), []

    def open_file() -> event_file.AppendFile:
        if faults:
            raise OSError(28, "No space left on device")
        return event_file.AppendFile(path)

    file = event_file.RetryingFile(open_file, lambda kind, text: None)
    for _ in range(3 * 1000 // len(record)):
        file.write(record, 1)
    before = path.stat().st_size
    faults.append(True)
    file._release()
    waiting = 1000 // len(record)
    for _ in range(waiting + 2):
        file.write(record, 1)
    assert file.dropped == 2, "the bound is the bytes that wait, not all that ever passed"
    faults.clear()
    file.drain(now=True)
    assert path.stat().st_size == before + waiting * len(record)


@pytest.mark.slow
def test_rewind_without_space_for_a_copy(tmp_path):
    """Every file is cut at its first event beyond the checkpoint; no reader sees the dead branch."""
    script = """
records = [t.scalars_event(s, a=s, sparse=s) for s in range(1, 201)]
t.write_file(run, 0, *records)
limit(2000)
print(event_file.rewind_events(run, event_file.Rewind(100)))
t.write_file(run, 101, t.scalars_event(101, a=-1))
"""
    assert run_limited(script, tmp_path).strip() == "{'a': 100, 'sparse': 100}"
    assert steps(tmp_path, "a") == list(range(1, 102))
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [event.step for event in reader.Scalars("a")] == list(range(1, 102))
    assert not list(tmp_path.glob(".compact*"))


@pytest.mark.slow
def test_a_failed_start_leaves_no_empty_file(tmp_path):
    script = """
limit(10)
for _ in range(3):
    try:
        event_file.create_event_file(run, 0)
    except OSError:
        print(len(list(run.iterdir())))
"""
    assert run_limited(script, tmp_path).split() == ["0", "0", "0"]


def test_rewind_of_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join([*lines, "no json\n", '{"step": 4}\n', '{"step": 2, "to']))
    event_file.rewind_lines(path, event_file.Rewind(2))
    assert path.read_text() == "".join(lines[:2])
    event_file.rewind_lines(tmp_path / "absent", event_file.Rewind(2))


def test_rewound_lines_are_on_the_disk_before_they_take_the_place_of_all(tmp_path, monkeypatch):
    """Else a power cut after the rename may leave an empty file where all points were."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    synced, replaced, fsync, replace = {}, {}, os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def note_replace(source, target) -> None:
        replaced[os.stat(source).st_ino] = os.stat(source).st_size
        assert replaced.items() <= synced.items()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(Path, "replace", note_replace)
    event_file.rewind_lines(path, event_file.Rewind(1))
    assert list(replaced.values()) == [len('{"step": 1}\n')]


def test_a_torn_line_is_cut_before_the_next_one(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    file = event_file.open_lines(path)
    file.append(b'{"step": 1}\n{"st')
    file.close()
    file = event_file.open_lines(path)
    file.append(b'{"step": 2}\n')
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_checksum_is_that_of_the_format():
    """CRC-32C of "123456789" is 0xE3069283 (RFC 3720), masked as in TensorFlow's record writer."""
    crc = 0xE3069283
    expected = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    assert event_file.masked_crc(b"123456789") == expected
    assert struct.unpack("<Q", event_file.frame(b"abc")[:8]) == (3,)


def test_start_is_recognised():
    start = Event(session_log=SessionLog(status=SessionLog.START))
    stop = Event(session_log=SessionLog(status=SessionLog.STOP))
    assert event_file.is_start(start)
    assert not event_file.is_start(stop)
    assert not event_file.is_start(Event(step=3))


# --- tags of users over another axis -----------------------------------------------------------------

REACH = event_file.Rewind(2, {"Custom/By_Tokens": 900})


def own_axis(tmp_path, ended: bool = True) -> None:
    """Ours over steps 1 to 3, a user's over tokens; the checkpoint is that of step 2 and 900 tokens."""
    ends = {event_file.SESSION_END_TAG: 1} if ended else {}
    events = [scalars_event(0, **ends, **{"_hparams_/session_start_info": 1})]
    for step, tokens in ((1, 500), (2, 900), (3, 1300)):
        events.append(scalars_event(step, **{"Training/Loss": step}))
        events.append(scalars_event(tokens, **{"Custom/By_Tokens": step}))
    events.append(scalars_event(1, **{"Custom/Late": 1}))  # began behind the checkpoint
    write_file(tmp_path, 0, *events)


def test_rewind_goes_by_how_far_a_users_tag_had_got(tmp_path):
    own_axis(tmp_path)
    kept = event_file.rewind_events(tmp_path, REACH)
    assert kept == {
        "_hparams_/session_start_info": 0, "Training/Loss": 2, "Custom/By_Tokens": 900,
    }  # fmt: skip
    assert steps(tmp_path, "Custom/By_Tokens") == [500, 900]
    assert steps(tmp_path, "Training/Loss") == [1, 2]


def test_without_knowing_how_far_all_tags_are_over_steps(tmp_path):
    own_axis(tmp_path)
    event_file.rewind_events(tmp_path, event_file.Rewind(2))
    assert steps(tmp_path, "Custom/By_Tokens") == [] and steps(tmp_path, "Custom/Late") == [1]


def test_tags_that_a_session_writes_anew_are_left_out(tmp_path):
    own_axis(tmp_path)
    rewind = event_file.Rewind(2, REACH.reach, without=("_hparams_/session_start_info",))
    assert "_hparams_/session_start_info" not in event_file.rewind_events(tmp_path, rewind)


def test_a_full_disk_keeps_all_up_to_the_first_point_that_goes(tmp_path, monkeypatch):
    own_axis(tmp_path, ended=False)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(event_file, "durable_file", full)
    event_file.rewind_events(tmp_path, REACH)
    assert steps(tmp_path, "Custom/By_Tokens") == [500, 900]
    assert steps(tmp_path, "Training/Loss") == [1, 2] and steps(tmp_path, "Custom/Late") == []


def test_lines_lose_the_numbers_that_go_and_keep_the_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    both = {"Training/Loss": 1.0, "Custom/By_Tokens": None}
    records = [
        {"step": 900, "time": 1.0, "metrics": {"Custom/By_Tokens": 2.0}},
        {"step": 3, "time": 2.0, "metrics": both, "nonfinite": {"Custom/By_Tokens": "NaN"}},
        {"step": 2, "time": 2.0, "metrics": {"Training/Loss": 2.0, "Custom/Late": 1.0}},
        {"step": 1300, "time": 3.0, "metrics": {"Custom/By_Tokens": 3.0}},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    event_file.rewind_lines(path, REACH)
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["metrics"]) for r in left] == [
        (900, {"Custom/By_Tokens": 2.0}),
        (3, {"Custom/By_Tokens": None}),
        (2, {"Training/Loss": 2.0}),
    ]
    assert left[1]["nonfinite"] == {"Custom/By_Tokens": "NaN"}
