"""Every setting has an effect that is seen: set off its default, it arrives where it must.

A row sets one field and looks where its value must arrive: the optimizer at an update, the plan, the
split, the tokens, the adapters, the files, or an error. Without the setting the same look must show
something else. A field without a row fails, and so does a word of a choice.

uv run pytest -m "not long" tests/runs/test_settings.py
"""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from direct_finetuning_with_existing_modules import DirectTrainer
from finetuning.common.distributed import init_distributed
from finetuning.common.errors import UserError
from finetuning.common.remote import RemoteFolder
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig, allowed_values
from finetuning.data.token_table import Segment
from finetuning.model.loss import Objective
from finetuning.model.packed_model import PackedLossModel
from finetuning.model.resolve import weight_dtype
from finetuning.model.sampling import GREEDILY
from finetuning.monitoring.channels import Channel
from finetuning.monitoring.system_monitor import SystemMonitor
from finetuning.runs import plan as run_plan
from finetuning.runs.build import build_engine, build_evaluator
from finetuning.runs.directory import RunDirectory
from finetuning.runs.metrics import MetricsProcessor
from finetuning.runs.plan import RunPlan, plan_run
from finetuning.runs.probing import Probing
from finetuning.runs.record import RunRecord
from finetuning.runs.session import SessionStart, logger_options, open_run
from finetuning.training.engine import TrainingEngine
from finetuning.training.state import TrainState
from tb_logger import TensorBoardLogger

FIELDS = {f.name: f for f in dataclasses.fields(DirectTrainingConfig)}

# -----------------------------------------------------------------------------
# Where it is tried


def question(i: int, word: str) -> dict[str, str]:
    a, b = 17 + 3 * i, 41 + 2 * i
    thinking = f"先算{a}×{b}。" + "，".join(f"{word}{a * j}" for j in range(i % 6)) + "。"
    return {"question": f"{word}{i}：{a}乘{b}？", "thinking": thinking, "answer": f"{a * b}。"}


def talk(i: int) -> dict[str, list]:
    turns = [
        ("user", f"第{i}问"),
        ("assistant", f"第{i}答"),
        ("user", f"再问{i}"),
        ("assistant", "好"),
    ]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def files_of(folder: Path) -> dict[str, str]:
    """Data for the settings that need their own, by name."""
    renamed = [{**question(i, "甲"), "题目": f"另一题{i}"} for i in range(12)]
    control = [
        {**question(i, "丙"), **({"answer": "<|im_end|>"} if i < 3 else {})} for i in range(12)
    ]
    records = {
        "a": [question(i, "甲") for i in range(12)],
        "b": [question(i, "乙") for i in range(10)],
        "renamed": renamed,
        "talks": [talk(i) for i in range(6)],
        "control": control,
        "broken": [*(question(i, "丁") for i in range(19)), {"question": "无答案"}],
    }
    paths = {}
    for name, rows in records.items():
        paths[name] = folder / f"{name}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[name].write_text("".join(lines), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


class World:
    """Files, a base configuration, and what the program makes of a configuration."""

    def __init__(self, folder: Path, model: Path, data: Path, adapter: Path, cache: Path) -> None:
        self.folder, self.adapter = folder, adapter
        self.files = files_of(folder)
        self.other_model = Path(shutil.copytree(model, folder / "other-model"))
        self.base = DirectTrainingConfig(
            model_name=str(model),
            data_path=(str(data),),
            max_seq_length=768,
            learning_rate=3e-4,
            device="cpu",
            num_probes=0,
            workers=1,
            output_dir=str(folder / "out"),
            cache_dir=str(cache),
        )
        self.numbers = itertools.count()
        self.plans: dict[str, RunPlan] = {}
        self.engines: dict[str, TrainingEngine] = {}
        self.runs: dict[str, Path] = {}

    def fresh(self) -> Path:
        return self.folder / f"place-{next(self.numbers)}"

    def plan(self, config: DirectTrainingConfig) -> RunPlan:
        key = repr(config)
        if key not in self.plans:
            dist = init_distributed(config.device, config.distributed_timeout)
            self.plans[key] = plan_run(config, dist, Terminal(quiet=True))
        return self.plans[key]

    def engine(self, config: DirectTrainingConfig, *, fresh: bool = False) -> TrainingEngine:
        """With the weights as they are before the first step."""
        key = repr(config)
        if fresh or key not in self.engines:
            plan = self.plan(config)
            dist = init_distributed(config.device)
            engine = build_engine(config, plan, dist, Terminal(quiet=True))
            if fresh:
                return engine
            self.engines[key] = engine
        return self.engines[key]

    def trainer(self, config: DirectTrainingConfig) -> DirectTrainer:
        """A trainer that could do its first step; nothing is written."""
        trainer = DirectTrainer(config, quiet=True)
        trainer.plan, trainer.engine = self.plan(config), self.engine(config, fresh=True)
        trainer.metrics = MetricsProcessor(trainer.plan, trainer.dist, trainer.state)
        return trainer

    def run(self, config: DirectTrainingConfig) -> Path:
        """The output directory of a whole run."""
        key = repr(config)
        if key not in self.runs:
            DirectTrainer(config, quiet=True).train()
            self.runs[key] = Path(config.output_dir)
        return self.runs[key]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tiny_data, adapter, cache_dir) -> Iterator[World]:
    with mock.patch("finetuning.training.forecast.matmul_rate", return_value=1e9):  # 0.2 s each
        folder = tmp_path_factory.mktemp("settings")
        yield World(folder, tiny_model, tiny_data, adapter, cache_dir)


