"""The logger's thread: gathers the values of a step, makes one event and one JSON line of them, writes.

Training never waits for anything in here. A tag's steps rise strictly: of two values for one tag and step
the later wins while the step is still open, and a value that comes later or for an earlier step is dropped
and counted.
"""

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from finetuning.common import text
from finetuning.events import event_values, metric_table
from finetuning.events.event_file import (
    AppendFile,
    RetryingFile,
    create_event_file,
    event_files,
    frame,
    open_lines,
)

LINGER_SECONDS = 0.1  # a step stays open this long for calls that belong to it
# The thread looks for work this often. Waking it on every call would cost the caller 10 to 50 us.
POLL_SECONDS = 0.02  # while a step is open; this much is lost by kill -9, besides the open step
IDLE_POLL_SECONDS = 0.1
# Written again at the top of the first file when somebody deleted the run directory.
_PREAMBLE_TAGS = (event_values.EXPERIMENT_TAG, event_values.SESSION_START_TAG)


class Item(NamedTuple):
    """What a caller hands over: numbers, or a function that makes a `Summary.Value` in the thread."""

    step: int
    wall_time: float
    own_time: bool  # the caller gave `wall_time`, so the value gets an event of its own
    content: dict[str, float] | Callable[[], Summary.Value]
    weight: int  # bytes that `content` holds, about


class Request(NamedTuple):
    """Write what came before; `done` is set afterwards."""

    done: threading.Event
    durable: bool = False  # wait for the disk too
    last: bool = False  # and end the thread


