"""What to do about an alert, with the run's own settings in it, and what would end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from finetuning.common.formatting import four_digits, two_digits
from finetuning.monitoring.detector_memory import Finding

ADVICE = {
    "Gradient_Explosion": "Look at the samples of this step. If there are more of them, lower the learning "
    "rate{rate} or lengthen the warm-up{warmup}, and keep max_grad_norm at 1.0 or less{clip}.",
    "Loss_Spike": "Look at the samples of this step for broken or foreign text. If spikes repeat, "
    "lower the learning rate{rate} or shuffle the data better.",
    "NonFinite": "Look at the samples of this step and at the precision{precision}: use bf16 or fp32, not "
    "fp16. If it goes on, lower the learning rate{rate} and resume from the last checkpoint.",
    "Stagnation": "Check that the targets are not masked away (Dataset/Mask_Audit) and that the adapter gets "
    "gradients. Then raise the learning rate{faster} or lora_r{rank}.",
    "Divergence": "Stop, resume from the checkpoint before the rise and lower the learning rate "
    "by a factor of 2 to 5{rate}.",
    "Memory_Leak": "Something keeps objects from step to step. Look for tensors kept with their "
    "graph (use .item() or .detach()) and for growing lists or caches in the data reader.",
    "GPU_Overheat": "Check fans, air flow and dust, or lower the power limit "
    "(nvidia-smi -pl WATTS).",
    "Low_GPU_Utilization": "The named phase holds the GPU up. data: put the cache on a fast "
    "local disk (--cache-dir); logging: log less often; forward_backward: larger batches{batch} or packing.",
    "OOM_Risk": "Lower the tokens per micro-batch{batch} or max_seq_length{length}, or turn on gradient "
    "checkpointing; raise the accumulation to keep the batch.",
    "Data_Starvation": "The GPU waits for data, which come from the cache: put that on a fast local disk "
    "(--cache-dir), and keep processors free of other work.",
    "Thinking_Collapse": "The model stops thinking or closing its thought. Stop, go back to the "
    "checkpoint before, and check that the data holds full reasoning and </think>.",
    "Overfitting": "Stop here and keep the checkpoint with the lowest held-out loss. Fewer epochs{epochs}, "
    "more data or dropout{dropout} help.",
    "Slow_Rank": "One rank holds up all others. Compare temperature, clocks and other processes "
    "of its GPU, and its share of long samples.",
    "Saturation": "The training data are learned by heart; more steps on them teach nothing. Stop, take "
    "fewer epochs{epochs} or more data.",
    "Forgetting": "The model answers general questions worse than its base. Lower the learning rate{rate}, "
    "train fewer epochs{epochs}, hold adapters to their base with kl_anchor{anchor}, or mix general data in "
    "(--data-path, --data-weights).",
    "Source_Regression": "Look at the samples of this source: they may contradict the others, or be damaged. "
    "Leave it out or weigh it (--data-weights), and compare the two runs.",
    "Dead_Adapter": "These adapters do not learn. Check --target-modules and that their layers are used by "
    "this model; a frozen group can be left out.",
    "Clipping": "The clipping, not the gradient, sets the size of each step. Raise max_grad_norm{clip} to "
    "the usual norm, or lengthen the warm-up{warmup}.",
}
ENDS = {  # of what the value is; it ends on the other side of the threshold
    "Gradient_Explosion": "the gradient norm is below",
    "Loss_Spike": "the loss is below",
    "Divergence": "the smoothed loss is below",
    "Memory_Leak": "the growth stops, or is below (MB)",
    "GPU_Overheat": "the temperature is below 80 °C; it began at",
    "Low_GPU_Utilization": "the GPU is busy for more than (%)",
    "OOM_Risk": "the memory in use is 3 points below (%)",
    "Data_Starvation": "data take less than this share of a step:",
    "Overfitting": "the held-out loss is below",
    "Slow_Rank": "the slowest rank is behind by less than (%)",
    "Saturation": "one of ten logged accuracies is below",
    "Forgetting": "the loss on general text is below",
    "Source_Regression": "the rise of this source's loss is below",
    "Dead_Adapter": "each group's update ratio is above",
    "Clipping": "the usual norm is below this many times the limit:",
}


def advice(name: str, settings: Mapping) -> str:
    """What to do about an alert, with the run's settings where they are known."""
    return ADVICE[name].format_map({place: text(settings) for place, text in PLACES.items()})


