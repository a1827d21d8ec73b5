"""Packed rows are proven for a model, or not used: what a trial finds, also if our own code is wrong.

uv run pytest tests/model/test_row_proof.py
"""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_5 import modeling_qwen3_5

from finetuning.common.errors import UserError
from finetuning.config import NO_LIMIT
from finetuning.model import attention, packed_model, row_proof
from finetuning.model.positions import tokens_taken
from finetuning.model.row_proof import RowProof, positions_of, proven_way
from finetuning.model.small_config import (
    LIMIT,
    LONGEST,
    ROW,
    chosen_layers,
    lengths_within,
    small_configs,
)

FOREVER = 10**9  # tokens: longer than every window
WINDOW = {"sliding_window": 4096}


def prove(kind: str, longest: int = FOREVER, **settings: object) -> RowProof:
    return row_proof.prove(CONFIG_MAPPING[kind](**settings), longest=longest)


def windowed() -> Qwen3Config:
    """Half of the layers look at 4,096 tokens, which becomes 8."""
    return Qwen3Config(use_sliding_window=True, max_window_layers=16, **WINDOW)


# -----------------------------------------------------------------------------
# What is found


def test_an_ordinary_decoder_is_read_in_packed_rows():
    proof = prove("qwen3")
    assert (proof.way, proof.reason) == ("packed", "") and proof.difference < 1e-6


def test_windows_that_go_through_the_interface_are_read_in_packed_rows():
    assert row_proof.prove(windowed(), longest=FOREVER).way == "packed"


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("qwen3_5_text", {}, "see each other"),
        pytest.param("mamba2", {}, "see each other", marks=pytest.mark.slow),
        pytest.param("mpt", {}, "see each other", marks=pytest.mark.slow),
        ("phimoe", WINDOW, "more than causal products with windows"),
        pytest.param(
            "llama4_text", {}, "more than causal products with windows", marks=pytest.mark.slow
        ),
        ("gemma2", {"final_logit_softcapping": None}, "soft cap"),
        ("qwen3", {"attention_dropout": 0.1}, "dropout"),
        ("stablelm", {}, "does not hand on where packed documents begin"),
        pytest.param(
            "nemotron",
            {"num_key_value_heads": 8},
            "does not hand on where packed documents begin",
            marks=pytest.mark.slow,
        ),
        ("doge", {}, "mask of its own"),
    ],
)
def test_one_document_a_pass_where_packed_rows_are_wrong(kind, settings, reason):
    proof = prove(kind, **settings)
    assert proof.way == "alone" and reason in proof.reason and proof.difference < 1e-6
    assert "\n" not in proof.reason and len(proof.reason) < 250


def by_document(function, names: tuple[str, ...], dim: int):
    """A stand-in for a kernel that knows where packed documents begin, as transformers calls it."""

    def kernel(*args, cu_seqlens=None, cu_seq_lens_q=None, **more):
        bounds = cu_seqlens if cu_seqlens is not None else cu_seq_lens_q
        more = {
            k: v for k, v in more.items() if not k.startswith(("seq_idx", "cu_seq", "max_length"))
        }
        if bounds is None:
            return function(*args, **more)
        lengths = torch.diff(bounds).tolist()
        parts = [
            a.split(lengths, dim) if i < len(names) else [a] * len(lengths)
            for i, a in enumerate(args)
        ]
        named = {k: v.split(lengths, dim) for k, v in more.items() if k in ("g", "beta")}
        found = [
            function(*(p[d] for p in parts), **more | {k: v[d] for k, v in named.items()})
            for d in range(len(lengths))
        ]
        whole = isinstance(found[0], torch.Tensor)
        return torch.cat(found, dim) if whole else (torch.cat([f[0] for f in found], dim), None)

    return kernel


