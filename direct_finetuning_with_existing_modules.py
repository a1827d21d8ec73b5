"""LoRA fine-tuning of Qwen3-4B-Thinking on Q&A with reasoning, watched in TensorBoard.

The default, which also runs on a laptop:
    uv run python direct_finetuning_with_existing_modules.py
Your own data and model:
    uv run python direct_finetuning_with_existing_modules.py --data-path my.jsonl --model-name FOLDER
Several GPUs:
    uv run torchrun --nproc-per-node auto direct_finetuning_with_existing_modules.py
Watch it:
    uv run tensorboard --logdir=qwen3_4b_thinking_output/tensorboard_logs

This file is the story of a run; every other file is a module it uses.
"""

# ruff: noqa: I001  the order of the imports is on purpose

from finetuning.common import process  # first: it tunes malloc before torch allocates

if __name__ == "__main__":
    process.imports_begin()

import sys

from finetuning.common.errors import RunStopped, UserError
from finetuning.common.remote import check_address
from finetuning.common.terminal import Terminal, show_crash
from finetuning.command_line import CommandLine, parse_command_line, what_was_renamed
from finetuning.config import DirectTrainingConfig, unhindered
from finetuning.monitoring.channels import read_channels
from finetuning.readers.files import check_paths

if __name__ == "__main__":  # help, wrong settings and paths need none of the slow imports
    try:
        command = parse_command_line(sys.argv[1:])
        check_paths(command.training)
        check_address(command.training.mirror, "mirror", output_dir=command.training.output_dir)
        read_channels(command.training.notify if process.is_first_rank() else ())
        first = Terminal(quiet=command.quiet, is_main=process.is_first_rank())
        first.info("starting: the libraries are being loaded")
        first.info(what_was_renamed(sys.argv[1:]))
    except UserError as error:
        Terminal().error(str(error))
        sys.exit(2)

import functools
import math
from pathlib import Path

from finetuning.analysis.data_check import check_data
from finetuning.common.distributed import init_distributed, leave
from finetuning.common.formatting import due
from finetuning.data.packing import PlannedStep
from finetuning.runs import directory, session, summary
from finetuning.runs.build import build_engine, build_evaluator
from finetuning.runs.identity import check_identity
from finetuning.runs.init_adapter import with_own_settings
from finetuning.runs.metrics import MetricsProcessor
from finetuning.runs.mirror import Mirror
from finetuning.runs.news import RunNews
from finetuning.runs.plan import load_data, plan_run
from finetuning.runs.record import show_plan, show_plan_elsewhere
from finetuning.runs.report import leave_report
from finetuning.training.checkpoint import Checkpoint, misfits_are_told
from finetuning.training.checkpoint_manager import CheckpointManager
from finetuning.training.optimizer import StepResult, learning_rate_at
from finetuning.training.state import TrainState
from tb_logger import NullLogger, TensorBoardLogger

process.imports_are_done()