def ending(name: str, finding: Finding) -> str:
    """What would end it, in one sentence."""
    form = finding.evidence.get("form") or finding.evidence.get("metric")
    what = {
        "NonFinite": "the next finite step",
        "Stagnation": "a lower smoothed loss",
        "Thinking_Collapse": f"{form} at or above {four_digits(finding.threshold)}",
    }
    if name in what:
        return f"It ends with {what[name]}."
    return f"It ends when {ENDS[name]} {four_digits(finding.threshold)}."


def _setting(
    name: str,
    change: Callable[[float], float] | None = None,
    needs: Callable[[Mapping], bool] | None = None,
    with_it: str = "",
) -> Callable[[Mapping], str]:
    """ " (it is VALUE)", or " (it is VALUE; try --name CHANGED)"; nothing where the setting is not known.

    Nothing is suggested where that is what it is already, or where the other settings do not have what it
    `needs`. with_it: what else the command then says.
    """

    def text(settings: Mapping) -> str:
        value = settings.get(name)
        if value is None or value == "":
            return ""
        shown, other = _shown(value), None
        if change and isinstance(value, (int, float)) and (needs is None or needs(settings)):
            other = _shown(_rounded(change(value)))
        more = (
            f"; try --{name.replace('_', '-')} {other}{with_it}"
            if other not in (None, shown)
            else ""
        )
        return f" (it is {shown}{more})"

    return text


def _rounded(value: float) -> float:
    """Two digits of a float; an integer as it is."""
    return value if isinstance(value, int) else two_digits(value)


def _shown(value: object) -> str:
    """A setting as it is written: floats shortly, integers and words whole."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _more(share: float) -> float:
    """Twice a share of a whole, 0.05 at least; no further than one half."""
    return max(share, min(0.5, max(2 * share, 0.05)))


def _has_adapters(settings: Mapping) -> bool:
    return settings.get("lora_r") != 0


def _length(settings: Mapping) -> str:
    """The setting that decides how long a run is: --max-steps where it is given; with the learning rate,
    where that is automatic: by the rule a shorter run has a higher one, and would teach as much."""
    steps, rate = settings.get("max_steps"), settings.get("learning_rate")
    left = "learning_rate" in settings.get("automatic", ())
    with_rate = f" --learning-rate {_shown(rate)}" if left and rate else ""
    if not steps:
        return _setting(
            "num_epochs", lambda epochs: max(min(1, epochs), epochs / 2), with_it=with_rate
        )(settings)
    fewer = f"; try --max-steps {steps // 2}{with_rate}" if steps > 1 else ""
    return f" (--max-steps is {steps}{fewer})"


PLACES = {
    "rate": _setting("learning_rate", lambda rate: rate / 3),
    "faster": _setting("learning_rate", lambda rate: rate * 3),
    "warmup": _setting("warmup_ratio", _more),
    "clip": _setting("max_grad_norm"),
    "rank": _setting("lora_r", lambda rank: 2 * rank),  # all weights: twice 0 is no suggestion
    "precision": _setting("precision"),
    "batch": _setting("batch_size"),
    "length": _setting("max_seq_length"),
    "epochs": _length,
    "dropout": _setting(
        "lora_dropout",
        _more,
        needs=lambda settings: _has_adapters(settings) and settings.get("precision") != "fp8",
    ),
    "anchor": _setting("kl_anchor", lambda weight: max(2 * weight, 0.1), needs=_has_adapters),
}