def json_line(step: int, wall_time: float, scalars: dict[str, float]) -> bytes:
    """One strict JSON object; a non-finite number is null, its kind is named under "nonfinite"."""
    record: dict[str, Any] = {"step": step, "time": round(wall_time, 3), "metrics": scalars}
    odd = {tag: value for tag, value in scalars.items() if not math.isfinite(value)}
    if odd:
        record["metrics"] = scalars | dict.fromkeys(odd)
        record["nonfinite"] = {tag: json.dumps(value) for tag, value in odd.items()}
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class StepWriter:
    """Owns the files of a run. Only the thread that runs `run` may call its methods."""

    def __init__(
        self,
        run_dir: Path,
        metrics_path: Path | None,
        resume_step: int | None,
        last_steps: dict[str, int],
        tell: Callable[[str, str], None],
    ):
        self._run_dir, self._tell = run_dir, tell
        self._resume_step = -1 if resume_step is None else resume_step
        self._last_steps = last_steps
        self._described = set(last_steps)  # their first value already carries the description
        self._highest_step = max(last_steps.values(), default=-1)
        self._highest_step = max(self._highest_step, self._resume_step)
        self._layout = event_values.layout_value(metric_table.LAYOUT)
        self._preamble: dict[str, Summary.Value] = {}
        self._events = RetryingFile(self._open_event_file, tell)
        self._lines = RetryingFile(lambda: open_lines(metrics_path), tell) if metrics_path else None
        self._key: tuple[int, float | None] | None = None
        self._wall_time = 0.0
        self._close_at = math.inf  # monotonic seconds
        self._scalars: dict[str, float] = {}
        self._values: dict[str, Summary.Value] = {}
        self._clean_tags: set[str] = set()  # tags that are written as they were given
        self._late = 0
        self.weight_done = 0  # bytes of the items taken so far

    @property
    def dropped(self) -> int:
        """Values that are in no event file."""
        return self._late + self._events.dropped

    @property
    def dropped_lines(self) -> int:
        """Steps that are not in metrics.jsonl."""
        return self._lines.dropped if self._lines else 0

    @property
    def tags(self) -> frozenset[str]:
        """Every tag that has a value."""
        return frozenset(dict(self._last_steps))

    @property
    def reach(self) -> dict[str, int]:
        """Last step of every custom tag, as `event_file.Rewind` takes it."""
        steps = dict(self._last_steps)
        return {tag: step for tag, step in steps.items() if metric_table.is_custom(tag)}

    def run(self, items: "deque[Item | Request]", wake: threading.Event) -> None:
        """Write until a request says that it is the last. `wake` cuts the pause between two looks short."""
        while True:
            while items:
                if self._survive(items.popleft()):
                    return
            self._survive(None)
            wake.wait(IDLE_POLL_SECONDS if self._key is None else POLL_SECONDS)
            wake.clear()

    def _survive(self, item: Item | Request | None) -> bool:
        """The write boundary: what goes wrong with a value costs this value, never the run."""
        try:
            return self._handle(item)
        except Exception as error:
            self._late += 1
            self._tell(f"value {type(error).__name__}", f"a value was not logged: {error!r}")
        if not isinstance(item, Request):
            return False
        item.done.set()
        return item.last

    def _handle(self, item: Item | Request | None) -> bool:
        """Take one item or, without one, do what time asks for. True after the last request."""
        if isinstance(item, Item):
            self._add(item)
        elif isinstance(item, Request):
            self._close_step()
            return self._answer(item)
        elif time.monotonic() >= self._close_at:
            self._close_step()
        else:
            self._retry()
        return False

    def _answer(self, request: Request) -> bool:
        try:
            for file in filter(None, (self._events, self._lines)):
                if request.last:
                    file.close()
                elif request.durable:
                    file.sync()
                else:
                    file.drain(now=True)
        finally:
            request.done.set()
        return request.last

    def _retry(self) -> None:
        for file in filter(None, (self._events, self._lines)):
            if file.waiting:
                file.drain()

    def _add(self, item: Item) -> None:
        self.weight_done += item.weight
        key = (item.step, item.wall_time if item.own_time else None)
        if key != self._key:
            self._close_step()
            self._key, self._wall_time = key, item.wall_time
            self._close_at = time.monotonic() + LINGER_SECONDS
        if isinstance(item.content, dict):
            self._add_scalars(item.step, item.content)
            return
        value = item.content()
        if self._takes(value.tag, item.step):
            self._values[value.tag] = value
            self._scalars.pop(value.tag, None)

    def _add_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Most steps are new and hold known tags only; then there is nothing to look at one by one."""
        if step > self._highest_step and not self._values and self._clean_tags.issuperset(scalars):
            self._scalars.update(scalars)
            return
        for given, number in scalars.items():
            tag = clean_tag(given)
            if tag == given:
                self._clean_tags.add(tag)
            if self._takes(tag, step):
                self._scalars[tag] = number
                self._values.pop(tag, None)

    def _takes(self, tag: str, step: int) -> bool:
        """Whether `tag` may have a value at `step`."""
        last = self._last_steps.get(tag)
        if last is None or last < step:
            return True
        if step > self._resume_step:  # else the run holds the value from before the resume
            self._late += 1
            self._tell("order", f"dropped {tag} at step {step}: it already has step {last}")
        return False

    def _close_step(self) -> None:
        """Make the open step one event and one line."""
        if self._key is None:
            return
        (step, _), scalars, values = self._key, self._scalars, self._values
        self._key, self._close_at, self._scalars, self._values = None, math.inf, {}, {}
        if not scalars and not values:
            return
        self._last_steps |= dict.fromkeys((*scalars, *values), step)
        self._highest_step = max(self._highest_step, step)
        self._preamble |= {tag: values[tag] for tag in _PREAMBLE_TAGS if tag in values}
        self._events.drain()  # notices a deleted directory before descriptions are left out
        event = self._event(step, scalars, values)
        if count := len(event.summary.value):
            self._events.write(frame(event.SerializeToString()), count)
        if scalars and self._lines is not None:
            self._lines.write(json_line(step, self._wall_time, scalars), 1)

    def _event(self, step: int, scalars: dict, values: dict) -> Event:
        event = Event(wall_time=self._wall_time, step=step)
        add = event.summary.value.add
        for tag, number in scalars.items():
            if metric_table.is_detail(tag):
                continue
            if not number and tag not in self._described and metric_table.is_quiet(tag):
                continue
            value = add(tag=tag, simple_value=number)
            if tag not in self._described:
                self._described.add(tag)
                if description := metric_table.description(tag):
                    value.metadata.CopyFrom(event_values.scalar_metadata(description))
        event.summary.value.extend(values.values())
        return event

    def _open_event_file(self) -> AppendFile:
        if self._highest_step >= 0 and event_files(self._run_dir):
            return create_event_file(self._run_dir, self._highest_step + 1)
        # A new run, one that begins again, or one whose directory was deleted.
        self._described.clear()
        first = Event(wall_time=time.time(), step=0)
        first.summary.value.extend([self._layout, *self._preamble.values()])
        return create_event_file(self._run_dir, 0, frame(first.SerializeToString()))


def clean_tag(tag: str) -> str:
    """A tag without control characters and lone surrogates, which no protocol buffer can hold."""
    return text.clean_line(str(tag), limit=300)
