"""LoRA fine-tuning of Qwen3-4B-Thinking on Q&A with reasoning, watched in TensorBoard.

The default, which also runs on a laptop:
    uv run python direct_finetuning_with_existing_modules.py
Your own data and model:
    uv run python direct_finetuning_with_existing_modules.py --data-path my.jsonl --model-name FOLDER
Several GPUs:
    uv run torchrun --nproc-per-node auto direct_finetuning_with_existing_modules.py
The smallest run on a CPU:
    uv run python direct_finetuning_with_existing_modules.py --max-steps 3 --num-probes 0
Watch it:
    uv run tensorboard --logdir=qwen3_4b_thinking_output/tensorboard_logs

This file is the story of a run; every other file is a module it uses.
"""

# ruff: noqa: I001  the order of the imports is on purpose

import memory_settings  # first: it tunes malloc before torch allocates

import signal
import sys

from errors import RunStopped, UserError
from terminal import Terminal, show_crash
from training_config import CommandLine, DirectTrainingConfig, parse_command_line

if __name__ == "__main__":  # help and wrong settings are answered before the imports that take long
    try:
        parse_command_line(sys.argv[1:])
    except UserError as error:
        Terminal().error(str(error))
        sys.exit(2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback through these

import dataclasses
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dataset_report
import distributed
import model_loading
import run_plan
import run_summary
from chat_tokens import mask_audit
from checkpoint import Checkpoint
from convergence import ConvergenceMonitor
from data_check import data_faults, is_good, summary
from evaluation import Evaluator
from generation_probes import choose_probes, token_budget
from hardest_samples import LEVEL_DECAY, hardest, hardest_text, loss_rows
from loss_ledger import LossLedger
from model_in_training import ModelInTraining
from optimization import StepResult, is_out_of_memory, learning_rate_at
from packed_model import compiler_is_there
from packing import PlannedStep, StepPlan
from report import write_report
from run_checkpoints import RunCheckpoints
from run_directory import (
    RunDirectory,
    check_writable,
    disk_faults_stop_the_run,
    known_run,
    lock_output,
    new_run,
    own_models,
    shared_run,
)
from run_record import RunRecord
from safe_text import redact_values, write_json
from system_monitor import gpu_memory, gpu_uuid
from tb_logger import NullLogger, TensorBoardLogger
from throughput import (
    CudaTimeline,
    HostTimeline,
    StepClock,
    peak_flops,
    straggler,
)
from train_state import TrainState
from training_data import TrainingData, prepare_data, read_data, split_samples

memory_settings.imports_are_done()
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)

MIN_CONSTANT_EFFICIENCY = 0.6  # of what compiled layers would go through, what is no padding


