"""A run's numbers equal those of plain transformers, peft and torch, computed one sample at a time.

The reference takes one thing from the program: which documents a step trains on. Tokens, masks, losses,
gradients, schedule, clipping, updates and all means are made here.

uv run pytest -m "not long" tests/runs/test_reference.py
"""

import contextlib
import itertools
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5TextConfig

from direct_finetuning_with_existing_modules import DirectTrainer
from finetuning.config import DirectTrainingConfig
from finetuning.data.packing import StepPlan
from tests.helpers.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

PEAK, WARMUP, LOWEST, DECAY, CLIP = 2e-2, 0.23, 0.2, 0.5, 0.14
BETAS, EPSILON, SEED, RANK, ALPHA = (0.8, 0.95), 1e-5, 11, 4, 12.0
EVAL_STEPS = 4
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
PARTS = ("thinking", "close", "answer", "end")
CLOSE_TO = {"rel": 2e-5, "abs": 2e-6}


# -----------------------------------------------------------------------------
# The data: two sources with weights, and held-out questions


def write(path: Path, word: str, count: int) -> str:
    """Questions with thinking of different lengths."""
    rows = []
    for i in range(count):
        a, b = 13 + 7 * i, 29 + 5 * i
        steps = "，".join(f"{word}第{j}步得{(a + 3 * j) * b}" for j in range(1 + i * 5 % 7))
        rows.append(
            {
                "question": f"{word}题{i}：{a}乘以{b}是多少？",
                "thinking": f"先算{a}×{b}。{steps}。",
                "answer": f"{word}的答案是{a * b}。",
            }
        )
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the data lie and runs are done: a weight's draw depends on how a file is named."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_model: Path, cache_dir: Path) -> DirectTrainingConfig:
    """Everything off its default that changes an update."""
    twice = write(folder / "twice.jsonl", "密钥", 9)
    half = write(folder / "half.jsonl", "证书", 10)
    return DirectTrainingConfig(
        model_name=str(tiny_model),
        data_path=(twice, half),
        data_weights=(2.0, 0.5),
        eval_path=(write(folder / "held_out.jsonl", "签名", 5),),
        max_seq_length=270,
        gradient_accumulation_steps=3,
        num_epochs=2.0,
        learning_rate=PEAK,
        warmup_ratio=WARMUP,
        min_lr_ratio=LOWEST,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=CLIP,
        seed=SEED,
        lora_r=RANK,
        lora_alpha=ALPHA,
        target_modules=tuple(PROJECTIONS),
        logging_steps=1,
        eval_steps=EVAL_STEPS,
        num_probes=0,
        device="cpu",
        output_dir="out",
        cache_dir=str(cache_dir),
    )


# -----------------------------------------------------------------------------
# The program


@dataclass
class Run:
    """What a run left: its plan, its points, and what its optimizer was told at each update."""

    plan: StepPlan
    texts: dict[int, tuple[str, int]]  # document -> name of its file and line
    points: dict[str, dict[int, float]]  # tag -> step -> value
    updates: list[dict[str, float]]
    adapter: dict[str, torch.Tensor]
    statistics: dict

    def steps(self) -> list[list[tuple[str, int]]]:
        """The samples of every step."""
        numbers = range(1, self.plan.num_steps + 1)
        return [[self.texts[d] for d in self.plan[n].documents] for n in numbers]


def train(
    config: DirectTrainingConfig, folder: Path, *, resume: str = "", stop_after: int = 0
) -> tuple[DirectTrainer, list[dict]]:
    """A session in this folder, and what its optimizer was told; a SIGTERM comes with that update."""
    updates: list[dict] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimizer.param_groups
        updates.append({name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})
        if len(updates) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(note)
    try:
        with contextlib.chdir(folder):
            trainer = DirectTrainer(config, resume=resume, quiet=True)
            trainer.train()
    finally:
        hook.remove()
    return trainer, updates


def do(config: DirectTrainingConfig, folder: Path, **session: str) -> Run:
    """The real program, from files to final model, started in this folder."""
    trainer, updates = train(config, folder, **session)
    out = folder / config.output_dir
    part = trainer.plan.data.train
    places = {int(d): part.sample(int(d)) for d in part.documents}
    return Run(
        plan=trainer.plan.steps,
        texts={d: (Path(s.source).name, s.line) for d, s in places.items()},
        points=points_of(out),
        updates=updates,
        adapter=load_file(out / "final_model" / "adapter_model.safetensors"),
        statistics=json.loads((out / "training_statistics.json").read_text(encoding="utf-8")),
    )


