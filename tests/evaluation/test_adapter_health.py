"""LoRA health against dense products, plain norms and numpy's histogram.

uv run pytest tests/evaluation/test_adapter_health.py
"""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetuning.evaluation import adapter_health
from finetuning.evaluation.adapter_health import (
    AdapterHealth,
    effective_rank,
    find_lora_modules,
    ratio_map,
    update_ratios,
)
from tests.model.test_fused_lora import lora_model, loss_and_gradients


def dense_update(module) -> torch.Tensor:
    return module.scaling * module.b.detach().double() @ module.a.detach().double()


def test_ratios_and_ranks_equal_the_dense_product():
    model = lora_model()
    health = AdapterHealth(model)
    ratios, scalars = health.update_ratios(), health.scalars()
    assert len(ratios) == 14 and "layers.1.mlp.down_proj" in ratios
    for module in health.modules:
        update = dense_update(module)
        expected = (update.norm() / module.base.weight.double().norm()).item()
        assert ratios[module.name] == pytest.approx(expected, rel=1e-4)
        assert scalars[f"LoRA/{module.name}/Update_Ratio"] == pytest.approx(expected, rel=1e-4)
        rank = effective_rank(torch.linalg.svdvals(update).numpy())
        assert scalars[f"LoRA/{module.name}/Effective_Rank"] == pytest.approx(rank, rel=1e-4)
        assert 1 < rank <= 4
    assert update_ratios(model) == ratios


def test_zero_at_the_start():
    health = AdapterHealth(lora_model(random_b=False))
    assert set(health.update_ratios().values()) == {0.0}
    assert not any("Effective_Rank" in tag for tag in health.scalars())


def test_a_rank_one_update_has_effective_rank_one():
    model = lora_model()
    for module in find_lora_modules(model):
        column = torch.randn(len(module.b), 1)
        module.b.data = column @ torch.randn(1, module.b.shape[1])
    ranks = [v for tag, v in AdapterHealth(model).scalars().items() if "Effective_Rank" in tag]
    assert len(ranks) == 14
    assert ranks == pytest.approx([1.0] * 14, rel=1e-4)


def test_ranks_and_scaling_that_differ_by_module():
    model = lora_model(rank_pattern={"q_proj": 2, "up_proj": 6}, alpha_pattern={"o_proj": 3})
    health = AdapterHealth(model)
    for module in health.modules:
        expected = (dense_update(module).norm() / module.base.weight.norm()).item()
        assert health.update_ratios()[module.name] == pytest.approx(expected, rel=1e-4)
    assert {len(module.a) for module in health.modules} == {2, 4, 6}


