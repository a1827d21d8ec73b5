"""KL to the base and the loss on general text against a dense computation of their own; the anchored loss.

uv run pytest -m "not long" tests/evaluation/test_forgetting.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Qwen3ForCausalLM

from finetuning.common.distributed import Distributed
from finetuning.config import DataSettings, bundled_data
from finetuning.data.packing import StepPlan, build_batch
from finetuning.data.token_table import Segment
from finetuning.data.training_data import DataPart, general_part
from finetuning.evaluation.evaluator import held_out_sums
from finetuning.evaluation.forgetting import BaseStates, general_metrics, kl_metric
from finetuning.events.reading import read_run
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.loss import Objective
from finetuning.model.packed_model import PackedLossModel
from tests.helpers.settings import step_plan, up_to

ONE = Distributed(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def part(tiny_model: Path) -> DataPart:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = general_part([bundled_data("general")], tokenizer, up_to(64), pytest.fail, 2500)
    assert len(found) > 8
    return found


def adapted(folder: Path) -> PeftModel:
    """Adapters that change the predictions by much."""
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(folder), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def plan_of(part: DataPart) -> StepPlan:
    tokens, data = part.tokens, DataSettings(max_seq_length=part.tokens.max_seq_length)
    return step_plan(tokens.lengths, tokens.num_targets, part.documents, data=data)


def dense(model: torch.nn.Module, base: torch.nn.Module, part: DataPart) -> tuple[float, float]:
    """Mean KL(base‖model) and mean loss of the tokens that carry loss, in fp64, a document at a time."""
    kls, losses = [], []
    for document in part.documents:
        piece = part.tokens[int(document)]
        ids = torch.from_numpy(piece.ids.astype(np.int64))[None]
        with torch.no_grad():
            tuned, kept = (m(ids).logits[0, :-1].double().log_softmax(1) for m in (model, base))
        learnt = torch.from_numpy(piece.segments[1:] != 0)
        kls.append(F.kl_div(tuned, kept, log_target=True, reduction="none").sum(1)[learnt])
        losses.append(F.nll_loss(tuned, ids[0, 1:], reduction="none")[learnt])
    return torch.cat(kls).mean().item(), torch.cat(losses).mean().item()


@pytest.mark.parametrize("fused", [False, True])
def test_gauges_agree_with_a_dense_computation(tiny_model, part, fused):
    model = adapted(tiny_model)
    kl, loss = dense(adapted(tiny_model).eval(), Qwen3ForCausalLM.from_pretrained(tiny_model), part)
    if fused:
        assert enable_fast_lora(model) > 0
    packed, plan = PackedLossModel(model, part.tokens.close_id), plan_of(part)
    base = BaseStates(packed, part.tokens, plan, ONE, head=None)
    found = general_metrics(held_out_sums(packed, part.tokens, plan, ONE, base=base))
    assert kl > 0.01
    assert found["Forgetting/KL_General"] == pytest.approx(kl, rel=1e-4)
    assert found["Forgetting/General_Loss"] == pytest.approx(loss, rel=1e-4)


def test_all_weights_are_compared_with_those_they_had(tiny_model, part):
    before, model, plain = (Qwen3ForCausalLM.from_pretrained(tiny_model) for _ in range(3))
    packed, plan = PackedLossModel(model, part.tokens.close_id), plan_of(part)
    base = BaseStates(packed, part.tokens, plan, ONE, head=packed.head_weight.clone())
    sums = held_out_sums(packed, part.tokens, plan, ONE, base=base)
    assert kl_metric("kl", sums.divergence) == {"kl": 0.0}, "nothing is changed yet"
    with torch.no_grad():
        for changed in (model, plain):
            changed.get_input_embeddings().weight.mul_(6)  # it is the head, too
    sums = held_out_sums(packed, part.tokens, plan, ONE, base=base)
    kl, _ = dense(plain, before, part)
    assert kl > 0.01
    assert kl_metric("kl", sums.divergence)["kl"] == pytest.approx(kl, rel=1e-4)


def test_whole_copies_of_modules_are_no_part_of_the_base(tiny_model, part):
    """As an adapter of others may have them, `modules_to_save`: the base has the norm that it had."""
    base = Qwen3ForCausalLM.from_pretrained(tiny_model)
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(tiny_model), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(-2)
    kl, _ = dense(model.eval(), base, part)
    packed, plan = PackedLossModel(model, part.tokens.close_id), plan_of(part)
    states = BaseStates(packed, part.tokens, plan, ONE, head=None)
    sums = held_out_sums(packed, part.tokens, plan, ONE, base=states)
    assert kl > 0.01
    assert kl_metric("kl", sums.divergence)["kl"] == pytest.approx(kl, rel=1e-4)


def test_of_much_text_the_first_tokens_are_compared(tiny_model, part, monkeypatch):
    monkeypatch.setattr("finetuning.evaluation.forgetting.CPU_TOKENS", 1500)
    packed, plan = PackedLossModel(adapted(tiny_model), part.tokens.close_id), plan_of(part)
    base = BaseStates(packed, part.tokens, plan, ONE, head=None)
    sums = held_out_sums(packed, part.tokens, plan, ONE, base=base)
    assert 0 < sums.divergence[1] < sums.documents[:, :, 2].sum()


@pytest.mark.parametrize(
    ("weight", "of_answer"), [(0.0, 1.0), (0.5, 1.0), (3.0, 1.0), (0.0, 2.5), (0.7, 0.25)]
)
def test_the_gradient_is_that_of_the_objective(tiny_model, part, weight, of_answer):
    """Σ w · cross-entropy + weight · KL(base‖model), over the number of targets; densely."""
    batch = build_batch(part.tokens, part.documents[:3])
    ours, plain = adapted(tiny_model), adapted(tiny_model)
    packed = PackedLossModel(
        ours, part.tokens.close_id, objective=Objective(weight, of_answer)
    ).train()
    loss, _ = packed(batch, len(batch.labels))
    loss.backward()
    wanted = torch.zeros(())
    shown = 0.0
    for document in part.documents[:3]:
        piece = part.tokens[int(document)]
        ids = torch.from_numpy(piece.ids.astype(np.int64))[None]
        learnt = torch.from_numpy(piece.segments[1:] != 0)
        tuned = plain(ids).logits[0, :-1].log_softmax(1)[learnt]
        with torch.no_grad(), plain.disable_adapter():
            base = plain(ids).logits[0, :-1].log_softmax(1)[learnt]
        nll = F.nll_loss(tuned, ids[0, 1:][learnt], reduction="none")
        shown += nll.sum().item()
        answers = np.isin(piece.segments[1:][learnt], (Segment.ANSWER, Segment.END))
        of_target = torch.where(torch.from_numpy(answers), of_answer, 1.0)
        wanted = (
            wanted
            + (of_target * nll).sum()
            + weight * F.kl_div(tuned, base, log_target=True, reduction="sum")
        )
    (wanted / len(batch.labels)).backward()
    assert loss.item() == pytest.approx(shown / len(batch.labels), rel=1e-5), "the loss shown is CE"
    reference = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert own.keys() == reference.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, reference[name], rtol=2e-4, atol=2e-6)


def test_a_run_shows_what_it_forgets(run, tmp_path):
    assert run(tmp_path, "--learning-rate", "0.02") == 0
    (events,) = (tmp_path / "out" / "tensorboard_logs").iterdir()
    series = {tag: dict(points) for tag, points in read_run(events).items()}
    for tag in ("Forgetting/KL_Held_Out", "Forgetting/KL_General"):
        assert series[tag][0] == 0.0, "before the first step the model is its base"
        assert series[tag][6] > 1e-4
    assert series["Forgetting/General_Loss"][0] > 1


def test_the_gauge_can_be_left_out(run, tmp_path):
    assert run(tmp_path, "--no-forgetting", "--max-steps", "1") == 0
    (events,) = (tmp_path / "out" / "tensorboard_logs").iterdir()
    assert not [tag for tag in read_run(events) if tag.startswith("Forgetting/")]
