"""Everything of a run that is written while it goes on, in one object, so that the loop has one call.

It holds the run's TensorBoard logger, hardware monitor, alerts and status file. On ranks other than 0
the same calls write nothing; only the alerts look at every rank's numbers, so that all ranks act alike.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetuning.common.distributed import Distributed
from finetuning.common.errors import RunStopped
from finetuning.common.files import atomic_write_text, json_text, strict, write_json
from finetuning.common.process import Interrupted
from finetuning.common.terminal import Terminal
from finetuning.common.text import redact_values
from finetuning.config import DirectTrainingConfig
from finetuning.data.accounts import Accounts, account_rows
from finetuning.data.mask_audit import mask_audit
from finetuning.events.address import pinned_address
from finetuning.events.event_file import Rewind, rewind_lines
from finetuning.model.resolve import banner
from finetuning.monitoring.alert_command import AlertCommand, end_commands
from finetuning.monitoring.alerts import Alert, AlertMonitor
from finetuning.monitoring.system_monitor import SystemMonitor
from finetuning.readers.sample import BrokenSample
from finetuning.runs import summary
from finetuning.runs.directory import RunDirectory
from finetuning.runs.gpu_summary import GpuSummary
from finetuning.runs.other_hardware import Gpus, plan_elsewhere
from finetuning.runs.plan import RunPlan
from finetuning.runs.question_pairs import AFTER, BEFORE
from finetuning.training.checkpoint import Checkpoint
from finetuning.training.engine import TrainingEngine
from finetuning.training.state import TrainState
from finetuning.training.step_clock import Stopwatch

STATUS_SECONDS = 10.0  # after which status.json names the newest step


class RunRecord:
    """The record of one session of a run. On ranks other than 0 the logger is false, and nothing is written.

    Args:
        run: where it is written.
        logger: a TensorBoardLogger or a NullLogger.
        system: the hardware monitor of this rank's node, running on the node's first rank.
        resume_step: step of the checkpoint that the session starts from; -1: a run that begins again;
            None: a fresh one.
        alert_state: what the alerts remembered at that step.
        alert_actions: alert name -> log, save, stop, or a command to run.
        changes: of settings, by the resumes so far.
        warn: told of everything a person should look at.
    """

    def __init__(
        self,
        run: RunDirectory,
        logger: Any,
        system: SystemMonitor,
        *,
        resume_step: int | None,
        alert_state: Mapping,
        alert_actions: Mapping[str, str],
        changes: Sequence[str] = (),
        warn: Callable[[str], None],
    ) -> None:
        self.run, self.logger, self.system = run, logger, system
        self._actions, self._warn = alert_actions, warn
        self.changes = list(changes)
        self.stop_alerts: list[str] = []  # alerts that have asked for the end of the run
        self.raised: list[Alert] = []  # by the newest logged step
        self._commands: list[AlertCommand] = []  # that alerts have started, at work
        self._told_status = time.monotonic()
        self._spent = Stopwatch()  # on alerts, and on what they ask for
        self.evidence: dict[str, object] = {}  # what the alerts of the next logged step may cite
        self._settings: dict[str, Any] = {}
        self.alerts = AlertMonitor(alert_state or None)
        if logger and resume_step is not None:
            self._forget_alerts(resume_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> set[str]:
        """Write one step's numbers; returns what its alerts ask for: any of "save" and "stop"."""
        with self._spent:
            raised = self.alerts.observe(step, metrics, self.evidence)
            scalars, table = self.alerts.scalars(), self.alerts.table() if raised else ""
        self.evidence, self.raised = {}, raised
        self.logger.log(step, {**metrics, **scalars})
        if raised:
            self.logger.add_text("Alerts/Table", table, step)
        with self._spent:
            if time.monotonic() - self._told_status >= STATUS_SECONDS:
                self.status("running", step=step)
            return {self._act(alert) for alert in raised} & {"save", "stop"}

    def rewind(
        self, step: int, alert_state: Mapping, reach: Mapping[str, int] | None = None
    ) -> None:
        """Take back everything after `step`: the run goes on from there. `reach`: of custom tags."""
        self.logger.rewind(step, reach)
        self.alerts = AlertMonitor(alert_state or None, settings=self._settings)
        self.evidence = {}
        if self.logger:
            self._forget_alerts(step)

    def cite(self, settings: Mapping[str, Any]) -> None:
        """Settings of the run, which alerts look at and their advice names."""
        self._settings = dict(settings)
        self.alerts = AlertMonitor(self.alerts.state_dict(), settings=self._settings)

    @property
    def was_described(self) -> bool:
        """Whether an earlier session has come to the end of `describe`, and what it wrote is still here."""
        return "Config/Sequence_Length" in self.logger.tags

    def status(self, status: str, **details: object) -> None:
        """How the run stands, for schedulers and people."""
        if not self.logger:
            return
        self._told_status = time.monotonic()
        try:
            self.run.write_status(status, **redact_values(details))
        except OSError as error:  # a full disk must neither stop training nor hide why it stopped
            self._warn(f"status.json can't be written: {error.strerror or error}")

    def keep_in(self, state: TrainState) -> None:
        """For a checkpoint: what the alerts remember, and the points so far, which are on the disk now."""
        state.alerts, state.changes = self.alerts.state_dict(), list(self.changes)
        self.logger.flush(durable=True)
        state.reach = dict(self.logger.reach)

    def broke_off(self, error: BaseException, *, step: int, saved: int) -> None:
        """The status of a run that an error or a second signal has ended."""
        kinds = {RunStopped: "stopped", Interrupted: "preempted"}
        details = {"step": step, "saved": max(saved, 0), "reason": repr(error)}
        self.status(kinds.get(type(error), "failed"), **details)

    def note_evidence(self, **evidence: object) -> None:
        """What alerts of the coming logged step may name; None, or what was noted before, changes nothing."""
        known = {name: value for name, value in evidence.items() if value is not None}
        self.evidence = known | self.evidence

    def overhead_percent(self, seconds: float, elsewhere: float) -> dict[str, float]:
        """Share of `seconds` of training that logged steps took from it: calls of the logger, alerts, and
        the seconds that were spent elsewhere on the numbers themselves."""
        if seconds <= 0 or not self.logger:
            return {}
        spent = self.logger.overhead_seconds + self._spent.seconds + elsewhere
        return {"Monitoring/Logging_Overhead_Percent": 100 * spent / seconds}

    def close(self, status: str | None, *, at_once: bool = False) -> None:
        """End writing; `status` "success" or "failure" only when the run will not be resumed. at_once: no
        wait for what alerts have started."""
        self.system.stop()
        self.logger.close(status)
        end_commands(self._commands, at_once=at_once)

    # -------------------------------------------------------------------------
    # What a run says about itself

    def describe(self, plan: RunPlan) -> None:
        """Before step 1: settings, data set and mask audit, to TensorBoard and as files."""
        logger, statistics, logs = self.logger, plan.inputs.statistics, self.run.logs
        write_json(logs / "dataset_statistics.json", statistics.to_json())
        broken = [record for account in plan.inputs.accounts for record in account.broken]
        write_broken(logs / "broken_samples.jsonl", broken)
        write_json(logs / "truncation.json", asdict(plan.data.train.tokens.truncation))
        self.write_settings(plan.settings, 0)
        logger.add_text("Dataset/Summary", statistics.summary_markdown(), 0)
        audit = mask_audit(plan.data.train.tokens, plan.inputs.tokenizer)
        logger.add_text("Dataset/Mask_Audit", audit, 0)
        for tag, values in statistics.histograms().items():
            logger.add_histogram(tag, values, 0)
        for tag, draw in statistics.pictures().items():
            logger.add_figure(tag, draw, 0)
        named = {
            "Config/Batch_Size": "batch_size",
            "Config/Sequence_Length": "max_seq_length",
            "Config/Gradient_Accumulation_Steps": "gradient_accumulation_steps",
        }
        numbers = {tag: float(plan.settings[name]) for tag, name in named.items()}
        logger.log(0, statistics.scalars() | numbers)

    def write_questions(self, found: Mapping[str, Any]) -> None:
        """What an evaluation found on each question: that before the first step, and the newest one."""
        if self.logger:
            write_json(self.run.logs / (AFTER if found["step"] else BEFORE), found)

    def write_settings(self, settings: Mapping[str, Any], step: int) -> None:
        """TEXT: all settings as they are from this step on."""
        table = summary.markdown_table(summary.hparams(settings))
        self.logger.add_text("Config/Training_Settings", table, step)

    def write_configuration(self, plan: RunPlan, engine: TrainingEngine) -> None:
        """configuration.json among the run's logs: settings, model, steps and versions."""
        if self.logger:
            model = summary.model_size(plan, engine)
            record = summary.configuration(plan, model, self.changes)
            write_json(self.run.logs / "configuration.json", record)

    def write_summary(
        self,
        plan: RunPlan,
        engine: TrainingEngine,
        state: TrainState,
        monitoring: Mapping[str, float],
        outcome: str,
    ) -> dict[str, Any]:
        """Final_* tags, Training/Final_Summary and training_statistics.json, whose content is returned."""
        model, state.changes = summary.model_size(plan, engine), list(self.changes)
        gpus = self._gpus()
        final = summary.final_metrics(plan, model, state, monitoring) | gpus.metrics()
        result = summary.result(outcome, state, plan.best_by_as_set)
        end = {"run": self.run.name, "outcome": outcome, "result": result}
        statistics = summary.training_statistics(plan, model, state, final, end)
        self.logger.log(state.step, final)
        text = summary.final_summary(statistics)
        self.logger.add_text("Training/Final_Summary", text, state.step)
        if gpus.gpus:
            self.logger.add_text("GPU/Throttling", gpus.throttling(), state.step)
        write_json(self.run.statistics, statistics)
        return statistics

    def _gpus(self) -> GpuSummary:
        """Of the run so far; empty where its own lines can't be read, which is told."""
        self.logger.flush()
        try:
            return GpuSummary.read(self.run.logs / "metrics.jsonl")
        except (ValueError, OSError) as error:
            self._warn(f"no Final_GPU tags: metrics.jsonl can't be read ({error})")
            return GpuSummary(())

    # -------------------------------------------------------------------------
    # Alerts

    def _forget_alerts(self, step: int) -> None:
        """Those of steps that will be done again, and would be told again."""
        path = self.run.logs / "alerts.jsonl"
        try:
            rewind_lines(path, Rewind(step))
        except OSError as error:
            self._warn(f"alerts after step {step} stay in {path.name}: {error.strerror or error}")

    def _act(self, alert: Alert) -> str:
        self._warn(alert.line())
        action = self._actions.get(alert.name, "log")
        if action == "stop":
            self.stop_alerts.append(alert.name)
        if not self.logger:
            return action
        _append_line(self.run.logs / "alerts.jsonl", alert.record(), self._warn)
        if action not in ("log", "save", "stop"):
            self._commands = [c for c in self._commands if c.is_alive()]
            self._commands.append(AlertCommand(action, alert))
        return action


