"""A training run without a line of the program: plain transformers, peft and torch, one sample at a time.

It takes settings, files and the samples of every step (and the masks of dropout, where there is any).
Tokens, masks, losses, gradients, schedule, clipping, updates and all means are made here.
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

from finetuning.config import DirectTrainingConfig

PARTS = ("thinking", "close", "answer", "end")
LEVEL_DECAY, HARDEST = 0.9, 10  # of the table of the hardest samples

Sample = tuple[str, int]  # name of its file, line


@dataclass(frozen=True)
class Document:
    """Tokens of a sample, and the part of each token, "" for the prompt; what its loss counts for."""

    ids: list[int]
    parts: list[str]
    groups: tuple[str, ...]  # name of its file, and what its record says it belongs to


def tokens_of(tokenizer, record: Mapping, *groups: str) -> Document:
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
    block = ["thinking"] * close + ["close"] if record["thinking"] else [""] * (close + 1)  # masked
    parts = [*block, *["answer"] * (end - close - 1), "end"]
    return Document(before + behind[: end + 1], [""] * len(before) + parts, groups)


@dataclass
class Sums:
    """Loss, correct predictions and targets by part, tenth of the thinking and group; all tokens with the
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
    closing = chances[:, close_id].exp().tolist()
    sums, thought = Sums(tokens=len(document.ids)), 0
    for i, (part, loss, hit) in enumerate(zip(parts, nll.tolist(), hits.tolist(), strict=True)):
        names = [part, *document.groups] if part else []
        if part == "thinking":
            names.append(f"tenth {1 + 10 * thought // parts.count(part)}")
            sums.closing += closing[i]
            thought += 1
        for name in names:
            sums.loss[name] += loss
            sums.correct[name] += int(hit)
            sums.count[name] += 1
    carries = torch.tensor([bool(part) for part in parts])
    return nll[carries].sum(), sums


def rate_at(step: int, num_steps: int, config: DirectTrainingConfig) -> float:
    """Up in equal parts over the share of warmup, then half a cosine from the peak to a share of it."""
    peak = config.learning_rate
    rising = math.ceil(config.warmup_ratio * num_steps)
    if step <= rising:
        return peak * step / rising
    way = (step - rising - 1) / (num_steps - rising)
    floor = peak * config.min_lr_ratio
    return floor + (peak - floor) * (1 + math.cos(math.pi * way)) / 2


class GivenDropout(torch.nn.Module):
    """Dropout whose masks are given, one a call: true where an input stays."""

    def __init__(self, share: float, masks: deque) -> None:
        super().__init__()
        self.share, self.masks = share, masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.masks.popleft() / (1 - self.share) if self.training else x


@dataclass
class Adapters:
    """The adapters at an evaluation: by layer the size of the update against its weight, and its rank; the
    norm of its gradients (with "" for all, absent before the first step); A, B of all layers in a row."""

    ratios: dict[str, float]
    ranks: dict[str, float]
    gradients: dict[str, float]
    weights: dict[str, torch.Tensor]