def points_of(out: Path) -> dict[str, dict[int, float]]:
    (path,) = (out / "training_logs").glob("*/metrics.jsonl")
    points: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for tag, value in record["metrics"].items():
            points.setdefault(tag, {})[record["step"]] = value
    return points


@pytest.fixture(scope="module")
def run(config: DirectTrainingConfig, folder: Path) -> Run:
    return do(config, folder)


# -----------------------------------------------------------------------------
# The reference


@dataclass(frozen=True)
class Document:
    """Tokens of a sample, and the part of each token, "" for the prompt; the name of its file."""

    ids: list[int]
    parts: list[str]
    file: str


def tokens_of(tokenizer, record: dict[str, str], file: str) -> Document:
    """The chat template's own text: the generation prompt, and what stands behind it in the whole turn."""
    question = {"role": "user", "content": record["question"]}
    turn = {
        "role": "assistant",
        "content": record["answer"],
        "reasoning_content": record["thinking"],
    }
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, turn], tokenize=False)
    assert whole.startswith(prompt)
    before = tokenizer.encode(prompt, add_special_tokens=False)
    behind = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    close = behind.index(tokenizer.convert_tokens_to_ids("</think>"))
    end = behind.index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    parts = ["thinking"] * close + ["close"] + ["answer"] * (end - close - 1) + ["end"]
    return Document(before + behind[: end + 1], [""] * len(before) + parts, file)


@dataclass
class Sums:
    """Loss, correct predictions and targets by part, tenth of the thinking and file; all tokens with the
    prompts; p(</think>) in the thinking."""

    loss: Counter = field(default_factory=Counter)
    correct: Counter = field(default_factory=Counter)
    count: Counter = field(default_factory=Counter)
    tokens: int = 0
    closing: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.loss + other.loss,
            self.correct + other.correct,
            self.count + other.count,
            self.tokens + other.tokens,
            self.closing + other.closing,
        )

    def mean(self, *parts: str) -> float:
        names = parts or PARTS
        return sum(self.loss[p] for p in names) / sum(self.count[p] for p in names)

    def accuracy(self, *parts: str) -> float:
        names = parts or PARTS
        return sum(self.correct[p] for p in names) / sum(self.count[p] for p in names)

    @property
    def targets(self) -> int:
        return sum(self.count[part] for part in PARTS)


def losses_of(model, document: Document, close_id: int) -> tuple[torch.Tensor, Sums]:
    """The summed loss of one sample, and its sums."""
    ids = torch.tensor([document.ids])
    logits = model(input_ids=ids).logits[0, :-1].float()
    labels, parts = ids[0, 1:], document.parts[1:]
    chances = torch.log_softmax(logits, dim=-1)
    nll = -chances[torch.arange(len(labels)), labels]
    hits = logits.argmax(dim=-1) == labels
    sums, thought = Sums(tokens=len(document.ids)), 0
    for i, part in enumerate(parts):
        names = [part, document.file] if part else []
        if part == "thinking":
            names.append(f"tenth {1 + 10 * thought // parts.count(part)}")
            sums.closing += chances[i, close_id].exp().item()
            thought += 1
        for name in names:
            sums.loss[name] += nll[i].item()
            sums.correct[name] += int(hits[i])
            sums.count[name] += 1
    carries = torch.tensor([bool(part) for part in parts])
    return nll[carries].sum(), sums


def rate_at(step: int, num_steps: int) -> float:
    """Up in equal parts over the share of warmup, then half a cosine from the peak to a fifth of it."""
    rising = math.ceil(WARMUP * num_steps)
    if step <= rising:
        return PEAK * step / rising
    way = (step - rising - 1) / (num_steps - rising)
    floor = PEAK * LOWEST
    return floor + (PEAK - floor) * (1 + math.cos(math.pi * way)) / 2


@dataclass
class Reference:
    """Sums and gradient norm of every step, held-out sums by step, and the trained adapter."""

    steps: list[Sums]
    norms: list[float]
    rates: list[float]
    held_out: dict[int, Sums]
    adapter: dict[str, torch.Tensor]


