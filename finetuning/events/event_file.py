"""Event files: TensorBoard's record framing, files that stay whole, and rewinding a run to a step.

A record is `length (u64) | masked CRC-32C of length | payload | masked CRC-32C of payload`, the payload
one `Event`. All readers of TensorBoard sort the files of a run by name and never return to an older one,
so this module never appends to a file that an earlier process or a failed write has left behind.
"""

import contextlib
import json
import math
import os
import re
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from finetuning.common.files import atomic_write, durable_file, fsync_directory
from finetuning.events.metric_table import is_custom

FILE_VERSION = "brain.Event:2"
SESSION_END_TAG = "_hparams_/session_end_info"
_SHORT = 64  # bytes; a SessionLog START is shorter, so longer payloads need no parsing to find one
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADER = struct.Struct("<QI")
BACKLOG_BYTES = 8 << 20
RETRY_SECONDS = 1.0


# --- records ---------------------------------------------------------------------------------


def masked_crc(data: bytes) -> int:
    """CRC-32C rotated right by 15 bits plus a constant, as the TFRecord format wants it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """One record with `payload` inside."""
    length = _LENGTH.pack(len(payload))
    return b"".join(
        (length, _CRC.pack(masked_crc(length)), payload, _CRC.pack(masked_crc(payload)))
    )


def read_records(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield (end offset, payload) of every whole record; a payload with a wrong CRC comes as None.

    Stops at a torn record, which is where every reader of TensorBoard stops.
    """
    end = 0
    with open(path, "rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, crc = _HEADER.unpack(header)
            if masked_crc(header[: _LENGTH.size]) != crc:
                return
            if (
                length > os.fstat(file.fileno()).st_size - file.tell()
            ):  # and nothing is set aside for it
                return
            body = file.read(length + _CRC.size)
            if len(body) < length + _CRC.size:
                return
            payload = body[:length]
            end += len(header) + len(body)
            yield end, payload if _CRC.unpack(body[length:])[0] == masked_crc(payload) else None


# --- files -----------------------------------------------------------------------------------


class AppendFile:
    """An unbuffered file that is whole after every append: what a failed write left is cut off."""

    def __init__(self, path: Path, flags: int = 0):
        self.path, self._name = path, os.fspath(path)
        flags |= os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._fd = os.open(path, flags, 0o644)
        self.size = os.fstat(self._fd).st_size

    def append(self, data: bytes) -> None:
        """Write all of `data` or, with OSError, none of it."""
        view, written = memoryview(data), 0
        try:
            while written < len(view):  # a nearly full disk first takes a part
                written += os.write(self._fd, view[written:])
        except OSError:
            with contextlib.suppress(OSError):  # cutting works on a full disk
                os.ftruncate(self._fd, self.size)
            raise
        self.size += written

    def in_place(self) -> bool:
        """False if the path was deleted or replaced; writes would then go to no visible file."""
        try:
            there, here = os.stat(self._name), os.fstat(self._fd)
        except OSError:
            return False
        return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close; nothing is buffered, so nothing is written here."""
        os.close(self._fd)


class RetryingFile:
    """A file that is reopened after faults. Records wait in a bounded backlog while the disk refuses.

    `open_file()` gives a fresh `AppendFile`. `tell(kind, text)` hears of each kind of fault. A record that
    finds the backlog full is lost; its points are added to `.dropped`.
    """

    def __init__(self, open_file: Callable[[], AppendFile], tell: Callable[[str, str], None]):
        self._open_file, self._tell = open_file, tell
        self._file: AppendFile | None = None
        self._backlog: deque[tuple[bytes, int]] = deque()
        self._backlog_bytes = 0
        self._retry_at = 0.0
        self.dropped = 0

    @property
    def waiting(self) -> bool:
        """Whether records wait for the disk, or the file itself does."""
        return bool(self._backlog) or self._file is None

    def write(self, record: bytes, points: int) -> None:
        """Append now, or keep for later, or drop and count. Never raises OSError."""
        if self._backlog_bytes + len(record) > BACKLOG_BYTES and self._backlog:
            self.dropped += points
            return
        self._backlog.append((record, points))
        self._backlog_bytes += len(record)
        self.drain()

    def drain(self, now: bool = False) -> None:
        """Open the file if need be and write the backlog; at most one try a second unless `now`."""
        if time.monotonic() < self._retry_at and not now:
            return
        try:
            self.ready()
            while self._backlog:
                self._file.append(self._backlog[0][0])
                self._backlog_bytes -= len(self._backlog.popleft()[0])
        except OSError as error:
            self._failed(error)

    def ready(self) -> None:
        """Have an open file that is still at its path. May raise OSError."""
        if self._file is not None and not self._file.in_place():
            self._tell("deleted", f"{self._file.path} was deleted; logging goes on in a new file")
            self._release()
        if self._file is None:
            self._file = self._open_file()

    def sync(self) -> None:
        """`drain`, then wait until the file is on the disk."""
        self.drain(now=True)
        try:
            if self._file is not None:
                self._file.sync()
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        """Last attempt to write; what still waits is dropped and counted."""
        self.sync()
        self._release()
        self.dropped += sum(points for _, points in self._backlog)
        self._backlog.clear()

    def _failed(self, error: OSError) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._release()
        self._tell(
            f"disk {error.errno}",
            f"cannot write the log ({error}); training goes on, points wait in memory "
            f"({BACKLOG_BYTES >> 20} MB) and are dropped beyond that",
        )

    def _release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def event_files(run_dir: Path) -> list[Path]:
    """The event files of one run (not of runs below it), in the order in which readers take them."""
    if not run_dir.is_dir():
        return []
    return sorted(path for path in run_dir.iterdir() if "tfevents" in path.name and path.is_file())


def next_event_path(run_dir: Path) -> Path:
    """A name that sorts after every event file there, also with a clock that stood still or went back."""
    stamps = (re.search(r"tfevents\.(\d+)", path.name) for path in event_files(run_dir))
    newest = max((int(match[1]) for match in stamps if match), default=0)
    stamp = max(int(time.time()), newest + 1)
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"
    return run_dir / f"events.out.tfevents.{stamp:010d}.{host}.{os.getpid()}.0"


def opening_records(start_step: int) -> bytes:
    """The two records every file starts with: version and SessionLog START at `start_step`."""
    now = time.time()
    start = Event(wall_time=now, step=start_step, session_log=SessionLog(status=SessionLog.START))
    version = Event(wall_time=now, file_version=FILE_VERSION)
    return frame(version.SerializeToString()) + frame(start.SerializeToString())


def create_event_file(run_dir: Path, start_step: int, preamble: bytes = b"") -> AppendFile:
    """A new last event file. START withdraws earlier events with step >= `start_step` in all readers."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = AppendFile(next_event_path(run_dir), os.O_EXCL)
    try:
        file.append(opening_records(start_step) + preamble)
    except OSError:
        file.close()
        file.path.unlink(missing_ok=True)  # else every retry on a full disk leaves an empty file
        raise
    return file


# --- reading ---------------------------------------------------------------------------------


def is_start(event: Event) -> bool:
    """Whether the event is a SessionLog START."""
    return event.HasField("session_log") and event.session_log.status == SessionLog.START


def parsed(payload: bytes) -> Event:
    """The event of a record; an empty one where the bytes are none of TensorBoard's, though whole."""
    try:
        return Event.FromString(payload)
    except DecodeError:
        return Event()


def _payloads(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        for _, payload in read_records(path):
            if payload is not None:
                yield payload


def surviving_events(paths: Sequence[Path], holding: bytes = b"") -> Iterator[Event]:
    """Events with a summary, in file order, without those that a later START withdraws.

    holding: of long events only those whose bytes hold these; parsing takes most of the time.
    """
    short = (parsed(p) for p in _payloads(paths) if len(p) < _SHORT)
    limits = [event.step for event in short if is_start(event)] + [math.inf]
    for i in reversed(range(len(limits) - 1)):  # limits[i]: lowest step withdrawn from START i on
        limits[i] = min(limits[i], limits[i + 1])
    passed = 0
    for payload in _payloads(paths):
        if len(payload) >= _SHORT and holding not in payload:
            continue
        event = parsed(payload)
        if is_start(event):
            passed = min(passed + 1, len(limits) - 1)  # a live file may have grown since
        elif event.HasField("summary") and event.step < limits[passed]:
            yield event


# --- rewinding a run to a checkpoint -------------------------------------------------------------


@dataclass(frozen=True)
class Rewind:
    """Which points stay when a run goes back to a checkpoint.

    Ours are over optimizer steps. A tag of a user's may be over tokens, seconds or samples: what counts is
    how far it had got when the checkpoint was written, as its steps rise.

    step: of the checkpoint. reach: last step of each custom tag there; None: not known, all tags are taken
    to be over optimizer steps. without: tags of which nothing stays.
    """

    step: int
    reach: Mapping[str, int] | None = None
    without: tuple[str, ...] = ()

    def keeps(self, tag: str, step: float) -> bool:
        """Whether the point of a tag at this step was there at the checkpoint."""
        if tag in self.without:
            return False
        if self.reach is None or not is_custom(tag):
            return step <= self.step
        return step <= self.reach.get(tag, -math.inf)


def rewind_events(run_dir: Path, rewind: Rewind) -> dict[str, int]:
    """Remove all points that `rewind` does not keep; return the last step of every tag that is left.

    The kept records are copied to a new file that sorts last, then the old files are cut to their version
    record. Deleting them would leave a live server at the dead branch for ever. If the copy fails (disk
    full), every file is cut at its first event that has to go instead.
    """
    for stale in run_dir.glob(".compact-*.tmp"):
        stale.unlink(missing_ok=True)
    paths = event_files(run_dir)
    if not paths:
        return {}
    temporary = run_dir / f".compact-{os.getpid()}.tmp"  # readers load any name with "tfevents"
    try:
        with durable_file(temporary, buffering=1 << 20) as file:
            last_steps = _copy_kept(paths, rewind, file)
        temporary.replace(next_event_path(run_dir))
        fsync_directory(run_dir)
    except OSError:
        temporary.unlink(missing_ok=True)
        for path in paths:
            os.truncate(path, _end_of_kept(path, rewind))
        return _last_steps(surviving_events(paths))
    for path in paths:
        os.truncate(path, _version_end(path))
    return last_steps


def _copy_kept(paths: Sequence[Path], rewind: Rewind, file: BinaryIO) -> dict[str, int]:
    last_steps: dict[str, int] = {}
    file.write(opening_records(0))
    for event in surviving_events(paths):
        if _keep_values(event, rewind):
            last_steps.update(_last_steps([event]))
            file.write(frame(event.SerializeToString()))
    return last_steps


def _keep_values(event: Event, rewind: Rewind) -> bool:
    """Drop the values that have to go, and the one that says the run has ended; False if none is left."""
    values = event.summary.value
    for i in reversed(range(len(values))):
        if values[i].tag == SESSION_END_TAG or not rewind.keeps(values[i].tag, event.step):
            del values[i]
    return bool(values)


def _last_steps(events: Iterator[Event] | Sequence[Event]) -> dict[str, int]:
    return {value.tag: event.step for event in events for value in event.summary.value}


def _end_of_kept(path: Path, rewind: Rewind) -> int:
    """Offset of the end of the last record before the first one with a value that has to go."""
    end = 0
    for record_end, payload in read_records(path):
        event = parsed(payload) if payload is not None else None
        if event is None:
            break
        count = len(event.summary.value)
        if count and not (_keep_values(event, rewind) and len(event.summary.value) == count):
            break
        end = record_end
    return end


def _version_end(path: Path) -> int:
    for end, payload in read_records(path):
        is_version = payload is not None and parsed(payload).HasField("file_version")
        return end if is_version else 0
    return 0


# --- metrics.jsonl -----------------------------------------------------------------------------


def _kept_line(line: bytes, rewind: Rewind) -> bytes:
    """The line as it is, or without the numbers that have to go; empty where none stays."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else {}
        step, metrics = record["step"], record.get("metrics")
        if not isinstance(metrics, dict):  # of another file, such as alerts.jsonl
            return line if step <= rewind.step else b""
        kept = {tag: value for tag, value in metrics.items() if rewind.keeps(tag, step)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return b""
    if len(kept) == len(metrics):
        return line if kept or step <= rewind.step else b""
    record["metrics"] = kept
    if "nonfinite" in record:
        record["nonfinite"] = {t: kind for t, kind in record["nonfinite"].items() if t in kept}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n" if kept else b""


def rewind_lines(path: Path, rewind: Rewind) -> None:
    """Remove the numbers of a JSONL file that `rewind` does not keep, and broken lines; atomic rewrite."""
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with atomic_write(path, temporary) as new, open(path, "rb") as old:
            new.writelines(_kept_line(line, rewind) for line in old)
    except OSError:
        os.truncate(path, _kept_lines_end(path, rewind))


def _kept_lines_end(path: Path, rewind: Rewind) -> int:
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if _kept_line(line, rewind) != line:
                break
            end += len(line)
    return end


def open_lines(path: Path) -> AppendFile:
    """Open metrics.jsonl to append; a torn last line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with open(path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
    return AppendFile(path)
