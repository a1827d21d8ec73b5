"""Which token comes next: the most probable one, or one that is drawn by temperature and top-p.

The numbers that decide come from a seed before the first token, on the host. So the same scores give the same
tokens on every rank, in every session and by every way of writing, and no other generator is touched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Chooser = Callable[[torch.Tensor, int], torch.Tensor]  # scores (B, V) of the n-th new token -> (B,)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: greedily, and the others are of no meaning."""

    temperature: float = 0.0
    seed: int = 0
    top_p: float = 0.95

    def chooser(self, rows: int, most: int, device: torch.device) -> Chooser:
        """A function for answers of `rows` rows and `most` tokens."""
        if not self.temperature:
            return lambda scores, place: scores.argmax(1)
        generator = torch.Generator().manual_seed(self.seed)
        numbers = torch.rand(most, rows, generator=generator, dtype=torch.float64).to(device)
        return lambda scores, place: self._drawn(scores, numbers[place])

    def _drawn(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Of the most probable tokens that together reach `top_p`, the one in which `numbers` (B,) fall."""
        likely, tokens = (scores.float() / self.temperature).softmax(1).sort(1, descending=True)
        sums = likely.cumsum(1)
        kept = (sums - likely < self.top_p).sum(1, keepdim=True).clamp(min=1)
        wanted = numbers.float()[:, None] * sums.gather(1, kept - 1)
        place = (sums <= wanted).sum(1, keepdim=True)
        drawn = tokens.gather(1, place.minimum(kept - 1))[:, 0]
        # A NaN or an infinite score leaves no probabilities: then as without a temperature. The host does not
        # ask, for it would wait for the GPU.
        return torch.where(sums[:, -1].isfinite(), drawn, scores.argmax(1))


GREEDILY = Sampling()