class PlainTraining:
    """One sample after the other through peft's model, and torch's AdamW."""

    def __init__(self, folder: Path, paths: list[Path], held_out: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.close_id = self.tokenizer.convert_tokens_to_ids("</think>")
        self.documents = {
            (path.name, i): document
            for path in paths
            for i, document in enumerate(self.read(path), start=1)
        }
        self.held_out = list(self.read(held_out))
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS)
        torch.manual_seed(SEED)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(SEED)
        self.model = get_peft_model(base, lora)
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=PEAK, betas=BETAS, eps=EPSILON, weight_decay=DECAY
        )

    def read(self, path: Path) -> Iterator[Document]:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield tokens_of(self.tokenizer, json.loads(line), path.name)

    def train(self, steps: list[list[tuple[str, int]]]) -> Reference:
        found = Reference([], [], [], {0: self.evaluate()}, {})
        for number, samples in enumerate(steps, start=1):
            rate = rate_at(number, len(steps))
            sums, norm = self.update([self.documents[s] for s in samples], rate)
            found.steps.append(sums)
            found.norms.append(norm)
            found.rates.append(rate)
            if number % EVAL_STEPS == 0 or number == len(steps):
                found.held_out[number] = self.evaluate()
        found.adapter = {
            name.replace(".default", ""): weight.detach() for name, weight in self.weights.items()
        }
        return found

    def update(self, documents: list[Document], rate: float) -> tuple[Sums, float]:
        """The gradient of the mean over all supervised tokens of the step, clipped, and one update."""
        targets = sum(bool(part) for document in documents for part in document.parts)
        total = Sums()
        self.optimizer.zero_grad()
        for document in documents:
            loss, sums = losses_of(self.model, document, self.close_id)
            (loss / targets).backward()
            total += sums
        gradients = [weight.grad for weight in self.weights.values()]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIP / norm))
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return total, norm

    @torch.no_grad()
    def evaluate(self) -> Sums:
        found = [losses_of(self.model, d, self.close_id)[1] for d in self.held_out]
        return sum(found, Sums())


@pytest.fixture(scope="module")
def reference(config: DirectTrainingConfig, folder: Path, run: Run) -> Reference:
    files = [folder / name for name in config.data_path]
    plain = PlainTraining(Path(config.model_name), files, folder / config.eval_path[0])
    return plain.train(run.steps())


# -----------------------------------------------------------------------------
# Both beside each other


def assert_curve(run: Run, tag: str, expected: dict[int, float], **tolerance: float) -> None:
    assert run.points[tag] == pytest.approx(expected, **(tolerance or CLOSE_TO)), tag


def by_step(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values, start=1))


def test_the_steps_are_worth_a_comparison(run: Run, reference: Reference):
    """Odd numbers of micro-batches, a last step of an epoch that is smaller, and norms on both sides."""
    plan = run.plan
    micro_batches = [plan[n].num_micro_batches for n in range(1, plan.num_steps + 1)]
    assert set(micro_batches) >= {3} and len(set(micro_batches)) > 1, micro_batches
    assert plan.num_steps == 2 * plan.steps_per_epoch >= 6
    assert sum(norm > 1.1 * CLIP for norm in reference.norms) >= 2, reference.norms
    assert sum(norm < CLIP for norm in reference.norms) >= 1, reference.norms
    assert WARMUP * plan.num_steps % 1 > 0.05, "the warmup must be no whole number of steps"


def test_an_epoch_shows_each_source_by_its_weight(run: Run):
    for epoch in range(2):
        first = epoch * run.plan.steps_per_epoch
        steps = run.steps()[first : first + run.plan.steps_per_epoch]
        shown = Counter(sample for step in steps for sample in step)
        twice = {sample: n for sample, n in shown.items() if sample[0] == "twice.jsonl"}
        half = {sample: n for sample, n in shown.items() if sample[0] == "half.jsonl"}
        assert twice == {("twice.jsonl", line): 2 for line in range(1, 10)}
        assert len(half) == 5 and set(half.values()) == {1}


def test_losses_of_every_step_by_part(run: Run, reference: Reference):
    tags = {
        "Training/Loss": (),
        "Thinking/Loss": ("thinking",),
        "Answer/Loss": ("answer",),
        "Boundary/Close_Loss": ("close",),
        "Boundary/EOS_Loss": ("end",),
    }
    for tag, parts in tags.items():
        assert_curve(run, tag, by_step([sums.mean(*parts) for sums in reference.steps]))
    for i in range(1, 11):
        tenth = [sums.mean(f"tenth {i}") for sums in reference.steps]
        assert_curve(run, f"Thinking/Loss_By_Position_{i:02d}", by_step(tenth))
    perplexity = [math.exp(sums.mean()) for sums in reference.steps]
    assert_curve(run, "Training/Perplexity", by_step(perplexity), rel=1e-4)


