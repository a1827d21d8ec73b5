"""The formulas of docs/scaling.md where a few numbers can be worked out by hand.

    uv run pytest tests/runs/test_scaling_formulas.py

`python -m benchmarks.scaling --check` compares them with what torch gives to its collectives.
"""

import pytest

from benchmarks import scaling

WITHOUT_PADDING = 8  # every shape of the table has a multiple of so many rows


def test_a_shard_is_as_long_as_the_first(subtests):
    for shape, world, shard, padded in [
        ((16, 100), 8, 200, 1_600),  # two rows a rank
        ((16, 100), 16, 100, 1_600),
        ((16, 100), 64, 100, 6_400),  # 48 ranks hold a row of padding
        ((16, 100), 1024, 100, 102_400),
        ((100, 3), 64, 6, 384),  # two rows a rank, 128 in all
        ((128, 3, 5), 1024, 15, 15_360),  # experts: eight times their size
        ((7,), 2, 4, 8),
        ((7, 2), 1, 14, 14),
    ]:
        with subtests.test(shape=shape):
            assert scaling.shard_size(shape, world) == shard
            assert scaling.padded_size(shape, world) == padded


def test_a_step_gathers_layers_twice_and_the_root_once():
    assert scaling.fsdp_gathered(layers=1_000, root=50, micro_batches=1) == 2_050
    assert scaling.fsdp_gathered(layers=1_000, root=50, micro_batches=3) == 6_150
    assert scaling.fsdp_reduced(trained=25, micro_batches=3) == 300


@pytest.mark.parametrize("name", scaling.MODELS)
def test_without_padding_the_sizes_are_the_plain_ones(name):
    world, layers = WITHOUT_PADDING, scaling.MODELS[name].layers
    weights, adapters = scaling.parameters(name), scaling.adapters_of(name)
    layer, root, trained = scaling.layer_and_root(name, world)
    assert layers * trained == adapters
    assert layers * layer + root == 2 * weights + 4 * adapters
    assert scaling.state_bytes(name, 1) == 2 * weights + 16 * adapters
    assert scaling.state_bytes(name, world) == scaling.state_bytes(name, 1) / world
    assert scaling.sharded_sends(name, world, world) == scaling.sharded_sends(name, world, 1)


@pytest.mark.parametrize("name", scaling.MODELS)
def test_padding_only_adds(name):
    for world in (64, 1024):
        assert scaling.state_bytes(name, world) > scaling.state_bytes(name, 1) / world
        assert scaling.sharded_sends(name, world, world) > scaling.sharded_sends(name, world, 1)


def test_the_mixture_on_1024_ranks_by_hand():
    layer, root, trained = scaling.layer_and_root("235B", 1024)
    experts = 1024 * 3 * 4096 * 1536  # one a rank, of which 128 are real
    router = 1024 * 4096
    attention = 2 * 8192 * 4096 + 2 * 1024 * 4096  # keys and values: 512 rows on 1,024 ranks
    rows_of_a = 1024 * (3 * 4096 + 8192)  # 16 of them real
    rows_of_b = 16 * (8192 + 2 * 1024 + 4096)
    assert trained == rows_of_a + rows_of_b
    assert layer == 2 * (experts + router + attention) + 4 * trained
    assert root == 2 * 2 * 152_576 * 4096  # 151,936 rows: 149 a rank


def test_a_token_meets_the_whole_layer_or_its_own_experts():
    one_expert = 3 * 4096 * 1536
    attention = 2 * 8192 * 4096 + 2 * 512 * 4096
    assert scaling.active_in_layer("235B") == attention + 128 * 4096 + 8 * one_expert
    dims = scaling.MODELS["4B"]
    assert scaling.active_in_layer("4B") * dims.layers == dims.linear_parameters()


def test_forward_always_needs_as_many_tokens_as_there_are_operations_a_byte():
    # P weights in bf16 are 2P bytes, and 2P operations a token
    assert scaling.hiding_tokens(sent=2 * 1_000, weights=1_000, passes=1) == 1
    # going through the layer again relaxes only the backward pass
    assert scaling.hiding_tokens(sent=2 * 1_000, weights=1_000, passes=2) == 0.5
    for name in scaling.MODELS:
        forward, backward, recomputed = scaling.layer_hides_from(name, 1024)
        assert forward < backward == pytest.approx(2 * recomputed)
