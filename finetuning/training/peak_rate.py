"""The rule of the automatic learning rate. Without torch, as the command line and reports read it."""

from finetuning.common.formatting import two_digits

# docs/recipes.md, "Learning rate". Of the rates whose loss on general text stays within 0.5% of the base's,
# the one of the lowest held-out loss: for a hidden size of 576 that is 1e-3 at 2.5 passes over the data, and
# 3e-4 at 6.8, as what is seen more often is learned by heart. At 2,560 the exponent gives 3.1e-4: in a
# published sweep of a 4B model 3e-4 is within 0.4% of the best, and 3e-3 diverges.
HIGHEST_RATE, FEW_PASSES = 1e-3, 2.5
SMALL_HIDDEN_SIZE, EXPONENT = 576, 0.78
USUAL_HIDDEN_SIZE = 2560  # that of a 4B model, where a configuration has none that we know
ALL_WEIGHTS_SHARE = 0.1


def automatic_rate(hidden_size: int, passes: float, *, trains_all: bool) -> float:
    """Peak learning rate, of two digits.

    hidden_size: of the text model; 0: not known. passes: how often the run goes through its training data.
    trains_all: all weights, no adapters.
    """
    size = (SMALL_HIDDEN_SIZE / (hidden_size or USUAL_HIDDEN_SIZE)) ** EXPONENT
    rate = HIGHEST_RATE * min(1.0, size) * min(1.0, FEW_PASSES / passes)
    return two_digits(rate * (ALL_WEIGHTS_SHARE if trains_all else 1))
