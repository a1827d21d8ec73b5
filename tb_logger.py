"""The TensorBoard logger: one dict per step in, one event per step out, never in training's way.

    logger = TensorBoardLogger(run_dir, metrics_path=logs / "metrics.jsonl")
    logger.log(step, {"Training/Loss": 1.25, "Training/Learning_Rate": 2e-4})
    logger.add_scalar("Custom/My_Metric", value, step)  # add_text, add_image, ... as SummaryWriter has them
    logger.close("success")

A call copies its arguments into a queue; a daemon thread encodes and writes. Nothing raises into training
and nothing blocks: what can't be written is dropped, counted in `.dropped` and told once through `warn`.
Resume with `resume_step=` the checkpoint's step: later events and JSON lines of the run are removed first.
Calls in a forked child, and a pickled copy of the logger, do nothing.
"""

import atexit
import functools
import os
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.common.errors import UserError
from finetuning.events import event_values
from finetuning.events.event_file import Rewind, event_files, rewind_events, rewind_lines
from finetuning.events.metric_table import HPARAM_METRICS
from finetuning.events.step_writer import Item, Request, StepWriter, clean_tag

MAX_QUEUED_BYTES = 256 << 20
TYPICAL_FIGURE_BYTES = 4 * 800 * 600  # of a figure that is still to be made
_ITEM_BYTES, _NUMBER_BYTES = 400, 100  # what an item and a number in it take in the queue, about


def _print_warning(text: str) -> None:
    print(f"TensorBoard logger: {text}", file=sys.stderr)