def test_losses_of_every_step_by_source(
    config: DirectTrainingConfig, run: Run, reference: Reference
):
    seen = dict(enumerate(reference.steps, start=1))
    for name in config.data_path:
        losses = {n: sums.mean(name) for n, sums in seen.items() if sums.count[name]}
        assert_curve(run, f"Training/By_Source/{name}", losses)


def test_accuracies_and_shares_of_every_step(run: Run, reference: Reference):
    tags = {
        "Training/Token_Accuracy": (),
        "Thinking/Accuracy": ("thinking",),
        "Answer/Accuracy": ("answer",),
    }
    for tag, parts in tags.items():
        least = min(sums.count[p] for sums in reference.steps for p in parts or ("thinking",))
        accuracies = by_step([sums.accuracy(*parts) for sums in reference.steps])
        assert_curve(run, tag, accuracies, abs=1.01 / least, rel=0)  # one tie may fall otherwise
        assert max(accuracies.values()) > 2 / least, "nothing to see"
    for part, tag in (("thinking", "Thinking"), ("answer", "Answer")):
        shares = [100 * sums.count[part] / sums.targets for sums in reference.steps]
        assert_curve(run, f"{tag}/Tokens_Percent", by_step(shares))
    closing = [sums.closing / sums.count["thinking"] for sums in reference.steps]
    assert_curve(run, "Thinking/Premature_Close_Probability", by_step(closing))


def test_gradient_norms_are_those_before_clipping(run: Run, reference: Reference):
    assert_curve(run, "Training/Gradient_Norm", by_step(reference.norms), rel=1e-4)
    assert_curve(run, "Training/Gradient_Norm_Max", by_step(reference.norms), rel=1e-4)


def test_the_optimizer_uses_the_rate_that_is_logged(run: Run, reference: Reference):
    used = [update["lr"] for update in run.updates]
    assert used == pytest.approx(reference.rates, rel=1e-9)
    assert_curve(run, "Training/Learning_Rate", by_step(reference.rates), rel=1e-9)
    for update in run.updates:
        assert (update["betas"], update["eps"]) == (BETAS, EPSILON)
        assert update["weight_decay"] == DECAY


def assert_same_adapter(run: Run, reference: Reference) -> None:
    assert run.adapter.keys() == reference.adapter.keys()
    for name, weight in reference.adapter.items():
        assert torch.allclose(run.adapter[name], weight, rtol=0, atol=1e-5), name
        assert weight.abs().max() > 1e-3, "nothing was learnt"


def test_the_trained_adapter(run: Run, reference: Reference):
    assert_same_adapter(run, reference)


def assert_epochs_and_counters(run: Run, reference: Reference) -> None:
    size = run.plan.steps_per_epoch
    epochs = [sum(reference.steps[i : i + size], Sums()) for i in (0, size)]
    means = {size: epochs[0].mean(), 2 * size: epochs[1].mean()}
    assert_curve(run, "Epoch/Average_Loss", means)
    seen = list(itertools.accumulate(sums.tokens for sums in reference.steps))
    assert run.points["Throughput/Tokens_Seen"] == by_step(seen)
    assert_curve(run, "Training/Epoch", {n: n / size for n in range(1, 2 * size + 1)})
    assert run.statistics["throughput"]["tokens"] == seen[-1]
    assert run.statistics["throughput"]["samples"] == sum(map(len, run.steps())) == 2 * 23


def test_epochs_and_counters(run: Run, reference: Reference):
    assert_epochs_and_counters(run, reference)


def test_held_out_losses(run: Run, reference: Reference):
    tags = {
        "Eval/Loss": (),
        "Eval/Thinking_Loss": ("thinking",),
        "Eval/Answer_Loss": ("answer",),
        "Eval/Close_Loss": ("close",),
        "Eval/EOS_Loss": ("end",),
    }
    for tag, parts in tags.items():
        assert_curve(run, tag, {n: s.mean(*parts) for n, s in reference.held_out.items()})
    accuracies = {n: s.accuracy() for n, s in reference.held_out.items()}
    tokens = reference.held_out[0].targets
    assert_curve(run, "Eval/Token_Accuracy", accuracies, abs=1.01 / tokens, rel=0)