@dataclass
class Evaluation:
    """Of each held-out and of each general sample its sums, and the adapters; the mean KL(base‖model) of a
    learnt token of either."""

    samples: list[Sums]
    adapters: Adapters
    general: list[Sums]
    kl_held_out: float = math.nan
    kl_general: float = math.nan

    @property
    def sums(self) -> Sums:
        return sum(self.samples, Sums())


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
    """All steps, evaluations by step, and the trained adapter."""

    training: list[Step]
    evaluations: dict[int, Evaluation]
    adapter: dict[str, torch.Tensor]

    @property
    def held_out(self) -> dict[int, Sums]:
        return {step: found.sums for step, found in self.evaluations.items()}

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
    """One sample after the other through peft's model, and torch's AdamW.

    groups: names of a record's groups, besides its file's.
    """

    def __init__(
        self, config: DirectTrainingConfig, folder: Path, groups=lambda record: ()
    ) -> None:
        self.config, self.groups = config, groups
        self.tokenizer = AutoTokenizer.from_pretrained(config.model_name)
        self.close_id = self.tokenizer.convert_tokens_to_ids("</think>")
        self.documents = {
            (name, i): document
            for name in config.data_path
            for i, document in enumerate(self.read(folder / name), start=1)
        }
        (held_out,) = config.eval_path
        self.held_out = list(self.read(folder / held_out))
        general = [d for name in config.general_path for d in self.read(folder / name)]
        room = sum(
            len(document.ids) for document in self.held_out
        )  # on a CPU no more than is held out
        ends = itertools.accumulate(len(document.ids) for document in general)
        self.general = [d for d, end in zip(general, ends, strict=True) if end <= room]
        self.scale = config.lora_alpha / config.lora_r
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=list(config.target_modules),
            lora_dropout=config.lora_dropout,
        )
        torch.manual_seed(config.seed)
        base = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32)
        torch.manual_seed(config.seed)
        self.model = get_peft_model(base, lora)
        self.masks: deque = deque()  # of the passes to come
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Dropout):
                    module[name] = GivenDropout(config.lora_dropout, self.masks)
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.gradients: dict[str, float] = {}

    def read(self, path: Path) -> Iterator[Document]:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield tokens_of(self.tokenizer, record, path.name, *self.groups(record))

    def train(
        self,
        steps: Sequence[Sequence[Sample]],
        *,
        eval_steps: int = 0,
        left_out: Sequence[int] = (),
        masks: Mapping[int, Sequence[torch.Tensor]] | None = None,
    ) -> Reference:
        """`eval_steps`: otherwise than in the settings. `left_out`: steps without an update. `masks`: of
        dropout, those of a step in the order of its samples and of the model's layers."""
        found = Reference([], {0: self.evaluate()}, {})
        every = eval_steps or self.config.eval_steps
        for number, samples in enumerate(steps, start=1):
            self.masks.extend(masks[number] if masks else ())
            rate = rate_at(number, len(steps), self.config)
            found.training.append(self.update(samples, rate, updates=number not in left_out))
            assert not self.masks, "each mask belongs to one pass"
            if number % every == 0 or number == len(steps):
                found.evaluations[number] = self.evaluate()
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
        gradients = {name: weight.grad for name, weight in self.weights.items()}
        squares = {n: g.double().square().sum().item() for n, g in gradients.items()}
        norm = math.sqrt(sum(squares.values()))
        self.gradients = {
            name: math.sqrt(squares[a] + squares[b]) for name, a, b in self.layers()
        } | {"": norm}
        whole = [gradient.clone() for gradient in gradients.values()]
        step = Step(seen, whole, list(gradients.values()), norm, rate)
        for gradient in step.clipped:
            gradient.mul_(min(1.0, self.config.max_grad_norm / norm))
        self.optimizer.param_groups[0]["lr"] = rate
        if updates:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return step

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        self.model.eval()
        samples = [losses_of(self.model, d, self.close_id)[1] for d in self.held_out]
        general = [losses_of(self.model, d, self.close_id)[1] for d in self.general]
        distances = self.divergence(self.held_out), self.divergence(self.general)
        return Evaluation(samples, self.adapters(), general, *distances)

    def divergence(self, documents: Sequence[Document]) -> float:
        """The mean KL(base‖model) of a supervised token."""
        found = []
        for document in documents:
            ids = torch.tensor([document.ids])
            carries = torch.tensor([bool(part) for part in document.parts[1:]])
            own = self.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with self.model.disable_adapter():
                base = self.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            found.append((base.exp() * (base - own)).sum(-1)[carries])
        return torch.cat(found).mean().item() if found else math.nan

    def layers(self) -> list[tuple[str, str, str]]:
        """Of each adapted layer its name in the transformer, and the names of its A and B."""
        found = []
        for a in self.weights:
            path, _, rest = a.partition(".lora_A")
            if rest:
                found.append((path.split("model.")[-1], a, f"{path}.lora_B{rest}"))
        return found

    def adapters(self) -> Adapters:
        ratios, ranks = {}, {}
        for name, a, b in self.layers():
            base = self.model.get_submodule(a.partition(".lora_A")[0]).base_layer.weight.double()
            product = self.scale * self.weights[b].double() @ self.weights[a].double()
            ratios[name] = (product.norm() / base.norm()).item()
            shares = torch.linalg.svdvals(product)[: self.config.lora_r]
            if shares.sum() > 0:
                shares = shares / shares.sum()
                ranks[name] = torch.special.entr(shares).sum().exp().item()
        weights = {
            kind: torch.cat([self.weights[layer[at]].flatten() for layer in self.layers()])
            for at, kind in ((1, "A"), (2, "B"))
        }
        return Adapters(ratios, ranks, dict(self.gradients), weights)
