"""The whole fast path against the library's plain one; compiled, recomputed, in bf16.

uv run pytest tests/model/test_packed_model.py
"""

from functools import partial

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from peft import LoraConfig, get_peft_model
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetuning.config import PROJECTIONS
from finetuning.data.packing import build_batch
from finetuning.data.token_table import Segment, TokenizedSample
from finetuning.model.attention import ordinary_attention
from finetuning.model.flops import dims_from_config
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.loading import recompute_activations
from finetuning.model.packed_model import PackedLossModel
from finetuning.model.parallel import Replica
from finetuning.training.memory_estimate import Placement, activation_bytes
from tests.helpers.settings import step_plan, up_to
from tests.model.test_attention import reference_kernel, use_bounds, varlen_2_12

TARGETS = list(PROJECTIONS)
VOCAB, CLOSE = 97, 5


def lora_model(*, dtype: torch.dtype = torch.float32, recompute: bool | int = False, **overrides):
    """recompute: all layers, or the first so many."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        "use_cache": False,
    }
    base = Qwen3ForCausalLM(Qwen3Config(**{**settings, **overrides})).to(dtype)
    if recompute:
        recompute_activations(base, None if recompute is True else recompute)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_documents(lengths: tuple[int, ...]) -> list[TokenizedSample]:
    rng = np.random.default_rng(len(lengths))
    documents = []
    for index, length in enumerate(lengths):
        segments = np.full(length, Segment.ANSWER, dtype=np.uint8)
        segments[: length // 3] = Segment.PROMPT
        segments[length // 3 : length // 2] = Segment.THINKING
        ids = rng.integers(6, VOCAB, length).astype(np.int32)
        documents.append(TokenizedSample(ids=ids, segments=segments, index=index))
    return documents


DOCUMENTS = make_documents((21, 40, 9, 33))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def plain(model: torch.nn.Module):
    """The library's own loss on padded rows, its own LoRA layers, its own attention."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.from_numpy(d.ids.astype(np.int64)) for d in DOCUMENTS]
    labels = [
        torch.where(torch.from_numpy(d.segments != Segment.PROMPT), i, -100)
        for d, i in zip(DOCUMENTS, ids, strict=True)
    ]
    mask = pad([torch.ones_like(i) for i in ids], batch_first=True)
    loss = model(
        input_ids=pad(ids, batch_first=True),
        attention_mask=mask,
        labels=pad(labels, batch_first=True, padding_value=-100),
    ).loss
    loss.backward()
    return loss.detach(), gradients(model)


def fast(model: torch.nn.Module, **shape: int):
    """What training does."""
    assert enable_fast_lora(model) == 3 * len(TARGETS)
    batch = build_batch(DOCUMENTS, range(len(DOCUMENTS)), **shape)
    loss, sums = PackedLossModel(model, CLOSE)(batch, len(batch.labels))
    loss.backward()
    total, _, count = sums.per_document.sum((0, 1)).tolist()
    assert count == len(batch.labels) and total / count == pytest.approx(loss.item(), rel=1e-5)
    return loss.detach(), gradients(model)


