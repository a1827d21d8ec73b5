"""What a user can set: seven groups of settings and their checks.

A function takes the group that it reads. `DirectTrainingConfig` is all seven, so it can be handed to
each of them.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from finetuning.common.errors import UserError
from finetuning.common.paths import expanded, home_cache
from finetuning.rules import (
    ABOVE_ZERO,
    AUTO_OR_ABOVE_ZERO,
    AUTO_OR_TEMPERATURE,
    BELOW_ONE,
    FROM_ONE,
    FROM_ZERO,
    LENGTH,
    LOGGING,
    NOT_EMPTY,
    RUN_NAME,
    SHARE,
    STEPS,
    Rule,
    finite,
)

# The linear layers of a decoder block; "all-linear" means all that a model has.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Keys of alert_actions, in the order of the metric table.
ALERT_NAMES = (
    "Gradient_Explosion",
    "Loss_Spike",
    "NonFinite",
    "Stagnation",
    "Memory_Leak",
    "GPU_Overheat",
    "Low_GPU_Utilization",
    "OOM_Risk",
    "Divergence",
    "Data_Starvation",
    "Thinking_Collapse",
    "Overfitting",
    "Forgetting",
    "Slow_Rank",
    "Saturation",
    "Source_Regression",
    "Dead_Adapter",
    "Clipping",
)

# Services of `notify`.
SERVICES = ("feishu", "dingtalk", "wecom", "slack", "mail")

# What records may show of a text. Of a text that stands in neither they show nothing.
NAMES_AND_PATHS = (
    "model_name",
    "run_name",
    "revision",
    "init_adapter",
    "target_modules",
    "data_path",
    "eval_path",
    "general_path",
    "probe_path",
    "columns",
    "device",
    "output_dir",
    "cache_dir",
)
EMBEDDED = "embedded"  # name of the demonstration model
# What may hold secrets: of a command records show the program, of a channel the service, of an
# address the place.
PARTLY_SHOWN = ("alert_actions", "notify", "mirror")
# Settings in which `~` is the home directory; the paths of data are for `readers.files`.
_HOME_IS_SHORT = ("model_name", "init_adapter", "output_dir", "cache_dir", "mirror")
ROW_TOKENS = 2048  # of a row, where the length of samples is left to the program
NO_LIMIT = 2**31 - 1  # tokens
_PROGRAM = Path(__file__).parents[1]

# -----------------------------------------------------------------------------
# Checks


class _Settings:
    """Base of the groups: a value that can't be right is refused where it is set.

    A group yields the faults of its own fields; those of all groups of an object come in one UserError.
    """

    def __post_init__(self) -> None:
        for name in _HOME_IS_SHORT:
            if value := getattr(self, name, ""):
                object.__setattr__(self, name, expanded(value, name))
        groups = [kind for kind in reversed(type(self).__mro__) if "_faults" in vars(kind)]
        faults = [fault for group in groups for fault in group._faults(self)]
        faults += self._unknown_choices()
        if faults:
            raise UserError("configuration: " + "; ".join(faults))

    def _unknown_choices(self) -> Iterator[str]:
        """A fault for each field that has none of the words its type names."""
        for field_ in dataclasses.fields(self):
            choices, types = allowed_values(field_)
            if choices and not types:
                rule = Rule(lambda value, choices=choices: value in choices, either(choices))
                yield from self._breaches(rule, field_.name)

    def _breaches(self, rule: Rule, *names: str) -> Iterator[str]:
        """A fault for each of the named fields that breaks the rule."""
        for name in names:
            value = getattr(self, name)
            if not rule.holds(value):
                yield f"{name} is {value!r}, must be {rule.wanted}"


# -----------------------------------------------------------------------------
# Groups. The line below a field is its help text; 0 or empty means off.


@dataclass(frozen=True)
class ModelSettings(_Settings):
    """Which model is trained, and in which type its frozen weights are."""

    model_name: str = ""
    """Folder or hub name of a causal language model. Empty: Qwen/Qwen3-4B-Thinking-2507 where a GPU
    can hold it and its weights are at hand, else the embedded demonstration model."""
    revision: str = ""
    """Branch, tag or commit of a model of the hub; empty: its main branch."""
    init_adapter: str = ""
    """Folder of a PEFT adapter (ours, TRL's, LLaMA-Factory's) to start from; empty: a fresh one."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Type of the frozen weights and activations; auto: bf16 on CUDA, else fp32. Adapters are fp32.
    fp8: bf16 whose large products are made in FP8 in training (Hopper GPUs and later)."""
    quantization: Literal["none", "4bit"] = "none"
    """4bit: QLoRA through bitsandbytes (optional extra `qlora`)."""

    def _faults(self) -> Iterator[str]:
        name = Rule(
            lambda value: not value or re.fullmatch(r"(?!.*\.\.)[\w][\w./-]*", value),
            "the name of a branch or tag, or a commit",
        )
        yield from self._breaches(name, "revision")


@dataclass(frozen=True)
class LoraSettings(_Settings):
    """The adapters."""

    lora_r: int = 16
    """Rank of the adapters; 0: full fine-tuning."""
    lora_alpha: float = 32.0
    """Scale of the adapters: alpha / r, or alpha / sqrt(r) with rslora."""
    lora_dropout: float = 0.0
    """Dropout before the adapters, probability; above 0 the fused adapter kernel is off."""
    target_modules: tuple[str, ...] = PROJECTIONS
    """Names of the linear layers that get adapters."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name or pattern -> rank that differs from lora_r."""
    use_rslora: bool = False
    """Rank-stabilised scale (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Weight-decomposed adapters (Liu et al. 2024); slower."""

    def _faults(self) -> Iterator[str]:
        yield from self._breaches(FROM_ZERO, "lora_r")
        yield from self._breaches(BELOW_ONE, "lora_dropout")
        yield from self._breaches(Rule(ABOVE_ZERO.holds, "above 0"), "lora_alpha")
        ranks = Rule(lambda value: all(rank >= 1 for rank in value.values()), "ranks of 1 or more")
        yield from self._breaches(ranks, "rank_pattern")
        if self.lora_r:
            yield from self._breaches(NOT_EMPTY, "target_modules")