# -----------------------------------------------------------------------------
# Where to look

Config = DirectTrainingConfig


def refusal(act: Callable[[], object]) -> str:
    """What a UserError says; empty where there is none."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def refused_plan(world: World, config: Config) -> str:
    return refusal(lambda: world.plan(config))


def adapted(world: World, config: Config) -> dict[str, torch.nn.Module]:
    """The layers with adapters, by the last part of their names."""
    modules = world.engine(config).packed.model.named_modules()
    return {name.rpartition(".")[2]: m for name, m in modules if hasattr(m, "lora_A")}


def ranks(world: World, config: Config) -> dict[str, int]:
    return {n: len(m.lora_A["default"].weight) for n, m in adapted(world, config).items()}


def scales(world: World, config: Config) -> set[float]:
    return {m.scaling["default"] for m in adapted(world, config).values()}


def dropouts(world: World, config: Config) -> set[float]:
    layers = (m.lora_dropout["default"] for m in adapted(world, config).values())
    return {getattr(layer, "p", 0.0) for layer in layers}


def has_magnitudes(world: World, config: Config) -> bool:
    return all(len(m.lora_magnitude_vector) for m in adapted(world, config).values())


def starts_from_the_adapter(world: World, config: Config) -> bool:
    """Whether the trained tensors are those of the file."""
    saved = load_file(world.adapter / "adapter_model.safetensors")
    own = world.engine(config).tensors()["adapter_model"]
    return saved.keys() == own.keys() and all(torch.equal(saved[n], own[n]) for n in saved)


def drawn_from_seven(world: World, config: Config) -> bool:
    """Whether the adapters are those that peft draws from the seed 7."""
    base = AutoModelForCausalLM.from_pretrained(config.model_name)
    torch.manual_seed(7)
    other = get_peft_model(base, LoraConfig(r=config.lora_r, target_modules=[*PROJECTIONS]))
    expected = get_peft_model_state_dict(other)
    own = world.engine(config).tensors()["adapter_model"]
    return expected.keys() == own.keys() and all(torch.equal(own[n], expected[n]) for n in own)


def frozen_types(world: World, config: Config) -> set[torch.dtype]:
    parameters = world.engine(config).packed.model.parameters()
    return {p.dtype for p in parameters if not p.requires_grad}


def type_on_a_gpu(world: World, config: Config) -> torch.dtype:
    with mock.patch("torch.cuda.is_bf16_supported", return_value=True):
        return weight_dtype(torch.device("cuda"), config.precision)


def four_bits(world: World, config: Config) -> str:
    """The class of the weights that bitsandbytes makes, or that it is missed."""
    said = refusal(lambda: world.engine(config))
    if said:
        return said
    parameters = world.engine(config).packed.model.parameters()
    return " ".join({type(p).__name__ for p in parameters})


def train_sources(world: World, config: Config) -> Counter:
    part = world.plan(config).data.train
    return Counter(Path(part.sample(int(d)).source).stem for d in part.documents)


def token_shares(world: World, config: Config) -> dict[str, float]:
    """Of each source in the tokens of an epoch."""
    part = world.plan(config).data.train
    found = Counter()
    for document in part.documents:
        name = Path(part.sample(int(document)).source).stem
        found[name] += int(part.tokens.lengths[document])
    return {name: tokens / found.total() for name, tokens in found.items()}


def held_out_sources(world: World, config: Config) -> set[str]:
    part = world.plan(config).data.held_out
    return {Path(part.sample(int(d)).source).stem for d in part.documents}


def held_out(world: World, config: Config) -> int:
    return len(world.plan(config).data.held_out)


def documents(world: World, config: Config) -> int:
    return len(world.plan(config).data.train.tokens)


def taught_answers(world: World, config: Config) -> Counter:
    """The last signs of the answers that carry loss: 答 in a first turn, 好 in a last one."""
    plan = world.plan(config)
    tokens, decode = plan.data.train.tokens, plan.inputs.tokenizer.decode
    answers = (piece.ids[piece.segments == Segment.ANSWER] for piece in tokens)
    return Counter(decode(ids)[-1] for ids in answers)


def empty_blocks(world: World, config: Config) -> tuple[int, int]:
    """Documents, and those whose `</think>` carries loss."""
    tokens = world.plan(config).data.train.tokens
    return len(tokens), sum(Segment.CLOSE in piece.segments for piece in tokens)


def general_sources(world: World, config: Config) -> set[str]:
    part, _ = world.plan(config).general
    return {Path(part.sample(int(d)).source).stem for d in part.documents}


def probed_sources(world: World, config: Config) -> set[str]:
    return {Path(probe.sample.source).stem for probe in world.plan(config).probing.probes}


def passes(world: World, config: Config) -> tuple[float, int]:
    """Over the data, and updates."""
    plan = world.plan(config)
    return plan.settings["num_epochs"], plan.steps.num_steps


def weights_of_targets(world: World, config: Config) -> set[float]:
    """In four updates; empty where none are made."""
    seen = set()
    original = Objective.weights

    def note(self: Objective, segments: torch.Tensor) -> torch.Tensor | None:
        found = original(self, segments)
        seen.update([] if found is None else found.tolist())
        return found

    with mock.patch.object(Objective, "weights", note):
        updates(world, config)
    return seen


def reads_of_the_base(world: World, config: Config) -> int:
    """In four updates."""
    with mock.patch.object(
        PackedLossModel, "base_rows", autospec=True, side_effect=PackedLossModel.base_rows
    ) as read:
        updates(world, config)
    return read.call_count


def shortened(world: World, config: Config) -> bool:
    return len(world.plan(config).data.train.tokens.truncation.shortened) > 0


def first_question(world: World, config: Config) -> str:
    """Read as large data are, whose samples are kept: the cache must know the columns."""
    with mock.patch("finetuning.readers.dataset.LARGE_DATA", 0):
        return world.plan(config).data.split.read.samples[0].question


def capacity(world: World, config: Config) -> tuple[int, bool]:
    """Of a row, and whether a document is too long."""
    plan = world.plan(config)
    return plan.steps.row_tokens, len(plan.data.train.tokens.truncation.dropped) > 0


def fullest_row(world: World, config: Config) -> int:
    """Tokens of the fullest row with several documents."""
    steps, lengths = world.plan(config).steps, world.plan(config).data.train.tokens.lengths
    documents = [steps[step].documents for step in range(1, steps.steps_per_epoch + 1)]
    return max((int(lengths[list(d)].sum()) for d in documents if len(d) > 1), default=0)


def rows(world: World, config: Config) -> tuple[int, int]:
    """In a micro-batch of training and of evaluation."""
    plan = world.plan(config)
    return plan.steps.rows_per_micro_batch, plan.evaluation.rows_per_micro_batch


def updates(world: World, config: Config) -> list[dict[str, Any]]:
    """What AdamW is told at four updates, and the norm of the gradient it gets."""
    config, seen = replace(config, max_steps=4), []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimizer.param_groups
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        seen.append({**group, "norm": norm.item()})

    trainer, hook = world.trainer(config), register_optimizer_step_pre_hook(note)
    try:
        for step in range(1, 5):
            trainer.update(step, evaluates=False)
    finally:
        hook.remove()
    return seen


def told(name: str) -> Callable[[World, Config], list]:
    """A value of AdamW's parameter group at each update."""
    return lambda world, config: [update[name] for update in updates(world, config)]