def assert_same(actual, expected) -> None:
    """Loss within 1e-5, every gradient within 1e-4 of its tensor's norm, none of them zero."""
    assert abs(actual[0] - expected[0]) < 1e-5
    assert actual[1].keys() == expected[1].keys() and len(expected[1]) == 6 * len(TARGETS)
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (actual[1][name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("recompute", [False, True])
def test_the_fast_path_equals_the_plain_one(recompute: bool):
    assert_same(fast(lora_model(recompute=recompute)), plain(lora_model()))


def test_constant_shapes_change_nothing():
    shape = {"pad_to": 160, "pad_documents": 9, "max_length": 40}
    assert_same(fast(lora_model(), **shape), plain(lora_model()))


def test_recomputation_runs_each_layer_twice():
    model, calls = lora_model(recompute=True), []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    fast(model)
    assert len(calls) == 6


def test_bf16_base_with_fp32_adapters_stays_near_fp32():
    exact, rounded = fast(lora_model()), fast(lora_model(dtype=torch.bfloat16))
    assert rounded[0].dtype == torch.float32 and abs(rounded[0] - exact[0]) < 0.03
    for name, gradient in rounded[1].items():
        assert gradient.dtype == torch.float32, name
        cosine = torch.cosine_similarity(gradient.flatten(), exact[1][name].flatten(), dim=0)
        assert cosine > 0.98, (name, float(cosine))


@pytest.mark.parametrize(
    ("recompute", "join"), [(False, False), (False, True), (True, False), (True, True), (2, True)]
)
def test_compiled_layers_are_one_graph_for_all_batches(
    monkeypatch, recompute: bool | int, join: bool
):
    """The way of CUDA with a stand-in for its kernel: packed rows that differ, shapes that don't.

    Layers that are recomputed have a graph of their own, where transformers recomputes within them.
    torch itself says whether a later start can take the layer's two passes from the cache.
    """
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        check_cacheable(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    use_bounds(monkeypatch, varlen_2_12)
    lengths = np.array([21, 40, 9, 33, 50, 12, 17, 38, 5, 44, 29, 36])
    documents = make_documents(tuple(lengths))
    targets = np.array([(d.segments != Segment.PROMPT).sum() for d in documents])
    plan = step_plan(lengths, targets, data=up_to(64), max_steps=6)
    model, eager = lora_model(recompute=recompute), lora_model()
    packed, reference = (PackedLossModel(m, CLOSE).train() for m in (model, eager))
    assert enable_fast_lora(model, join=join) and enable_fast_lora(eager)
    packed.compile_layers(backend=count)
    shapes = set()
    for step in range(1, len(plan) + 1):
        (row,) = plan[step].micro_batches
        batch = build_batch(documents, row, **plan.constant_shape)
        shapes.add((batch.input_ids.shape, batch.cu_seqlens.shape, batch.max_length))
        loss, _ = packed(batch, plan[step].num_targets)
        loss.backward()
        expected, _ = reference(build_batch(documents, row), plan[step].num_targets)
        expected.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert len(shapes) == 1 and len({plan[s].micro_batches for s in range(1, 7)}) > 2
    number = len(graphs)
    assert number == 1 if type(recompute) is bool else number <= 2
    for row in ((0, 1), (2, 3, 4), (5,)):  # an evaluation has other shapes: it runs eagerly
        with torch.no_grad():
            batch = build_batch(documents, row)
            torch.testing.assert_close(packed(batch, 1)[0], reference(batch, 1)[0])
    assert len(graphs) == number
    for name, gradient in gradients(eager).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-5, rtol=1e-3)


def saved_by_compiled_layers(monkeypatch, model: torch.nn.Module, wrap=lambda m: m):
    """(bytes kept for the backward pass a token, number of graphs), divided as inductor does."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def any_kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        return reference_kernel(q, k, v, cu_q, scale)

    graphs = []

    def inductors_division(graph, inputs):
        graphs.append(graph)
        return aot_autograd(
            fw_compiler=lambda module, _: make_boxed_func(module.forward),
            decompositions=select_decomp_table(),
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        )(graph, inputs)

    torch._dynamo.reset()
    use_bounds(monkeypatch, any_kernel)
    enable_fast_lora(model)
    packed = PackedLossModel(model, CLOSE).train()
    packed.compile_layers(backend=inductors_division)
    wrapped = wrap(packed)
    batch = build_batch(DOCUMENTS, range(4), pad_to=128, pad_documents=5, max_length=128)
    wrapped(batch, 10)[0].backward()  # compiles
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and 128 in tensor.shape:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = packed.hidden_states(batch)
    assert hidden.requires_grad
    return sum(kept.values()) / 128, len(graphs)


def test_compiled_layers_keep_what_the_plan_says(monkeypatch):
    """Norms and the MLP's product are made again in the backward pass: inductor's own division keeps them."""
    shape = {"hidden_size": 80, "intermediate_size": 304, "head_dim": 16}
    models = [lora_model(dtype=torch.bfloat16, num_hidden_layers=n, **shape) for n in (2, 3)]
    (two, _), (three, graphs) = [saved_by_compiled_layers(monkeypatch, m) for m in models]
    dims = dims_from_config(models[0].config)
    assert graphs == 1
    adapters, norms = (
        7 * 4 * 2,
        (2 + 4 + 2) * 4,
    )  # x A^T, and a number a row: too little for the plan
    planned = activation_bytes(dims, Placement("cuda", 2, compiled=True))
    assert three - two == planned + adapters + norms


def test_a_replica_does_not_cut_the_compiled_layers(monkeypatch):
    """DDP's first bucket is a megabyte; at 4B a layer's adapters have more, and would be two graphs."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 4000)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _, graphs = saved_by_compiled_layers(monkeypatch, lora_model(), Replica)
    finally:
        torch.distributed.destroy_process_group()
    assert graphs == 1


def test_documents_that_go_through_the_model_alone_give_the_same():
    """Also with several in a batch, and answers need nothing switched."""
    model = lora_model()
    enable_fast_lora(model)
    packed, batch = PackedLossModel(model, CLOSE, "alone"), build_batch(DOCUMENTS, range(4))
    loss, sums = packed(batch, len(batch.labels))
    loss.backward()
    assert sums.per_document.shape[0] == 4
    assert_same((loss.detach(), gradients(model)), plain(lora_model()))
    with ordinary_attention(model), torch.no_grad():
        assert model.config._attn_implementation == "sdpa"
        ids = torch.tensor([[0, 0, 7, 8], [6, 7, 8, 9]])
        mask = (ids > 0).long()
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
        alone = model.generate(input_ids=ids[:1, 2:], max_new_tokens=3)
    assert found[0, 4:].tolist() == alone[0, 2:].tolist()


def test_a_batch_without_a_gradient_gives_the_same_loss():
    model = lora_model()
    packed = PackedLossModel(model, CLOSE)
    batch = build_batch(DOCUMENTS, range(len(DOCUMENTS)))
    with torch.no_grad():
        loss, _ = packed(batch, len(batch.labels))
    assert not loss.requires_grad
    assert abs(loss - plain(lora_model())[0]) < 1e-5