def _append_line(path: Path, record: Mapping, warn: Callable[[str], None]) -> None:
    line = json_text(redact_values(dict(record)))
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:  # a full disk must not stop training
        warn(f"{path.name} can't be written: {error.strerror or error}")


def announce(
    terminal: Terminal, record: RunRecord, plan: RunPlan, engine: TrainingEngine, dist: Distributed
) -> None:
    """What was decided about the run, on the terminal."""
    if plan.inputs.model.embedded:
        terminal.info(banner(plan.inputs.model), style="bold yellow")
    rows = summary.run_rows(plan, engine, dist)
    terminal.table("Run", [*rows, ("run", record.run.logs)])
    tell_losses(terminal, plan.inputs.accounts)
    terminal.info(watch_text(record.run))


def watch_text(run: RunDirectory) -> str:
    """How to see the curves: the command, and the address with the charts that matter."""
    return (
        f"watch it: uv run tensorboard --logdir={run.tensorboard.parent}\n"
        f"then open: {pinned_address()}"
    )


def show_plan(terminal: Terminal, plan: RunPlan) -> None:
    """What --plan shows: what becomes of the data, and what the run would do, need and take."""
    if plan.inputs.model.embedded:
        terminal.final(banner(plan.inputs.model).partition("What it is")[0].rstrip())
    length = ("longest sample taken", plan.inputs.length.text())
    rate = ("learning rate", summary.rate_text(plan))
    rows = [*account_rows(plan.inputs.accounts), length, rate, *plan.forecast.rows()]
    terminal.table(f"Plan for {plan.inputs.model.name}", rows, always=True)
    tell_losses(terminal, plan.inputs.accounts)


