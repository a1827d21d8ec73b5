"""A rank with a CUDA device and a neighbour that are not there: for the loop, they are.

The device works off a queue in a time of its own, as CUDA does; losses, gradients and times of a step are
what a script says.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from finetuning.common.distributed import Distributed
from finetuning.data.token_table import NUM_SEGMENTS, Segment
from finetuning.model.loss import LossSums
from finetuning.training.optimizer import StepResult

MB, TARGETS = 2**20, 10  # tokens that carry loss in each document


@dataclass(frozen=True)
class ScriptedStep:
    """What happens in one step. Losses in nats a token; seconds on the device."""

    own_loss: float
    other_loss: float  # of the neighbour, over as many tokens
    norm: float
    data: float
    own: float  # of forward and backward
    waiting: float  # for the neighbour
    optimizer: float
    flops: float


class Device:
    """Its time at the end of what is queued, and of what it has finished."""

    def __init__(self) -> None:
        self.queued = self.finished = 0.0

    def event(self, enable_timing: bool = False) -> SimpleNamespace:
        """In place of torch.cuda.Event."""
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.queued)
        event.query = lambda: event.at <= self.finished
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event


@dataclass(frozen=True)
class PretendedRanks(Distributed):
    """Rank 0 of two; what the other one gives is put into `others` beforehand."""

    others: list[np.ndarray] = field(default_factory=list)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = [self.others.pop(0) for _ in range(len(tensor))]
        return tensor + torch.from_numpy(np.array(rows)) if rows else tensor

    def any(self, *flags: bool) -> list[bool]:
        return list(flags)

    def gather(self, value: object) -> list:
        """The other rank has nothing hard, a GPU of its own node, and takes two seconds of its own."""
        other = {list: [], dict: {"GPU_8/Temperature_C": 51.0}, float: 2.0}
        return [value, other[type(value)]]


def two_ranks() -> PretendedRanks:
    return PretendedRanks(0, 2, 0, torch.device("cuda", 0))


class ScriptedEngine:
    """In place of weights: the steps of a script."""

    num_trainable, num_parameters = 12, 345

    def __init__(self, script: Callable[[int], ScriptedStep], device: Device, trainer) -> None:
        self._script, self._device, self._trainer = script, device, trainer
        self.captured: SimpleNamespace | None = None
        self.before: Callable[[int], None] = lambda step: None
        self.step = 0

    def forward_backward(self, planned, tokens, clock, state, wants_stop) -> tuple[list, bool]:
        self._device.finished = self._device.queued  # what was queued before is done by now
        self.step += 1
        self.before(self.step)
        step = self._script(self.step)
        with clock.phase("data"):
            self._device.queued += step.data
        with clock.phase("forward_backward"):
            self._device.queued += step.own
            clock.gradients_are_ready()
            self._device.queued += step.waiting
        documents = planned.micro_batches[0]
        vector = self._trainer.metrics.losses.vector
        self._trainer.dist.others.append(
            vector(documents, _sums(documents, step.other_loss).per_document.numpy())
        )
        return [(documents, _sums(documents, step.own_loss))], False

    def update(self, learning_rate: float, **_) -> torch.Tensor:
        step = self._script(self.step)
        self._device.queued += step.optimizer
        return torch.tensor(step.norm, dtype=torch.float64)

    def flops(self, lengths, num_targets) -> float:
        return self._script(self.step).flops

    def beside_graph(self, work: Callable) -> object:
        return work()

    def tensors(self) -> dict:
        return {"adapter_model": {"weight": torch.zeros(1)}}

    def documents(self) -> dict:
        return {}

    def save(self, folder, tokenizer, notes) -> None:
        folder.mkdir(parents=True)


def _sums(documents, loss: float) -> LossSums:
    per_document = torch.zeros(len(documents), NUM_SEGMENTS, 3, dtype=torch.float64)
    per_document[:, Segment.ANSWER] = torch.tensor(
        [TARGETS * loss, 0, TARGETS], dtype=torch.float64
    )
    return LossSums(per_document, torch.zeros(10, 2), torch.zeros(2))


class NoEvaluator:
    """Nothing is held out."""

    questions: ClassVar = {"step": 0, "losses": [], "answers": []}

    def measure(self, *_: object) -> dict:
        return {}

    def note_gradients(self) -> None:
        pass


@contextlib.contextmanager
def cuda(device: Device, memory: Callable[[], dict[str, int]]) -> Iterator[None]:
    """torch.cuda with this device; `memory` says how many MB are free, allocated, reserved, the peak's."""
    reset = []

    def peak(_: object) -> int:
        assert len(reset) == len(asked), "the peak is reset once for each reading"
        asked.append(1)
        return memory()["peak"] * MB

    asked: list[int] = []
    fakes = {
        "is_available": lambda: True,
        "get_device_name": lambda _=None: "NVIDIA H100 80GB HBM3",
        "Event": device.event,
        "mem_get_info": lambda _=None: (memory()["free"] * MB, memory()["total"] * MB),
        "memory_allocated": lambda _=None: memory()["allocated"] * MB,
        "memory_reserved": lambda _=None: memory()["reserved"] * MB,
        "max_memory_allocated": peak,
        "reset_peak_memory_stats": reset.append,
    }
    read = StepResult.read

    def read_when_done(result: StepResult) -> object:
        """Who reads a step waits for it."""
        device.finished = max(device.finished, result.ends_at)
        return read(result)

    def noted(result: StepResult, *arguments) -> None:
        init(result, *arguments)
        result.ends_at = device.queued

    init = StepResult.__init__
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(StepResult, "__init__", noted)
        patch.setattr(StepResult, "read", read_when_done)
        yield