@dataclass(frozen=True)
class DataSettings(_Settings):
    """What is read, what is held out, and how samples become rows of tokens."""

    data_path: tuple[str, ...] = field(default_factory=lambda: (bundled_data(),))
    """Files, folders, globs, or datasets of the hub (hf://datasets/owner/name); not given: the Q&A that come
    with the program."""
    data_weights: tuple[float, ...] = ()
    """One weight per data_path, see data_weights_by; empty: all 1."""
    data_weights_by: Literal["samples", "tokens"] = "samples"
    """samples: 2 shows a source twice an epoch, 0.5 half of it. tokens: 0.94 0.06 takes 6% of the tokens from
    the second source; the one of the largest weight is shown once."""
    replay: float = 0.0
    """Share of the training's tokens that comes from general text of the program's own, against forgetting,
    which is then measured on other text; 0: none."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns in your files (e.g. --columns question 问题), for question, thinking, answer, system,
    input, context, options, history, tools, difficulty or messages; the others are found by their names."""
    eval_path: tuple[str, ...] = ()
    """Held-out data of your own; empty: a share of data_path is split off."""
    eval_fraction: float = 0.1
    """Share of the samples that is held out, by a hash of each sample; 0: none."""
    max_eval_samples: int = 1000
    """Samples that eval_fraction holds out at most, as each evaluation reads them all; 0: no limit."""
    max_seq_length: int | Literal["auto"] = "auto"
    """Longest sample, in tokens. auto: that of the data, 2,048 at least; where that does not fit the memory,
    what keeps 99% of the samples, or what fits."""
    tokens_per_row: int | Literal["auto"] = "auto"
    """Tokens up to which a packed row is filled; a longer sample has a row of its own. auto: 2,048, or
    max_seq_length where that is set, so that there are fewer updates, too; 0: max_seq_length."""
    over_length: Literal["drop", "truncate_thinking", "error"] = "drop"
    """What happens to a longer sample; it is never cut at its end."""
    loss_on: Literal["last_turn", "all_turns"] = "last_turn"
    """Which assistant turns of a conversation carry loss; all_turns: each is a document of its own."""
    empty_thinking: Literal["mask", "train", "drop"] = "mask"
    """The empty think block that a template gives a sample without thinking. mask: it carries no loss;
    train: the model learns to write it, and so not to think; drop: such samples are left out."""
    control_tokens: Literal["refuse", "split"] = "refuse"
    """What happens to a sample whose text spells a control token such as <|im_end|>."""
    packing: bool = True
    """Fill rows with several samples that never see each other; off: one sample per row."""
    max_broken_fraction: float = 0.1
    """Share of the samples that may be left out for one reason (broken, control tokens, longer than an
    automatic max_seq_length); above it the run refuses to start."""

    def _faults(self) -> Iterator[str]:
        yield from self._breaches(NOT_EMPTY, "data_path")
        yield from self._breaches(FROM_ZERO, "max_eval_samples")
        yield from self._breaches(STEPS, "tokens_per_row")
        yield from self._breaches(BELOW_ONE, "eval_fraction", "replay")
        if self.replay and self.columns:
            yield "replay does not go with columns, which name those of your files alone: leave one out"
        yield from self._breaches(SHARE, "max_broken_fraction")
        yield from self._breaches(LENGTH, "max_seq_length")
        yield from self._breaches(
            Rule(self._fit_paths, "empty, or one number of 0 or more for each data_path"),
            "data_weights",
        )

    @property
    def most_tokens(self) -> int:
        """Of a sample; as long as that is not decided, no limit."""
        return NO_LIMIT if self.max_seq_length == "auto" else self.max_seq_length

    @property
    def row_capacity(self) -> int:
        """Tokens up to which a row is filled with several samples."""
        if self.tokens_per_row == "auto" and self.max_seq_length == "auto":
            return ROW_TOKENS
        own = 0 if self.tokens_per_row == "auto" else self.tokens_per_row
        return min(own or self.most_tokens, self.most_tokens)

    def _fit_paths(self, weights: tuple[float, ...]) -> bool:
        if not weights:
            return True
        valid = all(finite(weight) and weight >= 0 for weight in weights)
        return len(weights) == len(self.data_path) and valid and sum(weights) > 0


