"""The beginning of a session: a new run, or one that goes on, with its directory and its record."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.common.distributed import Distributed
from finetuning.common.process import StopSignal
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig, OutputSettings
from finetuning.runs import directory, summary
from finetuning.runs.build import start_system_monitor
from finetuning.runs.directory import RunDirectory
from finetuning.runs.identity import changed_settings, recorded_settings
from finetuning.runs.naming import trial_name
from finetuning.runs.origin import read_origin
from finetuning.runs.plan import RunPlan
from finetuning.runs.record import RunRecord, announce, tell_resume
from finetuning.training.checkpoint import Checkpoint
from finetuning.training.engine import TrainingEngine
from finetuning.training.state import TrainState


@dataclass(frozen=True)
class SessionStart:
    """Where a session begins: at a checkpoint, anew in a run that died before its first one, or fresh."""

    checkpoint: Checkpoint | None
    begun: str  # the run that begins again; empty for none
    state: TrainState  # as restored
    changes: tuple[str, ...] = ()  # of settings since the checkpoint

    @classmethod
    def of(
        cls, checkpoint: Checkpoint | None, begun: str, plan: RunPlan, state: TrainState
    ) -> "SessionStart":
        """The start at this checkpoint, from which `state` is; the state keeps what has changed since."""
        if checkpoint is None:
            return cls(None, begun, state)
        changes = changed_settings(checkpoint.state["config"], plan.settings)
        state.changes += [f"{change} at step {checkpoint.step}" for change in changes]
        return cls(checkpoint, "", state, tuple(changes))

    @property
    def run(self) -> str:
        """Name of the run that goes on; empty for a new one."""
        return self.checkpoint.run if self.checkpoint else self.begun

    @property
    def resume_step(self) -> int | None:
        """The checkpoint's step; -1: the run begins again; None: it is a new one."""
        return self.checkpoint.step if self.checkpoint else -1 if self.begun else None


def open_run(
    start: SessionStart,
    output: OutputSettings,
    dist: Distributed,
    terminal: Terminal,
    needed_bytes: int,
) -> RunDirectory:
    """The directory of the run, alike on all ranks, with what it has left elsewhere; and its log file."""
    output_dir = Path(output.output_dir)
    if start.checkpoint and dist.is_main:
        carry_run(start.checkpoint, output_dir, start.state, terminal.info)
    options = {"needed_bytes": needed_bytes, "say": terminal.info, "given_name": output.run_name}
    run = directory.open_directory(output_dir, dist, start.run, **options)
    if start.begun:
        terminal.info(f"{start.begun} begins again: it had no checkpoint yet")
    terminal.open_log(run.logs / "training.log")
    if start.changes and dist.is_main:
        put_other_best_aside(run, start.state, terminal.info)
    return run


def logger_options(
    start: SessionStart,
    run: RunDirectory,
    config: DirectTrainingConfig,
    plan: RunPlan,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Of the run's TensorBoardLogger, which goes on where the session begins."""
    files = {"run_dir": run.tensorboard, "metrics_path": run.logs / "metrics.jsonl"}
    goes_on = {"resume_step": start.resume_step, "reach": start.state.reach}
    texts = {"hparams": summary.hparams(plan.settings), "warn": warn}
    texts["trial"] = trial_name(run.name, recorded_settings(config))
    return {**files, **goes_on, **texts}


def begin_record(
    start: SessionStart,
    run: RunDirectory,
    logger: Any,
    alert_actions: Mapping[str, str],
    plan: RunPlan,
    engine: TrainingEngine,
    dist: Distributed,
    terminal: Terminal,
) -> RunRecord:
    """The record of the session, with all that a run says about itself before it begins or goes on.

    logger: a TensorBoardLogger or a NullLogger.
    """
    record = RunRecord(
        run,
        logger,
        start_system_monitor(dist, run.output_dir, terminal.warning),
        resume_step=start.resume_step,
        alert_state=start.state.alerts,
        alert_actions=alert_actions,
        changes=start.state.changes,
        warn=terminal.warning,
    )
    record.cite({**plan.settings, "automatic": plan.automatic})
    announce(terminal, record, plan, engine, dist)
    if start.checkpoint:
        tell_resume(terminal, record, plan, start.checkpoint, start.changes)
    record.write_configuration(plan, engine)
    record.status("running", step=max(start.resume_step or 0, 0))
    return record


def describe_data(
    start: SessionStart,
    record: RunRecord,
    plan: RunPlan,
    dist: Distributed,
    terminal: Terminal,
    stop: StopSignal,
) -> None:
    """Statistics and texts about the data, where no earlier session has come to their end. A signal leaves
    them for the next one."""
    with dist.wait_alive("statistics"):
        described = start.checkpoint and record.was_described
        if dist.is_main and not described and not stop.name:
            with stop.at_once(), terminal.working("describing the data"):
                record.describe(plan)
                start.state.system_prompt = plan.inputs.system_prompt


# -----------------------------------------------------------------------------
# Into another output directory


def carry_run(
    checkpoint: Checkpoint, output_dir: Path, state: TrainState, say: Callable[[str], None]
) -> None:
    """Where the checkpoint lies below another output directory: its run's curves, texts, files and best
    model come along, or it is told that they don't."""
    source = checkpoint.path.resolve().parent.parent
    if source == output_dir.resolve():
        return
    old, new = RunDirectory(source, checkpoint.run), RunDirectory(output_dir, checkpoint.run)
    if new.tensorboard.exists() or new.logs.exists():
        return  # it goes on here already
    pairs = [(old.tensorboard, new.tensorboard), (old.logs, new.logs)]
    carried = [pair for pair in pairs if pair[0].is_dir()]
    for there, here in carried:
        shutil.copytree(there, here)
    if carried:
        say(f"curves, texts and files of the run until step {checkpoint.step} come from {source}")
    else:
        say(
            f"curves of the run until step {checkpoint.step} are not beside its checkpoint: not carried"
        )
    if state.best_step:
        places = [old.best_model, source / "earlier_models" / checkpoint.run / "best_model"]
        own = [place for place in places if _is_best(place, checkpoint.run, state)]
        if own:  # from there `own_models` takes it to its place
            shutil.copytree(own[0], output_dir / "earlier_models" / checkpoint.run / "best_model")
            say(f"best_model, of step {state.best_step}, comes from {own[0]}")
        else:
            say(f"best_model, of step {state.best_step}, is not below {source}: not carried")


def _is_best(folder: Path, run: str, state: TrainState) -> bool:
    """Whether a model is this run's best one at the checkpoint; models of earlier versions name no step."""
    if directory.owner(folder) != run:
        return False
    return read_origin(folder).get("step", state.best_step) == state.best_step


def put_other_best_aside(run: RunDirectory, state: TrainState, say: Callable[[str], None]) -> None:
    """A run that goes on with other settings leaves what came after its checkpoint, the best model too."""
    place = run.best_model
    if directory.owner(place) != run.name or _is_best(place, run.name, state):
        return
    step = read_origin(place)["step"]
    target = run.output_dir / "earlier_models" / f"{run.name}-step-{step}" / place.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    place.rename(target)
    say(f"best_model was of step {step}, which the run has left behind; it is now {target}")
