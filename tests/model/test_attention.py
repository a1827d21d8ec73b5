"""Packed attention: the same losses and gradients as documents apart, and no view across documents.

uv run pytest tests/model/test_attention.py
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetuning.common.errors import UserError
from finetuning.model import attention
from tests.helpers.packed import document_bounds

LENGTHS = (7, 31, 12, 20)


def tiny_model(seed: int = 0, **overrides) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,  # large enough that attention has something to lose
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(Qwen3Config(**{**shape, **overrides}))


def documents(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 97, (length,), generator=generator) for length in LENGTHS]


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


def packed_hidden(model, docs, pad_to=None) -> torch.Tensor:
    bounds = document_bounds(LENGTHS, pad_to)
    return model.model(
        input_ids=torch.cat(docs).unsqueeze(0),
        position_ids=torch.cat([torch.arange(len(doc)) for doc in docs]).unsqueeze(0),
        use_cache=False,
        **attention.attention_kwargs(bounds, LENGTHS, max(LENGTHS)),
    ).last_hidden_state[0]


def packed_losses(model, docs) -> torch.Tensor:
    parts = model.lm_head(packed_hidden(model, docs)).split(LENGTHS)
    return torch.cat([token_losses(*pair) for pair in zip(parts, docs, strict=True)])


def padded_losses(model, docs, implementation: str) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    ids = torch.nn.utils.rnn.pad_sequence(docs, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    logits = model(input_ids=ids, attention_mask=mask.long()).logits
    return torch.cat(
        [token_losses(row[: len(doc)], doc) for row, doc in zip(logits, docs, strict=True)]
    )


def gradients(model, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_packed_gives(model, docs, expected: torch.Tensor) -> None:
    """The packed row has these losses of its tokens, and their gradients."""
    expected_gradients = gradients(model, expected)
    attention.enable(model)
    losses = packed_losses(model, docs)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model, losses).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_equals_padded(implementation):
    model, docs = tiny_model(), documents()
    expected = padded_losses(model, docs, implementation)
    assert_packed_gives(model, docs, expected)


def test_packed_equals_documents_apart():
    model, docs = tiny_model(), documents()
    expected = torch.cat([token_losses(model(input_ids=d[None]).logits[0], d) for d in docs])
    assert_packed_gives(model, docs, expected)


def test_documents_never_see_each_other():
    model, docs = tiny_model(), documents()
    attention.enable(model)
    before = packed_hidden(model, docs).split(LENGTHS)
    changed = [docs[0], (docs[1] + 5) % 97, *docs[2:]]
    after = packed_hidden(model, changed).split(LENGTHS)
    for index in (0, 2, 3):
        assert torch.equal(before[index], after[index])
    assert not torch.allclose(before[1], after[1])


def test_a_token_sees_no_later_token():
    model, docs = tiny_model(), documents()
    attention.enable(model)
    before = packed_hidden(model, docs).split(LENGTHS)[1]
    docs[1] = torch.cat((docs[1][:20], (docs[1][20:] + 1) % 97))
    after = packed_hidden(model, docs).split(LENGTHS)[1]
    torch.testing.assert_close(before[:20], after[:20])
    assert not torch.allclose(before[20:], after[20:])


def test_gradient_checkpointing_changes_nothing():
    docs, results = documents(), []
    for checkpointing in (False, True):
        model = tiny_model().train()
        attention.enable(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        results.append(gradients(model, packed_losses(model, docs)))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name])


def test_sliding_window_layers():
    window = dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)
    model, docs = tiny_model(**window), documents()
    assert "sliding_attention" in model.config.layer_types
    expected = padded_losses(model, docs, "sdpa")
    attention.enable(model)
    torch.testing.assert_close(packed_losses(model, docs), expected, atol=1e-5, rtol=1e-5)


def test_generation_and_padding_inside_ordinary_attention():
    model, docs = tiny_model().eval(), documents()
    width = max(LENGTHS)
    ids = torch.stack([F.pad(doc, (width - len(doc), 0)) for doc in docs])
    inputs = dict(input_ids=ids, attention_mask=(ids != 0).long())
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    attention.enable(model)
    with attention.ordinary_attention(model):
        actual = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(actual, expected)
    with pytest.raises(RuntimeError, match="ordinary_attention"):
        model(input_ids=ids)
    assert packed_losses(model, docs).isfinite().all()


def test_ordinary_attention_ends_after_an_error():
    model = tiny_model()
    attention.enable(model)
    with pytest.raises(KeyError), attention.ordinary_attention(model):
        assert model.config._attn_implementation == "sdpa"
        raise KeyError
    assert model.config._attn_implementation == attention.IMPLEMENTATION


# ---------------------------------------------------------------------------
# The kernel for CUDA, without CUDA: torch's signatures, and the compiled graph.


def per_document(function, bounds, *tensors):
    """Apply function to each document's (1, heads, length, d) parts; concatenate what it returns."""
    parts = zip(*(tensor.split(bounds.diff().tolist()) for tensor in tensors), strict=True)
    results = [
        function(*(part.transpose(0, 1)[None] for part in document))
        for document in parts
        if len(document[0])
    ]
    return tuple(
        torch.cat([part[0].transpose(0, 1) for part in column])
        for column in zip(*results, strict=True)
    )