def test_rows_are_packed_where_the_models_own_kernels_take_the_boundaries(monkeypatch):
    """As with flash-linear-attention and causal-conv1d, which only a GPU runs."""
    scan, conv = modeling_qwen3_5.torch_chunk_gated_delta_rule, modeling_qwen3_5.causal_conv1d_fn
    scan = by_document(scan, ("query", "key", "value"), 1)
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", scan)
    assert prove("qwen3_5_text").way == "alone", "the convolution still reaches over the boundaries"
    conv = by_document(conv, ("states",), 2)
    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", conv)
    proof = prove("qwen3_5_text")
    assert proof.way == "marked" and "see each other" in proof.reason and proof.difference < 1e-6


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gemma2", {}, "output head (final_logit_softcapping)"),
        pytest.param("cohere", {}, "output head (logit_scale)", marks=pytest.mark.slow),
        pytest.param(
            "recurrent_gemma", {}, "output head (logits_soft_cap)", marks=pytest.mark.slow
        ),
        ("phi", {}, "output head (a bias on the output head)"),
        ("bert", {}, "see later ones"),
    ],
)
def test_a_model_that_no_way_is_right_for_is_refused_with_the_reason(kind, settings, reason):
    proof = prove(kind, **settings)
    assert proof.way == "" and reason in proof.reason


def test_positions_that_no_document_reaches_do_not_count():
    """Phi-3's angles change for the whole row once one of its documents is longer than 4,096 tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 48,
        "long_factor": [4.0] * 48,
        "original_max_position_embeddings": 4096,
    }
    assert prove("phi3", 4096 - 1, rope_parameters=rope).way == "packed"
    assert prove("phi3", 4096, rope_parameters=rope).way == "alone"


GROWING = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_positions_that_grow_with_the_longest_document_so_far_are_refused(kind: str):
    """Its angles are those of the longest document of the row, and stay for the documents after it."""
    settings = {"max_position_embeddings": 2048, "rope_parameters": GROWING}
    assert prove(kind, 2048, **settings) == replace(prove(kind, 2000, **settings), way="packed")
    for longest in (2049, 4096, FOREVER):
        proof = prove(kind, longest, **settings)
        assert (proof.way, proof.tokens) == ("", 2048) and "read before" in proof.reason


def test_a_limit_that_only_rows_cross_is_crossed_in_the_trial():
    """Llama 4's layers look at chunks of the row, not of the document."""
    config = CONFIG_MAPPING["llama4_text"](
        attention_chunk_size=8192, layer_types=["chunked_attention"] * 4, num_hidden_layers=4
    )
    assert row_proof.prove(config, longest=4096, row=8192).way == "packed"
    proof = row_proof.prove(config, longest=4096, row=16384)
    assert proof.way == "alone" and "see each other" in proof.reason


@pytest.mark.parametrize(
    ("kind", "settings", "tokens"),
    [
        ("gpt2", {"n_positions": 100}, 100),
        ("opt", {"max_position_embeddings": 100}, 100),
        ("mpt", {"max_seq_len": 100}, 100),
        ("codegen", {"n_positions": 100}, 100),
        ("roberta", {"is_decoder": True, "max_position_embeddings": 514}, 512),
        ("qwen3", {"max_position_embeddings": 100}, 0),
        ("xglm", {"max_position_embeddings": 100}, 0),  # computes what is not in its table
    ],
)
def test_what_a_model_takes_is_found_by_trying_it(kind: str, settings: dict, tokens: int):
    config = CONFIG_MAPPING[kind](**settings)
    build = partial(row_proof._small_model, dtype=torch.float32, trust_remote_code=False)
    for wanted in (438, FOREVER):
        assert tokens_taken(config, max(wanted, tokens + 1), build) == (
            tokens or max(wanted, tokens + 1)
        )
    assert tokens_taken(config, 60, build) == 60
    if tokens:
        assert tokens_taken(config, tokens, build) == tokens


def test_a_model_is_tried_with_what_it_takes():
    proof = prove("opt", 768, max_position_embeddings=100)
    assert (proof.way, proof.tokens) == ("packed", 100)
    assert prove("opt", 100, max_position_embeddings=100).tokens == 0


def test_a_class_that_makes_no_model_is_refused():
    proof = prove("dots1")  # its default number of experts is none
    assert proof.way == "" and "could not be tried" in proof.reason


def test_random_states_stay_as_they_are():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    prove("qwen3")
    prove("gpt2")  # draws for its dropout
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


# -----------------------------------------------------------------------------
# What is found when our own code is wrong


