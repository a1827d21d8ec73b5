"""Bytes on the device at the peak of a training step, before weights are loaded."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning.common.errors import UserError
from finetuning.common.fingerprint import weight_files
from finetuning.common.machine import available_memory
from finetuning.common.text import clean_line
from finetuning.config import LoraSettings
from finetuning.model.adapters import attach_adapters
from finetuning.model.flops import ModelDims, dims_of
from finetuning.model.loading import separate_layers
from finetuning.model.loss import compared_rows_per_chunk, rows_per_chunk
from finetuning.model.sizes import check_count

FP32 = 4  # bytes
BITS_4 = 0.516  # bytes a weight in NF4: half a byte, and its doubly quantised scales
USABLE = 0.92  # of the free memory; the rest goes to fragmentation and what the estimate leaves out

# What the library raises for a configuration of which it can't make a model.
_UNBUILDABLE = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
)
HOST_LAYERS = 3  # layers' activations that glibc's malloc holds in gaps no tensor fits into
HOST_LIBRARIES = 40 * 2**20  # bytes that libraries take with their first products

# -----------------------------------------------------------------------------
# The model, not loaded


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model and its adapters; numbers of weights, shared ones once."""

    dims: ModelDims | None  # None: an architecture whose activations are not known here
    parameters: int
    linear_parameters: int  # those that 4-bit quantisation packs
    trainable: int  # of the adapters; all of them at lora_r 0
    lora: bool
    attention: str = "sdpa"  # what transformers chooses for the class; "eager" keeps all scores
    layers: int = 1  # that can be recomputed one by one; 1: all of them or none

    @property
    def total(self) -> int:
        """With the adapters."""
        return self.parameters + (self.trainable if self.lora else 0)

    @property
    def lora_weights(self) -> int | None:
        """As `training_flops` takes it."""
        return self.trainable if self.lora else None


def model_shape(
    folder: Path, lora: LoraSettings, *, init_adapter: str = "", trust_remote_code: bool = False
) -> ModelShape:
    """Build the model of `folder` and its adapters on the meta device, without weights, and count.

    Raises UserError for an architecture that is not known and for adapters that do not fit it.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _UNBUILDABLE as error:
        raise UserError(
            f"model folder {folder}: its architecture can't be built ({clean_line(str(error), 200)}); "
            "check that this version of transformers knows it"
        ) from error
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    dims, parameters = dims_of(model), sum(p.numel() for p in model.parameters())
    files = [file for file in weight_files(folder) if file.is_file()]
    if files:  # a benchmark may ask about a model of which only the configuration is here
        check_count(parameters, folder, files)
    trainable = parameters
    if init_adapter:
        trainable = adapter_size(Path(os.path.expanduser(init_adapter)))
    elif lora.lora_r:
        with torch.device("meta"):
            adapted = attach_adapters(model, lora, str(folder), seed=0)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return ModelShape(
        dims=dims,
        parameters=parameters,
        linear_parameters=linear,
        trainable=trainable,
        lora=bool(lora.lora_r),
        attention=model.config._attn_implementation,
        layers=len(separate_layers(model)),
    )


def adapter_size(folder: Path) -> int:
    """Number of weights in a saved adapter, read from its header. Raises UserError."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"init_adapter {folder}: {path.name} can't be read ({clean_line(str(error), 200)}); give the "
            "folder of an adapter saved as safetensors"
        ) from error


