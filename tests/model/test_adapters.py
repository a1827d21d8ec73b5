"""Adapters: attached, counted, started from others, and refused with reasons."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetuning.common.errors import UserError
from finetuning.model import adapters
from tests.helpers.models import disturb, edit, load, logits


def test_the_same_seed_gives_the_same_adapters(tiny):
    torch.manual_seed(123)
    first = adapters.adapter_state(load(tiny, seed=3)[0])
    torch.manual_seed(456)
    again = adapters.adapter_state(load(tiny, seed=3)[0])
    other = adapters.adapter_state(load(tiny, seed=4)[0])
    assert first.keys() == again.keys() and len(first) == 2 * 7 * 2
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("precision, dtype", [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_adapters_are_fp32_whatever_the_base_is(tiny, precision, dtype):
    model, _ = load(tiny, precision=precision)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, dtype)}


def test_peft_options_by_name(tiny):
    model, _ = load(
        tiny,
        lora_r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        use_rslora=True,
        use_dora=True,
    )
    state = adapters.adapter_state(model)
    assert {n.split(".")[-3] for n in state if "lora_A" in n} == {"q_proj", "down_proj"}
    assert state["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape[0] == 2
    assert any("lora_magnitude_vector" in name for name in state)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(6 / 4**0.5)
    assert layer.lora_dropout["default"].p == 0.1


def test_unknown_target_modules_are_refused_with_those_that_exist(tiny):
    with pytest.raises(UserError, match=r"q_prj; .*down_proj, gate_proj, k_proj, o_proj"):
        load(tiny, target_modules=["q_prj", "k_proj"])
    with pytest.raises(UserError, match="no module of this model fits"):
        load(tiny, rank_pattern={"q_prj": 4})


def test_all_linear(tiny):
    state = adapters.adapter_state(load(tiny, target_modules=["all-linear"])[0])
    assert len(state) == 2 * 7 * 2


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_adapters_at_the_ends_are_refused_by_name(tiny, tmp_path, end):
    with (
        warnings.catch_warnings(action="error", category=UserWarning),
        pytest.raises(UserError, match=f"adapters on .*{end} are not trained here"),
    ):
        load(tiny, target_modules=["q_proj", end])
    foreign = LoraConfig(target_modules=["q_proj"], modules_to_save=[end], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), foreign).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=end):
        load(tiny, init_adapter=str(tmp_path))


def test_parts_of_layers_without_adapters_are_known(tiny):
    found = adapters.parts_without_adapters(load(tiny, target_modules=["q_proj", "v_proj"])[0])
    assert found == {"mlp": (2, ["down_proj", "gate_proj", "up_proj"])}
    assert not adapters.parts_without_adapters(load(tiny)[0])
    assert not adapters.parts_without_adapters(load(tiny, lora_r=0)[0])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_r": 0}])
def test_state_goes_out_and_in(tiny, options):
    model, _ = load(tiny, **options)
    disturb(model)
    state = {n: t.clone() for n, t in adapters.adapter_state(model).items()}
    fresh, _ = load(tiny, **options)
    adapters.load_adapter_state(fresh, state)
    assert torch.equal(logits(fresh), logits(model))


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(tiny):
    model, _ = load(tiny)
    before = {n: t.clone() for n, t in adapters.adapter_state(model).items()}
    state = {n: torch.ones_like(t) for n, t in before.items()}
    name = next(iter(state))
    faults = {
        "1 missing, first": {n: t for n, t in state.items() if n != name},
        "1 unexpected, first extra": {**state, "extra": torch.ones(1)},
        "1 of another shape": {**state, name: torch.ones(3)},
    }
    for reason, wrong in faults.items():
        with pytest.raises(UserError, match=reason):
            adapters.load_adapter_state(model, wrong)
    after = adapters.adapter_state(model)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_an_adapter_is_a_start(trained, tiny):
    folder, expected = trained
    model, _ = load(tiny, init_adapter=str(folder), lora_r=16)
    torch.testing.assert_close(logits(model), expected)
    assert model.peft_config["default"].r == 4
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_an_adapter_that_peft_itself_saved_is_a_start(tiny, tmp_path):
    """The form in which TRL and LLaMA-Factory leave theirs."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    config = LoraConfig(
        r=2, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    edit(tmp_path / "adapter_config.json", base_model_name_or_path="meta/other", later_option=1)
    ours, _ = load(tiny, init_adapter=str(tmp_path))
    torch.testing.assert_close(logits(ours), logits(model))
    document = adapters.adapter_documents(ours)["adapter_config.json"]
    assert document["base_model_name_or_path"] == str(tiny.resolve())


def adapter_without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    return "pickle"


def adapter_without_config(folder):
    (folder / "adapter_config.json").unlink()
    return "adapter_config.json is missing"


def adapter_of_another_kind(folder):
    edit(folder / "adapter_config.json", peft_type="IA3")
    return "only LORA"


def adapter_that_changed_its_base(folder):
    edit(folder / "adapter_config.json", init_lora_weights="pissa_niter_4")
    return "changes the base"


def adapter_with_fewer_tensors(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    return "1 missing"


def adapter_of_another_rank(folder):
    edit(folder / "adapter_config.json", r=8)
    return "of another shape"


def adapter_of_another_model(folder):
    edit(folder / "adapter_config.json", target_modules=["c_attn"])
    return "c_attn"


@pytest.mark.parametrize(
    "fault",
    [
        adapter_without_weights,
        adapter_without_config,
        adapter_of_another_kind,
        adapter_that_changed_its_base,
        adapter_with_fewer_tensors,
        adapter_of_another_rank,
        adapter_of_another_model,
    ],
)
def test_a_bad_adapter_is_refused_with_its_reason(trained, tiny, tmp_path, fault):
    folder = Path(shutil.copytree(trained[0], tmp_path / "adapter"))
    reason = fault(folder)
    with pytest.raises(UserError, match=reason):
        load(tiny, init_adapter=str(folder))