def without_bounds(query, key, value, lengths, scaling, window):
    return ORIGINAL(query, key, value, (query.shape[2],), scaling, window)


def with_a_longer_window(query, key, value, lengths, scaling, window):
    return ORIGINAL(query, key, value, lengths, scaling, window and window + 1)


def with_another_scale(query, key, value, lengths, scaling, window):
    return ORIGINAL(query, key, value, lengths, scaling * 1.001, window)


def without_gradient_of_values(query, key, value, lengths, scaling, window):
    return ORIGINAL(query, key, value.detach(), lengths, scaling, window)


ORIGINAL = attention._per_document


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        (without_bounds, "see each other"),
        (with_a_longer_window, "more than causal products"),
        (with_another_scale, "more than causal products"),
        (without_gradient_of_values, "the gradient of"),
    ],
)
def test_a_mistake_in_packed_attention_is_found(monkeypatch, mistake, reason):
    monkeypatch.setattr(attention, "_per_document", mistake)
    proof = row_proof.prove(windowed(), longest=FOREVER)
    assert proof.way == "alone" and reason in proof.reason


def test_a_mistake_in_the_loss_is_found(monkeypatch):
    right = packed_model.packed_loss

    def one_target_too_many(*args, num_targets, **kwargs):
        return right(*args, num_targets=num_targets + 1, **kwargs)

    monkeypatch.setattr(packed_model, "packed_loss", one_target_too_many)
    proof = prove("qwen3")
    assert proof.way == "" and "the loss is" in proof.reason


# -----------------------------------------------------------------------------
# Kept in the cache, refused with one line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Qwen3Config(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_model_is_tried_once(folder: Path, tmp_path: Path, monkeypatch):
    tries = []
    right = row_proof.prove

    def counted(config, **options):
        tries.append(config.rms_norm_eps)
        return right(config, **options)

    monkeypatch.setattr(row_proof, "prove", counted)
    first = proven_way(folder, tmp_path / "cache", longest=64)
    assert proven_way(folder, tmp_path / "cache", longest=64) == first and len(tries) == 1
    proven_way(folder, tmp_path / "cache", longest=128)
    change(folder, rms_norm_eps=1e-5)
    proven_way(folder, tmp_path / "cache", longest=128)
    assert tries == [1e-6, 1e-6, 1e-5]


def test_more_tokens_than_it_takes_are_one_line_with_the_number_to_give(folder, tmp_path):
    change(folder, max_position_embeddings=2048, rope_parameters=GROWING)
    with pytest.raises(UserError, match=r"more than 2,048 tokens .*; use --max-seq-length 2048$"):
        proven_way(folder, tmp_path / "cache", longest=4096)
    assert proven_way(folder, tmp_path / "cache", longest=2048).way == "packed"
    CONFIG_MAPPING["gpt2"](n_positions=100).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"no more positions; use --max-seq-length 100$"):
        proven_way(tmp_path / "gpt2", tmp_path / "cache", longest=101)


