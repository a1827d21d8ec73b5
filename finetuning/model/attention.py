"""Attention over packed documents: one row of tokens, no padding, no T x T mask.

A packed row holds many documents one after the other. The kernel is told where they begin, so a
token sees only earlier tokens of its own document. CUDA uses `torch.nn.attention.varlen`; every
other device runs one causal scaled_dot_product_attention per document, with lengths that are
already on the host. The function is registered with transformers' `AttentionInterface` and not with
its mask interface, which makes the model skip its masks.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from finetuning.common.errors import UserError

IMPLEMENTATION = "packed_documents"
_VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)


def enable(model: torch.nn.Module) -> None:
    """Select packed attention on a transformers model, bare or wrapped by an adapter library.

    From here on a forward pass needs the arguments of `attention_kwargs`; inside
    `ordinary_attention(model)` it takes padded batches and key/value caches as usual.
    """
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    _pretrained(model).set_attn_implementation(IMPLEMENTATION)


def attention_kwargs(
    cu_seqlens: torch.Tensor,
    lengths: Sequence[int],
    max_length: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict:
    """Keyword arguments for `decoder(input_ids, position_ids=…, use_cache=False, **kwargs)`.

    cu_seqlens: (D+1,) int32 on the model's device. lengths: tokens per document, host integers.
    max_length: at least the longest document; a constant for all batches under torch.compile.
    dtype: of the hidden states; the CUDA kernel knows half precision only, else it is one SDPA per
    document. With the kernel the lengths stay out: a compiled layer would be specialised on each.
    """
    if cu_seqlens.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return {"packed_bounds": cu_seqlens, "packed_max_length": int(max_length)}
    return {"packed_lengths": tuple(lengths)}


def marking_kwargs(cu_seqlens: torch.Tensor, max_length: int) -> dict:
    """transformers' own arguments for packed rows, which some linear attention and convolutions know."""
    of_document = torch.diff(cu_seqlens)
    numbers = torch.arange(len(of_document), dtype=torch.int32, device=cu_seqlens.device)
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": int(max_length),
        "max_length_k": int(max_length),
        "seq_idx": torch.repeat_interleave(numbers, of_document)[None],
    }


@contextmanager
def ordinary_attention(model: torch.nn.Module) -> Iterator[None]:
    """Run the model with SDPA, masks and caches, for padded batches and `model.generate`; with its own
    attention where packed attention was never selected.

    Compiled layers run eagerly meanwhile, because a growing cache is a new shape with every token.
    """
    pretrained = _pretrained(model)
    selected = pretrained.config._attn_implementation
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if selected == IMPLEMENTATION:
        pretrained.set_attn_implementation("sdpa")
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        if selected == IMPLEMENTATION:
            pretrained.set_attn_implementation(selected)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_bounds: torch.Tensor | None = None,
    packed_max_length: int | None = None,
    packed_lengths: tuple[int, ...] | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, Hq, T, d), key and value (1, Hkv, T, d).

    Returns (1, T, Hq, d) and no attention weights. Raises UserError for attention that is more than a
    softmax of the products: sinks (gpt-oss), capped products (Gemma 2), dropout.
    """
    if s_aux is not None or softcap is not None:
        raise UserError(
            "the model's attention has sinks or a soft cap, which packed attention does not know"
        )
    if packed_bounds is None and packed_lengths is None:
        raise RuntimeError(
            "the model does not hand on where packed documents begin (attention_kwargs), or it reads "
            "padded rows outside ordinary_attention(model)"
        )
    if attention_mask is not None:
        raise UserError(
            "the model makes an attention mask of its own, which packed attention ignores"
        )
    assert query.shape[0] == 1, query.shape
    if dropout != 0.0:
        raise UserError("packed attention has no attention dropout, which the model's config sets")
    if packed_bounds is None:
        return _per_document(query, key, value, packed_lengths, scaling, sliding_window), None
    left = -1 if sliding_window is None else sliding_window - 1
    q, k, v = (states.transpose(1, 2).squeeze(0) for states in (query, key, value))
    out = varlen_kernel(q, k, v, packed_bounds, packed_max_length, scaling, left)
    return out.unsqueeze(0), None


def _per_document(query, key, value, lengths, scaling, sliding_window) -> torch.Tensor:
    """One causal SDPA per document; a window adds a mask for documents longer than it."""
    if query.is_cuda:  # what is left to fp32 there takes equal heads, else all products are kept
        key, value = _repeat_heads(query, key, value)
    outputs = []
    parts = (states.split(lengths, dim=2) for states in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            ).transpose(1, 2)
        )
    return torch.cat(outputs, dim=1)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length) bool: the `window` latest tokens, itself included; None if all are seen."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def varlen_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    max_length: int,
    scaling: float | None,
    left_window: int,
) -> torch.Tensor:
    """(T, heads, d) through torch's variable-length kernel, whatever this torch's signature is.

    q (T, Hq, d), k and v (T, Hkv, d), bounds (D+1,) int32. left_window: tokens before a token that it sees;
    -1: all.

    Torch 2.10 takes `is_causal`, and its key/value heads are repeated for it; 2.11 takes
    `window_size=(-1, 0)`, and fewer key/value heads as they are, which 2.12 wants to be told with
    `enable_gqa`. One boundary tensor serves queries and keys: torch 2.15 chooses cuDNN only if both
    are the same object.
    """
    options = {"scale": scaling}
    if "window_size" in _VARLEN_PARAMETERS:
        options["window_size"] = (left_window, 0)
    else:
        assert left_window == -1, "a sliding window needs torch 2.11"
        options["is_causal"] = True
        k, v = _repeat_heads(q, k, v)
    if q.shape[1] != k.shape[1] and "enable_gqa" in _VARLEN_PARAMETERS:
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, bounds, bounds, max_length, max_length, **options)


def _repeat_heads(query, key, value) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with a head for each of the queries'; heads are dimension 1."""
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def _pretrained(model: torch.nn.Module) -> PreTrainedModel:
    """The outermost transformers model inside wrappers (adapter library, DDP)."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