def test_the_numbers_at_the_end(run: Run, reference: Reference):
    held_out = {n: s.mean() for n, s in reference.held_out.items()}
    last = run.plan.num_steps
    final = {
        "Training/Final_Loss": reference.steps[-1].mean(),
        "Final_Model/First_Eval_Loss": held_out[0],
        "Final_Model/Last_Eval_Loss": held_out[last],
        "Final_Model/Best_Eval_Loss": min(held_out.values()),
    }
    for tag, value in final.items():
        assert_curve(run, tag, {last: value})
    training = run.statistics["training"]
    assert training["final_loss"] == pytest.approx(final["Training/Final_Loss"], **CLOSE_TO)
    assert training["best_step"] == min(held_out, key=held_out.get)
    assert training["epochs"] == 2


def test_longer_intervals_are_the_means_of_their_steps(config, folder, run, reference):
    """With a point every second step: token-weighted means, the highest norm, the last rate."""
    other = do(replace(config, logging_steps=2, output_dir="other"), folder)
    logged = range(2, run.plan.num_steps + 1, 2)
    pairs = {n: reference.steps[n - 2] + reference.steps[n - 1] for n in logged}
    assert_curve(other, "Training/Loss", {n: sums.mean() for n, sums in pairs.items()})
    assert_curve(other, "Thinking/Loss", {n: s.mean("thinking") for n, s in pairs.items()})
    highest = {n: max(reference.norms[n - 2 : n]) for n in logged}
    assert_curve(other, "Training/Gradient_Norm_Max", highest, rel=1e-4)
    for tag in ("Training/Gradient_Norm", "Training/Learning_Rate", "Throughput/Tokens_Seen"):
        assert other.points[tag] == {n: run.points[tag][n] for n in logged}
    for tag in ("Epoch/Average_Loss", "Eval/Loss"):
        assert other.points[tag] == run.points[tag]
    for n, sums in pairs.items():
        one, two = (
            run.points["Training/Loss"][m] * reference.steps[m - 1].targets for m in (n - 1, n)
        )
        assert other.points["Training/Loss"][n] == pytest.approx((one + two) / sums.targets)


def test_a_run_in_three_sessions_has_the_numbers_of_one(config, folder, reference):
    """Stopped in the first epoch and in the second: nothing is lost, and nothing is counted twice."""
    config = replace(config, output_dir="stopped")
    train(config, folder, stop_after=2)
    train(config, folder, resume="latest", stop_after=3)
    run = do(config, folder, resume="latest")
    resumes = run.points["Monitoring/Resume_Count"]
    assert list(resumes.values()) == [0] * 3 + [1] * 4 + [2] * 3
    assert_curve(run, "Training/Loss", by_step([sums.mean() for sums in reference.steps]))
    assert_curve(run, "Training/Gradient_Norm", by_step(reference.norms), rel=1e-4)
    assert_curve(run, "Training/Learning_Rate", by_step(reference.rates), rel=1e-9)
    assert_curve(run, "Eval/Loss", {n: s.mean() for n, s in reference.held_out.items()})
    first = {run.plan.num_steps: reference.held_out[0].mean()}
    assert_curve(run, "Final_Model/First_Eval_Loss", first)
    assert_epochs_and_counters(run, reference)
    assert_same_adapter(run, reference)


# -----------------------------------------------------------------------------
# A model for which packed rows are wrong


def test_a_model_with_linear_attention_is_trained_as_if_nothing_was_packed(
    config: DirectTrainingConfig, folder: Path, capfd
):
    """Rows of several documents, two of them a micro-batch, in training and evaluation."""
    hybrid = make_tiny_model(
        folder / "hybrid",
        kind=Qwen3_5TextConfig,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    config = replace(config, model_name=str(hybrid), batch_size=2, output_dir="hybrid_out")
    run = do(config, folder)
    shown = capfd.readouterr().err
    assert shown.count("one document a forward pass") == 1 and "see each other" in shown
    assert "no adapter is in linear_attn of 1 layers (" in shown and "out_proj" in shown
    assert max(len(documents) for n in (1, 2) for documents in run.plan[n].micro_batches) > 2
    plain = PlainTraining(
        hybrid, [folder / n for n in config.data_path], folder / config.eval_path[0]
    )
    reference = plain.train(run.steps())
    assert_curve(run, "Training/Loss", by_step([sums.mean() for sums in reference.steps]))
    assert_curve(run, "Training/Gradient_Norm", by_step(reference.norms), rel=1e-4)
    assert_curve(run, "Eval/Loss", {n: sums.mean() for n, sums in reference.held_out.items()})
    for name, expected in reference.adapter.items():
        torch.testing.assert_close(run.adapter[name], expected, rtol=1e-3, atol=2e-6)
