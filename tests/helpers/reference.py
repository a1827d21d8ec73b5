"""A training run without a line of the program: plain transformers, peft and torch, one sample at a time.

It takes one thing from the program: which documents a step trains on (and the masks of dropout, where there
is any). Tokens, masks, losses, gradients, schedule, clipping, updates and all means are made here.
"""

import itertools
import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

PEAK, WARMUP, LOWEST, DECAY, CLIP = 2e-2, 0.23, 0.2, 0.5, 0.14
BETAS, EPSILON, SEED, RANK, ALPHA = (0.8, 0.95), 1e-5, 11, 4, 12.0
EVAL_STEPS = 4
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
PARTS = ("thinking", "close", "answer", "end")
LEVEL_DECAY, HARDEST = 0.9, 10  # of the table of the hardest samples

Sample = tuple[str, int]  # name of its file, line


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


class GivenDropout(torch.nn.Module):
    """Dropout whose masks are given, one a call: true where an input stays."""

    def __init__(self, share: float, masks: deque) -> None:
        super().__init__()
        self.share, self.masks = share, masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.masks.popleft() / (1 - self.share) if self.training else x


@dataclass
class Step:
    """One step: sums of each sample, the gradient of each weight before and after clipping, its norm."""

    samples: list[tuple[Sample, Sums]]
    gradients: list[torch.Tensor]
    clipped: list[torch.Tensor]
    norm: float
    rate: float

    @property
    def sums(self) -> Sums:
        return sum((sums for _, sums in self.samples), Sums())


@dataclass
class Reference:
    """All steps, held-out sums by step, and the trained adapter."""

    training: list[Step]
    held_out: dict[int, Sums]
    adapter: dict[str, torch.Tensor]

    @property
    def steps(self) -> list[Sums]:
        return [step.sums for step in self.training]

    @property
    def norms(self) -> list[float]:
        return [step.norm for step in self.training]

    @property
    def rates(self) -> list[float]:
        return [step.rate for step in self.training]

    def tokens_seen(self) -> list[int]:
        return list(itertools.accumulate(sums.tokens for sums in self.steps))

    def samples_seen(self) -> list[int]:
        return list(itertools.accumulate(len(step.samples) for step in self.training))

    def best(self) -> dict[int, tuple[int, float, int]]:
        """After each evaluation: step and loss of the best one so far, and how many came after it."""
        found: dict[int, tuple[int, float, int]] = {}
        for number, step in enumerate(self.held_out):
            losses = [sums.mean() for sums in list(self.held_out.values())[: number + 1]]
            place = losses.index(min(losses))
            found[step] = list(self.held_out)[place], losses[place], number - place
        return found

    def hardest(
        self, begin: int, end: int, spoilt: Sequence[int] = ()
    ) -> list[tuple[Sample, int, float, float]]:
        """(sample, step, loss above the level, loss) of the ten hardest in the steps begin … end.

        The level is the mean loss of a token, in which a step weighs 0.9 of what the next one does; a
        `spoilt` step, without a finite gradient, counts nowhere.
        """
        total = count = 0.0
        best: dict[Sample, tuple[Sample, int, float, float]] = {}
        for number, step in enumerate(self.training[:end], start=1):
            if number in spoilt:
                continue
            total = LEVEL_DECAY * total + sum(step.sums.loss[part] for part in PARTS)
            count = LEVEL_DECAY * count + step.sums.targets
            for name, sums in step.samples:
                above = sums.mean() - total / count
                if number >= begin and (name not in best or above > best[name][2]):
                    best[name] = name, number, above, sums.mean()
        return sorted(best.values(), key=lambda row: -row[2])[:HARDEST]


class PlainTraining:
    """One sample after the other through peft's model, and torch's AdamW."""

    def __init__(
        self, folder: Path, paths: Sequence[Path], held_out: Path, *, clip: float, dropout: float
    ) -> None:
        self.clip = clip
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.close_id = self.tokenizer.convert_tokens_to_ids("</think>")
        self.documents = {
            (path.name, i): document
            for path in paths
            for i, document in enumerate(self.read(path), start=1)
        }
        self.held_out = list(self.read(held_out))
        torch.manual_seed(SEED)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(SEED)
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS, lora_dropout=dropout
        )
        self.model = get_peft_model(base, lora)
        self.masks: deque = deque()  # of the passes to come
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Dropout):
                    module[name] = GivenDropout(dropout, self.masks)
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=PEAK, betas=BETAS, eps=EPSILON, weight_decay=DECAY
        )

    def read(self, path: Path) -> Iterator[Document]:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield tokens_of(self.tokenizer, json.loads(line), path.name)

    def train(
        self,
        steps: Sequence[Sequence[Sample]],
        *,
        eval_steps: int = EVAL_STEPS,
        left_out: Sequence[int] = (),
        masks: Mapping[int, Sequence[torch.Tensor]] | None = None,
    ) -> Reference:
        """`left_out`: steps without an update. `masks`: of dropout, those of a step in the order of its
        samples and of the model's layers."""
        found = Reference([], {0: self.evaluate()}, {})
        for number, samples in enumerate(steps, start=1):
            self.masks.extend(masks[number] if masks else ())
            rate = rate_at(number, len(steps))
            found.training.append(self.update(samples, rate, updates=number not in left_out))
            assert not self.masks, "each mask belongs to one pass"
            if number % eval_steps == 0 or number == len(steps):
                found.held_out[number] = self.evaluate()
        found.adapter = {
            name.replace(".default", ""): weight.detach() for name, weight in self.weights.items()
        }
        return found

    def update(self, samples: Sequence[Sample], rate: float, *, updates: bool) -> Step:
        """The gradient of the mean over all supervised tokens of the step, clipped, and one update."""
        documents = [self.documents[sample] for sample in samples]
        targets = sum(bool(part) for document in documents for part in document.parts)
        self.model.train()
        self.optimizer.zero_grad()
        seen = []
        for sample, document in zip(samples, documents, strict=True):
            loss, sums = losses_of(self.model, document, self.close_id)
            (loss / targets).backward()
            seen.append((sample, sums))
        gradients = [weight.grad for weight in self.weights.values()]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        step = Step(seen, [g.clone() for g in gradients], gradients, norm, rate)
        for gradient in gradients:
            gradient.mul_(min(1.0, self.clip / norm))
        self.optimizer.param_groups[0]["lr"] = rate
        if updates:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return step

    @torch.no_grad()
    def evaluate(self) -> Sums:
        self.model.eval()
        found = [losses_of(self.model, d, self.close_id)[1] for d in self.held_out]
        return sum(found, Sums())
