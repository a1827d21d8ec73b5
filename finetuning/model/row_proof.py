"""Is a model trained right as packed rows? Tried on a small relative of it, before its weights are loaded.

Nothing is known about architectures here. A model of the same class with random weights reads short documents
that cross its windows and chunks, each alone and as transformers computes it; then the way of training reads
them. Hidden states, losses and gradients must be the same. Where a packed row is not, documents
go through the model one after the other; where that is not either, the model is refused with the reason.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning.common.cache import cached_value, code_version
from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.config import NO_LIMIT
from finetuning.data.packing import PackedBatch, build_batch
from finetuning.data.token_table import Segment, TokenizedSample
from finetuning.model.packed_model import PackedLossModel, Way, decoder_of
from finetuning.model.positions import tokens_taken, told_positions
from finetuning.model.resolve import as_user_error, short_reason
from finetuning.model.sizes import check_extent
from finetuning.model.small_config import LENGTHS, lengths_within, small_configs
from finetuning.model.undisturbed import undisturbed

CHANGED = 35  # token of the second document that is replaced, to see who notices
BEGINNINGS = (25, 45, 67, 70)  # tokens of it that are read before and after longer ones
LARGEST = 60_000_000  # weights of a small model
# Used by transformers where they are installed.
_KERNELS = ("flash-linear-attention", "causal-conv1d", "mamba-ssm", "kernels")
_WORDS = {
    "packed": "packed rows",
    "marked": "packed rows with transformers' own arguments",
    "alone": "documents that go through its decoder alone",
}
_HEAD_SETTING = re.compile(r"^(?!.*(router|keep|attn)).*(logit|lm_head)")


@dataclass(frozen=True)
class _Arithmetic:
    """Where and how a small model computes, and which differences are none: of states, in their spread, and
    of losses and gradients, in their size, since the loss is in fp32 in any case. Leaks are larger."""

    device: str
    dtype: torch.dtype
    states: float
    losses: float


_EXACT = (
    _Arithmetic("cpu", torch.float64, 1e-6, 1e-4),
    _Arithmetic("cpu", torch.float32, 1e-4, 1e-2),
)
# Kernels that only a GPU runs round the inputs of their products to 10 bits.
_ON_GPU = _Arithmetic("cuda", torch.float32, 1e-2, 5e-2)


@dataclass(frozen=True)
class RowProof:
    """What was found: the way that is right, or "" for none, and why none before it is.

    difference: largest difference of the way's hidden states from the plain ones, in their spread.
    tokens: documents of so many at most are meant, where that is fewer than were asked for, as the model
        has no more positions; without a way: documents of so many would have one. 0: of any number.
    """

    way: Way | str
    reason: str
    difference: float
    tokens: int = 0


class _NoTrialError(Exception):
    """A small model that is none: it can't be built, run, or compared."""


# -----------------------------------------------------------------------------
# What a run asks


