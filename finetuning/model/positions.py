"""How many tokens a model has positions for: as its configuration tells it, and as small relatives show.

Some models look positions up in a table, and its end is an error; others compute them. Nobody has to say
which, or what the setting is called.
"""

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from finetuning.config import NO_LIMIT
from finetuning.model.small_config import (
    CROSSED_POSITIONS,
    LIMIT,
    LONGEST,
    lengths_within,
    small_configs,
)

_UNUSED = 8  # positions that an architecture may leave unused, and more
Build = Callable[[Any], torch.nn.Module]  # of a small configuration; raises what it likes


def told_positions(config: Any) -> int:
    """What the configuration says, under whatever name transformers knows it by; 0: nothing."""
    text = config.get_text_config(decoder=True)
    count = getattr(text, "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else 0


def tokens_taken(config: Any, wanted: int, build: Build) -> int:
    """How many tokens of `wanted` a document may have before the positions end; 0 where no small model runs.

    Only where there is a limit on lengths so near that it may matter, something is built.
    """
    if wanted <= LIMIT or not lengths_within(config, wanted + _UNUSED):
        return wanted
    for length in [wanted, *lengths_within(config, wanted - 1)]:
        missing = LONGEST - _tokens_run(config, length, build)
        if missing < LONGEST - CROSSED_POSITIONS:  # else a shorter limit is what ends it
            return length - missing
    return 0


def _tokens_run(config: Any, longest: int, build: Build) -> int:
    """How many tokens of LONGEST the first small model takes that takes any."""
    with suppress(ValueError):  # no smaller numbers fit each other: none
        for small in small_configs(config, longest, NO_LIMIT):
            with suppress(
                Exception
            ):  # libraries raise anything where numbers do not fit each other
                model = build(small)
                rows = model.get_input_embeddings().weight.shape[0]
                if found := _longest_run(model, torch.full((1, LONGEST), rows // 4)):
                    return found
    return 0


@torch.no_grad()
def _longest_run(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Tokens of the longest beginning that a model reads without an error."""

    def fails(tokens: int) -> bool:
        try:
            model(input_ids=ids[:, :tokens])
        except Exception:  # of any library
            return True
        return False

    longest = ids.shape[1]
    return bisect_left(range(1, longest), True, key=fails) if fails(longest) else longest