def after_bad_gradients(world: World, config: Config) -> tuple[str, int]:
    """What a run does after two steps without a finite gradient: how it ends, where it goes back from."""
    trainer = DirectTrainer(config, quiet=True)
    trainer.metrics = SimpleNamespace(nonfinite_places=lambda result: ["a.jsonl:1"])
    trainer.record = SimpleNamespace(evidence={})
    for step in (5, 6):
        trainer.note_nonfinite(SimpleNamespace(step=step))
    return trainer.outcome, trainer.rollback_from


def device(world: World, config: Config) -> str:
    """Where it computes, or what is said where there is none."""
    said = refusal(lambda: DirectTrainer(config, quiet=True))
    return said or DirectTrainer(config, quiet=True).dist.device.type


def timeout(world: World, config: Config) -> float:
    """Of the group of two ranks, seconds."""
    module = "finetuning.common.distributed"
    with (
        mock.patch.dict("os.environ", {"WORLD_SIZE": "2"}),
        mock.patch(f"{module}._job_store"),
        mock.patch(f"{module}._newest_group"),
        mock.patch("torch.distributed.init_process_group") as begun,
    ):
        DirectTrainer(config, quiet=True)
    return begun.call_args.kwargs["timeout"].total_seconds()


def recomputes(world: World, config: Config) -> bool:
    modules = world.engine(config).packed.model.modules()
    return any(getattr(module, "gradient_checkpointing", False) for module in modules)