@dataclass(frozen=True)
class BatchSettings(_Settings):
    """How much goes into an update, and how many updates there are."""

    batch_size: int = 1
    """Packed rows per micro-batch and rank."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one rank per optimizer update."""
    num_epochs: float | Literal["auto"] = 3.0
    """Passes over the training data. auto: 3, and on few data so many more that there are 150 updates, at
    most 15."""
    max_steps: int = 0
    """Exactly so many optimizer updates instead of num_epochs; 0: off."""

    def _faults(self) -> Iterator[str]:
        yield from self._breaches(FROM_ONE, "batch_size", "gradient_accumulation_steps")
        yield from self._breaches(AUTO_OR_ABOVE_ZERO, "num_epochs")
        yield from self._breaches(FROM_ZERO, "max_steps")


@dataclass(frozen=True)
class OptimizerSettings(_Settings):
    """AdamW, its learning rate, and what follows a non-finite gradient."""

    learning_rate: float | Literal["auto"] = "auto"
    """Peak learning rate. auto: 1e-3, and less for a hidden size above 576 (a 4B model: 3.1e-4) and for many
    passes over the data; up to twice that for small updates of few passes; a tenth where all weights are
    trained (docs/recipes.md)."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warmup; the first two end at min_lr_ratio of the peak."""
    warmup_ratio: float = 0.05
    """Share of all steps in which the learning rate rises; the first update is above zero."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW; norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of AdamW."""
    max_grad_norm: float = 1.0
    """Clip the gradient's L2 norm to this; 0: no clipping."""
    kl_anchor: float = 0.0
    """Weight of KL(base‖tuned) per token in the loss, which holds the model to its base; 0: off. Needs
    adapters; a step also goes through the base."""
    answer_weight: float = 1.0
    """Weight of the answer's tokens and of the end in the loss; those of the thinking weigh 1."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """After a NaN or infinite gradient (its update never happens): stop, go on, or reload a checkpoint."""
    max_nonfinite_steps: int = 10
    """Non-finite steps of a run after which skip and rollback stop too."""
    seed: int = 42
    """Seed of packing, order and adapter initialisation."""

    def _faults(self) -> Iterator[str]:
        yield from self._breaches(ABOVE_ZERO, "adam_epsilon", "answer_weight")
        yield from self._breaches(AUTO_OR_ABOVE_ZERO, "learning_rate")
        yield from self._breaches(BELOW_ONE, "warmup_ratio", "adam_beta1", "adam_beta2")
        yield from self._breaches(SHARE, "min_lr_ratio")
        not_negative = ("weight_decay", "max_grad_norm", "kl_anchor", "max_nonfinite_steps", "seed")
        yield from self._breaches(FROM_ZERO, *not_negative)


@dataclass(frozen=True)
class DeviceSettings(_Settings):
    """Where the run computes, and how it uses memory and several devices."""

    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: replicas (ddp) or sharded weights (fsdp); auto: ddp for adapters where it fits."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations of all layers or of none; auto: of as few as fit, of all once memory runs out."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile per layer, which needs CUDA and bf16; auto: there, unless it pads much."""
    distributed_timeout: float = 600.0
    """Seconds after which a silent rank ends the group."""

    def _faults(self) -> Iterator[str]:
        yield from self._breaches(ABOVE_ZERO, "distributed_timeout")