def proven_way(
    folder: Path,
    cache_dir: Path,
    *,
    longest: int,
    row: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> RowProof:
    """How documents of up to `longest` tokens go through the model of `folder`; tried once, then kept.

    row: tokens of the longest row (0: of the longest document); device: type of the one that trains. Raises
    UserError where no way is right.
    """
    config = configuration(folder, trust_remote_code)
    place = cache_dir / f"row-proof-{_fingerprint(config, f'{longest} {row}', device)}"

    def make() -> dict[str, Any]:
        options = {"row": row, "device": device, "trust_remote_code": trust_remote_code}
        with as_user_error(f"model folder {folder}", "check its config.json"):
            check_extent(config, folder, trust_remote_code)
        return asdict(prove(config, longest=longest, **options))

    proof = cached_value(place, make, lambda kept: RowProof(**kept))
    if proof.way and not proof.tokens:
        return proof
    name = config.model_type
    if not proof.tokens:
        raise UserError(f"model {name} can't be trained here: {proof.reason}")
    raise UserError(
        f"model {name} can't be trained on documents of more than {proof.tokens:,} tokens "
        f"(max_seq_length is {longest:,}): {'it has no more positions' if proof.way else proof.reason}; "
        f"use --max-seq-length {proof.tokens}"
    )


def positions_of(folder: Path, cache_dir: Path, *, trust_remote_code: bool = False) -> int:
    """How many tokens a document may have, by the model's configuration and by a trial, which is kept;
    `NO_LIMIT`: any number, as far as is known."""
    config = configuration(folder, trust_remote_code)

    def make() -> dict[str, Any]:
        build = partial(_small_model, dtype=torch.float32, trust_remote_code=trust_remote_code)
        told = told_positions(config)
        with as_user_error(f"model folder {folder}", "check its config.json"):
            check_extent(config, folder, trust_remote_code)
        with undisturbed():
            return {"tokens": tokens_taken(config, told or NO_LIMIT, build) or told or NO_LIMIT}

    place = cache_dir / f"positions-{_fingerprint(config, '', 'cpu')}"
    return cached_value(place, make, lambda kept: int(kept["tokens"]))


def configuration(folder: Path, trust_remote_code: bool) -> Any:
    """A model's own. Raises UserError where transformers does not know it."""
    advice = "check that this version of transformers knows its architecture"
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with as_user_error(f"model folder {folder}", advice):
        return AutoConfig.from_pretrained(folder, **options)


def _fingerprint(config: Any, lengths: str, device: str) -> str:
    """Of what a proof depends on: configuration, code of the model and of ours, libraries."""
    content = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
    reference = getattr(config, "auto_map", None) or {}
    known = [json.dumps(content, sort_keys=True, default=str), f"{lengths} {device} {reference}"]
    module = sys.modules.get(type(config).__module__)
    if reference and module is not None:  # the model has code of its own
        known.append(inspect.getsource(module))
    known += [f"{name} {_version(name)}" for name in _KERNELS]
    names = ("row_proof", "positions", "small_config", "packed_model", "attention", "loss")
    code = code_version(*(f"model.{n}" for n in names), libraries=("torch", "transformers"))
    return blake2b("\n".join([*known, code]).encode(), digest_size=12).hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


# -----------------------------------------------------------------------------
# The trial


def prove(
    config: Any,
    *,
    longest: int,
    row: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> RowProof:
    """Try the ways on small relatives of a transformers configuration, until one can be built and run.

    It runs on the CPU, or, where the model's kernels don't and training is on a GPU, there. No random state
    is touched. Where no small relative runs, no way is proven. Where the model takes shorter documents only,
    it is tried with these.
    """
    arithmetics = (*_EXACT, *([_ON_GPU] if device == "cuda" else []))

    def proof_for(tokens: int) -> RowProof:
        return _proof_for(config, (tokens, max(row, tokens)), arithmetics, trust_remote_code)

    with undisturbed():
        build = partial(_small_model, dtype=torch.float32, trust_remote_code=trust_remote_code)
        tokens = tokens_taken(config, longest, build) or longest
        proof = proof_for(tokens)
        if proof.way:
            return replace(proof, tokens=tokens * (tokens < longest))
        fewer = (n for n in lengths_within(config, tokens - 1) if proof_for(n).way)
        return replace(proof, tokens=next(fewer, 0))


def _proof_for(
    config: Any,
    lengths: tuple[int, int],
    arithmetics: Sequence[_Arithmetic],
    trust_remote_code: bool,
) -> RowProof:
    """For documents and rows of so many tokens at most."""
    failures = []
    try:
        for small in small_configs(config, *lengths):
            for arithmetic in arithmetics:
                try:
                    trial = _Trial(small, arithmetic, trust_remote_code)
                    with _as_no_trial("compared"):
                        return trial.proof()
                except _NoTrialError as error:
                    failures.append(str(error))
    except ValueError as error:
        failures.append(short_reason(error))
    first = failures[0] if failures else "it has no layers"
    return RowProof("", f"packed rows could not be tried: {first}", 0.0)


@dataclass(frozen=True)
class _Pass:
    """What a way makes of the documents: (T, H) states and (T, V) logits, loss, gradients by name."""

    states: torch.Tensor
    logits: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


class _Trial:
    """One small model in one arithmetic. Raises _NoTrialError where it can't be built, run or read."""

    def __init__(self, config: Any, arithmetic: _Arithmetic, trust_remote_code: bool) -> None:
        self._arithmetic, self._tolerance = arithmetic, arithmetic.states
        with _as_no_trial("built"):
            self._model = _small_model(config, arithmetic.dtype, trust_remote_code)
            self._model.to(arithmetic.device)
            self._own_attention = self._model.config._attn_implementation
            ends = self._model.get_input_embeddings(), self._model.get_output_embeddings()
            rows = min(end.weight.shape[0] for end in ends)
        self._documents = _documents(rows)
        with _as_no_trial("run"):
            before = [self._beginning(tokens) for tokens in BEGINNINGS]
            self._plain = self._plain_pass()
            after = [self._beginning(tokens) for tokens in BEGINNINGS[::-1]]
            self._forgets = _spread(torch.cat(after[::-1]), torch.cat(before)) <= self._tolerance
        if not self._plain.states.isfinite().all():
            raise _NoTrialError("a small model of its kind gives no finite numbers")

    def proof(self) -> RowProof:
        """The first way that is right, and why the ones before it are not."""
        if not self._forgets:
            reason = "what it computes for a document depends on the documents that it read before"
            return RowProof("", reason, 0.0)
        blind = self._reads_ahead_or_nothing()
        if blind:
            return RowProof("", blind, 0.0)
        reasons = []
        for way in get_args(Way):
            reason, difference = self._fault(way)
            if not reason:
                return RowProof(way, reasons[0] if reasons else "", difference)
            reasons.append(reason)
        return RowProof("", reasons[-1], 0.0)

    def _fault(self, way: Way) -> tuple[str, float]:
        """Why a way is wrong, or "", and the difference of its states."""
        try:
            own = self._own_pass(way)
        except UserError as error:
            return str(error), 0.0
        except Exception as error:  # of any library, for any reason: the way does not work
            return f"{_WORDS[way]} end in an error: {_short(error)}", 0.0
        difference = _spread(own.states, self._plain.states)
        if not difference <= self._tolerance:
            return self._why_states_differ(way, difference), difference
        if not _spread(own.logits, self._plain.logits) <= self._tolerance:
            return (
                f"its logits are more than hidden states times output head{self._head()}",
                difference,
            )
        loose = self._arithmetic.losses
        if not abs(own.loss - self._plain.loss) <= loose * abs(self._plain.loss):
            return f"the loss is {own.loss:.6f} instead of {self._plain.loss:.6f}", difference
        return self._wrong_gradient(own, loose), difference

    def _why_states_differ(self, way: Way, difference: float) -> str:
        measured = f"hidden states differ by {difference:.1g} of their spread"
        if way == "alone":
            return f"its decoder called by itself is not what the model computes ({measured})"
        with torch.no_grad():
            alone = [self._states_of(way, [d]) for d in range(len(LENGTHS))]
        if _spread(torch.cat(alone), self._plain.states) <= self._tolerance:
            return f"documents in one row see each other ({measured})"
        return f"its attention is more than causal products with windows ({measured})"

    def _wrong_gradient(self, own: _Pass, tolerance: float) -> str:
        total = torch.stack([g.norm() for g in self._plain.gradients.values()]).norm()
        for name, expected in self._plain.gradients.items():
            found = own.gradients.get(name)
            error = expected.norm() if found is None else (found - expected).norm()
            if not error <= tolerance * (expected.norm() + 1e-3 * total):
                return (
                    f"the gradient of {name} differs by {error / expected.norm():.1g} of its norm"
                )
        return ""

    def _head(self) -> str:
        """What is known to do that, in brackets."""
        settings = self._model.config.get_text_config(decoder=True).to_dict()
        neutral = (None, False, 0, 1, 1.0)
        found = [n for n, v in settings.items() if _HEAD_SETTING.search(n) and v not in neutral]
        if getattr(self._model.get_output_embeddings(), "bias", None) is not None:
            found.append("a bias on the output head")
        return f" ({', '.join(found)})" if found else ""

    def _reads_ahead_or_nothing(self) -> str:
        """Another token in the middle of a document changes what comes after it and nothing before."""
        ids = self._ids(1)
        other = ids.clone()
        other[0, CHANGED] += 1 if ids[0, CHANGED] == ids.min() else -1
        with torch.no_grad():
            changed = self._model(input_ids=other).logits[0]
        plain = self._plain.logits[LENGTHS[0] :][: LENGTHS[1]]
        moved = (changed - plain).abs().amax(1) / plain.std()
        if moved[:CHANGED].max() > self._tolerance:
            return "its tokens see later ones, so that it is no causal language model"
        if not moved[CHANGED + 1 :].max() > 10 * self._tolerance:
            return "a small model of its kind does not look at earlier tokens"
        return ""

    # -------------------------------------------------------------------------
    # Passes

    def _ids(self, document: int) -> torch.Tensor:
        ids = torch.from_numpy(self._documents[document].ids.astype(np.int64))[None]
        return ids.to(self._arithmetic.device)

    @torch.no_grad()
    def _beginning(self, tokens: int) -> torch.Tensor:
        """(T, V) logits of the first tokens of the longest document, alone."""
        return self._model(input_ids=self._ids(1)[:, :tokens]).logits[0]

    def _plain_pass(self) -> _Pass:
        """As transformers computes it: each document alone, all logits, cross-entropy."""
        logits, losses, batch = [], [], self._batch()
        with self._decoder_watched() as states:
            for document in range(len(LENGTHS)):
                out = self._model(input_ids=self._ids(document)).logits[0]
                first = int((self._documents[document].segments == Segment.PROMPT).sum())
                labels = self._ids(document)[0, first:]
                losses.append(F.cross_entropy(out[first - 1 : -1], labels, reduction="sum"))
                logits.append(out)
        if len(states) != len(LENGTHS):
            raise RuntimeError("its logits don't come from its decoder")
        loss = torch.stack(losses).sum() / len(batch.labels)
        return self._gradients(torch.cat(states), torch.cat(logits), loss)

    def _own_pass(self, way: Way) -> _Pass:
        """As training computes it; in training mode too, where dropout must not be what breaks it."""
        packed, batch = self._packed(way), self._batch()
        with torch.no_grad():
            packed.train()(batch, 1)
        with self._decoder_watched() as found:
            loss, _ = packed.eval()(batch, len(batch.labels))
        states = torch.cat(found).detach()
        logits = states @ self._model.get_output_embeddings().weight.detach().t()
        return self._gradients(states, logits, loss)

    @contextmanager
    def _decoder_watched(self) -> Iterator[list[torch.Tensor]]:
        """The (T, H) hidden states of each pass through the decoder meanwhile."""
        states: list[torch.Tensor] = []
        hook = decoder_of(self._model).register_forward_hook(
            lambda *call: states.append(call[2][0][0])
        )
        try:
            yield states
        finally:
            hook.remove()

    def _states_of(self, way: Way, documents: list[int]) -> torch.Tensor:
        return self._packed(way).hidden_states(self._batch(documents))

    def _packed(self, way: Way) -> PackedLossModel:
        if self._model.config._attn_implementation != self._own_attention:
            self._model.set_attn_implementation(self._own_attention)
        return PackedLossModel(self._model, -1, way).eval()

    def _batch(self, documents: Sequence[int] = range(len(LENGTHS))) -> PackedBatch:
        return build_batch(self._documents, documents).to(torch.device(self._arithmetic.device))

    def _gradients(self, states: torch.Tensor, logits: torch.Tensor, loss: torch.Tensor) -> _Pass:
        self._model.zero_grad()
        loss.backward()
        named = {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None}
        self._model.zero_grad()
        return _Pass(states.detach(), logits.detach(), loss.detach(), named)


def _small_model(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> torch.nn.Module:
    """The model of a small configuration with weights that make every part of it matter."""
    with _of_bounded_size():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.config.use_cache = model.config.get_text_config(decoder=True).use_cache = False
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no double precision
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(dtype).eval().requires_grad_(True)


@contextmanager
def _of_bounded_size() -> Iterator[None]:
    """A model that is built meanwhile ends in a RuntimeError where its weights become too many."""
    seen: dict[int, torch.nn.Parameter] = {}  # tied ones are registered twice
    weights = 0

    def count(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal weights
        if parameter is not None and id(parameter) not in seen:
            seen[id(parameter)] = parameter
            weights += parameter.numel()
        if weights > LARGEST:
            raise RuntimeError(f"more than {LARGEST // 10**6}M weights are too many to try")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _documents(rows: int) -> list[TokenizedSample]:
    """Documents of random tokens, none of which is special: those are among the first or the last ids."""
    generator = np.random.default_rng(0)
    documents = []
    for index, length in enumerate(LENGTHS):
        segments = np.full(length, Segment.ANSWER, dtype=np.uint8)
        segments[: max(1, length // 3)] = Segment.PROMPT
        ids = generator.integers(rows // 4, rows // 2, length).astype(np.int32)
        documents.append(TokenizedSample(ids=ids, segments=segments, index=index))
    return documents


def _spread(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in the spread of what is expected; NaN where there is one."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.std())


@contextmanager
def _as_no_trial(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # libraries raise anything where numbers do not fit each other
        raise _NoTrialError(
            f"a small model of its kind can't be {what}: {_short(error)}"
        ) from error


def _short(error: Exception) -> str:
    return clean_line(short_reason(error), 160)