def compiled_on_a_gpu(world: World, config: Config) -> bool:
    steps, gpu = world.plan(config).steps, torch.device("cuda")
    with mock.patch.object(run_plan, "compiler_is_there", return_value=True):
        return run_plan.compiles(config, gpu, torch.bfloat16, steps)


def checkpoints_due(world: World, config: Config) -> list[int]:
    manager = DirectTrainer(config, quiet=True).checkpoints
    return [step for step in range(1, 13) if manager.is_due(step)]


def checkpoints_kept(world: World, config: Config) -> int:
    config = replace(config, output_dir=str(world.fresh()))
    manager = DirectTrainer(config, quiet=True).checkpoints
    for step in range(1, 6):
        tensors = {"adapter_model": {"weight": torch.zeros(1)}}
        manager.save("run", step, tensors, documents={}, state={}, protect=None)
    return len(list(manager.directory.glob("checkpoint-*")))


def forecast_row(name: str) -> Callable[[World, Config], str]:
    return lambda world, config: dict(world.plan(config).forecast.rows())[name]


class Asked(Exception):
    """The questions were asked; their answers don't matter here."""


def questions(world: World, config: Config) -> tuple[int, int]:
    """How many are asked at an evaluation, and how long an answer may be."""
    plan, asked = world.plan(config), mock.Mock(side_effect=Asked)
    evaluator = build_evaluator(config, plan, world.engine(config), init_distributed("cpu"))
    with mock.patch("finetuning.evaluation.evaluator.complete", asked):
        try:
            evaluator.measure(0, mock.Mock())
        except Asked:
            return len(asked.call_args.args[2]), asked.call_args.kwargs["max_new_tokens"]
    return 0, 0


def histograms(world: World, config: Config) -> bool:
    """Whether an evaluation writes those of the weights."""
    plan, logger = world.plan(config), mock.Mock()
    dist = init_distributed("cpu")
    build_evaluator(config, plan, world.engine(config), dist).measure(0, logger)
    tags = [call.args[0] for call in logger.log_histogram_counts.call_args_list]
    return any(tag.startswith("Model/Weights_Distribution") for tag in tags)


def evaluations_until_the_end(world: World, config: Config) -> int:
    """After how many evaluations without a better loss a run ends, of at most six."""
    trainer = DirectTrainer(config, quiet=True)
    trainer.metrics, trainer.record = mock.MagicMock(), mock.MagicMock()
    trainer.engine = SimpleNamespace(beside_graph=lambda work: work())
    trainer.evaluator = SimpleNamespace(measure=lambda *_: {"Eval/Loss": 1.0}, questions={})
    trainer.plan = SimpleNamespace(settings={"best_by": "loss"})
    for count in range(7):
        trainer.evaluate(count)
        if trainer.outcome:
            return count
    return -1


def judge_of(asked: int) -> Callable[[World, Config], str]:
    """What decides where so many short answers are judged at every evaluation."""
    probes = [SimpleNamespace(reference_tokens=9)] * asked
    return lambda world, config: Probing(probes, 9, GREEDILY).best_by(config.best_by)


