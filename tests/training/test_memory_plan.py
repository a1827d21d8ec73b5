"""What a step holds: as few layers recomputed as fit, and a graph only where it brings something.

uv run pytest tests/training/test_memory_plan.py
"""

import itertools

import pytest

from finetuning.training.memory_estimate import USABLE, ModelShape, Placement, estimate_memory
from finetuning.training.memory_plan import NO_ROOM, MemoryPlan, plan_memory
from tests.helpers.units import GIB

BARE = Placement("cuda", 2, compiled=True)
CAPTURED = Placement("cuda", 2, compiled=True, captured=True)
LONG = "a micro-batch of {:,} tokens takes longer than its launches"


def room_for(shape: ModelShape, placement: Placement, tokens: int, recomputed: int) -> int:
    """Free bytes that such a step just fits into."""
    total = estimate_memory(shape, placement, tokens, recomputed=recomputed).total
    return int(total / USABLE) + 1


@pytest.mark.parametrize("recomputed", [0, 1, 12, 24, 35])
def test_as_few_layers_are_recomputed_as_fit(qwen3_4b, recomputed: int):
    free = room_for(qwen3_4b, BARE, 8192, recomputed)
    plan = plan_memory(qwen3_4b, BARE, 8192, free, "auto")
    assert plan.recomputed == recomputed and plan.fits and plan.layers == 36
    tighter = plan_memory(qwen3_4b, BARE, 8192, free - 2**20, "auto")
    assert tighter.recomputed == recomputed + 1


def test_what_is_set_counts_and_what_does_not_fit_recomputes_all(qwen3_4b):
    def plan(setting: str, free: int) -> tuple[str, bool]:
        found = plan_memory(qwen3_4b, BARE, 8192, free, setting)
        return found.text, found.fits

    assert plan("on", 80 * GIB) == ("on", True) and plan("off", 20 * GIB) == ("off", False)
    assert plan("auto", 20 * GIB) == ("22 of 36 layers", True)
    assert plan("auto", 80 * GIB) == ("off", True) and plan("auto", GIB) == ("on", False)


def test_a_host_recomputes_none_or_all(qwen3_4b):
    """Its estimate is up to 18% too low there, and its system ends what takes too much."""
    host = Placement("cpu", 2)
    rooms = [room_for(qwen3_4b, host, 2048, recomputed) for recomputed in (0, 12)]
    assert [plan_memory(qwen3_4b, host, 2048, f, "auto").recomputed for f in rooms] == [0, 36]


def test_each_layer_less_is_as_many_bytes_and_the_last_one_works_alone(qwen3_4b):
    """Behind the last kept layer's backward pass nothing is kept beside the layer that is recomputed."""
    found = [estimate_memory(qwen3_4b, BARE, 8192, recomputed=n) for n in range(37)]
    steps = [one.total - other.total for one, other in itertools.pairwise(found)]
    assert steps[:35] == pytest.approx([steps[0]] * 35)
    assert abs(steps[35]) < 0.2 * steps[0] and found[36].workspace > found[35].workspace


def test_a_long_micro_batch_is_no_graph(qwen3_4b):
    short, long = (plan_memory(qwen3_4b, CAPTURED, n, 80 * GIB, "auto") for n in (2048, 8192))
    assert short.placement.captured and not short.no_graph and short.estimate.evaluation > 0
    assert not long.placement.captured and long.no_graph == LONG.format(8192)
    assert long.estimate.evaluation == 0
    never = plan_memory(qwen3_4b, BARE, 8192, 80 * GIB, "auto")
    assert not never.no_graph, "the engine knows why there could be none"


@pytest.mark.parametrize(("setting", "recomputed"), [("off", 0), ("on", 36), ("auto", 36)])
def test_a_graph_without_room_is_left_out(qwen3_4b, setting: str, recomputed: int):
    def plan(free: int) -> MemoryPlan:
        return plan_memory(qwen3_4b, CAPTURED, 2048, free, setting)

    roomy = plan(room_for(qwen3_4b, CAPTURED, 2048, recomputed))
    tight = plan(room_for(qwen3_4b, BARE, 2048, recomputed))
    assert roomy.placement.captured and not roomy.no_graph
    assert tight.no_graph == NO_ROOM and not tight.placement.captured
    assert roomy.fits and tight.fits and tight.recomputed == recomputed


def test_a_row_of_65536_tokens_of_qwen3_4b_takes_31_gib(qwen3_4b):
    plan = plan_memory(qwen3_4b, CAPTURED, 65536, 80 * GIB, "on")
    assert plan.no_graph == LONG.format(65536) and 28 * GIB < plan.estimate.total < 31 * GIB
    assert plan_memory(qwen3_4b, CAPTURED, 65536, 32 * GIB, "auto").fits
