"""How the model of a run would lie on a device, as far as settings decide it."""

import torch

from finetuning.common.distributed import Distributed
from finetuning.config import DirectTrainingConfig
from finetuning.training.memory_estimate import Placement


def placement_of(
    config: DirectTrainingConfig,
    dist: Distributed,
    dtype: torch.dtype,
    *,
    compiled: bool,
    parallel: str,
) -> Placement:
    """How the model would lie on this rank's device."""
    plain = not (config.lora_dropout or config.use_dora or config.quantization != "none")
    return Placement(
        dist.device.type,
        dtype.itemsize,
        quantized=config.quantization != "none",
        compiled=compiled,
        fused_lora=plain or not config.lora_r,
        shards=dist.world_size if parallel == "fsdp" else 1,
        fp8=config.precision == "fp8",
        base_head=config.forgetting and not (config.lora_r or config.init_adapter),
        anchored=bool(config.kl_anchor),
        captured=compiled
        and plain
        and not config.kl_anchor
        and parallel == "ddp"
        and dist.world_size == 1,
    )
