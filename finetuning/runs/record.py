"""Everything of a run that is written down while it goes on: one object, so that the loop has one call.

It owns the run's TensorBoard writer, hardware monitor, alerts and status file. On ranks other than 0
the same calls do nothing; only the alerts look at every rank's numbers, so that all ranks act alike.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from finetuning.common.files import json_text
from finetuning.common.text import redact_values
from finetuning.events.event_file import rewind_lines
from finetuning.monitoring.alerts import Alert, AlertMonitor, run_command
from finetuning.monitoring.system_monitor import SystemMonitor
from finetuning.runs.directory import RunDirectory
from tb_logger import NullLogger, TensorBoardLogger


class RunRecord:
    """The record of one session of a run.

    Args:
        run: where it is written.
        is_main: this rank writes.
        samples_hardware: this rank reads its node's gauges.
        resume_step: step of the checkpoint that the session starts from; -1: a run that begins again;
            None: a fresh one.
        gpu_uuids: this node's devices, numbered from `first_gpu_index`; empty: none are read.
        alert_actions: alert name -> log, save, stop, or a command to run.
        warn: told of everything a person should look at.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        is_main: bool,
        samples_hardware: bool,
        resume_step: int | None,
        gpu_uuids: tuple[str, ...] | None,
        first_gpu_index: int,
        alert_state: Mapping | None,
        alert_actions: Mapping[str, str],
        warn: Callable[[str], None],
    ) -> None:
        self.run, self._is_main, self._warn = run, is_main, warn
        self._actions = alert_actions
        self._overhead_seconds = 0.0  # of writers before this one
        self.evidence: dict[str, object] = {}  # what the alerts of the next logged step may cite
        self.alerts = AlertMonitor(alert_state or None)
        if is_main and resume_step is not None:
            self._forget_alerts(resume_step)
        self.writer = self._open_writer(resume_step)
        self.system = SystemMonitor(gpu_uuids, run.output_dir, 1.0, first_gpu_index, warn=warn)
        if samples_hardware:
            self.system.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> set[str]:
        """Write one step's numbers; returns what its alerts ask for: any of "save" and "stop"."""
        raised = self.alerts.observe(step, metrics, self.evidence)
        self.evidence = {}
        self.writer.log(step, {**metrics, **self.alerts.scalars()})
        if raised:
            self.writer.add_text("Alerts/Table", self.alerts.table(), step)
        return {self._act(alert) for alert in raised} & {"save", "stop"}

    def rewind(self, step: int, alert_state: Mapping) -> None:
        """Take back everything after `step`: the run goes on from there."""
        self.writer.close()
        self._overhead_seconds += self.writer.overhead_seconds
        self.writer = self._open_writer(step)
        self.alerts, self.evidence = AlertMonitor(alert_state or None), {}
        if self._is_main:
            self._forget_alerts(step)

    def status(self, status: str, **details: object) -> None:
        """How the run stands, for schedulers and people."""
        if not self._is_main:
            return
        try:
            self.run.write_status(status, **redact_values(details))
        except OSError as error:  # a full disk must neither stop training nor hide why it stopped
            self._warn(f"status.json can't be written: {error.strerror or error}")

    def overhead_percent(self, seconds: float) -> dict[str, float]:
        """Share of `seconds` of training that calls of the writer took."""
        if seconds <= 0 or not self.writer:
            return {}
        spent = self._overhead_seconds + self.writer.overhead_seconds
        return {"Monitoring/Logging_Overhead_Percent": 100 * spent / seconds}

    def close(self, status: str | None) -> None:
        """End writing; `status` "success" or "failure" only when the run will not be resumed."""
        self.system.stop()
        self.writer.close(status)

    def _open_writer(self, resume_step: int | None) -> TensorBoardLogger | NullLogger:
        if not self._is_main:
            return NullLogger()
        return TensorBoardLogger(
            self.run.tensorboard,
            metrics_path=self.run.logs / "metrics.jsonl",
            resume_step=resume_step,
            warn=self._warn,
        )

    def _forget_alerts(self, step: int) -> None:
        """Those of steps that will be done again, and would be told again."""
        path = self.run.logs / "alerts.jsonl"
        try:
            rewind_lines(path, step)
        except OSError as error:
            self._warn(f"alerts after step {step} stay in {path.name}: {error.strerror or error}")

    def _act(self, alert: Alert) -> str:
        self._warn(f"{alert.name} at step {alert.step}: {alert.advice}")
        action = self._actions.get(alert.name, "log")
        if not self._is_main:
            return action
        _append_line(self.run.logs / "alerts.jsonl", alert.record(), self._warn)
        if action not in ("log", "save", "stop"):
            run_command(action, alert)
        return action


def _append_line(path: Path, record: Mapping, warn: Callable[[str], None]) -> None:
    line = json_text(redact_values(dict(record)))
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:  # a full disk must not stop training
        warn(f"{path.name} can't be written: {error.strerror or error}")
