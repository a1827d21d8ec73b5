"""The sums of steps become the numbers of logged steps, epochs and texts."""

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from finetuning.common.distributed import Distributed
from finetuning.common.errors import UserError
from finetuning.data.packing import PlannedStep
from finetuning.evaluation.hardest_samples import LEVEL_DECAY, Row, hardest, hardest_text, loss_rows
from finetuning.evaluation.loss_metrics import LossMetrics
from finetuning.model.flops import peak_flops
from finetuning.monitoring.convergence import ConvergenceMonitor
from finetuning.monitoring.system_monitor import gpu_memory
from finetuning.runs.plan import RunPlan
from finetuning.runs.summary import epoch_summary
from finetuning.training.captured_step import CapturedStep
from finetuning.training.optimizer import StepResult
from finetuning.training.state import TrainState, summed
from finetuning.training.step_clock import (
    CudaTimeline,
    HostTimeline,
    StepClock,
    Stopwatch,
    straggler,
)

NAMED = 4  # samples that an alert names


class MetricsProcessor:
    """Adds up what steps leave behind, in the run's state, and divides it when it is shown.

    The state is handed in with each call, since a checkpoint brings one of its own.
    """

    def __init__(self, plan: RunPlan, dist: Distributed, state: TrainState) -> None:
        self._plan, self._data, self._dist = plan.steps, plan.data, dist
        self.losses = LossMetrics(plan.groups[0])
        self._check(state)
        if not state.interval:
            state.interval = state.epoch = self.losses.zeros().tolist()
        self.convergence = self._monitor(state)
        on_cuda = dist.device.type == "cuda"
        peak = peak_flops(torch.cuda.get_device_name(dist.device)) if on_cuda else None
        self.clock = StepClock(
            peak_flops=peak and peak * dist.world_size,
            timeline=CudaTimeline() if on_cuda else HostTimeline(),
        )
        self.spent = Stopwatch()  # on what a logged step shows, without the wait for other ranks
        self._started = self._counted = time.monotonic()
        self._interval: list[Row] = []  # this rank's hardest documents since the last logged step

    @property
    def session_seconds(self) -> float:
        """Wall time since this session began."""
        return time.monotonic() - self._started

    def restart(self, state: TrainState) -> None:
        """Go on from an earlier state, after a rollback."""
        self._check(state)
        self.convergence = self._monitor(state)

    def _check(self, state: TrainState) -> None:
        """Raise UserError where the sums or the documents of a state that was read are not of these data."""
        sizes = {len(sums) for sums in (state.interval, state.epoch) if sums}
        documents = range(len(self._data.train.tokens.lengths))
        if sizes - {self.losses.size} or any(row[2] not in documents for row in state.hardest):
            raise UserError(
                "--resume: the sums in the checkpoint's state.json are not those of these data; go on with "
                "the version of this program that wrote it, or start a new run with --init-adapter"
            )

    def _monitor(self, state: TrainState) -> ConvergenceMonitor:
        plan = self._plan
        return ConvergenceMonitor(plan.num_steps, plan.steps_per_epoch, state.convergence or None)

    # -------------------------------------------------------------------------
    # Steps

    def count(self, planned: PlannedStep, flops: float, state: TrainState) -> None:
        """Add a step's tokens, samples and arithmetic; the host knows them without waiting."""
        state.tokens_seen += planned.num_tokens
        state.samples_seen += planned.num_samples
        self.clock.count(
            tokens=planned.num_tokens,
            supervised=planned.num_targets,
            samples=planned.num_samples,
            flops=flops,
        )

    def collect(self, results: Sequence[StepResult], state: TrainState) -> list[StepResult]:
        """Add up the sums of these steps over ranks; returns the steps whose gradient is not finite.

        The only place that waits for the device, and for these steps only.
        """
        own, by_document, norms = np.zeros((len(results), self.losses.size)), [], []
        for row, result in zip(own, results, strict=True):
            grad_norm, micro_batches = result.read()
            norms.append(grad_norm)
            by_document.append([(documents, sums[0]) for documents, sums in micro_batches])
            for documents, sums in micro_batches:
                row += self.losses.vector(documents, *sums)
        vectors = self._dist.sum(torch.from_numpy(own)).numpy()
        nonfinite = []
        for vector, result, losses, norm in zip(vectors, results, by_document, norms, strict=True):
            state.interval = summed(state.interval, vector)
            state.grad_norm = norm
            if math.isfinite(state.grad_norm):
                state.grad_norm_max = max(state.grad_norm_max or 0.0, state.grad_norm)
                state.epoch = summed(state.epoch, vector)
                self._rank_hardest(result.step, vector, losses, state)
            else:
                nonfinite.append(result)
        return nonfinite

    def _rank_hardest(
        self,
        step: int,
        vector: np.ndarray,
        losses: list[tuple[tuple[int, ...], np.ndarray]],
        state: TrainState,
    ) -> None:
        """Keep this rank's hardest documents of the epoch, measured against the steps around them."""
        count = self.losses.num_targets(vector)
        total, tokens = (LEVEL_DECAY * old for old in state.loss_level)
        state.loss_level = total + self.losses.loss(vector) * count, tokens + count
        level = state.loss_level[0] / state.loss_level[1]
        rows = [r for d, sums in losses for r in loss_rows(d, sums, step=step, level=level)]
        state.hardest = hardest([*state.hardest, *rows])
        self._interval = hardest([*self._interval, *rows], NAMED)

    def hardest_places(self) -> list[str]:
        """`file:line` of the hardest samples since this was last asked, of all ranks. A collective."""
        rows = [r for own in self._dist.gather(self._interval) for r in own]
        self._interval = []
        return [self._data.train.place(row[2]) for row in hardest(rows, NAMED)]

    def nonfinite_places(self, result: StepResult) -> list[str]:
        """`file:line` of the samples of a step without a finite gradient, of all ranks; 20 at most."""
        own = [d for documents, sums in result.sums for d in _nonfinite(documents, sums)]
        own = own or [d for documents, _ in result.sums for d in documents]
        train = self._data.train
        return [p for rank in self._dist.gather([train.place(d) for d in own]) for p in rank][:20]

    # -------------------------------------------------------------------------
    # Numbers

    def training(
        self, step: int, learning_rate: float, state: TrainState, pending: Sequence[StepResult]
    ) -> dict[str, float]:
        """Losses, gradient norm, convergence and counters since the last logged step.

        pending: later steps, which the state's counters hold already.
        """
        with self.spent, self.clock.phase("logging"):
            return self._training(step, learning_rate, state, pending)

    def _training(
        self, step: int, learning_rate: float, state: TrainState, pending: Sequence[StepResult]
    ) -> dict[str, float]:
        queued = sum(result.planned.num_tokens for result in pending)
        metrics = self.losses.training_metrics(np.asarray(state.interval, np.float64))
        state.last_loss = metrics["Training/Loss"]
        self.convergence.observe(step, state.last_loss, learning_rate)
        metrics |= {
            "Training/Learning_Rate": learning_rate,
            "Training/Gradient_Norm": state.grad_norm,
            "Training/Epoch": self._plan.fractional_epoch(step),
            "Throughput/Packing_Efficiency_Percent": 100 * self._plan.efficiency,
            "Throughput/Tokens_Seen": float(state.tokens_seen - queued),
            "Monitoring/NonFinite_Steps": float(sum(s <= step for s in state.nonfinite_steps)),
            "Monitoring/Resume_Count": float(state.resume_count),
            **(self.convergence.scalars() if self.convergence.is_due() else {}),
        }
        if state.grad_norm_max is not None:  # a step with a finite one
            metrics["Training/Gradient_Norm_Max"] = state.grad_norm_max
        if state.micro_batch_splits:  # else it is what step 0 says
            rows = self._plan.rows_per_micro_batch
            metrics["Config/Batch_Size"] = rows / 2**state.micro_batch_splits
        state.interval, state.grad_norm_max = self.losses.zeros().tolist(), None
        return metrics

    def hardware(self, gauges: Mapping[str, float]) -> dict[str, float]:
        """This node's gauges, and the GPUs of all other nodes under their global numbers."""
        found = dict(gauges)
        for others in self._dist.gather({t: v for t, v in found.items() if t.startswith("GPU_")}):
            found |= others
        return found

    def gpu_memory(self, captured: CapturedStep | None) -> dict[str, float]:
        """`Memory/GPU_*` of this rank; a graph that is replayed uses what it used when it was recorded."""
        if self._dist.device.type != "cuda":
            return {}
        values = gpu_memory(self._dist.device)
        if captured is not None:
            peak = max(values["Memory/GPU_Peak_MB"], captured.peak_bytes / 2**20)
            values["Memory/GPU_Peak_MB"] = peak
        return values

    def straggler(self) -> tuple[dict[str, float], int | None]:
        """How far the slowest rank lies behind, and which rank it is; nothing with one rank."""
        seconds = self._dist.gather(self.clock.own_seconds)
        if None in seconds or not all(seconds):  # one rank, or nothing that a rank does on its own
            return {}, None
        percent, rank = straggler(seconds)
        return {"Throughput/Straggler_Percent": percent}, rank

    # -------------------------------------------------------------------------
    # Epochs

    def gather_hardest(self, state: TrainState) -> None:
        """The hardest documents of all ranks, on every rank."""
        state.hardest = hardest([r for rows in self._dist.gather(state.hardest) for r in rows])

    def hardest_text(self, state: TrainState) -> str:
        """Markdown: the training samples of this epoch with the highest loss, of all ranks. A collective."""
        self.gather_hardest(state)
        if not self._dist.is_main:
            return ""
        return hardest_text(self._data.train, state.hardest, training=True)

    def epoch(self, step: int, state: TrainState) -> tuple[dict[str, float], str]:
        """Epoch/ tags over the epoch that ends with this step, and its Markdown; the sums begin anew."""
        self.count_seconds(state)
        steps = (step - 1) % self._plan.steps_per_epoch + 1
        metrics = {
            "Epoch/Average_Loss": self.losses.loss(np.asarray(state.epoch)),
            "Epoch/Duration_Seconds": state.epoch_seconds,
            "Epoch/Steps_Per_Second": steps / state.epoch_seconds,
        }
        state.epoch, state.epoch_seconds = self.losses.zeros().tolist(), 0.0
        state.hardest = []
        number = math.ceil(self._plan.fractional_epoch(step))
        return metrics, epoch_summary(number, steps, metrics)

    def count_seconds(self, state: TrainState) -> None:
        """Bring the state's wall times up to now."""
        now = time.monotonic()
        state.epoch_seconds += now - self._counted
        state.training_seconds += now - self._counted
        self._counted = now


def _nonfinite(documents: tuple[int, ...], sums: object) -> list[int]:
    """Documents whose own loss is not finite."""
    finite = torch.isfinite(sums.per_document).all(dim=2).all(dim=1).tolist()
    return [d for d, good in zip(documents, finite, strict=True) if not good]
