"""Tokens behind prompts of different lengths; on a GPU one token of all rows is one CUDA graph.

Qwen3-4B takes some two thousand kernels for a token: the host launches for 30 ms what the GPU does in
five. So keys and values, mask and positions lie in buffers that stay, and a token is one launch. Whether
a model can be run that way is tried: its own `generate` writes the first tokens too, and the scores
must agree; else it writes all of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import AttentionInterface, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetuning.model.cuda_graph import recorded
from finetuning.model.sampling import GREEDILY, Chooser, Sampling

ONE_TOKEN = "one_token"
ALIGNMENT = 8  # of the keys' number: the kernel reads the mask in pieces of this
CHECKED_EVERY = 8  # tokens; to learn whether all rows have ended is to wait for the device
TRIED_TOKENS = 3
# Standard deviations of a row's scores: rounding in bf16 makes a few hundredths, a wrong mask 0.2 or more.
TOLERANCE = 0.1
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Request:
    """Prompts that are written on.

    ids: (B, T), padded on the left, where mask (B, T) is 0. most: new tokens. end_id: what ends a row.
    enough: asked now and then with the number of tokens written; true ends them all.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    most: int
    end_id: int
    enough: Callable[[int], bool] = lambda count: False


class Decoder:
    """Writes tokens with a model, by graph where that is right.

    Args:
        model: a transformers causal language model, maybe within peft's.
        prepare: called before each answer, as adapters that are kept in other matrices want it.
        why_no_graph: not empty: the model's own `generate` writes, for this reason.
        warn: told once where a graph turns out to be wrong for the model.
        sampling: how tokens are chosen.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prepare: Callable[[], object] = lambda: None,
        *,
        why_no_graph: str = "",
        warn: Callable[[str], object] = lambda text: None,
        sampling: Sampling = GREEDILY,
    ) -> None:
        self.model, self.prepare = model, prepare
        self.why_no_graph, self._warn, self._sampling = why_no_graph, warn, sampling
        self._is_tried = False

    def write(self, request: Request) -> torch.Tensor:
        """(B, n) new tokens; what stands behind a row's first end token is of no meaning.

        n is the most, or less where all rows have ended or enough is written.
        """
        self.prepare()
        if not _can_have_graphs(request):
            self.why_no_graph = "there is no CUDA device"
        if not self.why_no_graph:
            try:
                return self._by_graph(request)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of any library, for any reason: this way does not work
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                self.why_no_graph = reason
                self._warn(f"answers are written without a CUDA graph: {reason}")
        return self._by_generate(request)

    def _by_graph(self, request: Request) -> torch.Tensor:
        if not self._is_tried:
            self._try(request)
            self._is_tried = True
        with _one_token_attention(self.model):
            decoder, choose = StaticDecoder(self.model, request), self._chooser(request)
            record = request.most > CHECKED_EVERY
            return written_tokens(decoder, request, choose, record=record)

    def _chooser(self, request: Request) -> Chooser:
        """Which token comes next, by the scores and the number of those before it."""
        return self._sampling.chooser(len(request.ids), request.most, request.ids.device)

    def _try(self, request: Request) -> None:
        """Raise RuntimeError unless the first scores are those of the model's own way."""
        own = self.model.generate(
            input_ids=request.ids,
            attention_mask=request.mask,
            max_new_tokens=TRIED_TOKENS,
            min_new_tokens=TRIED_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
        new = own.sequences[:, request.ids.shape[1] :].unbind(1)
        with _one_token_attention(self.model):
            off = self._difference(replace(request, most=TRIED_TOKENS), own.logits, new)
        if not off < TOLERANCE:
            raise RuntimeError(f"scores are {off:.2f} standard deviations from those of `generate`")

    def _difference(
        self, request: Request, scores: Sequence[torch.Tensor], tokens: Sequence[torch.Tensor]
    ) -> float:
        """The largest of all rows and tokens, in standard deviations of a row's scores; the last by graph."""
        decoder, worst = StaticDecoder(self.model, request), 0.0
        for place, (expected, chosen) in enumerate(zip(scores, tokens, strict=True)):
            expected = expected.float()
            off = (decoder.scores - expected).square().mean(1).sqrt() / expected.std(1)
            worst = max(worst, float(off.max()))
            if place == 1 and request.ids.is_cuda:
                decoder.record()
            decoder.append(chosen)
        return worst

    def _by_generate(self, request: Request) -> torch.Tensor:
        width = request.ids.shape[1]

        def written(so_far: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            stop = request.enough(so_far.shape[1] - width)
            return torch.full((len(so_far),), stop, dtype=torch.bool, device=so_far.device)

        choose = self._chooser(request)

        def only_chosen(so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            chosen = choose(scores, so_far.shape[1] - width)
            alone = torch.full_like(scores, -math.inf)
            return alone.scatter(1, chosen[:, None], 0.0)

        out = self.model.generate(
            input_ids=request.ids,
            attention_mask=request.mask,
            max_new_tokens=request.most,
            eos_token_id=request.end_id,
            pad_token_id=request.end_id,
            stopping_criteria=[written],
            logits_processor=[only_chosen] if self._sampling.temperature else [],
            **GREEDY,
        )
        return out[:, width:]


def _can_have_graphs(request: Request) -> bool:
    return request.ids.is_cuda


class StaticDecoder:
    """Rows of tokens with keys and values that stay where they are.

    Args:
        model: a transformers causal language model, maybe within peft's.
        request: its prompts, and the number of tokens for which there is to be room.
    Raises RuntimeError for a model whose layers keep something else than all keys and values.
    """

    def __init__(self, model: torch.nn.Module, request: Request) -> None:
        ids = request.ids
        rows, width = ids.shape
        room = math.ceil((width + request.most) / ALIGNMENT) * ALIGNMENT
        self._model = model
        self._cache = StaticCache(config=_pretrained(model).config, max_cache_len=room)
        if any(type(layer) is not StaticLayer for layer in self._cache.layers):
            raise RuntimeError("not every layer attends to all tokens before its own")
        there = request.mask.bool()
        self._seen = torch.zeros(rows, 1, 1, room, dtype=torch.bool, device=ids.device)
        self._seen[:, 0, 0, :width] = there
        positions = (there.cumsum(1) - 1).clamp(min=0)
        self._position = positions[:, -1:] + 1  # (B, 1), of the next token
        self._place = torch.tensor([width], device=ids.device)  # of its key
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=ids.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.scores = self._read(ids, positions)  # (B, V) fp32, of the next token

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """Put a token (B,) behind each row; the scores of the next one, valid until the next call."""
        self._ids.copy_(tokens[:, None])
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()
        return self.scores

    def record(self) -> None:
        """From the next token on it is one launch; after a first `append`. Raises RuntimeError."""
        torch.cuda.synchronize(self._ids.device)
        self._graph = recorded(self._step, torch.cuda.Stream(self._ids.device))

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        width, device = ids.shape[1], ids.device
        earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        itself = torch.eye(width, dtype=torch.bool, device=device)  # what pads sees something, too
        mask = self._seen.repeat(1, 1, width, 1)
        mask[..., :width] = (mask[..., :width] & earlier) | itself
        return self._forward(ids, mask, positions)

    def _step(self) -> None:
        self._seen.index_fill_(3, self._place, True)
        self.scores.copy_(self._forward(self._ids, self._seen, self._position))
        self._place += 1
        self._position += 1

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()


def written_tokens(
    decoder: StaticDecoder, request: Request, choose: Chooser, *, record: bool
) -> torch.Tensor:
    """(B, n) tokens chosen by their scores, see `Decoder.write`; with a graph if `record`."""
    scores, most = decoder.scores, request.most
    tokens = torch.full((len(scores), most), request.end_id, device=scores.device)
    ended = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for count in range(1, most + 1):
        chosen = choose(scores, count - 1)
        tokens[:, count - 1] = chosen
        ended |= chosen == request.end_id
        if count % CHECKED_EVERY == 0 or count == most:
            stop = request.enough(count)  # asked before the wait
            if stop or count == most or bool(ended.all()):
                return tokens[:, :count]
        scores = decoder.append(chosen)
        if record and count == 1:
            decoder.record()
    raise AssertionError("most is at least 1")


@contextmanager
def _one_token_attention(model: torch.nn.Module) -> Iterator[None]:
    """SDPA reads keys and values as they are where a row has one token; other attention stays as it is."""
    pretrained = _pretrained(model)
    if pretrained.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(ONE_TOKEN, _one_token)
    pretrained.set_attn_implementation(ONE_TOKEN)
    try:
        yield
    finally:
        pretrained.set_attn_implementation("sdpa")


def _one_token(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (B, Hq, 1, d), key and value (B, Hkv, T, d).

    Heads that read the same keys become rows of one product: else SDPA with a mask wants each key once a
    head, four times the memory's work for Qwen3-4B.
    """
    rows, heads, length, width = query.shape
    if length > 1 or attention_mask is None:
        options = {"scaling": scaling, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attention_mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, -1), None


def _pretrained(model: torch.nn.Module) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
