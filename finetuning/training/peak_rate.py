"""The peak learning rate of a run: as set, or the program's own rule. Without torch, as reports read it."""

from finetuning.config import OptimizerSettings

# The automatic rate, from docs/recipes.md: KL on general text grows with the rate and the number of updates,
# whatever the data are; of a run's rates with a KL of up to 0.4 this one had the lowest held-out loss.
USUAL_RATE, USUAL_UPDATES, HIGHEST_RATE = 3e-4, 150, 1e-3
ALL_WEIGHTS_SHARE = 0.1


def peak_rate(settings: OptimizerSettings, num_steps: int, *, trains_all: bool) -> float:
    """The learning rate as set, or the automatic one for so many updates."""
    if settings.learning_rate != "auto":
        return settings.learning_rate
    rate = USUAL_RATE * max(1.0, USUAL_UPDATES / num_steps)
    return min(rate, HIGHEST_RATE) * (ALL_WEIGHTS_SHARE if trains_all else 1)