@dataclass(frozen=True)
class OutputSettings(_Settings):
    """What is written where and how often, and what is watched meanwhile."""

    output_dir: str = "qwen3_4b_thinking_output"
    """Everything is written below this directory."""
    run_name: str = ""
    """Added to the run's name, which begins with the time: at most 60 letters of any language, digits and
    . _ = + - ."""
    logging_steps: int | Literal["auto"] = "auto"
    """Optimizer steps between logged points. auto: 1 in runs of less than 200 steps, else 5."""
    save_steps: int | Literal["auto"] = "auto"
    """Steps between checkpoints. auto: 50, or more where saving would take over a twentieth of the time;
    once the last one is a quarter of an hour old, the next multiple of 10. 0: only at the end."""
    eval_steps: int | Literal["auto"] = "auto"
    """Steps between held-out evaluations; they also run before the first step and at the end. auto: 4 to
    50 evaluations, 40 steps apart or more, that add at most a fifth to the time. 0: only these two."""
    save_total_limit: int = 3
    """Checkpoints of this run that are kept; the newest and the best always are."""
    log_weight_histograms: bool = False
    """Write Model/Weights_Distribution at every evaluation."""
    best_by: Literal["auto", "loss", "answers"] = "auto"
    """What makes a model the best, and early stopping wait: the held-out loss, or Eval/Answer_Score. auto:
    the answers where every evaluation judges 16 or more."""
    early_stopping_patience: int = 0
    """Evaluations without a better model, see best_by, after which the run ends; 0: off."""
    forgetting: bool = True
    """At every evaluation, measure how far the model is from its base: KL on held-out and on general text,
    and the loss on the latter."""
    general_path: tuple[str, ...] = ()
    """General questions and answers of your own for it; empty: those that come with the program."""
    probe_path: tuple[str, ...] = ()
    """Questions of your own, with answers, that are answered instead of held-out ones."""
    num_probes: int | Literal["auto"] = "auto"
    """Questions that evaluations answer, held-out ones or those of probe_path; 0: off. auto: 32 on a GPU, on
    a CPU 16 or for a large model 4; only at the first and the last evaluation where more costs too much."""
    probe_max_new_tokens: int = 0
    """Longest probe answer, tokens; 0: a quarter more than the longest reference, on a CPU at most 640."""
    probe_temperature: float | Literal["auto"] = "auto"
    """Temperature at which answers are drawn, 0.01 or more, with top-p 0.95 and seed; 0: greedily. auto: 0.6
    for a model that thinks, else 0."""
    alert_actions: dict[str, str] = field(default_factory=dict)
    """Alert name -> log, save, stop, or a command to run with the alert as JSON on its input."""
    mirror: str = ""
    """Where checkpoints, models and records are copied behind the training: a folder, or an address of fsspec
    such as s3://bucket/folder. --resume takes the newest from there where output_dir has none. Empty: off."""
    notify: tuple[str, ...] = ()
    """Who is told of begin, alerts and end: SERVICE=ADDRESS, or SERVICE=env:NAME for the address in a
    variable of the environment; feishu, dingtalk, wecom, slack or mail (docs/running.md)."""
    workers: int = 0
    """Processes that read and tokenize large data; 0: one for each processor that the run may use."""
    cache_dir: str = ""
    """Data as read, tokenized and described, and the embedded model; empty:
    ~/.cache/qwen3_thinking_finetuning, or cache below output_dir where there is no home to write to."""

    def _faults(self) -> Iterator[str]:
        path = Rule(lambda value: value.strip() and "\0" not in value, "a path, not empty")
        yield from self._breaches(path, "output_dir")
        yield from self._breaches(RUN_NAME, "run_name")
        yield from self._breaches(LOGGING, "logging_steps")
        yield from self._breaches(FROM_ONE, "save_total_limit")
        yield from self._breaches(STEPS, "save_steps", "eval_steps", "num_probes")
        not_negative = ("early_stopping_patience", "probe_max_new_tokens", "workers")
        yield from self._breaches(FROM_ZERO, *not_negative)
        yield from self._breaches(AUTO_OR_TEMPERATURE, "probe_temperature")
        for name in self.alert_actions:
            if name not in ALERT_NAMES:
                near, known = closest(name, ALERT_NAMES), ", ".join(ALERT_NAMES)
                yield f"alert_actions: no alert {name!r}{near}; there are {known}"
        # What stands there may be a secret, so it is not shown.
        if not self.mirror.isprintable():
            yield "mirror: must be a folder or an address, without control characters"
        if any(one.partition("=")[0] not in SERVICES or "=" not in one for one in self.notify):
            yield (
                "notify: each has the form SERVICE=ADDRESS or SERVICE=env:NAME, with SERVICE one of "
                f"{', '.join(SERVICES)}"
            )

    @property
    def cache_path(self) -> Path:
        """The directory of cached work."""
        if self.cache_dir:
            return Path(self.cache_dir)
        return home_cache("qwen3_thinking_finetuning") or Path(self.output_dir) / "cache"


