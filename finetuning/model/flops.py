"""Arithmetic of a model: its dimensions, the FLOPs of training and the peak of a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ModelDims:
    """Shape of a dense decoder with grouped-query attention and a gated MLP (Qwen3, Llama, …)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear maps of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def linear_parameters(self) -> int:
        """Weights of all layers' linear maps; embedding and head apart."""
        return self.layers * sum(i * o for i, o in self.linear_shapes().values())


def dims_from_config(config: object) -> ModelDims | None:
    """From a Hugging Face model config; None for a model this count does not fit (MoE, GPT-2, …)."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    known = all(isinstance(getattr(config, name, None), int) for name in (*names, "vocab_size"))
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if not known or any(getattr(config, name, None) for name in experts):
        return None
    heads = config.num_attention_heads
    return ModelDims(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
    )


def dims_of(model: torch.nn.Module) -> ModelDims | None:
    """Of a model, with or without adapters; None also where its linear layers have other numbers of weights
    than the count gives, as with linear attention or an MLP without a gate."""
    dims, head = dims_from_config(model.config), model.get_output_embeddings()
    weights = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
    )
    return dims if dims and weights == dims.linear_parameters() else None


def lora_parameters(dims: ModelDims, r: int, targets: Sequence[str] | str = "all-linear") -> int:
    """Weights of rank-r adapters on the named linear maps of every layer ("all-linear": all)."""
    shapes = dims.linear_shapes()
    names = shapes if targets == "all-linear" else targets
    return dims.layers * r * sum(sum(shapes[name]) for name in names)


def training_flops(
    dims: ModelDims, lengths: Sequence[int], num_targets: int, *, lora_weights: int | None
) -> int:
    """Model FLOPs of forward and backward over documents of these lengths, one attention each.

    `num_targets`: labelled positions, the only ones the head is computed for. `lora_weights`:
    number of adapter weights over a frozen base (`lora_parameters`); None: all weights are trained.

    A multiply-add is 2. Per token and weight: forward 2, gradient of the input 2, gradient of the
    weight 2 if it is trained; so frozen weights cost 4 and trained ones 6 (the count of Kaplan et
    al. 2020, arXiv 2001.08361, less what LoRA skips). Attention: QKᵀ and PV over the causal half,
    2·heads·head_dim·length² forward and twice that backward, per layer.
    """
    per_weight = 6 if lora_weights is None else 4
    lengths = [int(length) for length in lengths]  # numpy's own integers would overflow
    tokens, square = sum(lengths), sum(length**2 for length in lengths)
    linear = per_weight * dims.linear_parameters() * tokens
    adapters = 6 * (lora_weights or 0) * tokens
    head = per_weight * dims.hidden * dims.vocab * int(num_targets)
    attention = 6 * dims.heads * dims.head_dim * square * dims.layers
    return linear + adapters + head + attention


def forward_flops(
    dims: ModelDims, lengths: Sequence[int], num_targets: int, *, lora_weights: int = 0
) -> int:
    """FLOPs of the forward pass alone, counted as in `training_flops`: 2 a weight and token, adapters'
    too. lora_weights 0: of the base."""
    lengths = [int(length) for length in lengths]
    tokens, square = sum(lengths), sum(length**2 for length in lengths)
    weights = (dims.linear_parameters() + lora_weights) * tokens
    head = dims.hidden * dims.vocab * int(num_targets)
    attention = dims.heads * dims.head_dim * square * dims.layers
    return 2 * (weights + head + attention)


# Dense tensor-core peak in TFLOP/s, bf16 with fp32 accumulation (fp16 where a GPU has no bf16: V100,
# T4), from NVIDIA's data sheets (the figures "with sparsity" halved). The pattern must fit the whole
# name, so a laptop chip, a vGPU or a MIG instance of a listed board is unknown, as it must be.
_SIZE = r"(?:[ -]\d+GB)?"
_PEAKS = (
    (rf"GB200{_SIZE}", 2500),
    (rf"B200{_SIZE}", 2250),
    (rf"(?:H[128]00|GH200)(?: SXM\d?)?{_SIZE}(?: HBM3e?)", 989.4),
    (rf"(?:H200|H800|GH200){_SIZE}", 989.4),
    (rf"H[12]00 NVL{_SIZE}", 835.5),
    (rf"H[18]00{_SIZE}(?:[ -]PCIe)", 756),
    (rf"H20{_SIZE}(?: HBM3e?)?|H20-3e", 148),
    (rf"A[18]00{_SIZE}(?:[ -](?:SXM\d?|PCIE|PCIe))?{_SIZE}", 312),
    (r"A30", 165),
    (r"A40", 149.7),
    (r"A10", 125),
    (r"A10G", 70),
    (r"L40S", 362),
    (r"L40", 181),
    (r"L4", 121),
    (rf"V100-SXM[23]{_SIZE}(?:-LS)?", 125),
    (rf"V100-PCIE{_SIZE}", 112),
    (r"T4", 65),
    (r"RTX A6000", 154.8),
    (r"RTX 6000 Ada Generation", 364.2),
    (r"RTX 3090", 71),
    (r"RTX 3090 Ti", 80),
    (r"RTX 4090", 165.2),
    (r"RTX 5090", 209.5),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s that a GPU of this name (`torch.cuda.get_device_name`) can do; None if not known."""
    name = re.sub(r"^(?:NVIDIA|Tesla|GeForce|Quadro)\s+", "", device_name.strip())
    name = re.sub(r"^(?:Tesla|GeForce)\s+", "", name)
    for pattern, teraflops in _PEAKS:
        if re.fullmatch(pattern, name):
            return teraflops * 1e12
    return None