def test_effective_rank_of_known_values():
    assert effective_rank(np.ones(5)) == pytest.approx(5)
    assert effective_rank(np.array([3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    assert effective_rank(np.zeros(3)) is None


def test_gradient_norms():
    model = lora_model()
    health = AdapterHealth(model)
    assert health.gradient_norms() == {}
    _, gradients = loss_and_gradients(model)
    norms = health.gradient_norms()
    total = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    assert norms["LoRA/Gradient_Norm"] == pytest.approx(total, rel=1e-5)
    for module in health.modules:
        expected = math.hypot(module.a.grad.norm(), module.b.grad.norm())
        assert norms[f"LoRA/{module.name}/Gradient_Norm"] == pytest.approx(expected, rel=1e-5)


def test_dora_counts_its_magnitudes():
    """The update is what peft's own merge changes; all that is trained has its share of the norms."""
    model = lora_model(use_dora=True)
    health = AdapterHealth(model)
    assert len(health.modules) == 14 and all(m.magnitude is not None for m in health.modules)
    with torch.no_grad():
        for module in health.modules:
            module.magnitude.mul_(1 + torch.rand(len(module.magnitude)))
    loss_and_gradients(model)
    norms, ratios = health.gradient_norms(), health.update_ratios()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 3 * 14
    total = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert norms["LoRA/Gradient_Norm"] == pytest.approx(total, rel=1e-5)
    module = health.modules[0]
    parts = (module.a.grad.norm(), module.b.grad.norm(), module.magnitude.grad.norm())
    expected = math.hypot(*parts)
    assert norms[f"LoRA/{module.name}/Gradient_Norm"] == pytest.approx(expected, rel=1e-5)
    before = {module.name: module.base.weight.clone() for module in health.modules}
    model.merge_adapter()
    for module in health.modules:
        change = (module.base.weight - before[module.name]).norm() / before[module.name].norm()
        assert ratios[module.name] == pytest.approx(change.item(), rel=1e-4)
        plain = dense_update(module).norm() / before[module.name].norm()
        assert abs(ratios[module.name] - plain) > 0.05 * plain


def test_dora_changes_nothing_at_the_start():
    ratios = AdapterHealth(lora_model(use_dora=True, random_b=False)).update_ratios()
    assert len(ratios) == 14 and max(ratios.values()) < 1e-6


def test_nan_in_an_adapter_stays_visible():
    model = lora_model()
    health = AdapterHealth(model)
    health.modules[3].b.data[0, 0] = torch.nan
    scalars = health.scalars()
    assert math.isnan(scalars[f"LoRA/{health.names[3]}/Update_Ratio"])
    assert sum(math.isnan(v) for tag, v in scalars.items() if "Ratio" in tag) == 1


def test_ratio_map():
    model = lora_model(layers_pattern="layers", layers_to_transform=[1])
    health = AdapterHealth(model)
    ratios = health.update_ratios()
    grid, layers, projections = ratio_map(health.modules, ratios)
    assert grid.shape == (1, 7) and layers == [1] and projections[0] == "q_proj"
    for column, projection in enumerate(projections):
        (expected,) = [r for name, r in ratios.items() if name.endswith(projection)]
        assert grid[0, column] == expected
    partial = {name: r for name, r in ratios.items() if "o_proj" not in name}
    assert "o_proj" not in ratio_map(health.modules, partial)[2]


def test_histograms_equal_numpy(monkeypatch):
    monkeypatch.setattr(adapter_health, "MAX_HISTOGRAM_ELEMENTS", 300)  # several blocks
    model = lora_model(modules_to_save=["norm"])
    health = AdapterHealth(model)
    histograms = health.weight_histograms()
    assert set(histograms) == {"LoRA/A", "LoRA/B", "Model/Weights_Distribution"}
    trainable = [p.detach() for p in model.parameters() if p.requires_grad]
    values = {
        "LoRA/A": [m.a.detach() for m in health.modules],
        "LoRA/B": [m.b.detach() for m in health.modules],
        "Model/Weights_Distribution": trainable,
    }
    for tag, histogram in histograms.items():
        flat = torch.cat([p.flatten() for p in values[tag]]).double().numpy()
        expected, _ = np.histogram(flat, histogram.edges)
        assert histogram.counts.sum() == len(flat)
        # A value at a border may fall on either side in fp32.
        assert np.abs(histogram.counts - expected).sum() <= 4
        assert (np.diff(histogram.edges) > 0).all()
        assert histogram.minimum == pytest.approx(flat.min())
        assert histogram.maximum == pytest.approx(flat.max())
        assert histogram.sum == pytest.approx(flat.sum(), abs=1e-3)
        assert histogram.sum_squares == pytest.approx(np.square(flat).sum(), rel=1e-4)


def test_zero_weights_are_counted_beside_zero():
    histogram = AdapterHealth(lora_model(random_b=False)).weight_histograms()["LoRA/B"]
    (bin_index,) = np.flatnonzero(histogram.counts)
    assert histogram.edges[bin_index] <= 0 <= histogram.edges[bin_index + 1]
    assert histogram.minimum == histogram.maximum == histogram.sum == 0


def test_a_nan_weight_does_not_stop_the_histogram():
    model = lora_model()
    health = AdapterHealth(model)
    before = health.weight_histograms()["LoRA/A"].counts.sum()
    health.modules[0].a.data[0, 0] = torch.nan
    after = health.weight_histograms()["LoRA/A"]
    assert after.counts.sum() == before - 1 and math.isnan(after.maximum)


def test_the_frozen_base_is_read_once_and_never_copied():
    class Operations(TorchDispatchMode):
        def __init__(self, watched):
            super().__init__()
            self.watched, self.calls = watched, []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)]
            if any(t.data_ptr() in self.watched and t.numel() for t in tensors):
                self.calls.append(str(function))
            return function(*args, **(kwargs or {}))

    model = lora_model()
    loss_and_gradients(model)
    health = AdapterHealth(model)
    bases = {module.base.weight.data_ptr() for module in health.modules}
    readings = []
    for _ in range(2):
        with Operations(bases) as operations:
            health.scalars()
            health.gradient_norms()
            health.weight_histograms()
        readings.append({name for name in operations.calls if "detach" not in name})
    assert readings == [{"aten.linalg_vector_norm.default"}, set()]


def test_the_norm_of_a_large_weight_is_accurate():
    weight = torch.randn(4096, 2560) * 0.02
    norm = adapter_health._weight_norm(weight.to(torch.bfloat16)).item()
    assert norm == pytest.approx(weight.to(torch.bfloat16).double().norm().item(), rel=2e-5)


def test_a_model_without_adapters():
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    health = AdapterHealth(model)
    assert health.scalars() == health.gradient_norms() == health.update_ratios() == {}
    histogram = health.weight_histograms()["Model/Weights_Distribution"]
    assert histogram.counts.sum() == sum(p.numel() for p in model.parameters())


def test_wrapped_models_give_the_same_names():
    model = lora_model()
    names = AdapterHealth(model).names
    assert AdapterHealth(torch.nn.ModuleDict({"module": model})).names == names


def test_lora_on_the_head():
    model = get_peft_model(
        lora_model().unload(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    )
    health = AdapterHealth(model)
    ratios = health.update_ratios()
    assert "lm_head" in ratios and len(ratios) == 3
    assert ratio_map(health.modules, ratios)[2] == ["q_proj"]