def after_an_alert(world: World, config: Config) -> tuple[bool, str]:
    """Whether a step with an alert asks for a checkpoint, and how the run ends."""
    place = world.fresh()
    trainer = world.trainer(config)
    run = RunDirectory(place, "run")
    run.logs.mkdir(parents=True)
    options = {"resume_step": None, "alert_state": {}, "alert_actions": config.alert_actions}
    quiet = {"warn": lambda text: None}
    start = SessionStart(None, "", trainer.state)
    logger = TensorBoardLogger(**logger_options(start, run, config, trainer.plan, print))
    trainer.record = RunRecord(run, logger, SystemMonitor((), place), **options, **quiet)
    try:
        saves = trainer.log(1, {"Monitoring/NonFinite_Steps": 1.0})
    finally:
        trainer.record.close(None)
    return saves, trainer.outcome


def told_people(world: World, config: Config) -> set[str]:
    """Services that hear of an interruption."""
    with (
        mock.patch.object(Channel, "deliver", autospec=True) as deliver,
        DirectTrainer(config, quiet=True).news as news,
    ):
        news.interrupted("enough")
    return {call.args[0].service for call in deliver.call_args_list}


def copied(world: World, config: Config) -> bool:
    """Whether a saved model goes elsewhere."""
    run = RunDirectory(world.fresh(), "qwen3_4b_thinking_20260101_000000")
    run.final_model.mkdir(parents=True)
    (run.final_model / "weights").write_text("all", encoding="utf-8")
    config = replace(config, output_dir=str(run.output_dir))
    with DirectTrainer(config, quiet=True).mirror as mirror:
        mirror.add_model(run, run.final_model, 3)
    place = RemoteFolder(f"memory://{world.folder.name}")
    return place.read(f"{run.name}/final_model/weights", 9) == b"all" and bool(mirror)


def processes(world: World, config: Config) -> set[int]:
    """How many read, and how many tokenize, where data are large."""
    asked: set[int] = set()

    def in_order(function, jobs, workers, initializer=None, initargs=()):
        asked.add(workers)
        if initializer:
            initializer(*initargs)
        return [function(*job) for job in jobs]

    config = replace(config, cache_dir=str(world.fresh()))
    with (
        mock.patch("finetuning.readers.dataset.LARGE_DATA", 0),
        mock.patch("finetuning.readers.dataset.in_order", in_order),
        mock.patch("finetuning.data.tokenization._POOL_FROM", 1),
        mock.patch("finetuning.data.tokenization.in_order", in_order),
    ):
        world.plan(config)
    return asked


def kept_work(world: World, config: Config) -> bool:
    """Whether a folder of ours holds what was tokenized."""
    world.plan(config)
    found = (world.folder / "own-cache" / "tokens").is_dir()
    shutil.rmtree(world.folder / "own-cache", ignore_errors=True)
    return found


def curve(tag: str) -> Callable[[World, Config], list[int]]:
    """The steps at which a run wrote a tag."""

    def steps(world: World, config: Config) -> list[int]:
        (path,) = (world.run(config) / "training_logs").glob("*/metrics.jsonl")
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [line["step"] for line in lines if tag in line["metrics"]]

    return steps


def saved(world: World, config: Config) -> set[str]:
    return {path.name for path in (world.run(config) / "checkpoints").iterdir()}


def has_written(world: World, config: Config) -> str:
    """The name of the directory that a run was to fill, if it did."""
    world.run(config)
    directory = Path(config.output_dir)
    is_there = (directory / "final_model" / "adapter_config.json").is_file()
    return directory.name if is_there else "nothing"


def named(world: World, config: Config) -> bool:
    """Whether a run's directory ends with the name that it was given."""
    place = world.folder / f"named-{config.run_name}"
    place.mkdir(exist_ok=True)
    start = SessionStart(None, "", TrainState())
    output = replace(config, output_dir=str(place))
    dist = init_distributed("cpu", 60)
    return open_run(start, output, dist, Terminal(quiet=True), 0).name.endswith("_quick")


# -----------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Row:
    """A setting off its default, where to look, and what is there then and not without it."""

    setting: str
    value: Any  # or a function of the world
    look: Callable[[World, Config], Any]
    arrives: Any  # or a function of what is seen
    beside: Mapping[str, Any] = field(default_factory=dict)  # other settings, with it and without
    otherwise: Any = None  # what is seen without it, where that is worth a look
    slow: bool = False  # looks at a whole run, which all slow rows share

    def __str__(self) -> str:
        value = "" if callable(self.value) else f"={self.value}"
        name = getattr(self.look, "__name__", "")
        return f"{self.setting}{value}" + (f"-{name}" if name[:1] != "<" else "")

    def settings(self, world: World) -> dict[str, Any]:
        """What the row sets; slow rows all set theirs at once."""
        chosen = [row for row in ROWS if row.slow] if self.slow else [self]
        return {row.setting: of_world(row.value, world) for row in chosen}

    def has_arrived(self, seen: object) -> bool:
        return bool(self.arrives(seen)) if callable(self.arrives) else seen == self.arrives


