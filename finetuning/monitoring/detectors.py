"""All detectors of trouble by name. Each takes (memory, metrics) of one logged step.

It returns a Finding while the trouble is present, None while it is not, KEEP where this step says nothing
about it.
"""

from __future__ import annotations

import functools
import re

from finetuning.monitoring import hardware_detectors, loss_detectors, model_detectors

QUIET = 10  # logged steps that a trouble must be away before it is news again

# Tags that a detector looks at.
_WATCHED = re.compile(
    r"Training/(Epoch|Loss|Gradient_Norm|Learning_Rate|Token_Accuracy)|Eval/By_Source/.+"
    r"|Training/By_(Source/|Difficulty_|Category/).+|Throughput/Tokens_Seen"
    r"|Eval/(Loss|Think_Length_Ratio|Format_Valid_Rate)|LoRA/[^/]+/Update_Ratio"
    r"|Throughput/(?:Step_)?(?:Seconds[_/])?(?:Data|Forward_Backward|Optimizer|Logging)(?:_Seconds)?"
    r"|Forgetting/(General_Loss|KL_General)"
    r"|Throughput/Straggler_Percent|Monitoring/(NonFinite_Steps|Forecast_Final_Loss_High)"
    r"|Memory/(Host_RSS_MB|Host_Percent|GPU_(Allocated_MB|Peak_MB|Total_MB|Utilization_Percent))"
    r"|GPU_\d+/(Temperature_C|Utilization_Percent)"
)


@functools.lru_cache(maxsize=10_000)
def is_watched(tag: str) -> bool:
    """Whether a detector looks at the tag; of all others it need not be told."""
    return bool(_WATCHED.fullmatch(tag))


DETECTORS = {  # in this order: a spike is compared with the losses before, a divergence takes the new one
    "Gradient_Explosion": loss_detectors.gradient_explosion,
    "Loss_Spike": loss_detectors.loss_spike,
    "NonFinite": loss_detectors.non_finite,
    "Divergence": loss_detectors.divergence,
    "Stagnation": loss_detectors.stagnation,
    "Memory_Leak": hardware_detectors.memory_leak,
    "GPU_Overheat": hardware_detectors.gpu_overheat,
    "Data_Starvation": hardware_detectors.data_starvation,
    "Low_GPU_Utilization": hardware_detectors.low_gpu_utilization,
    "OOM_Risk": hardware_detectors.oom_risk,
    "Thinking_Collapse": model_detectors.thinking_collapse,
    "Overfitting": model_detectors.overfitting,
    "Slow_Rank": hardware_detectors.slow_rank,
    "Saturation": model_detectors.saturation,
    "Forgetting": model_detectors.forgetting,
    "Source_Regression": model_detectors.source_regression,
    "Dead_Adapter": model_detectors.dead_adapter,
    "Clipping": loss_detectors.clipping,
}
