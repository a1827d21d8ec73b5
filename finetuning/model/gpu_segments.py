"""A GPU's memory in segments that grow, so that what was freed in one size serves another."""

import os

import torch

SETTINGS = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
)  # a user's own
TRIED_BYTES = 2**25


def let_segments_grow(device: torch.device) -> bool:
    """Have torch's allocator do so from now on, where this GPU can; false where all stays as it is.

    WSL, virtual and embedded GPUs know no such segments, and the first allocation fails there: it is made
    here. Who has set the allocator has set all of it.
    """
    if device.type != "cuda" or torch.version.hip or any(map(os.environ.get, SETTINGS)):
        return False
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        torch.empty(TRIED_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        return False
    return True
