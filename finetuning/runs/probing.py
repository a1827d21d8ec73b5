"""Which questions a run's evaluations answer, how many, how long, how drawn, and how often."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers

from finetuning.common.distributed import Distributed
from finetuning.common.fingerprint import weight_files
from finetuning.config import DirectTrainingConfig
from finetuning.data.packing import StepPlan
from finetuning.data.training_data import DataPart, general_part
from finetuning.evaluation.generation import (
    CPU_BUDGET,
    CPU_PROBES,
    CPU_SIZE,
    FEW_PROBES,
    GPU_PROBES,
    WARM,
    EvalPrompt,
    choose_probes,
    token_budget,
)
from finetuning.model.sampling import Sampling

ENOUGH_JUDGED = 16  # answers of an evaluation from which on they choose: large differences show


@dataclass(frozen=True)
class Probing:
    """The questions, the tokens of an answer at most, how they are chosen, and whether every evaluation asks
    or only the first and the last."""

    probes: tuple[EvalPrompt, ...]
    most: int
    sampling: Sampling
    always: bool = True
    source: str = ""  # digest of the user's own questions; empty: held-out ones

    @property
    def warmth(self) -> float:
        """The temperature."""
        return self.sampling.temperature

    def only_at(self, steps: StepPlan) -> tuple[int, ...]:
        """The steps whose evaluations ask; empty: all do."""
        return () if self.always else (0, steps.num_steps)

    def settings(self, best_by: str) -> dict[str, int | float | str]:
        """As they are used."""
        own = {"num_probes": len(self.probes), "probe_temperature": self.warmth}
        return own | {"best_by": self.best_by(best_by)}

    @property
    def judged(self) -> int:
        """Answers that are judged for certain, as their references fit."""
        return sum(probe.reference_tokens <= self.most for probe in self.probes)

    def best_by(self, wanted: str) -> str:
        """loss or answers, by which a model is the best."""
        enough = self.always and self.judged >= ENOUGH_JUDGED
        return wanted if wanted != "auto" else "answers" if enough else "loss"

    def best_text(self, wanted: str, held_out: int) -> str:
        """The same for a person, with the reason where that was left to the program. held_out: samples."""
        if not held_out and self.best_by(wanted) == "loss":
            return "none, as no sample is held out"
        by = {"loss": "held-out loss", "answers": "answers"}[self.best_by(wanted)]
        if wanted != "auto":
            return f"by {by}"
        few = "" if self.always else ", as not every evaluation asks"
        few = few or f", as fewer than {ENOUGH_JUDGED} answers are judged"
        return f"by {by} (auto{few * (self.best_by(wanted) == 'loss')})"

    def doubts(self, config: DirectTrainingConfig, held_out: int) -> Iterator[str]:
        """Why no model may turn out to be the best, so that early stopping waits in vain.

        held_out: how many samples are.
        """
        by, known = self.best_by(config.best_by), bool(config.early_stopping_patience)
        if by == "loss" and not held_out and (known or config.best_by == "loss"):
            yield (
                "no sample is held out, so no loss says which model is the best, and early stopping never "
                "ends the run; hold some out, or name questions with --probe-path and --best-by answers"
            )
        if by == "answers" and not self.judged:
            yield (
                f"every reference is longer than the {self.most:,} tokens of an answer, so answers that are "
                "cut are not judged and an evaluation may not count; raise --probe-max-new-tokens, or use "
                "--best-by loss"
            )

    def text(self) -> str:
        """For a person."""
        if not self.probes:
            return "none"
        how = f"drawn at temperature {self.warmth:g}" if self.warmth else "greedy"
        often = "every evaluation" if self.always else "the first and the last evaluation only"
        return f"{len(self.probes)} of {self.most:,} tokens at most, {how}, at {often}"


def plan_probes(
    config: DirectTrainingConfig,
    folder: Path,
    tokenizer: transformers.PreTrainedTokenizerBase,
    held_out: DataPart,
    dist: Distributed,
    warn: Callable[[str], None],
    positions: int,
) -> Probing:
    """The questions, held out or the user's own. folder: of the model, whose size decides their number;
    positions: tokens that a question and its answer may have together.

    A CPU asks what its tokens suffice for: references that fit, where the user has set no length.
    """
    part = held_out
    if config.probe_path:
        options = {"positions": positions, "cache_dir": config.cache_path}
        paths, option = config.probe_path, "--probe-path"
        part = general_part(paths, tokenizer, config, warn, option=option, **options)
    on_cpu, wanted = dist.device.type == "cpu", config.probe_max_new_tokens
    count = number_of_probes(folder, dist) if config.num_probes == "auto" else config.num_probes
    fitting = CPU_BUDGET if on_cpu and not wanted else 0
    chosen = choose_probes(part, tokenizer, count, fitting)
    probes = tuple(probe for probe in chosen if len(probe.prompt) < positions)
    warmth = config.probe_temperature
    if warmth == "auto":
        warmth = WARM if held_out.tokens.close_id >= 0 else 0.0
    longest = max((len(probe.prompt) for probe in probes), default=0)
    most = min(token_budget(probes, wanted, dist.device), positions - longest)
    if wanted > most > 0:
        warn(
            f"answers have {most:,} tokens at most, as questions have up to {longest:,} and the model takes "
            f"{positions:,}"
        )
    source = part.fingerprint() if config.probe_path and probes else ""
    return Probing(probes, most, Sampling(warmth, config.seed), source=source)


def number_of_probes(folder: Path, dist: Distributed) -> int:
    """How many the device can answer at once."""
    if dist.device.type != "cpu":
        return GPU_PROBES
    size = sum(file.stat().st_size for file in weight_files(folder) if file.is_file())
    return CPU_PROBES if size <= CPU_SIZE else FEW_PROBES