def of_world(value: Any, world: World) -> Any:
    return value(world) if callable(value) else value


def data(*names: str) -> Callable[[World], tuple[str, ...]]:
    """Paths of the world's own files."""
    return lambda world: tuple(world.files[name] for name in names)


def only(*names: str) -> dict[str, Any]:
    """Trained on the world's own files, with nothing held out."""
    return {"data_path": data(*names), "eval_fraction": 0.0}


def says(*words: str) -> Callable[[str], bool]:
    return lambda seen: all(word in seen for word in words)


PROJECTIONS = DirectTrainingConfig().target_modules
LOSSES = {"max_broken_fraction": 0.5}
NARROW = {"max_seq_length": 200}
WHOLE = {"lora_r": 0, "precision": "bf16"}
SHORT_RUN = {"max_steps": 6}

ROWS = [
    # The model
    Row(
        "model_name",
        lambda world: str(world.other_model),
        lambda world, config: world.plan(config).inputs.model.path.name,
        "other-model",
    ),
    Row("revision", "v2", refused_plan, says("revision v2 is for a model of the hub")),
    Row("init_adapter", lambda world: str(world.adapter), starts_from_the_adapter, True),
    Row("precision", "bf16", frozen_types, {torch.bfloat16}),
    Row("precision", "fp32", type_on_a_gpu, torch.float32),
    Row("precision", "fp8", refused_plan, says("fp8")),
    Row("quantization", "4bit", four_bits, lambda seen: "bitsandbytes" in seen or "4bit" in seen),
    # The adapters
    Row("lora_r", 4, ranks, dict.fromkeys(PROJECTIONS, 4)),
    Row("lora_alpha", 8.0, scales, {0.5}, otherwise={2.0}),
    Row("lora_dropout", 0.25, dropouts, {0.25}),
    Row("target_modules", ("q_proj", "up_proj"), ranks, {"q_proj": 16, "up_proj": 16}),
    Row("rank_pattern", {"v_proj": 3}, ranks, dict.fromkeys(PROJECTIONS, 16) | {"v_proj": 3}),
    Row("use_rslora", True, scales, {8.0}),
    Row("use_dora", True, has_magnitudes, True),
    # The data
    Row("data_path", data("a", "b"), train_sources, lambda seen: set(seen) == {"a", "b"}),
    Row("data_weights", (2.0, 0.29), train_sources, {"a": 24, "b": 3}, beside=only("a", "b")),
    Row(
        "data_weights_by",
        "tokens",
        token_shares,
        lambda seen: abs(seen["b"] - 0.2) < 0.02,
        beside=only("a", "b") | {"data_weights": (0.8, 0.2)},
    ),
    Row("replay", 0.2, token_shares, lambda seen: abs(seen.get("replay", 0) - 0.2) < 0.02),
    Row("columns", {"question": "题目"}, first_question, "另一题0", beside=only("renamed")),
    Row("eval_path", data("b"), held_out_sources, {"b"}),
    Row("empty_thinking", "train", empty_blocks, (18, 18), beside=only("a", "talks")),
    Row("empty_thinking", "drop", empty_blocks, (12, 12), beside=only("a", "talks")),
    Row("forgetting", False, lambda world, config: world.plan(config).general, None),
    Row("general_path", data("b"), general_sources, {"b"}),
    Row("kl_anchor", 0.5, reads_of_the_base, 4),
    Row("answer_weight", 2.0, weights_of_targets, {1.0, 2.0}),
    Row("eval_fraction", 0.3, held_out, lambda seen: 10 <= seen <= 27),
    Row("max_eval_samples", 2, held_out, 2),
    Row("max_seq_length", 200, capacity, (200, True)),
    Row("tokens_per_row", 200, fullest_row, lambda seen: seen <= 200),
    Row("over_length", "truncate_thinking", shortened, True, beside=NARROW),
    Row("over_length", "error", refused_plan, says("max_seq_length is 200"), beside=NARROW),
    Row(
        "loss_on",
        "all_turns",
        taught_answers,
        {"答": 6, "好": 6},
        beside=only("talks"),
        otherwise={"好": 6},
    ),
    Row(
        "control_tokens",
        "split",
        documents,
        12,
        beside=only("control") | LOSSES,
        otherwise=9,
    ),
    Row(
        "packing",
        False,
        lambda world, config: (
            world.plan(config).steps.num_rows == len(world.plan(config).data.train)
        ),
        True,
    ),
    Row(
        "max_broken_fraction",
        0.0,
        refused_plan,
        says("1 of 20 samples are broken"),
        beside=only("broken"),
    ),
    # The batch
    Row("batch_size", 3, rows, (3, 3), beside=NARROW),
    Row(
        "gradient_accumulation_steps",
        3,
        lambda world, config: len(world.plan(config).steps[1].micro_batches),
        3,
        beside=NARROW,
    ),
    Row(
        "gradient_accumulation_steps",
        3,
        lambda world, config: world.plan(config).identity["rows_per_step"],
        3,
    ),
    Row(
        "num_epochs",
        2.0,
        lambda world, config: (
            world.plan(config).steps.num_steps / world.plan(config).steps.steps_per_epoch
        ),
        2,
    ),
    Row("max_steps", 5, lambda world, config: world.plan(config).steps.num_steps, 5),
    # The optimizer
    Row("learning_rate", 1e-3, told("lr"), lambda seen: max(seen) == pytest.approx(1e-3)),
    Row(
        "lr_schedule",
        "linear",
        told("lr"),
        pytest.approx([3e-4, 3e-4, 2e-4, 1e-4]),
    ),
    Row("lr_schedule", "constant", told("lr"), pytest.approx([3e-4] * 4)),
    Row(
        "warmup_ratio",
        0.5,
        told("lr"),
        lambda seen: seen[:3] == pytest.approx([1.5e-4, 3e-4, 3e-4]),
    ),
    Row("min_lr_ratio", 0.5, told("lr"), lambda seen: seen[3] == pytest.approx(1.875e-4)),
    Row("weight_decay", 0.3, told("weight_decay"), [0.3] * 4),
    Row("adam_beta1", 0.7, told("betas"), [(0.7, 0.999)] * 4),
    Row("adam_beta2", 0.93, told("betas"), [(0.9, 0.93)] * 4),
    Row("adam_epsilon", 1e-5, told("eps"), [1e-5] * 4),
    Row("max_grad_norm", 0.02, told("norm"), pytest.approx([0.02] * 4, rel=1e-3)),
    Row("nonfinite", "skip", after_bad_gradients, ("", 0)),
    Row("nonfinite", "rollback", after_bad_gradients, ("", 6)),
    Row(
        "max_nonfinite_steps",
        1,
        after_bad_gradients,
        ("nonfinite", 0),
        beside={"nonfinite": "skip"},
    ),
    Row("seed", 7, lambda world, config: world.plan(config).steps.seed, 7),
    Row("seed", 7, drawn_from_seven, True),
    # The device
    Row("device", "cuda", device, says("cuda")),
    Row("parallel", "fsdp", lambda world, config: world.plan(config).execution.parallel, "fsdp"),
    Row("parallel", "ddp", refused_plan, says("--parallel ddp"), beside=WHOLE),
    Row("gradient_checkpointing", "on", recomputes, True),
    Row(
        "gradient_checkpointing",
        "off",
        lambda world, config: world.plan(config).execution.may_recompute,
        False,
    ),
    Row("compile", "on", refused_plan, says("compile on needs CUDA")),
    Row("compile", "off", compiled_on_a_gpu, False),
    Row("distributed_timeout", 33.0, timeout, 33.0),
    # What is written
    Row(
        "output_dir",
        lambda world: str(world.folder / "elsewhere"),
        has_written,
        "elsewhere",
        slow=True,
    ),
    Row("run_name", "quick", named, True),
    Row("logging_steps", 3, curve("Training/Loss"), [3, 6, 7], slow=True),
    Row("save_steps", 2, saved, {"checkpoint-4", "checkpoint-6", "checkpoint-7"}, slow=True),
    Row("save_steps", 2, checkpoints_due, [2, 4, 6, 8, 10, 12]),
    Row("save_steps", 2, forecast_row("checkpoints"), says("3;"), beside=SHORT_RUN),
    Row("eval_steps", 3, curve("Eval/Loss"), [0, 3, 6, 7], slow=True),
    Row("eval_steps", 3, forecast_row("evaluations"), "3, every 3 steps", beside=SHORT_RUN),
    Row("save_total_limit", 2, checkpoints_kept, 2, otherwise=3),
    Row("log_weight_histograms", True, histograms, True),
    Row("best_by", "loss", judge_of(16), "loss", otherwise="answers"),
    Row("best_by", "answers", judge_of(15), "answers", beside={"num_probes": 15}, otherwise="loss"),
    Row("early_stopping_patience", 2, evaluations_until_the_end, 2, otherwise=-1),
    Row("num_probes", 2, questions, lambda seen: seen[0] == 2),
    Row("probe_path", data("b"), probed_sources, {"b"}, beside={"num_probes": 2}),
    Row("num_epochs", "auto", passes, lambda seen: 3 < seen[0] <= 15 and seen[1] >= 150),
    Row("probe_temperature", 0.3, lambda world, config: world.plan(config).probing.warmth, 0.3),
    Row("probe_max_new_tokens", 7, questions, (2, 7), beside={"num_probes": 2}),
    Row("alert_actions", {"NonFinite": "save"}, after_an_alert, (True, "")),
    Row("alert_actions", {"NonFinite": "stop"}, after_an_alert, (False, "stopped")),
    Row(
        "notify",
        ("slack=http://127.0.0.1:9/x", "wecom=http://127.0.0.1:9/x"),
        told_people,
        {"slack", "wecom"},
    ),
    Row("mirror", lambda world: f"memory://{world.folder.name}", copied, True),
    Row("workers", 3, processes, {3}, beside=only("a", "b")),
    Row("cache_dir", lambda world: str(world.folder / "own-cache"), kept_work, True),
]