def test_positions_are_those_of_the_configuration_or_of_a_trial(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert positions_of(folder, cache) == Qwen3Config().max_position_embeddings
    CONFIG_MAPPING["gpt2"](n_positions=100).save_pretrained(tmp_path / "gpt2")
    assert positions_of(tmp_path / "gpt2", cache) == 100
    CONFIG_MAPPING["mpt"](max_seq_len=100).save_pretrained(tmp_path / "mpt")
    assert positions_of(tmp_path / "mpt", cache) == 100, "nothing is told"
    CONFIG_MAPPING["bloom"]().save_pretrained(tmp_path / "bloom")
    assert positions_of(tmp_path / "bloom", cache) == NO_LIMIT
    monkeypatch.setattr(row_proof, "tokens_taken", lambda *_: pytest.fail("tried again"))
    assert positions_of(tmp_path / "gpt2", cache) == 100


def test_a_damaged_answer_is_made_anew(folder: Path, tmp_path: Path):
    first = proven_way(folder, tmp_path / "cache", longest=64)
    (path,) = (tmp_path / "cache").glob("row-proof-*/value.json")
    path.write_text("{")
    assert proven_way(folder, tmp_path / "cache", longest=64) == first


def test_an_architecture_that_nobody_knows_is_one_clear_error(folder: Path, tmp_path: Path):
    change(folder, model_type="never-heard-of")
    with pytest.raises(UserError, match="knows its architecture"):
        proven_way(folder, tmp_path / "cache", longest=64)


def test_a_refusal_names_the_model_and_the_reason(tmp_path: Path):
    CONFIG_MAPPING["gemma2"]().save_pretrained(tmp_path / "model")
    for _ in range(2):  # the second from the cache
        with pytest.raises(UserError, match=r"model gemma2 can't be trained here: .*softcapping"):
            proven_way(tmp_path / "model", tmp_path / "cache", longest=64)


# -----------------------------------------------------------------------------
# Small configurations


def small(config) -> dict:
    return next(small_configs(config, FOREVER)).to_dict()


def test_products_of_widths_still_fit():
    config = small(Qwen3Config(hidden_size=2560, intermediate_size=9728, num_attention_heads=32))
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (80, 304, 4)
    assert (config["num_attention_heads"], config["vocab_size"]) == (32, 256)


def test_only_limits_that_a_document_crosses_become_short():
    crossed, kept = (next(small_configs(windowed(), n)).sliding_window for n in (4096, 4095))
    assert (crossed, kept) == (LIMIT, 4096)


@pytest.mark.parametrize("longest", [9, 70, 100, 777, 4096, 10**6])
@pytest.mark.parametrize("row", [1, 3])
def test_lengths_keep_their_places_between_documents_and_rows(longest: int, row: int):
    """Whatever documents or rows go beyond is gone beyond in the trial, and nothing else."""
    for value in {
        9,
        65,
        70,
        100,
        125,
        500,
        longest - 1,
        longest,
        longest + 1,
        row * longest,
        10**7,
    }:
        config = Qwen3Config(max_position_embeddings=value, use_sliding_window=True)
        config.sliding_window = value
        small = next(small_configs(config, longest, row * longest))
        positions, window = small.max_position_embeddings, small.sliding_window
        if value > LIMIT:
            assert (positions < LONGEST) == (value < longest)
            assert (positions < ROW) == (value < row * longest)
            assert (window <= LONGEST) == (value <= longest)
            assert (window < ROW) == (value < row * longest or value <= longest)
            assert (value in lengths_within(config, longest)) == (value <= longest)


def test_every_kind_of_layer_is_kept_twice_and_the_last_one():
    kinds = ["a"] * 20 + ["b", "c"] + ["a"] * 7 + ["c", "b", "d"]
    chosen = chosen_layers({"layer_types": kinds, "dense_layers": [0, 20]}, len(kinds))
    assert chosen == [0, 1, 2, 20, 21, 29, 30, 31]
    config = Qwen3Config(num_hidden_layers=20, max_window_layers=20)
    config = replace_layers(config, ["full_attention"] * 18 + ["sliding_attention"] * 2)
    assert small(config)["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2


def replace_layers(config: Qwen3Config, kinds: list[str]) -> Qwen3Config:
    return replace(config, layer_types=kinds, sliding_window=64, use_sliding_window=True)


def test_a_small_model_with_too_many_weights_is_not_built_to_the_end(monkeypatch):
    """And models built afterwards may be as large as they like."""
    monkeypatch.setattr(row_proof, "LARGEST", 1_000_000)
    sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    small, config = (Qwen3Config(**sizes, num_hidden_layers=n) for n in (2, 200))
    row_proof._small_model(small, torch.float32, trust_remote_code=False)
    layers: list[torch.nn.Module] = []
    made = Qwen3DecoderLayer.__init__
    monkeypatch.setattr(
        Qwen3DecoderLayer,
        "__init__",
        lambda self, *a, **k: (layers.append(self), made(self, *a, **k))[1],
    )
    with pytest.raises(RuntimeError, match="more than 1M weights"):
        row_proof._small_model(config, torch.float32, trust_remote_code=False)
    assert 1 < len(layers) < 20
    assert torch.nn.Linear(2000, 2000).weight.numel() > row_proof.LARGEST