class DirectTrainer:
    """One run: `DirectTrainer(DirectTrainingConfig()).train()`.

    Args:
        config: every setting.
        resume: "", "latest", "auto" or a checkpoint directory (see CommandLine.resume).
        quiet: only warnings and the closing lines on the terminal.
        trust_remote_code: let the model folder run its own code.
    """

    def __init__(
        self,
        config: DirectTrainingConfig,
        *,
        resume: str = "",
        quiet: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.config, self.resume, self.trust_remote_code = config, resume, trust_remote_code
        self.quiet = quiet
        self.settings = run_summary.settings_of(config)
        self.dist = distributed.init_distributed(config.device, config.distributed_timeout)
        self.terminal = Terminal(quiet=quiet, is_main=self.dist.is_main)
        self.record: RunRecord | None = None
        self.state = TrainState()
        self.clock = StepClock()
        self.pending: list[StepResult] = []
        self.unlogged: StepResult | None = None  # its numbers were left to arrive
        self.stop_signal = ""  # set by a signal, told to all ranks once a step
        self.interrupted = False  # a rank has told so
        self.former_handlers: dict[int, object] = {}
        self.outcome = ""  # why the loop ends: completed, preempted, stopped, nonfinite
        self.rollback_from = 0  # non-finite step to go back from
        self.checkpoints = RunCheckpoints(
            Path(config.output_dir) / "checkpoints",
            self.dist,
            save_steps=config.save_steps,
            keep=config.save_total_limit,
            say=self.terminal.say,
            warn=self.terminal.warn,
        )

    @property
    def tensorboard_writer(self) -> TensorBoardLogger | NullLogger:
        """The run's writer, with SummaryWriter's methods; false in a condition on ranks other than 0."""
        return self.record.writer if self.record else NullLogger()

    # -------------------------------------------------------------------------
    # The story

    def train(self) -> TrainState:
        """The whole run, from data to final model. Returns the state after the last step."""
        lock = lock_output(Path(self.config.output_dir)) if self.dist.is_main else None
        try:
            self.prepare()
            self.make_forecast()
            self.build_model()
            with disk_faults_stop_the_run(Path(self.config.output_dir)):
                self.open_run()
            try:
                with disk_faults_stop_the_run(self.run.output_dir):
                    self.loop()
                    self.finish()
            except BaseException as error:
                status = "stopped" if isinstance(error, RunStopped) else "failed"
                self.record.status(status, step=self.state.step, reason=repr(error))
                raise
            finally:
                self.close_run()
        finally:
            if lock is not None:
                lock.release()
        return self.state

    def prepare(self) -> TrainingData:
        """Read, split and tokenize the data and plan every step; no weights are loaded."""
        self.resolved = self.find_model()
        with self.dist.patience("data"):
            self.prepare_data()
        self.plan_steps()
        self.identity = run_summary.identity(
            self.settings, self.resolved.name, self.data, self.plan
        )
        run_summary.check_ranks(self.dist.gather(self.identity))
        return self.data

    def prepare_data(self) -> None:
        """Samples and tokens, from the files or the cache."""
        config = self.config
        workers = config.workers or os.cpu_count() or 1
        with self.terminal.working("reading the data") as progress:
            read, eval_read = read_data(
                config.data_path,
                columns=config.columns or None,
                eval_path=config.eval_path,
                max_broken_fraction=config.max_broken_fraction,
                cache_dir=config.cache_path,
                workers=workers,
                progress=progress,
            )
        with self.terminal.working("looking for near duplicates"):
            split = split_samples(
                read,
                eval_read,
                eval_fraction=config.eval_fraction,
                max_eval_samples=config.max_eval_samples,
                weights=dict(zip(config.data_path, config.data_weights, strict=False)),
                seed=config.seed,
                cache_dir=config.cache_path,
            )
        with self.terminal.working("getting the tokenizer"):
            self.tokenizer = model_loading.load_tokenizer(
                self.resolved, split.training_texts, config.cache_path, config.seed
            )
        with self.terminal.working("tokenizing") as progress:
            self.data = prepare_data(
                split,
                self.tokenizer,
                config.max_seq_length,
                workers=workers,
                over_length=config.over_length,
                loss_on=config.loss_on,
                control_tokens=config.control_tokens,
                cache_dir=config.cache_path,
                progress=progress,
            )

    def find_model(self) -> model_loading.ResolvedModel:
        """The same model on all ranks: the embedded one for all, if one GPU has no room for the default."""
        resolved = model_loading.resolve_model(
            self.config.model_name or None,
            self.dist.device,
            precision=self.config.precision,
            trust_remote_code=self.trust_remote_code,
        )
        reasons = self.dist.gather(resolved.reason if resolved.embedded else "")
        reason = next(filter(None, reasons), "")
        return model_loading.embedded_because(reason) if reason else resolved

    def plan_steps(self) -> None:
        """Pack the documents and fix what every step of every rank will do, and when to evaluate."""
        config, train, held_out = self.config, self.data.train, self.data.held_out
        common = {
            "row_tokens": config.max_seq_length,
            "rows_per_micro_batch": config.batch_size,
            "seed": config.seed,
            "rank": self.dist.rank,
            "world_size": self.dist.world_size,
            "packing": config.packing,
        }
        self.plan = StepPlan(
            train.tokens.lengths,
            train.tokens.num_targets,
            train.documents,
            accumulation=config.gradient_accumulation_steps,
            num_epochs=config.num_epochs,
            max_steps=config.max_steps,
            **common,
        )
        self.eval_plan = None
        if len(held_out):
            tokens = held_out.tokens
            self.eval_plan = StepPlan(
                tokens.lengths, tokens.num_targets, held_out.documents, **common
            )
        self.probes = choose_probes(held_out, self.tokenizer, config.num_probes)
        self.answer_tokens = token_budget(
            self.probes, config.probe_max_new_tokens, self.dist.device
        )
        self.eval_steps = config.eval_steps
        if self.eval_steps == "auto":
            self.eval_steps = run_plan.steps_between_evaluations(
                self.plan,
                self.eval_plan.num_tokens if self.eval_plan else 0,
                self.answer_tokens,
                device_type=self.dist.device.type,
                lora=bool(config.lora_r),
            )
        self.settings["eval_steps"] = self.eval_steps
        self.ledger = LossLedger(self.data.train.groups)

    def make_forecast(self) -> run_plan.RunForecast:
        """Memory, time and disk that the planned steps will take; decides `parallel` and recomputation."""
        config, dist = self.config, self.dist
        self.parallel = distributed.parallel_mode(
            config.parallel,
            trains_all=not config.lora_r,
            dtype=self.dtype,
            world_size=dist.world_size,
        )
        self.forecast = self.forecast_for(self.parallel)
        may_shard = (
            config.parallel == "auto" and config.quantization == "none" and dist.world_size > 1
        )
        if may_shard and self.parallel == "ddp" and any(dist.any(not self.forecast.fits)):
            self.parallel, self.forecast = "fsdp", self.forecast_for("fsdp")
        if config.precision == "fp8" and (self.parallel == "fsdp" or not self.compiles):
            reason = "shards" if self.parallel == "fsdp" else "layers that are not compiled"
            raise UserError(f"precision fp8 does not go with {reason}; use --precision bf16")
        (self.checkpointing,) = dist.any(self.forecast.checkpointing)  # all ranks alike
        return self.forecast

    def forecast_for(self, parallel: str) -> run_plan.RunForecast:
        """The forecast with replicas (ddp) or shards (fsdp)."""
        config, dist, plan, data = self.config, self.dist, self.plan, self.data
        shape = run_plan.model_shape(
            Path(self.tokenizer.name_or_path),
            lora_r=config.lora_r,
            target_modules=config.target_modules,
            rank_pattern=config.rank_pattern,
            use_dora=config.use_dora,
            init_adapter=config.init_adapter,
            trust_remote_code=self.trust_remote_code,
        )
        dtype = self.dtype
        plain = not (config.lora_dropout or config.use_dora or config.quantization != "none")
        placement = run_plan.Placement(
            dist.device.type,
            dtype.itemsize,
            quantized=config.quantization != "none",
            compiled=self.compiles,
            fused_lora=plain or not config.lora_r,
            shards=dist.world_size if parallel == "fsdp" else 1,
            fp8=config.precision == "fp8",
            captured=self.compiles and plain and parallel == "ddp" and dist.world_size == 1,
        )
        train, held_out = data.train, data.held_out
        return run_plan.forecast(
            shape,
            placement,
            device=dist.device,
            free=run_plan.free_memory(dist.device, dist.local_world_size),
            dtype=dtype,
            plan=plan,
            lengths=train.tokens.lengths[plan.documents],
            num_targets=int(train.tokens.num_targets[plan.documents].sum()),
            eval_lengths=held_out.tokens.lengths[held_out.documents],
            eval_targets=int(held_out.tokens.num_targets[held_out.documents].sum()),
            batch_size=config.batch_size,
            eval_steps=self.eval_steps,
            answer_tokens=self.answer_tokens,
            gradient_checkpointing=config.gradient_checkpointing,
            save_steps=config.save_steps,
            save_total_limit=config.save_total_limit,
            output_dir=Path(config.output_dir),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of frozen weights and of the arithmetic."""
        return model_loading.weight_dtype(self.dist.device, self.config.precision)

    @property
    def compiles(self) -> bool:
        """Whether the decoder layers are compiled: auto does where that can be done and is worth it."""
        config, device = self.config, self.dist.device.type
        possible = device == "cuda" and self.dtype == torch.bfloat16
        if config.compile == "on" and not possible:
            raise UserError(
                f"compile on needs CUDA and bf16: on {device} in {str(self.dtype).removeprefix('torch.')} "
                "every batch would be compiled anew; leave it at auto"
            )
        if config.compile != "auto":
            return config.compile == "on"
        # DoRA's layers can't be traced.
        if not possible or config.use_dora or not compiler_is_there():
            return False
        return self.plan.constant_efficiency >= MIN_CONSTANT_EFFICIENCY  # padding costs arithmetic

    def loop(self) -> None:
        """Step n is the n-th optimizer update; a resumed run starts at a later n."""
        config, plan, state = self.config, self.plan, self.state
        tokens = self.data.train.tokens
        self.terminal.start_progress(plan.num_steps, state.step, plan.steps_per_epoch)
        if state.step == 0 and self.checkpoints.step < 0:
            metrics = self.evaluate(0)
            self.log(0, metrics)
            self.terminal.advance(0, metrics)
        while self.state.step < plan.num_steps and not self.outcome:
            state, step = self.state, self.state.step + 1
            planned, learning_rate = plan[step], self.learning_rate(step)
            sums, self.interrupted = self.model.forward_backward(
                planned, tokens, self.clock, state, lambda: bool(self.stop_signal)
            )
            last = step == plan.num_steps
            evaluates = last or due(step, self.eval_steps)
            if evaluates:
                self.evaluator.note_gradients()
            with self.clock.phase("optimizer"):
                grad_norm = self.model.update(
                    learning_rate,
                    max_grad_norm=config.max_grad_norm,
                    skip=step in state.skipped_steps,
                )
            result = StepResult(step, learning_rate, planned, sums, grad_norm)
            self.pending.append(result)
            self.advance(step, planned)

            saves = self.log_late() or last or self.checkpoints.is_due(step)
            epoch_ends = last or step % plan.steps_per_epoch == 0
            logs = last or due(step, config.logging_steps)
            settles = evaluates or saves or epoch_ends or self.interrupted or bool(self.outcome)
            if logs and self.logs_late and not settles:
                self.unlogged = result  # its numbers are read once the next step is queued
            elif logs or settles or self.reads_are_free:
                self.collect()
            if self.rollback_from:
                self.roll_back()
                continue
            metrics = {}
            if logs and not self.unlogged:
                metrics |= self.training_metrics(step, learning_rate)
            if evaluates:
                metrics |= self.evaluate(step)
            if evaluates or epoch_ends:
                self.show_hardest_trained(step)
            if epoch_ends:
                metrics |= self.epoch_metrics(step)
            if metrics:
                saves |= self.log(step, metrics)
            if self.interrupted and not self.outcome:
                self.outcome = "preempted"
            if (saves or self.outcome) and self.outcome != "nonfinite":
                self.save(step)  # a step that failed is to be done again, not to be resumed behind
            self.terminal.advance(step, metrics)
        self.outcome = self.outcome or "completed"

    # -------------------------------------------------------------------------
    # One step

    def learning_rate(self, step: int) -> float:
        """The schedule at this step."""
        config = self.config
        return learning_rate_at(
            step,
            self.plan.num_steps,
            peak=config.learning_rate,
            schedule=config.lr_schedule,
            warmup_ratio=config.warmup_ratio,
            min_ratio=config.min_lr_ratio,
        )

    def advance(self, step: int, planned: PlannedStep) -> None:
        """Count the step. Only numbers that the host knows."""
        state = self.state
        state.step = step
        state.tokens_seen += planned.num_tokens
        state.samples_seen += planned.num_samples
        lengths = self.data.train.tokens.lengths[list(planned.documents)]
        self.clock.count(
            tokens=planned.num_tokens,
            supervised=planned.num_targets,
            samples=planned.num_samples,
            flops=self.model.flops(lengths, planned.num_targets),
        )

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
        """Take the sums of the pending steps up to this one, add them up over ranks, look at each step.

        The only place that waits for the device, and for these steps only.
        """
        state = self.state
        results = [result for result in self.pending if result.step <= up_to]
        self.pending = self.pending[len(results) :]
        own, by_document, norms = np.zeros((len(results), self.ledger.size)), [], []
        for row, result in zip(own, results, strict=True):
            grad_norm, micro_batches = result.read()
            norms.append(grad_norm)
            by_document.append([(documents, sums[0]) for documents, sums in micro_batches])
            for documents, sums in micro_batches:
                row += self.ledger.vector(documents, *sums)
        vectors = self.dist.sum(torch.from_numpy(own)).numpy()
        for vector, result, losses, norm in zip(vectors, results, by_document, norms, strict=True):
            state.interval = (np.asarray(state.interval) + vector).tolist()
            state.grad_norm = norm
            if math.isfinite(state.grad_norm):
                state.grad_norm_max = max(state.grad_norm_max or 0.0, state.grad_norm)
                state.epoch = (np.asarray(state.epoch) + vector).tolist()
                self.rank_hardest(result.step, vector, losses)
            else:
                self.note_nonfinite(result)

    def rank_hardest(
        self, step: int, vector: np.ndarray, losses: list[tuple[tuple[int, ...], np.ndarray]]
    ) -> None:
        """Keep this rank's hardest documents of the epoch, measured against the steps around them."""
        state, count = self.state, self.ledger.num_targets(vector)
        total, tokens = (LEVEL_DECAY * old for old in state.loss_level)
        state.loss_level = [total + self.ledger.loss(vector) * count, tokens + count]
        level = state.loss_level[0] / state.loss_level[1]
        rows = [r for d, sums in losses for r in loss_rows(d, sums, step=step, level=level)]
        state.hardest = hardest([*state.hardest, *rows])

    def note_nonfinite(self, result: StepResult) -> None:
        """A NaN or infinite gradient: its update did not happen; name the samples, follow the policy."""
        state, config = self.state, self.config
        if result.step not in state.nonfinite_steps:  # after a rollback it comes a second time
            state.nonfinite_steps.append(result.step)
        own = [d for documents, sums in result.sums for d in _nonfinite(documents, sums)]
        own = own or [d for documents, _ in result.sums for d in documents]
        places = [
            p for rank in self.dist.gather([self.data.train.place(d) for d in own]) for p in rank
        ]
        self.record.evidence["samples"] = self.nonfinite_places = places[:20]
        self.terminal.warn(
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
        state = self.state
        queued = sum(result.planned.num_tokens for result in self.pending)  # of later steps
        metrics = self.ledger.training_metrics(np.asarray(state.interval))
        state.last_loss = metrics["Training/Loss"]
        self.convergence.observe(step, state.last_loss, learning_rate)
        metrics |= {
            "Training/Learning_Rate": learning_rate,
            "Training/Gradient_Norm": state.grad_norm,
            "Training/Epoch": self.plan.fractional_epoch(step),
            "Throughput/Packing_Efficiency_Percent": 100 * self.plan.efficiency,
            "Throughput/Tokens_Seen": float(state.tokens_seen - queued),
            "Monitoring/NonFinite_Steps": float(sum(s <= step for s in state.nonfinite_steps)),
            "Monitoring/Resume_Count": float(state.resume_count),
            **self.convergence.scalars(),
            **self.hardware(),
            **self.device_memory(),
        }
        if state.grad_norm_max is not None:  # a step with a finite one
            metrics["Training/Gradient_Norm_Max"] = state.grad_norm_max
        if state.micro_batch_splits:  # else it is what step 0 says
            metrics["Config/Batch_Size"] = self.config.batch_size / 2**state.micro_batch_splits
        metrics |= self.clock.read(metrics) | self.straggler()
        metrics |= self.record.overhead_percent(time.monotonic() - self.started)
        state.interval, state.grad_norm_max = self.ledger.zeros().tolist(), None
        return metrics

    def device_memory(self) -> dict[str, float]:
        """`Memory/GPU_*`; a graph that is replayed uses what it used when it was recorded."""
        if self.dist.device.type != "cuda":
            return {}
        values, captured = gpu_memory(self.dist.device), self.model.captured
        if captured is not None:
            peak = max(values["Memory/GPU_Peak_MB"], captured.peak_bytes / 2**20)
            values["Memory/GPU_Peak_MB"] = peak
        return values

    def straggler(self) -> dict[str, float]:
        """How far the slowest rank lies behind; an alert about it names the rank."""
        seconds = self.dist.gather(self.clock.own_seconds)
        if None in seconds or not all(seconds):  # one rank, or nothing that a rank does on its own
            return {}
        percent, self.record.evidence["slowest_rank"] = straggler(seconds)
        return {"Throughput/Straggler_Percent": percent}

    def hardware(self) -> dict[str, float]:
        """This node's gauges, and the GPUs of all other nodes under their global numbers."""
        gauges = self.record.system.read()
        for others in self.dist.gather({t: v for t, v in gauges.items() if t.startswith("GPU_")}):
            gauges |= others
        return gauges

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out losses, answers and adapter health; keeps the best model."""
        state, writer = self.state, self.tensorboard_writer
        with self.clock.phase("evaluation"), self.terminal.working("evaluation") as progress:
            metrics = None
            try:
                metrics = self.evaluator.measure(step, writer, progress)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.model.captured is None:
                    raise
            if metrics is None:  # behind the handler, whose error keeps what was there
                # A graph holds what the passes of a step use, also in between.
                self.model.release_graph()
                metrics = self.evaluator.measure(step, writer, progress)
        if "Eval/Loss" in metrics and state.note_evaluation(step, metrics["Eval/Loss"]) and step:
            self.save_model(self.run.best_model)
        patience = self.config.early_stopping_patience
        if patience and state.evals_without_gain >= patience:
            self.terminal.say(f"early stopping: no better held-out loss in {patience} evaluations")
            self.outcome = "stopped"
        return metrics

    def gather_hardest(self) -> None:
        """The hardest documents of all ranks, on every rank."""
        state = self.state
        state.hardest = hardest([r for rows in self.dist.gather(state.hardest) for r in rows])

    def show_hardest_trained(self, step: int) -> None:
        """TEXT: the training samples of this epoch with the highest loss."""
        self.gather_hardest()
        if self.dist.is_main:
            text = hardest_text(self.data.train, self.state.hardest, training=True)
            self.tensorboard_writer.add_text("Training/Hardest_Samples", text, step)

    def epoch_metrics(self, step: int) -> dict[str, float]:
        """Epoch/ tags over the epoch that ends with this step, and its line in TEXT."""
        state, plan = self.state, self.plan
        self.count_seconds()
        steps = (step - 1) % plan.steps_per_epoch + 1
        metrics = {
            "Epoch/Average_Loss": self.ledger.loss(np.asarray(state.epoch)),
            "Epoch/Duration_Seconds": state.epoch_seconds,
            "Epoch/Steps_Per_Second": steps / state.epoch_seconds,
        }
        epoch = math.ceil(plan.fractional_epoch(step))
        text = run_summary.epoch_summary(epoch, steps, metrics)
        self.tensorboard_writer.add_text("Training/Epoch_Summary", text, step)
        state.epoch, state.epoch_seconds = self.ledger.zeros().tolist(), 0.0
        state.hardest = []
        return metrics

    def log(self, step: int, metrics: dict[str, float]) -> bool:
        """A step to TensorBoard, metrics.jsonl and the alerts; true if these ask for a checkpoint."""
        with self.clock.phase("logging"):
            wishes = self.record.log(step, metrics)
        # Some of what alerts look at is a rank's own, and all must do the same.
        save, stop = self.dist.any("save" in wishes, "stop" in wishes)
        if stop:
            self.outcome = "stopped"
        return save

    def count_seconds(self) -> None:
        """Bring the state's wall times up to now."""
        now = time.monotonic()
        self.state.epoch_seconds += now - self.counted
        self.state.training_seconds += now - self.counted
        self.counted = now

    # -------------------------------------------------------------------------
    # Saving and going back

    def save(self, step: int) -> None:
        """A checkpoint of this step; the points up to it are on the disk before it is."""
        if self.checkpoints.step == step:
            return
        state = self.state
        self.gather_hardest()
        with self.clock.phase("saving"), self.terminal.working("saving"):
            self.count_seconds()
            state.convergence = self.convergence.state_dict()
            state.alerts = self.record.alerts.state_dict()
            self.tensorboard_writer.flush(durable=True)
            self.checkpoints.save(
                self.run.name,
                step,
                self.model.tensors(),
                documents=self.model.documents(),
                state={
                    "train_state": run_summary.settings_of(state),
                    "identity": self.identity,
                    "config": redact_values(self.settings),
                },
                protect=state.best_step,
            )

    def save_model(self, directory: Path) -> None:
        """The adapter with its tokenizer, whole or not at all."""
        with self.clock.phase("saving"), self.terminal.working(f"saving {directory.name}"):
            self.model.save(directory, self.tokenizer, self.run.name)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, optimizer, random state and counters as they were at the checkpoint."""
        run_summary.check_identity(checkpoint.state["identity"], self.identity, checkpoint.path)
        self.state = TrainState(**checkpoint.state["train_state"])
        self.model.restore(checkpoint.tensors, self.state)
        self.checkpoints.go_on_from(checkpoint)

    def roll_back(self) -> None:
        """Policy `rollback`: the newest checkpoint again, and no update at the step that failed."""
        failed, self.rollback_from = self.rollback_from, 0
        self.pending, self.unlogged = [], None  # steps behind the failed one
        nonfinite, skipped = self.state.nonfinite_steps, self.state.skipped_steps
        checkpoint = None if failed in skipped else self.checkpoints.newest(self.run.name)
        if checkpoint is None:
            self.outcome = "nonfinite"
            return
        with self.clock.phase("saving"):  # no training time
            self.restore(checkpoint)
        self.state.nonfinite_steps, self.state.skipped_steps = nonfinite, [*skipped, failed]
        self.start_convergence()
        self.record.rewind(self.state.step, self.state.alerts)
        self.terminal.say(
            f"went back to {checkpoint.path}; the update of step {failed} will be left out"
        )

    # -------------------------------------------------------------------------
    # Beginning

    def build_model(self) -> None:
        """Weights, adapters, fast kernels, the wrapper of several ranks, optimizer."""
        config, dist = self.config, self.dist
        with self.terminal.working("loading the model"):
            model = model_loading.load_model(
                self.resolved,
                self.tokenizer,
                device=dist.device,
                precision=config.precision,
                lora_r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=config.target_modules,
                rank_pattern=config.rank_pattern,
                use_rslora=config.use_rslora,
                use_dora=config.use_dora,
                quantization=config.quantization,
                init_adapter=config.init_adapter,
                gradient_checkpointing=self.checkpointing,
                seed=config.seed,
                sharded=self.parallel == "fsdp",
            )
        if self.compiles:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.cache_path / "compiled"))
        self.model = ModelInTraining(
            model,
            self.data.train.tokens.close_id,
            dist,
            parallel=self.parallel,
            dtype=self.dtype,
            batch_shape=self.plan.constant_shape if self.compiles else {},
            must_compile=config.compile == "on",
            recomputes=self.checkpointing,
            may_recompute=config.gradient_checkpointing == "auto" and not self.checkpointing,
            learning_rate=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fp8=config.precision == "fp8",
            warn=self.terminal.warn,
        )
        self.evaluator = Evaluator(
            self.model.packed,
            self.tokenizer,
            self.data.held_out,
            self.eval_plan,
            dist,
            probes=self.probes,
            max_new_tokens=self.answer_tokens,
            histograms=config.log_weight_histograms,
        )
        # Nothing waits for the CPU's own results, so there every step is looked at.
        self.reads_are_free = dist.device.type == "cpu"
        self.logs_late = dist.device.type == "cuda"  # only its clock says when a step was done
        torch.manual_seed(config.seed + dist.rank)  # dropout, if any, differs between ranks

    def open_run(self) -> None:
        """Directories, record and monitors; from a checkpoint where there is one."""
        config, dist = self.config, self.dist
        output_dir = Path(config.output_dir)
        self.state.interval = self.state.epoch = self.ledger.zeros().tolist()
        self.catch_signals()
        checkpoint = self.checkpoints.find(self.resume)
        if checkpoint:
            self.restore(checkpoint)
            self.state.resume_count += 1
        if dist.is_main:  # weights and both moments, one more while the old one is still there
            check_writable(output_dir, 6 * 4 * self.model.num_trainable)
        # By a group that died before its first checkpoint: nobody's work is in what it has shown.
        begun = "" if checkpoint else self.checkpoints.begun()
        name = dist.broadcast(
            checkpoint.run if checkpoint else dist.is_main and (begun or new_run(output_dir).name)
        )
        self.run: RunDirectory = (
            known_run(output_dir, name) if dist.is_main else shared_run(output_dir, name)
        )
        dist.note("run", name)
        if begun:
            self.terminal.say(f"{name} begins again: it had no checkpoint yet")
        for model in own_models(self.run) if dist.is_main else ():
            self.terminal.say(f"the model of an earlier run is now {model}")
        self.terminal.open_log(self.run.logs / "training.log")
        self.start_convergence()
        on_cuda = dist.device.type == "cuda"
        gpus = dist.gather_on_node(gpu_uuid(dist.device)) if on_cuda else ()
        self.record = RunRecord(
            self.run,
            is_main=dist.is_main,
            samples_hardware=dist.local_rank == 0,
            resume_step=self.state.step if checkpoint else -1 if begun else None,
            gpu_uuids=gpus,
            first_gpu_index=dist.rank,  # one a rank
            alert_state=self.state.alerts,
            alert_actions=config.alert_actions,
            warn=self.terminal.warn,
        )
        peak = peak_flops(torch.cuda.get_device_name(dist.device)) if on_cuda else None
        self.clock = StepClock(
            peak_flops=peak and peak * dist.world_size,
            timeline=CudaTimeline() if on_cuda else HostTimeline(),
        )
        self.started = self.counted = time.monotonic()
        self.announce(checkpoint)
        if dist.is_main:
            self.write_configuration()
        self.record.status("running", step=self.state.step)
        if checkpoint:
            self.tell_changes(checkpoint)
        else:
            with dist.patience("statistics"), self.terminal.working("describing the data"):
                if dist.is_main:
                    self.describe_data()

    def start_convergence(self) -> None:
        """The convergence monitor as it stood at the state's step."""
        self.convergence = ConvergenceMonitor(
            self.plan.num_steps, self.plan.steps_per_epoch, self.state.convergence or None
        )

    def catch_signals(self) -> None:
        """From here on there is something to save; before, a signal simply ends the process."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread do this
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                number = getattr(signal, name)
                self.former_handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _frame: object) -> None:
        """Only a flag: the loop saves at the next step boundary, all ranks at the same one."""
        self.stop_signal = signal.Signals(number).name

    def announce(self, checkpoint: Checkpoint | None) -> None:
        """What was resolved, on the terminal."""
        if self.resolved.embedded:
            self.terminal.say(model_loading.banner(self.resolved), style="bold yellow")
        data, plan, dist, model = self.data, self.plan, self.dist, self.model
        remarks = len(data.split.read.remarks)
        ranks = f", {dist.world_size} ranks, {self.parallel}" if dist.world_size > 1 else ""
        self.terminal.table(
            "Run",
            [
                ("device", f"{dist.device}{ranks}"),
                ("model", self.resolved.name),
                ("parameters", f"{model.num_trainable:,} trainable of {model.num_parameters:,}"),
                (
                    "samples",
                    f"{len(data.train)} train, {len(data.held_out)} held out",
                ),
                ("broken, left out", len(data.split.read.broken)),
                ("too long, left out", len(data.train.tokens.ledger.dropped)),
                *([("remarks", f"{remarks}; --check-data lists them")] if remarks else []),
                ("tokens per epoch", f"{plan.num_tokens:,}"),
                ("steps", f"{plan.num_steps} ({plan.steps_per_epoch} per epoch)"),
                ("packing", f"{plan.num_rows} rows, {plan.efficiency:.1%} full"),
                ("gradient checkpointing", "on" if model.recomputes else "off"),
                ("compiled layers", "on" if model.batch_shape else "off"),
                (
                    "CUDA graph",
                    f"no: {model.not_captured}"
                    if model.not_captured
                    else "from the second step on",
                ),
                *self.forecast.short_rows(),
                ("run", self.run.logs),
            ],
        )
        if checkpoint:
            self.terminal.say(f"resumed from {checkpoint.path}, step {self.state.step}")
        self.terminal.say(f"watch it: uv run tensorboard --logdir={self.run.tensorboard.parent}")

    def write_configuration(self) -> None:
        """configuration.json among the run's logs: settings, model, steps and versions."""
        record = run_summary.configuration(
            self.settings,
            self.model_record(),
            self.plan,
        )
        write_json(self.run.logs / "configuration.json", record)

    def model_record(self) -> dict[str, Any]:
        """The model's name and size, for the run's files."""
        model = self.model
        return {
            "name": self.resolved.name,
            "trainable": model.num_trainable,
            "total": model.num_parameters,
        }

    def tell_changes(self, checkpoint: Checkpoint) -> None:
        """Settings that are others than those of the checkpoint, on the terminal and in TEXT."""
        settings = redact_values(self.settings)
        changed = run_summary.changed_settings(checkpoint.state["config"], settings)
        if changed:
            self.terminal.say(f"changed since step {self.state.step}: {', '.join(changed)}")
            self.write_settings(self.state.step)

    def write_settings(self, step: int) -> None:
        """TEXT: all settings as they are from this step on."""
        table = run_summary.markdown_table(run_summary.hparams(self.settings))
        self.tensorboard_writer.add_text("Config/Training_Settings", table, step)

    def describe_data(self) -> None:
        """Before step 1: settings, dataset and mask audit, to TensorBoard and as files."""
        writer, statistics = self.tensorboard_writer, self.data.statistics
        self.data.write_reports(self.run.logs)
        writer.add_hparams(run_summary.hparams(self.settings))
        self.write_settings(0)
        writer.add_text("Dataset/Summary", statistics.summary_markdown(), 0)
        audit = mask_audit(self.data.train.tokens, self.tokenizer)
        writer.add_text("Dataset/Mask_Audit", audit, 0)
        for tag, values in statistics.histograms().items():
            writer.add_histogram(tag, values, 0)
        for tag, draw in statistics.pictures().items():
            writer.add_figure(tag, draw, 0)
        config = {
            "Config/Batch_Size": float(self.config.batch_size),
            "Config/Sequence_Length": float(self.config.max_seq_length),
            "Config/Gradient_Accumulation_Steps": float(self.config.gradient_accumulation_steps),
        }
        writer.log(0, statistics.scalars() | config)

    # -------------------------------------------------------------------------
    # End

    def finish(self) -> None:
        """Final model, summary and statistics; or, when interrupted, how to go on."""
        state, outcome = self.state, self.outcome
        self.terminal.stop_progress()
        if outcome == "nonfinite":
            raise RunStopped(
                f"step {state.nonfinite_steps[-1]}: non-finite gradient, samples "
                f"{', '.join(self.nonfinite_places[:4])}. No bad update reached the weights; look at these "
                "samples, lower --learning-rate or use --nonfinite skip, then --resume latest"
            )
        if outcome == "preempted":
            self.terminal.conclude(
                f"{self.stop_signal or 'a signal to another rank'}: saved step {state.step} of "
                f"{self.plan.num_steps}. Go on with the "
                "same command and --resume latest"
            )
        else:
            self.save_model(self.run.final_model)
            self.count_seconds()
            hardware = self.hardware()  # a collective
            if self.dist.is_main:
                self.write_summary(hardware)
        self.record.status(outcome, step=state.step, signal=self.stop_signal)

    def write_summary(self, hardware: dict[str, float]) -> None:
        """Final_* tags, Training/Final_Summary and training_statistics.json."""
        state, run = self.state, self.run
        model = self.model_record()
        final = run_summary.final_metrics(
            self.settings,
            self.data,
            {
                "Trainable_Parameters": self.model.num_trainable,
                "Total_Parameters": self.model.num_parameters,
            },
            state,
            self.convergence.scalars(),
            hardware,
        )
        statistics = run_summary.training_statistics(
            self.settings, model, self.data, self.plan, state, final, run
        )
        self.tensorboard_writer.log(state.step, final)
        summary = run_summary.final_summary(statistics)
        self.tensorboard_writer.add_text("Training/Final_Summary", summary, state.step)
        write_json(run.statistics, statistics)
        self.terminal.conclude(run_summary.closing_lines(statistics, run))

    def close_run(self) -> None:
        """Writer and monitors end, whatever happened."""
        self.terminal.stop_progress()
        ends = {"completed": "success", "stopped": "success"}
        self.record.close(ends.get(self.outcome))
        if self.dist.is_main:
            self.write_report()
        for number, handler in self.former_handlers.items():
            signal.signal(number, handler)

    def write_report(self) -> None:
        """report.html; a disk that is full or a file that somebody broke ends no run."""
        try:
            with self.terminal.working("writing the report"):
                path = write_report(self.run)
            self.terminal.say(f"report: {path}")
        except (OSError, UserError) as error:
            self.terminal.warn(f"no report.html: {error}")


def due(step: int, every: int) -> bool:
    """True at every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


def _nonfinite(documents: tuple[int, ...], sums: object) -> list[int]:
    """Documents whose own loss is not finite."""
    finite = torch.isfinite(sums.per_document).all(dim=2).all(dim=1).tolist()
    return [d for d, good in zip(documents, finite, strict=True) if not good]


# -----------------------------------------------------------------------------
# The command


def run(command: CommandLine) -> int:
    """Do what the command line says; returns the exit code."""
    config = command.training
    if command.check_data:  # everything that is wrong is to be seen, nothing may end the reading
        policy = "drop" if config.over_length == "error" else config.over_length
        config = dataclasses.replace(config, max_broken_fraction=1.0, over_length=policy)
    trainer = DirectTrainer(
        config,
        resume=command.resume,
        quiet=command.quiet,
        trust_remote_code=command.trust_remote_code,
    )
    if command.check_data:
        return check_data(trainer)
    if command.plan:
        trainer.prepare()
        rows = trainer.make_forecast().rows()
        trainer.terminal.table(f"Plan for {trainer.resolved.name}", rows, always=True)
    else:
        trainer.train()
    return 0


def check_data(trainer: DirectTrainer) -> int:
    """Print statistics, unless quiet, and everything that is wrong; 1 if something serious is."""
    data = trainer.prepare()
    if not trainer.quiet and trainer.dist.is_main:
        dataset_report.print_report(data.statistics.to_json())
    faults = data_faults(data)
    count = len(data.split.read.samples)
    trainer.terminal.conclude("\n".join([*map(str, faults), summary(faults, count)]))
    return 0 if is_good(faults) else 1


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done or interrupted with a checkpoint, 1 --check-data found something, 2 bad input,
    3 the run could not go on, 130 interrupted before there was anything to save."""
    try:
        sys.excepthook = show_crash
        code = run(parse_command_line(sys.argv[1:] if arguments is None else arguments))
    except (UserError, RunStopped) as error:
        Terminal().error(str(error))
        return 2 if isinstance(error, UserError) else 3
    except KeyboardInterrupt:
        Terminal().error("interrupted before the first step")
        return 130
    distributed.leave()
    return code


if __name__ == "__main__":
    distributed.exit_process(main())
