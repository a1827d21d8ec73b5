"""Tokens written with keys and values that stay, against the model's own `generate`."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finetuning.model import decoding
from finetuning.model.decoding import Decoder, Request, StaticDecoder, written_tokens
from finetuning.model.sampling import GREEDILY, Sampling
from finetuning.rules import LOWEST_TEMPERATURE

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
END, MOST = 1, 21
IDS = torch.tensor([[0, 0, 0, 7, 8], [3, 4, 5, 6, 9], [0, 5, 6, 7, 8]])
MASK = (IDS > 0).long()
ASKED = Request(IDS, MASK, MOST, END)
CERTAIN = GREEDILY.chooser(len(IDS), MOST, IDS.device)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, head_dim=16, initializer_range=0.3)
    return Qwen3ForCausalLM(config).eval()


def expected_tokens(model: torch.nn.Module, most: int = MOST) -> torch.Tensor:
    out = model.generate(
        input_ids=IDS,
        attention_mask=MASK,
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=END,
    )
    return out[:, IDS.shape[1] :]


def until_end(rows: torch.Tensor) -> list[list[int]]:
    lists = rows.tolist()
    return [row[: row.index(END)] if END in row else row for row in lists]


@torch.no_grad()
def test_buffers_that_stay_give_the_tokens_of_generate(model):
    expected = until_end(expected_tokens(model))
    assert len({tuple(row) for row in expected}) == 3 and max(map(len, expected)) > 8
    with decoding._one_token_attention(model):
        found = written_tokens(StaticDecoder(model, ASKED), ASKED, CERTAIN, record=False)
    assert until_end(found) == expected
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_scores_are_those_of_generate(model):
    """In fp32 nearly to the last digit, with and without the products of one token."""
    own = model.generate(
        input_ids=IDS,
        attention_mask=MASK,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with decoding._one_token_attention(model):
        decoder = StaticDecoder(model, replace(ASKED, most=5))
        for place, scores in enumerate(own.logits):
            torch.testing.assert_close(decoder.scores, scores, rtol=1e-4, atol=1e-4)
            decoder.append(own.sequences[:, IDS.shape[1] + place])


def test_it_ends_where_all_rows_ended_or_enough_is_written(model, monkeypatch):
    def written(request: Request) -> torch.Tensor:
        return written_tokens(StaticDecoder(model, request), request, CERTAIN, record=False)

    with torch.no_grad(), decoding._one_token_attention(model):
        told: list[int] = []
        written(replace(ASKED, enough=lambda count: bool(told.append(count))))
        assert told and told == [8, 16, MOST][: len(told)]
        short = written(replace(ASKED, enough=lambda count: count >= 8))
        assert short.shape == (3, 8)
        monkeypatch.setattr(decoding, "CHECKED_EVERY", 2)
        same = Request(IDS[1:2].repeat(3, 1), MASK[1:2].repeat(3, 1), MOST, int(short[1, 0]))
        assert written(same).shape == (3, 2), "all rows ended at the first token"


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (MistralConfig(**SIZES, sliding_window=4), MistralForCausalLM),
        (FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4), FalconH1ForCausalLM),
    ],
)
def test_layers_that_keep_something_else_are_left_to_generate(config, kind):
    with pytest.raises(RuntimeError, match="not every layer"):
        StaticDecoder(kind(config).eval(), ASKED)


@torch.no_grad()
def test_a_model_whose_scores_differ_is_found_out(model):
    decoder = Decoder(model)
    decoder._try(ASKED)  # nothing is raised
    frozen = StaticDecoder._step

    def step(self) -> None:
        frozen(self)
        self._position -= 1

    try:
        StaticDecoder._step = step
        with pytest.raises(RuntimeError, match="standard deviations"):
            decoder._try(ASKED)
    finally:
        StaticDecoder._step = frozen


@torch.no_grad()
def test_a_cpu_leaves_it_to_generate(model):
    prepared: list[int] = []
    decoder = Decoder(model, lambda: prepared.append(1))
    found = decoder.write(ASKED)
    assert torch.equal(found, expected_tokens(model)) and prepared == [1]
    assert decoder.why_no_graph == "there is no CUDA device"


@torch.no_grad()
def test_what_the_graph_can_not_do_is_told_once_and_left_to_generate(model, monkeypatch):
    """On a CPU there is no graph: here an error stands for what a model or a driver may raise."""

    def fails(self, request: Request) -> torch.Tensor:
        raise TypeError("forward() got an unexpected keyword argument")

    told: list[str] = []
    decoder = Decoder(model, warn=told.append)
    monkeypatch.setattr(Decoder, "_by_graph", fails)
    monkeypatch.setattr(decoding, "_can_have_graphs", lambda request: True)
    for _ in range(2):
        assert torch.equal(decoder.write(ASKED), expected_tokens(model))
    assert told == [
        "answers are written without a CUDA graph: forward() got an unexpected keyword argument"
    ]


# -----------------------------------------------------------------------------
# Drawn tokens


@torch.no_grad()
def test_drawn_tokens_are_those_of_the_seed_by_every_way(model):
    choose = Sampling(0.9, seed=3).chooser(len(IDS), MOST, IDS.device)
    decoder, other = (Decoder(model, sampling=Sampling(0.9, seed=seed)) for seed in (3, 4))
    state = torch.get_rng_state()
    own = until_end(decoder.write(ASKED))
    with decoding._one_token_attention(model):
        kept = written_tokens(StaticDecoder(model, ASKED), ASKED, choose, record=False)
    assert own == until_end(kept) == until_end(decoder.write(ASKED))
    assert own != until_end(expected_tokens(model)), "greedy"
    assert own != until_end(other.write(ASKED))
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_drawn_by_temperature_and_top_p():
    """Against the softmax of the kept tokens, 20,000 draws."""
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0])
    rows, temperature = 20_000, 0.6
    choose = Sampling(temperature, seed=1, top_p=0.98).chooser(rows, 1, torch.device("cpu"))
    found = torch.bincount(choose(scores.expand(rows, -1), 0), minlength=5) / rows
    likely = (scores / temperature).softmax(0)
    assert likely[:2].sum() < 0.98 < likely[:3].sum()
    wanted = torch.where(torch.arange(5) < 3, likely, 0.0)
    torch.testing.assert_close(found, wanted / wanted.sum(), atol=0.01, rtol=0)


def test_a_token_that_is_nearly_certain_is_drawn_and_equal_ones_all_are():
    device = torch.device("cpu")
    certain = torch.tensor([[0.0, 50.0]]).expand(100, -1)
    assert Sampling(0.6).chooser(100, 1, device)(certain, 0).eq(1).all()
    equal = torch.zeros(2000, 4)
    assert set(Sampling(0.6, top_p=1.0).chooser(2000, 1, device)(equal, 0).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_still_give_a_token(bad: float):
    """Of a whole row, or of one score; the rows beside it are drawn as ever."""
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    alone = Sampling(0.6, seed=2).chooser(3, 1, torch.device("cpu"))(scores, 0)
    for place in (slice(None), 4):
        broken = scores.clone()
        broken[1, place] = bad
        found = Sampling(0.6, seed=2).chooser(3, 1, torch.device("cpu"))(broken, 0)
        assert 0 <= found[1] < 7 and found[[0, 2]].equal(alone[[0, 2]])
        if place == 4:
            assert (found[1] == 4) == (bad != float("-inf"))


@torch.no_grad()
def test_a_model_whose_scores_are_no_numbers_writes_its_answers_to_the_end():
    broken = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)).eval()
    broken.lm_head.weight.fill_(float("nan"))
    assert Decoder(broken, sampling=Sampling(0.6)).write(ASKED).shape == (3, MOST)


def test_the_lowest_temperature_takes_the_most_probable_token():
    scores = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * 10
    choose = Sampling(LOWEST_TEMPERATURE).chooser(50, 1, torch.device("cpu"))
    assert choose(scores, 0).equal(scores.argmax(1))