# -----------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class Placement:
    """How the model lies on the device."""

    device_type: str
    dtype_bytes: int  # of frozen weights, gathered ones and activations
    quantized: bool = False
    compiled: bool = False
    fused_lora: bool = True  # adapters with one autograd node each
    shards: int = 1  # devices that share the weights
    fp8: bool = False  # linear layers lie beside two copies of one byte a weight
    base_head: bool = (
        False  # a copy of the head as it was, to which a model trained whole is compared
    )
    anchored: bool = False  # every micro-batch also goes through the base, for kl_anchor
    captured: bool = False  # a CUDA graph holds the memory of a step's passes between steps


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step, which is in the loss or in the backward pass after it."""

    weights: float
    gathered: float  # from other ranks, for a while
    adapter: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass
    logits: float  # in the loss
    workspace: float  # in the backward pass
    allocator: float
    evaluation: float = 0.0  # beside what a CUDA graph holds

    @property
    def total(self) -> float:
        """All of it, but of logits and workspace the larger one."""
        return sum(vars(self).values()) - min(self.logits, self.workspace)


def estimate_memory(
    shape: ModelShape, placement: Placement, tokens: int, *, recomputed: int
) -> MemoryEstimate | None:
    """Peak of a step with `tokens` in a micro-batch; None for an unknown architecture.

    What is trained is fp32, adapters or at lora_r 0 all weights: 4 bytes each for weight and gradient, 8
    for AdamW's moments. Shards, and all weights trained in bf16 on one device too, gather what is outside
    the layers, and two layers; if they are trained, with their gradients. Activations: `activation_bytes`
    per token and layer; of the first `recomputed` layers only the input, and all of one while it is
    recomputed: layers behind have let go of theirs by then, so that this counts only where there are none.
    An evaluation uses the memory of the passes again, unless a CUDA graph holds that. A GPU's
    allocator has its share of the memory left free (`USABLE`); a host's malloc is part of the estimate.
    """
    dims, size = shape.dims, placement.dtype_bytes
    if dims is None:
        return None
    packed = shape.linear_parameters if placement.quantized else 0
    adapters = shape.trainable if shape.lora else 0
    held = size if shape.lora else FP32
    mixed = held > size
    layer, on_host = activation_bytes(dims, placement), placement.device_type == "cpu"
    share = recomputed / shape.layers
    kept = dims.layers * (share * dims.hidden * size + (1 - share) * layer)
    outside = shape.parameters - shape.linear_parameters
    in_flight = (size if shape.lora else 2 * size) * (
        outside + 2 * shape.linear_parameters / dims.layers
    )
    logits = _logits_bytes(shape, placement, tokens)
    workspace = _workspace_bytes(shape, placement, tokens)
    return MemoryEstimate(
        weights=(packed * BITS_4 + (shape.parameters - packed) * held) / placement.shards
        + placement.fp8 * 2 * shape.linear_parameters
        + placement.base_head * dims.vocab * dims.hidden * size,
        gathered=in_flight if placement.shards > 1 or mixed else 0,
        adapter=adapters * FP32 / placement.shards,
        gradients=shape.trainable * FP32 / placement.shards,
        optimizer=2 * shape.trainable * FP32 / placement.shards,
        activations=tokens * kept,
        logits=logits,
        workspace=workspace + (recomputed == shape.layers) * tokens * layer,
        evaluation=placement.captured * max(logits, workspace),
        allocator=tokens * HOST_LAYERS * layer + HOST_LIBRARIES if on_host else 0,
    )


def activation_bytes(dims: ModelDims, placement: Placement) -> int:
    """What one layer keeps of a token for its backward pass.

    With H hidden, Q and K the widths of queries and keys, I of the MLP, b bytes an element. Eager: both
    residuals and the queries and keys before their norms in fp32, 4(2H + Q + K); two norm outputs,
    queries, keys, values, attention output and four widths of the MLP, b(2H + 2Q + 2K + 4I). The CPU's
    attention gives its output document by document, so that it is copied once more, Q. Compiled: norms
    and the product of the MLP are recomputed, b(2H + 3Q + 3K + 2I). Adapters that are not fused keep, unless
    the base is fp32, a copy of each linear layer's input in fp32, 4(5H + Q + I), and eager ones not the
    input itself, b(2H + I); compiled ones over 4-bit weights make that copy again (measured: peak 9.43 GiB
    for Qwen3-4B and 2,048 tokens, 9.37 by this with chunks of logits of 1 GiB). Qwen3-4B in bf16: 146 and
    78 KiB, and 75 more where adapters are not fused.
    """
    hidden, mlp = dims.hidden, dims.intermediate
    queries, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    size = placement.dtype_bytes
    if placement.compiled:
        kept = size * (2 * hidden + 3 * queries + 3 * keys + 2 * mlp)
    else:
        attention = 2 * queries + 2 * keys + (placement.device_type == "cpu") * queries
        kept = FP32 * (2 * hidden + queries + keys)
        kept += size * (2 * hidden + attention + 4 * mlp)
    copied = not placement.fused_lora and not (placement.compiled and placement.quantized)
    if copied and size < FP32:
        kept += FP32 * (5 * hidden + queries + mlp)
        kept -= 0 if placement.compiled else size * (2 * hidden + mlp)
    return kept


def _logits_bytes(shape: ModelShape, placement: Placement, tokens: int) -> int:
    """A chunk of logits, fp32, and off CUDA one of probabilities; the head's gradient if it is trained.

    Anchored: the base's logits and probabilities beside them, and its states at all targets.
    """
    vocab, hidden, anchored = shape.dims.vocab, shape.dims.hidden, placement.anchored
    most = (compared_rows_per_chunk if anchored else rows_per_chunk)(vocab, placement.device_type)
    tensors = (1 if placement.device_type == "cuda" else 2) + 2 * anchored
    head = 0 if shape.lora else vocab * hidden * FP32
    states = anchored * tokens * hidden * placement.dtype_bytes
    return min(most, tokens) * vocab * tensors * FP32 + head + states


def _workspace_bytes(shape: ModelShape, placement: Placement, tokens: int) -> int:
    """Gradients in flight: three widths of the MLP and four hidden states; adapters cast to bf16."""
    dims, size = shape.dims, placement.dtype_bytes
    casts = shape.trainable * size if shape.lora and size < FP32 else 0
    return tokens * size * (3 * dims.intermediate + 4 * dims.hidden) + casts


def free_memory(device: torch.device, ranks: int = 1) -> int:
    """Bytes that this process can still take: of its GPU, else of the host and its limits, which it
    shares with the other `ranks` there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // ranks


def largest_batch(
    total: Callable[[int], float], free: float, limit: int, *, usable: float = USABLE
) -> int:
    """The most rows up to `limit` whose `total(rows)`, which rises, stays within the free memory."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total(middle) <= usable * free else (low, middle - 1)
    return low
