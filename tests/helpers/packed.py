"""Boundaries of documents as a packed batch has them."""

from collections.abc import Sequence
from itertools import accumulate

import torch


def document_bounds(lengths: Sequence[int], pad_to: int | None = None) -> torch.Tensor:
    """(D+1,) int32: 0, l0, l0+l1, … T; T is repeated up to `pad_to` documents."""
    bounds = [0, *accumulate(lengths)]
    return torch.tensor(bounds + bounds[-1:] * ((pad_to or len(lengths)) - len(lengths))).int()