def show_plan_elsewhere(
    config: DirectTrainingConfig, gpus: str, terminal: Terminal, *, trust_remote_code: bool
) -> int:
    """What --plan --gpus shows; returns the exit code, 1 where the run would not fit."""
    trust = {"trust_remote_code": trust_remote_code}
    plan = plan_elsewhere(config, Gpus.parse(gpus), terminal, **trust)
    terminal.table(f"Plan for {plan.model}", plan.rows(), always=True)
    tell_losses(terminal, plan.accounts)
    return 0 if plan.fits else 1


def tell_losses(terminal: Terminal, accounts: Sequence[Accounts]) -> None:
    """A warning for each large share of the data that is left out, or teaches less than it holds."""
    for account in accounts:
        for warning in account.warnings():
            terminal.warning(warning)


def tell_resume(
    terminal: Terminal,
    record: RunRecord,
    plan: RunPlan,
    checkpoint: Checkpoint,
    changes: Sequence[str],
) -> None:
    """Where the run goes on, and which settings are others than before, also in TEXT."""
    terminal.info(f"resumed from {checkpoint.path}, step {checkpoint.step}")
    if changes:
        terminal.info(f"changed since step {checkpoint.step}: {', '.join(changes)}")
        record.write_settings(plan.settings, checkpoint.step)


def write_broken(path: Path, broken: Sequence[BrokenSample]) -> None:
    """One JSON object a line: source, line, reason. Nothing is written where nothing is broken."""
    if broken:
        records = ({"source": b.source, "line": b.line, "reason": b.reason} for b in broken)
        lines = (json.dumps(strict(r), ensure_ascii=False, allow_nan=False) for r in records)
        atomic_write_text(path, "".join(line + "\n" for line in lines))