class DirectTrainer:
    """One run: `DirectTrainer(DirectTrainingConfig()).train()`.

    Args:
        config: every setting.
        resume: "", "latest", "auto" or a checkpoint directory (see CommandLine.resume).
        quiet: only warnings and the closing lines on the terminal.
        trust_remote_code: let the model folder run its own code.

    `train()` makes the rest in the order in which it is told: plan, engine, evaluator, record, metrics.
    """

    def __init__(
        self,
        config: DirectTrainingConfig,
        *,
        resume: str = "",
        quiet: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.resume, self.trust_remote_code = resume, trust_remote_code
        self.dist = init_distributed(config.device, config.distributed_timeout)
        self.terminal = Terminal(quiet=quiet, is_main=self.dist.is_main)
        self.config = config = with_own_settings(config, self.terminal.warning)
        self.news = RunNews(config.notify if self.dist.is_main else (), self.terminal.warning)
        self.state = TrainState()
        self.pending: list[StepResult] = []  # steps whose numbers are on their way to the host
        self.unlogged: StepResult | None = None  # a step that is logged once the next one is queued
        # Nothing waits for the CPU's own results, so there every step is looked at. On CUDA a step is
        # logged while the next one runs: only its clock says when a step was done.
        self.reads_are_free = self.dist.device.type == "cpu"
        self.logs_late = self.dist.device.type == "cuda"
        self.stop = process.StopSignal()
        self.interrupted = False  # a rank has got a signal
        self.outcome = ""  # why the loop ends: completed, preempted, stopped, nonfinite
        self.rollback_from = 0  # non-finite step to go back from
        self.nonfinite_places: list[str] = []  # samples of the newest non-finite step
        self.mirror = Mirror(config, self.terminal, self.stop.at_once, is_main=self.dist.is_main)
        self.checkpoints = CheckpointManager(
            Path(config.output_dir) / "checkpoints",
            self.dist,
            save_steps=config.save_steps,
            keep=config.save_total_limit,
            say=self.terminal.info,
            warn=self.terminal.warning,
        )

    @property
    def tensorboard_writer(self) -> TensorBoardLogger | NullLogger:
        """The run's logger; a NullLogger, which is false, on other ranks."""
        record = getattr(self, "record", None)  # there is none before `train()` has opened the run
        return record.logger if record else NullLogger()

    # -------------------------------------------------------------------------
    # The story

    def train(self) -> TrainState:
        """The whole run, from data to final model. Returns the state after the last step."""
        output_dir = Path(self.config.output_dir)
        lock = directory.only_writer(output_dir, self.dist.is_main)
        with self.stop, lock, self.news, self.mirror:
            with directory.disk_faults_stop_the_run(output_dir):
                checkpoint = self.checkpoints.resolve_resume(self.resume, self.mirror.fetch)
            self.plan = plan_run(
                self.config,
                self.dist,
                self.terminal,
                trust_remote_code=self.trust_remote_code,
                pinned=checkpoint.settings if checkpoint else {},
            )
            self.engine = build_engine(self.config, self.plan, self.dist, self.terminal)
            self.evaluator = build_evaluator(self.config, self.plan, self.engine, self.dist)
            with directory.disk_faults_stop_the_run(output_dir):
                self.open(checkpoint)
            try:
                with directory.disk_faults_stop_the_run(output_dir):
                    self.loop()
                    self.finish()
            except BaseException as error:
                self.record.broke_off(error, step=self.state.step, saved=self.checkpoints.step)
                raise
            finally:
                self.close()
        return self.state

    def loop(self) -> None:
        """Step n is the n-th optimizer update; a resumed run starts at a later n."""
        plan, state = self.plan.steps, self.state
        self.terminal.start_progress(plan.num_steps, state.step, plan.steps_per_epoch)
        state.evaluation_due |= state.step == 0 and self.checkpoints.step < 0
        if state.evaluation_due and not self.wants_stop():
            metrics = self.evaluate(state.step)
            self.log(state.step, metrics)
            self.terminal.advance(state.step, metrics)
        if self.wants_stop():
            self.save(state.step)
        while self.state.step < plan.num_steps and not self.outcome:
            step = self.state.step + 1
            last = step == plan.num_steps
            evaluates = last or due(step, self.plan.settings["eval_steps"])
            result = self.update(step, evaluates=evaluates)

            saves = self.log_late() or last or self.checkpoints.is_due(step)
            epoch_ends = last or step % plan.steps_per_epoch == 0
            logs = last or due(step, self.plan.settings["logging_steps"])
            must_collect = evaluates or saves or epoch_ends or self.interrupted or self.outcome
            if logs and self.logs_late and not must_collect:
                self.unlogged = result  # its numbers are read once the next step is queued
            elif logs or must_collect or self.reads_are_free:
                self.collect()
            if self.rollback_from:
                self.roll_back()
                continue
            metrics = {}
            if logs and not self.unlogged:
                metrics |= self.training_metrics(step, result.learning_rate)
            if evaluates:
                metrics |= self.evaluate(step)
            if evaluates or epoch_ends:
                text = self.metrics.hardest_text(self.state)
                self.tensorboard_writer.add_text("Training/Hardest_Samples", text, step)
            if epoch_ends:
                metrics |= self.epoch_metrics(step)
            if metrics:
                saves |= self.log(step, metrics)
            if self.interrupted and not self.outcome:
                self.outcome = "preempted"
            if (saves or self.outcome) and self.outcome != "nonfinite":
                self.save(step)  # not a step that failed: a resume must repeat it
            self.terminal.advance(step, metrics)
        self.outcome = self.outcome or "completed"

    # -------------------------------------------------------------------------
    # One step

    def update(self, step: int, *, evaluates: bool) -> StepResult:
        """Forward and backward over the step's micro-batches, and the optimizer's update.

        Nothing here waits for the device. evaluates: keep the gradient norms for the evaluation.
        """
        state, clock, config = self.state, self.metrics.clock, self.config
        planned, steps = self.plan.steps[step], self.plan.steps.num_steps
        learning_rate = learning_rate_at(step, steps, self.plan.settings["learning_rate"], config)
        sums, self.interrupted = self.engine.forward_backward(
            planned, self.plan.data.train.tokens, clock, state, lambda: bool(self.stop.name)
        )
        if evaluates:
            self.evaluator.note_gradients()
        with clock.phase("optimizer"):
            skip, most = step in state.skipped_steps, config.max_grad_norm
            grad_norm = self.engine.update(learning_rate, max_grad_norm=most, skip=skip)
        result = StepResult(step, learning_rate, planned, sums, grad_norm)
        self.pending.append(result)
        self.advance(step, planned)
        return result

    def advance(self, step: int, planned: PlannedStep) -> None:
        """Count the step. Only numbers that the host knows."""
        self.state.step = step
        lengths = self.plan.data.train.tokens.lengths[list(planned.documents)]
        flops = self.engine.flops(lengths, planned.num_targets)
        self.metrics.count(planned, flops, self.state)

    def log_late(self) -> bool:
        """Log the step whose numbers came while another was queued; true if that asks for a checkpoint."""
        if self.unlogged is None:
            return False
        result, self.unlogged = self.unlogged, None
        self.collect(result.step)
        if self.rollback_from:
            return False
        metrics = self.training_metrics(result.step, result.learning_rate)
        saves = self.log(result.step, metrics)
        self.terminal.advance(result.step, metrics)
        return saves

    def collect(self, up_to: float = math.inf) -> None:
        """Take the sums of the pending steps up to this one; act on a gradient that is not finite."""
        results = [result for result in self.pending if result.step <= up_to]
        self.pending = self.pending[len(results) :]
        for result in self.metrics.collect(results, self.state):
            self.note_nonfinite(result)

    def note_nonfinite(self, result: StepResult) -> None:
        """A NaN or infinite gradient: its update did not happen; name the samples, follow the policy."""
        state, config = self.state, self.config
        if result.step not in state.nonfinite_steps:  # after a rollback it comes a second time
            state.nonfinite_steps.append(result.step)
        places = self.metrics.nonfinite_places(result)
        self.record.evidence["samples"] = self.nonfinite_places = places
        self.terminal.warning(
            f"step {result.step}: the gradient is not finite; its update was left out. Samples: "
            + ", ".join(places[:8])
        )
        if config.nonfinite == "stop" or len(state.nonfinite_steps) > config.max_nonfinite_steps:
            self.outcome = "nonfinite"
        elif config.nonfinite == "rollback" and result.step not in state.skipped_steps:
            self.rollback_from = result.step

    # -------------------------------------------------------------------------
    # Numbers

    def training_metrics(self, step: int, learning_rate: float) -> dict[str, float]:
        """What a logged step shows, over the steps since the last logged one."""
        metrics = self.metrics.training(step, learning_rate, self.state, self.pending)
        with self.metrics.spent:
            gauges = self.record.system.read() | self.metrics.gpu_memory(self.engine.captured)
        metrics |= self.metrics.hardware(gauges)  # waits for other ranks
        with self.metrics.spent:
            metrics |= self.metrics.clock.read(metrics)
        straggler, slowest = self.metrics.straggler()
        self.record.note_evidence(slowest_rank=slowest, samples=self.metrics.hardest_places())
        spent = self.metrics.session_seconds, self.metrics.spent.seconds
        return metrics | straggler | self.record.overhead_percent(*spent)

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out losses, answers and adapter health; keeps the best model."""
        state, writer, clock = self.state, self.tensorboard_writer, self.metrics.clock
        with clock.phase("evaluation"), self.terminal.working("evaluation") as progress:
            metrics = self.engine.beside_graph(
                lambda: self.evaluator.measure(step, writer, progress, lambda: bool(self.stop.name))
            )
        self.interrupted |= self.wants_stop()
        state.evaluation_due = metrics is None  # a signal: the session that goes on makes it
        if metrics is None:
            return {}
        self.record.write_questions(self.evaluator.questions)
        if state.note_evaluation(step, metrics, self.plan.settings["best_by"]) and step:
            self.save_model(self.record.run.best_model)
        self.look_at_end()
        return metrics

    def look_at_end(self) -> None:
        """End a run that early stopping or an alert has ended, now or in an earlier session."""
        config = self.config
        limits = config.early_stopping_patience, config.alert_actions, self.plan.settings["best_by"]
        reason = summary.stopped_text(self.state, *limits)
        if reason and not self.outcome:
            self.terminal.info(f"ended at step {self.state.step}: {reason}")
            self.outcome = "stopped"

    def wants_stop(self) -> bool:
        """Whether a rank has got a signal. A collective."""
        return any(self.dist.any(bool(self.stop.name)))

    def epoch_metrics(self, step: int) -> dict[str, float]:
        """Epoch/ tags over the epoch that ends with this step, and its line in TEXT."""
        metrics, text = self.metrics.epoch(step, self.state)
        self.tensorboard_writer.add_text("Training/Epoch_Summary", text, step)
        return metrics

    def log(self, step: int, metrics: dict[str, float]) -> bool:
        """A step to TensorBoard, metrics.jsonl and the alerts; true if these ask for a checkpoint."""
        with self.metrics.clock.phase("logging"):
            wishes = self.record.log(step, metrics)
            self.news.alerts(self.record.raised)
        # Alerts may differ between ranks, as some numbers are a rank's own: what one asks for, all do.
        save, stop = self.dist.any("save" in wishes, "stop" in wishes)
        if stop:
            names = {name for rank in self.dist.gather(self.record.stop_alerts) for name in rank}
            self.state.stop_alerts = sorted(names)
            self.look_at_end()
            self.outcome = self.outcome or "stopped"
        return save

    # -------------------------------------------------------------------------
    # Saving and going back

    def save(self, step: int) -> None:
        """A checkpoint of this step; the points up to it are on the disk before it is. A signal that
        comes meanwhile, or has come before, ends the loop."""
        if self.checkpoints.step != step:
            self.write_checkpoint(step)
        if not self.outcome and self.wants_stop():
            self.outcome = "preempted"

    def write_checkpoint(self, step: int) -> None:
        """All that a resume needs."""
        state = self.state
        self.metrics.gather_hardest(state)
        with self.metrics.clock.phase("saving"), self.terminal.working("saving"):
            self.metrics.count_seconds(state)
            state.convergence = self.metrics.convergence.state_dict()
            self.record.keep_in(state)
            self.checkpoints.save(
                self.record.run.name,
                step,
                self.engine.tensors(),
                documents=self.engine.documents(),
                state=summary.checkpoint_state(self.plan, state),
                protect=state.best_step,
            )
            newest = self.checkpoints.newest_path
            self.mirror.add_checkpoint(self.record.run, newest, state.best_step)

    def save_model(self, folder: Path) -> None:
        """The adapter with its tokenizer, whole or not at all."""
        with self.metrics.clock.phase("saving"), self.terminal.working(f"saving {folder.name}"):
            notes = summary.model_notes(self.plan, self.record.run, folder, self.state)
            self.engine.save(folder, self.plan.inputs.tokenizer, notes)
            self.mirror.add_model(self.record.run, folder, self.state.step)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, optimizer, random state and counters as they were at the checkpoint."""
        self.state = TrainState.read(checkpoint.state, checkpoint.path)
        identity = checkpoint.state["identity"]
        finished = self.state.step == identity.get("steps")
        check = {"finished": finished, "warn": self.terminal.warning}
        check_identity(identity, self.plan.identity, checkpoint.path, **check)
        with misfits_are_told(checkpoint.path):
            self.engine.restore(checkpoint.tensors, self.state)
            self.checkpoints.load_rng(checkpoint)

    def roll_back(self) -> None:
        """Policy `rollback`: the newest checkpoint again, and no update at the step that failed."""
        failed, later = self.rollback_from, self.state
        self.rollback_from, self.pending, self.unlogged = 0, [], None  # none behind the failed one
        checkpoint = self.checkpoints.newest(self.record.run.name)
        if checkpoint is None:
            self.outcome = "nonfinite"
            return
        self.metrics.count_seconds(later)
        with self.metrics.clock.phase("saving"):  # no training time
            self.restore(checkpoint)
        self.state.go_on_from(later, failed)
        self.metrics.restart(self.state)
        self.record.rewind(self.state.step, self.state.alerts, self.state.reach)
        self.terminal.info(f"went back to {checkpoint.path}; step {failed} will be left out")

    # -------------------------------------------------------------------------
    # Beginning

    def open(self, checkpoint: Checkpoint | None) -> None:
        """The run's directory, its record and its metrics; from a checkpoint where there is one."""
        if checkpoint:
            self.restore(checkpoint)
            self.state.resume_count += 1
        # A run that crashed before its first checkpoint begins again: its points may be removed.
        begun = "" if checkpoint else self.checkpoints.run_before_first_checkpoint()
        start = session.SessionStart.of(checkpoint, begun, self.plan, self.state)
        # Weights and both moments, one more while the old one is still there.
        needed = 6 * 4 * self.engine.num_trainable
        run = session.open_run(start, self.config, self.dist, self.terminal, needed)
        around, made = (self.dist, self.terminal), (self.plan, self.engine)
        options = session.logger_options(start, run, self.config, self.plan, self.terminal.warning)
        logger = TensorBoardLogger(**options) if self.dist.is_main else NullLogger()
        self.stop.wait_for_loop()  # from here on a checkpoint can be written
        actions = self.config.alert_actions
        self.record = session.begin_record(start, run, logger, actions, *made, *around)
        self.news.begun(run.name, start.resume_step, summary.run_rows(*made, self.dist))
        session.describe_data(start, self.record, self.plan, *around, self.stop)
        self.metrics = MetricsProcessor(self.plan, self.dist, self.state)
        if checkpoint:
            self.look_at_end()

    # -------------------------------------------------------------------------
    # End

    def finish(self) -> None:
        """Final model, summary and statistics; or, when interrupted, how to go on."""
        state, outcome = self.state, self.outcome
        self.terminal.stop_progress()
        if outcome == "nonfinite":
            raise RunStopped(summary.nonfinite_text(state, self.nonfinite_places))
        if outcome == "preempted":
            text = summary.preempted_text(self.stop.name, state.step, self.plan.steps.num_steps)
            self.terminal.final(text)
            self.news.interrupted(text)
        else:
            self.save_model(self.record.run.final_model)
            self.metrics.count_seconds(state)
            if self.dist.is_main:
                monitoring = self.metrics.convergence.scalars()
                end = self.record.write_summary(self.plan, self.engine, state, monitoring, outcome)
                self.terminal.final(summary.closing_lines(end, self.record.run))
                self.news.done(self.record.run, summary.result_lines(end, self.record.run))
        result = summary.result(outcome, state, self.plan.best_by_as_set)
        details = {"saved": self.checkpoints.step, "signal": self.stop.name, "result": result}
        self.record.status(outcome, step=state.step, **details)

    def close(self) -> None:
        """End logger and monitors, whatever happened, and write the report."""
        self.terminal.stop_progress()
        success = "success" if self.outcome in ("completed", "stopped") else None
        self.record.close(success, at_once=bool(self.stop.name))
        if self.dist.is_main and not self.stop.name:  # else nobody waits for a page
            leave_report(self.record.run, self.terminal, lambda: bool(self.stop.name))


# -----------------------------------------------------------------------------
# The command


def run(command: CommandLine) -> int:
    """Do what the command line says; returns the exit code."""
    config, trust = command.training, {"trust_remote_code": command.trust_remote_code}
    if command.gpus:
        return show_plan_elsewhere(config, command.gpus, Terminal(quiet=command.quiet), **trust)
    if command.check_data:
        config = unhindered(config)
    trainer = DirectTrainer(config, resume=command.resume, quiet=command.quiet, **trust)
    if command.check_data:
        load = functools.partial(load_data, config, trainer.dist, trainer.terminal, **trust)
        return check_data(load, trainer.terminal, config.cache_path, quiet=command.quiet)
    if command.plan:
        show_plan(trainer.terminal, plan_run(config, trainer.dist, trainer.terminal, **trust))
    else:
        trainer.train()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done or interrupted with a checkpoint, 1 --check-data found something, 2 bad input,
    3 the run could not go on, 128 + a signal's number (Ctrl-C: 130) ended without anything to save."""
    try:
        sys.excepthook = show_crash
        code = run(parse_command_line(sys.argv[1:] if arguments is None else arguments))
    except (UserError, RunStopped) as error:
        Terminal().error(str(error))
        return 2 if isinstance(error, UserError) else 3
    except KeyboardInterrupt as error:
        Terminal().error(str(error) or "interrupted before the first step")
        return getattr(error, "code", 130)
    leave()
    return code


if __name__ == "__main__":
    process.exit_process(main())