def as_parameter(row: Row) -> Any:
    return pytest.param(row, marks=[pytest.mark.slow] if row.slow else [], id=str(row))


@pytest.mark.parametrize("row", [as_parameter(row) for row in ROWS])
def test_a_setting_arrives(row: Row, world: World):
    beside = {name: of_world(value, world) for name, value in row.beside.items()}
    if row.slow:
        beside = {"max_steps": 7, "output_dir": str(world.folder / "run-without")}
    without = replace(world.base, **beside)
    chosen = row.settings(world)
    assert chosen[row.setting] not in (getattr(without, row.setting), default(row.setting))
    seen = row.look(world, replace(without, **chosen))
    assert row.has_arrived(seen), seen
    seen = row.look(world, without)
    assert not row.has_arrived(seen), f"the same is seen without it: {seen}"
    assert row.otherwise is None or seen == row.otherwise, seen


def default(name: str) -> Any:
    return getattr(DirectTrainingConfig(), name)


def test_every_setting_has_a_row():
    assert {row.setting for row in ROWS} == FIELDS.keys()


def test_every_word_of_a_choice_has_a_row():
    tried = {(row.setting, row.value) for row in ROWS if isinstance(row.value, str)}
    words = {
        (name, word)
        for name, field_ in FIELDS.items()
        for word in allowed_values(field_)[0]
        if word != default(name)
    }
    assert not words - tried