@dataclass(frozen=True)
class DirectTrainingConfig(  # the fields come in the reverse order of the bases, those of the model first
    OutputSettings,
    DeviceSettings,
    OptimizerSettings,
    BatchSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
):
    """Every setting of a run."""

    def _faults(self) -> Iterator[str]:
        """What is wrong between groups."""
        if self.quantization == "4bit" and self.parallel == "fsdp":
            yield "quantization 4bit can't be sharded: leave parallel at auto, or set it to ddp"
        if self.best_by == "answers" and not self.num_probes:
            yield "best_by answers needs questions: set num_probes above 0, or leave it at auto"
        nothing_held_out = not (self.eval_fraction or self.eval_path)
        if self.best_by == "answers" and nothing_held_out and not self.probe_path:
            yield "best_by answers needs questions: hold samples out, or set probe_path"
        if self.kl_anchor and not self.lora_r:
            yield "kl_anchor needs the base, which is there with adapters only: set lora_r above 0"
        if self.quantization == "4bit" and not self.lora_r:
            yield "quantization 4bit needs adapters: set lora_r above 0"
        remedies = {
            "set lora_r above 0": not self.lora_r,
            "set quantization to none": self.quantization != "none",
            "set lora_dropout to 0": self.lora_dropout > 0,
            "leave use_dora off": self.use_dora,
            "leave compile at auto": self.compile == "off",
            "leave parallel at auto, or set it to ddp": self.parallel == "fsdp",
        }
        for remedy in [text for text, bad in remedies.items() if bad and self.precision == "fp8"]:
            yield f"precision fp8 is for plain adapters of compiled layers: {remedy}"


def unhindered(config: DirectTrainingConfig) -> DirectTrainingConfig:
    """To look at data: everything that is wrong with them is to be seen, nothing may end the reading."""
    policy = "drop" if config.over_length == "error" else config.over_length
    return dataclasses.replace(config, max_broken_fraction=1.0, over_length=policy)


def bundled_data(name: str = "raw") -> str:
    """A folder of the program's own Q&A, wherever the program is started; short in its own folder."""
    folder, here = _PROGRAM / "data" / name, Path("data") / name
    at_home = not folder.exists() or (here.exists() and here.samefile(folder))
    return here.as_posix() if at_home else str(folder)


def allowed_values(field_: dataclasses.Field) -> tuple[list[str], list[type]]:
    """Values that a field names itself, and types of which any value will do."""
    of_several = get_origin(field_.type) in (Union, UnionType)
    kinds = get_args(field_.type) if of_several else (field_.type,)
    literals = [kind for kind in kinds if get_origin(kind) is Literal]
    types = [get_origin(kind) or kind for kind in kinds if kind not in literals]
    return [choice for kind in literals for choice in get_args(kind)], types


def either(choices: Sequence[str], *types: type) -> str:
    """The choices and types in words."""
    return " or ".join([*map(repr, choices), *(kind.__name__ for kind in types)])


def closest(key: str, names: Sequence[str]) -> str:
    """A question that names the most similar name; empty if none is."""
    from difflib import get_close_matches

    match = get_close_matches(key, names, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
