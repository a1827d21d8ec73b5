"""What a step holds so that it fits the memory: activations of how many layers, a CUDA graph or none."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetuning.training.captured_step import hides_launches
from finetuning.training.memory_estimate import (
    USABLE,
    MemoryEstimate,
    ModelShape,
    Placement,
    estimate_memory,
)

NO_ROOM = "the memory has no room for what it would hold"
# Devices whose estimate is good enough for some layers; a host's system ends what takes too much.
BY_LAYER = frozenset({"cuda"})


@dataclass(frozen=True)
class MemoryPlan:
    """How many layers are recomputed, and what that takes.

    estimates: of a step, by the number of layers that are recomputed; None for an unknown architecture.
    no_graph: why the passes are not captured though they could be; empty where they are, or could not be.
    """

    placement: Placement
    estimates: Sequence[MemoryEstimate | None]
    recomputed: int  # layers, the first ones
    free: int  # bytes
    no_graph: str = ""

    @property
    def layers(self) -> int:
        """Those that can be recomputed one by one."""
        return len(self.estimates) - 1

    @property
    def estimate(self) -> MemoryEstimate | None:
        """What a step takes as it is planned."""
        return self.estimates[self.recomputed]

    @property
    def fits(self) -> bool:
        """Whether it stays within the free memory; true where there is no estimate."""
        return self.within_free(self.estimate)

    @property
    def text(self) -> str:
        """Which layers are recomputed: off, on, or how many."""
        whole = {0: "off", self.layers: "on"}
        return whole.get(self.recomputed, f"{self.recomputed} of {self.layers} layers")

    def within_free(self, estimate: MemoryEstimate | None) -> bool:
        """Whether so much is free, with room for fragmentation."""
        return estimate is None or estimate.total <= USABLE * self.free


def plan_memory(
    shape: ModelShape, placement: Placement, tokens: int, free: int, gradient_checkpointing: str
) -> MemoryPlan:
    """For micro-batches of so many tokens and `free` bytes.

    gradient_checkpointing: on, off, or auto, which recomputes as few layers as fit; on a host none or all.
    placement: captured if there may be a graph. That is given up last, as it may bring more than recomputed
    layers cost, and at once where launches are hidden without it.
    """
    layers = shape.layers
    apart = range(layers + 1) if placement.device_type in BY_LAYER else (0, layers)
    counts = {"on": (layers,), "off": (0,)}.get(gradient_checkpointing, apart)

    def plan(placement: Placement, no_graph: str) -> MemoryPlan:
        estimates = [
            estimate_memory(shape, placement, tokens, recomputed=n) for n in range(layers + 1)
        ]
        plans = [MemoryPlan(placement, estimates, n, free, no_graph) for n in counts]
        return next((plan for plan in plans if plan.fits), plans[-1])

    bare = replace(placement, captured=False)
    if not placement.captured:
        return plan(bare, "")
    if shape.dims is not None and hides_launches(shape.dims, tokens):
        return plan(bare, f"a micro-batch of {tokens:,} tokens takes longer than its launches")
    captured = plan(placement, "")
    return captured if captured.fits else plan(bare, NO_ROOM)