def test_what_is_replayed_is_not_measured_nor_held_out(world: World, monkeypatch):
    monkeypatch.setattr("finetuning.runs.passes.CPU_TOKENS", 10**6)
    for share in (0.0, 0.2):
        plan = world.plan(replace(world.base, eval_fraction=0.0, replay=share))
        general, _ = plan.general
        measured = {general.sample(int(d)).question for d in general.documents}
        train = plan.data.train
        trained = {train.sample(int(d)).question for d in train.documents}
        assert len(measured) == (34 if share else 68) and not measured & trained
    held_out = world.plan(replace(world.base, eval_fraction=0.5, replay=0.2)).data.held_out
    assert len(held_out) and "replay" not in {
        Path(held_out.sample(int(d)).source).stem for d in held_out.documents
    }


def test_ranks_drop_out_differently(world: World):
    """Each rank draws from its own number, made of the seed."""
    config, seeds = replace(world.base, seed=70), []
    for rank in (0, 3):
        dist = replace(init_distributed("cpu"), rank=rank)
        build_engine(config, world.plan(config), dist, Terminal(quiet=True))
        seeds.append(torch.initial_seed())
    assert seeds == [70, 73]


def test_a_weight_takes_the_same_samples_wherever_the_files_lie(world: World):
    taken = []
    for folder in (world.fresh() for _ in range(4)):
        folder.mkdir()
        path = str(shutil.copy(world.files["b"], folder))
        config = replace(world.base, data_path=(path,), data_weights=(0.5,), eval_fraction=0.0)
        part = world.plan(config).data.train
        taken.append([part.sample(int(d)).question for d in part.documents])
    assert all(questions == taken[0] for questions in taken)