def _harmless(method: Callable) -> Callable:
    """Time a call, make it a no-op after close and in a forked child, and let nothing out of it."""

    @functools.wraps(method)
    def call(self: "TensorBoardLogger", *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        if os.getpid() != self._pid:
            return None
        try:
            if self._closed:
                return self._refuse("closed", f"{method.__name__}() after close()")
            return method(self, *args, **kwargs)
        except Exception as error:
            self._refuse(type(error).__name__, f"{method.__name__}(): {error!r}")
        finally:
            self.overhead_seconds += time.perf_counter() - began

    return call


class TensorBoardLogger:
    """The one writer of a run; its `add_` methods have the signatures of torch's SummaryWriter.

    `run_dir` is new, or belongs to the run that is resumed. `metrics_path` is a JSON-lines file with every
    number: the details of the metric table are there only, all are as precise as they were given (events
    hold 32 bits), and a non-finite one is null, its kind beside it. `warn(text)` is told of every kind of
    fault once. Without `global_step` a call belongs to the last step that was logged. `reach`: what the
    logger's own `reach` was at the checkpoint; by it custom tags over another axis than optimizer steps keep
    what they had then. `hparams`: as `add_hparams` takes them; they replace the row of the session before;
    `trial` names the row. Raises UserError if `run_dir` holds another run.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        metrics_path: str | Path | None = None,
        resume_step: int | None = None,
        reach: Mapping[str, int] | None = None,
        hparams: Mapping[str, Any] | None = None,
        trial: str = "",
        warn: Callable[[str], None] = _print_warning,
    ):
        self.run_dir = Path(run_dir)
        self._metrics_path = Path(metrics_path) if metrics_path is not None else None
        self.overhead_seconds = 0.0  # spent by callers
        self._warn, self._told = warn, set()
        self._lock = threading.RLock()  # a signal handler may log, too
        self._pid, self._closed, self._refused, self._weight = os.getpid(), False, 0, 0
        self._refused_lines = 0  # of writers before this one
        self._step = max(0, resume_step or 0)
        self._queue: deque[Item | Request] = deque()
        self._wake = threading.Event()
        without = (event_values.SESSION_START_TAG, event_values.EXPERIMENT_TAG) if hparams else ()
        start = resume_step if resume_step is None else Rewind(resume_step, reach, without)
        self._writer = self._start_writer(start)
        atexit.register(self.close)
        if hparams:
            self.add_hparams(hparams, run_name=trial)

    def _start_writer(self, rewind: Rewind | None) -> StepWriter:
        """A writer that goes on behind a checkpoint, and its thread."""
        last_steps = self._remove_later_points(rewind)
        resume_step = rewind and rewind.step
        writer = StepWriter(self.run_dir, self._metrics_path, resume_step, last_steps, self._tell)
        threading.Thread(
            target=writer.run, args=(self._queue, self._wake), name="tb_logger", daemon=True
        ).start()
        return writer

    def _remove_later_points(self, rewind: Rewind | None) -> dict[str, int]:
        if rewind is None:
            if event_files(self.run_dir):
                raise UserError(
                    f"{self.run_dir} already holds a run: resume it (resume_step=the step of its "
                    "checkpoint, -1 to start it again) or choose another directory"
                )
            return {}
        try:
            if self._metrics_path is not None:
                rewind_lines(self._metrics_path, rewind)
            return rewind_events(self.run_dir, rewind)
        except OSError as error:
            self._tell("rewind", f"points after step {rewind.step} stay in the charts: {error}")
            return {}

    # --- state ---------------------------------------------------------------------------------

    @property
    def dropped(self) -> int:
        """Values that were given and will not be in the event file."""
        return self._refused + self._writer.dropped

    @property
    def dropped_lines(self) -> int:
        """Steps that will not be in metrics.jsonl."""
        return self._refused_lines + self._writer.dropped_lines

    @property
    def reach(self) -> dict[str, int]:
        """Last step of every custom tag that was written; keep it with a checkpoint, after `flush`."""
        return self._writer.reach

    @property
    def tags(self) -> frozenset[str]:
        """Every tag that the run holds by now."""
        return self._writer.tags

    @property
    def log_dir(self) -> str:
        """The run directory, under SummaryWriter's name."""
        return str(self.run_dir)

    def get_logdir(self) -> str:
        """The run directory."""
        return str(self.run_dir)

    def __enter__(self) -> "TensorBoardLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return NullLogger, ()  # a copy in another process writes nothing

    def _tell(self, kind: str, text: str) -> None:
        if kind in self._told:
            return
        self._told.add(kind)
        try:
            self._warn(text)
        except Exception as error:  # a warning must not stop what it warns about
            print(f"TensorBoard logger: {text} (warn() failed: {error!r})", file=sys.stderr)

    def _refuse(self, kind: str, text: str, count: int = 1) -> None:
        with self._lock:
            self._refused += count
        self._tell(kind, f"not logged: {text}")

    # --- handing over ----------------------------------------------------------------------------

    def _put(
        self,
        step: Any,
        wall_time: float | None,
        content: dict[str, float] | Callable[[], Any],
        weight: int = 0,
    ) -> None:
        step = self._step if step is None else int(step)
        own_time = wall_time is not None
        wall_time = float(wall_time) if own_time else time.time()
        count = len(content) if isinstance(content, dict) else 1
        weight += _ITEM_BYTES + _NUMBER_BYTES * count
        with self._lock:
            self._step = max(self._step, step)
            queued = self._weight - self._writer.weight_done
            if queued == 0 or queued + weight <= MAX_QUEUED_BYTES:
                self._weight += weight
                self._queue.append(Item(step, wall_time, own_time, content, weight))
                return
        self._refuse("full", "the disk is slower than training, the queue is full", count)

    def _numbers(self, scalars: Mapping[str, Any]) -> dict[str, float]:
        """A snapshot as floats; what is no number is refused."""
        numbers = dict(scalars)
        if set(map(type, numbers.values())) <= {float}:
            return numbers
        for tag, value in scalars.items():
            try:
                numbers[tag] = float(value.item() if hasattr(value, "item") else value)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                del numbers[tag]
                self._refuse("number", f"{tag}: {error}")
        return numbers

    # --- methods with SummaryWriter's signatures -------------------------------------------------

    @_harmless
    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """All numbers of a step at once. A tensor is read here, so one on a device is waited for."""
        self._put(step, None, self._numbers(scalars))

    @_harmless
    def add_scalar(
        self,
        tag: str,
        scalar_value: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        new_style: bool = False,
        double_precision: bool = False,
    ) -> None:
        """One number, kept as float32; the last two arguments are accepted and change nothing."""
        self._put(global_step, walltime, self._numbers({tag: scalar_value}))

    @_harmless
    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: Mapping[str, Any],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Numbers under `main_tag/<key>` in this run, not in runs of their own."""
        scalars = {f"{main_tag}/{key}": value for key, value in tag_scalar_dict.items()}
        self._put(global_step, walltime, self._numbers(scalars))

    @_harmless
    def add_text(
        self,
        tag: str,
        text_string: str,
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Markdown. Text by strangers or a model belongs into `finetuning.common.text.fenced` first."""
        tag, text = clean_tag(tag), str(text_string)
        build = functools.partial(event_values.text_value, tag, text)
        self._put(global_step, walltime, build, len(text))

    @_harmless
    def add_histogram(
        self,
        tag: str,
        values: Any,
        global_step: int | None = None,
        bins: int | str | Sequence[float] = "tensorflow",
        walltime: float | None = None,
        max_bins: int | None = None,
    ) -> None:
        """Distribution of an array or tensor.

        The default is 64 equal bins between minimum and maximum; other `bins` are numpy's. A tensor on a
        device is counted there at once; anything else is copied here and counted in the thread.
        """
        build, weight = _histogram_builder(clean_tag(tag), values, bins, max_bins)
        self._put(global_step, walltime, build, weight)

    @_harmless
    def log_histogram_counts(
        self,
        tag: str,
        counts: Sequence[float],
        edges: Sequence[float],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Distribution that was counted elsewhere: n counts and n + 1 rising bin edges."""
        counts, edges = _host_array(counts), _host_array(edges)
        build = functools.partial(event_values.histogram_value, clean_tag(tag), counts, edges)
        self._put(global_step, walltime, build, counts.nbytes + edges.nbytes)

    @_harmless
    def add_image(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str = "CHW",
    ) -> None:
        """A picture: floats from 0 to 1 or integers from 0 to 255, axes as `dataformats` says."""
        image = _host_array(img_tensor)
        build = functools.partial(event_values.image_value, clean_tag(tag), image, dataformats)
        self._put(global_step, walltime, build, image.nbytes)

    @_harmless
    def add_figure(
        self,
        tag: str,
        figure: Any,
        global_step: int | None = None,
        close: bool = True,
        walltime: float | None = None,
    ) -> None:
        """A matplotlib figure, drawn in the thread; with `close=False`, as it may change, drawn here.

        Or a function that makes one: called in the thread, so nobody waits for matplotlib.
        """
        build = functools.partial(event_values.figure_value, clean_tag(tag), figure)
        if callable(figure):
            self._put(global_step, walltime, build, TYPICAL_FIGURE_BYTES)
            return
        if close:
            if "matplotlib.pyplot" in sys.modules:
                sys.modules["matplotlib.pyplot"].close(figure)
        else:
            value = build()
            build = lambda: value  # noqa: E731
        width, height = figure.get_size_inches() * figure.dpi
        self._put(global_step, walltime, build, int(4 * width * height))

    @_harmless
    def add_hparams(
        self,
        hparam_dict: Mapping[str, Any],
        metric_dict: Mapping[str, Any] | None = None,
        hparam_domain_discrete: Mapping[str, Sequence] | None = None,
        run_name: str | None = None,
        global_step: int | None = None,
    ) -> None:
        """This run's row of the HPARAMS table; call it once, at the start, or give the settings to the
        logger itself. `close(status)` ends the row.

        `metric_dict` adds numbers and their columns to `HPARAM_METRICS`. The domains are not needed; the
        row is that of this run, and `run_name` is what it is called in the table.
        """
        hparams, metrics = dict(hparam_dict), self._numbers(metric_dict or {})
        columns = tuple(dict.fromkeys((*HPARAM_METRICS, *metrics)))
        self._put(0, None, functools.partial(event_values.experiment_value, hparams, columns))
        about = hparams, time.time(), run_name or ""
        start = functools.partial(event_values.session_start_value, *about)
        self._put(0, None, start)
        if metrics:
            self._put(global_step, None, metrics)

    # --- the end ---------------------------------------------------------------------------------

    def _request(self, wait: float, **what: bool) -> bool:
        done = threading.Event()
        self._queue.append(Request(done, **what))
        self._wake.set()
        return done.wait(wait) if wait > 0 else done.is_set()

    @_harmless
    def flush(self, durable: bool = False, wait: float = 5.0) -> bool:
        """Write what was logged so far, with `durable` down to the disk.

        Waits for at most `wait` seconds (0: not at all); True if it was done by then.
        """
        return self._request(wait, durable=durable)

    @_harmless
    def rewind(self, step: int, reach: Mapping[str, int] | None = None, wait: float = 10.0) -> None:
        """Take back every point after `step`: what is logged from here on goes on behind it.

        `reach`: of custom tags, at the checkpoint of that step.
        """
        if not self._request(wait, last=True):
            self._tell("close", f"the disk did not answer for {wait} s; the last points are lost")
        with self._lock:
            self._refused, self._refused_lines = self.dropped, self.dropped_lines
            self._queue, self._wake, self._weight = deque(), threading.Event(), 0
            self._step = max(0, step)
            self._writer = self._start_writer(Rewind(step, reach))

    def close(self, status: str | None = None, wait: float = 10.0) -> None:
        """Write everything and end. `status` "success" or "failure" ends the run in the HPARAMS table.

        Leave `status` out when the run may be resumed. Waits for at most `wait` seconds.
        """
        if self._closed or os.getpid() != self._pid:
            return
        if status is not None:
            self._end_session(status)
        self._closed = True
        atexit.unregister(self.close)
        began = time.perf_counter()
        if not self._request(wait, last=True):
            self._tell("close", f"the disk did not answer for {wait} s; the last points are lost")
        self.overhead_seconds += time.perf_counter() - began
        if self.dropped or self.dropped_lines:
            self._tell(
                "total",
                f"{self.dropped} values were dropped from the event file and "
                f"{self.dropped_lines} steps from metrics.jsonl",
            )

    @_harmless
    def _end_session(self, status: str) -> None:
        build = functools.partial(event_values.session_end_value, status, time.time())
        self._put(None, None, build)


class NullLogger:
    """Takes every call of a logger and does nothing; false in a condition. For ranks other than 0."""

    dropped = dropped_lines = 0
    overhead_seconds = 0.0
    reach: Mapping[str, int] = types.MappingProxyType({})
    tags: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> "NullLogger":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    log = add_scalar = add_scalars = add_text = add_histogram = log_histogram_counts = _ignore
    add_image = add_figure = add_hparams = flush = rewind = close = _ignore


def _host_array(values: Any) -> np.ndarray:
    """A copy in host memory of an array, tensor or sequence."""
    if hasattr(values, "detach"):
        values = values.detach()
        if values.dtype.itemsize == 2:  # numpy has no bfloat16
            values = values.float()
        values = values.cpu().numpy()
    return np.array(values)


def _histogram_builder(
    tag: str, values: Any, bins: Any, max_bins: int | None
) -> tuple[Callable, int]:
    """A function that makes the histogram in the thread, and the bytes it holds until then."""
    equal_bins = 64 if bins == "tensorflow" else bins
    if isinstance(equal_bins, int) and hasattr(values, "detach"):
        equal_bins = min(equal_bins, max_bins or equal_bins)
        if values.device.type != "cpu":
            counted = event_values.tensor_counts(values, equal_bins)
            return functools.partial(event_values.histogram_value, tag, *counted), 0
    array = _host_array(values).reshape(-1)
    count = functools.partial(_count_and_build, tag, array, equal_bins, max_bins)
    return count, array.nbytes


def _count_and_build(tag: str, array: np.ndarray, bins: Any, max_bins: int | None) -> Any:
    if isinstance(bins, int):
        import torch

        counted = event_values.tensor_counts(torch.from_numpy(array), bins)
        return event_values.histogram_value(tag, *counted)
    array = array[np.isfinite(array)]
    edges = np.histogram_bin_edges(array, bins)
    if max_bins and len(edges) - 1 > max_bins:
        edges = np.linspace(edges[0], edges[-1], max_bins + 1)
    counts, edges = np.histogram(array, edges)
    return event_values.histogram_value(tag, counts, edges, array.sum(), (array**2).sum())
