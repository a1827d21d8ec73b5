"""The rule of the automatic learning rate. Without torch, as the command line and reports read it."""

from finetuning.common.formatting import two_digits

# docs/recipes.md, "Learning rate". The lower of two limits, both times 1e-3 for a hidden size of 576. Above
# one the model forgets general text: by trials of 300 to 2,000 tokens an update. Above the other it learns
# samples by heart: seen often, or in small updates. At 2,560 the exponent gives 3.1e-4: in a published sweep
# of a 4B model 3e-4 is within 0.4% of the best, and 3e-3 diverges.
SMALL_MODEL_RATE, SMALL_HIDDEN_SIZE, EXPONENT = 1e-3, 576, 0.78
USUAL_TOKENS, MOST_SHARE = 2000, 2.0  # more were not tried, nor were fewer with a large model
FEW_PASSES, LEAST_SHARE = 3.5, 0.1  # beyond the passes that we have tried the rate stays
USUAL_HIDDEN_SIZE = 2560  # that of a 4B model, where a configuration has none that we know
ALL_WEIGHTS_SHARE = 0.1


def automatic_rate(
    hidden_size: int, passes: float, tokens_per_update: float, *, trains_all: bool
) -> float:
    """Peak learning rate, of two digits.

    hidden_size: of the text model; 0: not known. passes: how often the run shows a sample, on the mean.
    tokens_per_update: of all ranks. trains_all: all weights, no adapters.
    """
    size = (SMALL_HIDDEN_SIZE / (hidden_size or USUAL_HIDDEN_SIZE)) ** EXPONENT
    by_heart = max(LEAST_SHARE, _by_heart(passes, tokens_per_update))
    share = min(_forgetting(tokens_per_update), by_heart)
    rate = SMALL_MODEL_RATE * min(1.0, size) * share
    return two_digits(rate * (ALL_WEIGHTS_SHARE if trains_all else 1))


def more_teaches(passes: float, tokens_per_update: float) -> bool:
    """Whether further passes would not lower the rate."""
    return _by_heart(passes, tokens_per_update) > _forgetting(tokens_per_update)


def _forgetting(tokens_per_update: float) -> float:
    return min(MOST_SHARE, max(1.0, (USUAL_TOKENS / tokens_per_update) ** 0.7))


def _by_heart(passes: float, tokens_per_update: float) -> float:
    return (FEW_PASSES / passes) ** 1.5 * (tokens_per_update / USUAL_TOKENS) ** 0.5