def repeated(query, *tensors):
    return [t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in tensors]


@torch.library.custom_op("test_varlen::attention", mutates_args=())
def reference_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> torch.Tensor:
    def attend(q, k, v):
        k, v = repeated(q, k, v)
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale),)

    return per_document(attend, bounds, q, k, v)[0]


@torch.library.custom_op("test_varlen::attention_backward", mutates_args=())
def reference_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def differentiate(grad, q, k, v):
        heads = k.shape[1]
        k, v = repeated(q, k, v)
        length = q.shape[2]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        p = (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
        dp = grad @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        dk, dv = (t.unflatten(1, (heads, -1)).sum(2) for t in (ds.mT @ q, p.mT @ grad))
        return ds @ k, dk, dv

    return per_document(differentiate, bounds, grad, q, k, v)


@reference_kernel.register_fake
def _(q, k, v, bounds, scale):
    return torch.empty_like(q)


@reference_backward.register_fake
def _(grad, q, k, v, bounds, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, grad):
    return (*reference_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


reference_kernel.register_autograd(backward, setup_context=save)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None):
    assert is_causal and query.shape[1] == key.shape[1]
    assert cu_seq_q is cu_seq_k and max_q == max_k >= max(LENGTHS)
    return reference_kernel(query, key, value, cu_seq_q, scale)


def varlen_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, 0) and q.shape[1] == 2 * k.shape[1]
    return reference_kernel(q, k, v, cu_q, scale)


def varlen_2_12(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0) and enable_gqa and q.shape[1] == 2 * k.shape[1]
    assert cu_q is cu_k
    return reference_kernel(q, k, v, cu_q, scale)


def use_bounds(monkeypatch, kernel) -> None:
    """Make this machine take the way of CUDA, with `kernel` in the place of torch's."""
    names = frozenset(inspect.signature(kernel).parameters)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_VARLEN_PARAMETERS", names)
    monkeypatch.setattr(
        attention,
        "attention_kwargs",
        lambda bounds, lengths, longest, dtype=None: {
            "packed_bounds": bounds,
            "packed_max_length": longest,
        },
    )


@pytest.mark.parametrize("kernel", [varlen_2_10, varlen_2_11, varlen_2_12])
def test_every_signature_of_the_kernel(monkeypatch, kernel):
    model, docs = tiny_model(), documents()
    attention.enable(model)
    expected = packed_losses(model, docs)
    expected_gradients = gradients(model, expected)
    use_bounds(monkeypatch, kernel)
    losses = packed_losses(model, docs)
    torch.testing.assert_close(losses, expected)
    for name, gradient in gradients(model, losses).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [{"s_aux": torch.zeros(4)}, {"softcap": 50.0}])
def test_attention_that_is_more_than_a_softmax_is_refused(more):
    """The sinks of gpt-oss would else be left out in silence."""
    states = [torch.randn(1, 4, 8, 16) for _ in range(3)]
    with pytest.raises(UserError, match="sinks or a soft cap"):
        attention.packed_attention(None, *states, None, packed_lengths=(8,), **more)


def test_the_installed_kernel_has_a_signature_that_we_know():
    names = attention._VARLEN_PARAMETERS
    assert "scale" in names and ("window_size" in names or "is_causal" in names)


def test_compiled_layers_share_one_graph(monkeypatch):
    """Constant tokens, padded boundaries and a constant maximum: one graph for all batches."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    use_bounds(monkeypatch, varlen_2_12)
    model = tiny_model().train()
    attention.enable(model)
    for layer in model.model.layers:
        layer.compile(backend=count, fullgraph=True, dynamic=False)
    results = []
    for lengths in ((7, 31, 12, 20), (40, 30), (10, 20, 10, 20, 10)):
        ids = torch.arange(70)[None] % 97
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        bounds = document_bounds(lengths, pad_to=6)
        kwargs = attention.attention_kwargs(bounds, lengths, 64)
        embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
        hidden = model.model(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, **kwargs
        ).last_hidden_state
        hidden.square().sum().backward()
        results.append(hidden)
    assert len(graphs) == 1
    with attention.ordinary_attention(model):  # runs eagerly: no graph is added
        model.eval()
        alone = model.model(input_ids=torch.arange(70)[None, :10] % 97).last_hidden_state
    assert len(graphs) == 1
    torch.testing.assert_close(results[2][:, :10], alone, atol=1e-4, rtol=1e-4)


def test_only_half_precision_goes_to_the_kernel():
    """It refuses fp32, which a GPU without bf16 trains in."""

    class OnCuda:
        is_cuda = True

    kernel = attention.attention_kwargs(OnCuda(), [3, 4], 8, torch.bfloat16)
    assert kernel.keys() == {"packed_bounds", "packed_max_length"}
    each = attention.attention_kwargs(OnCuda(), [3, 4], 8, torch.float32)
    assert each == {"packed_lengths": (3, 4)}
