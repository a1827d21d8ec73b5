"""What the run on a CPU must have written."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.checked_values import table_rows
from tests.helpers.hand_machine import Reading
from tests.helpers.reference import PARTS, Document, Sums
from tests.runs.metric_values.cpu_run import (
    BUDGET,
    EPOCH,
    EVALUATED,
    HELD_OUT,
    HIDDEN,
    INNER,
    KEYS,
    LAYERS,
    LOGGED,
    QUERIES,
    RANK,
    REPLIES,
    SAVED,
    SPENT,
    STEPS,
    STOPPED,
    SUBJECTS,
    CpuRun,
    looks_of,
)

CLOSE_TO = {"rel": 2e-5, "abs": 2e-6}

# -----------------------------------------------------------------------------
# Losses of the run on a CPU


def losses_of_logged_steps(cpu: CpuRun) -> None:
    tags = {
        "Training/Loss": (),
        "Thinking/Loss": ("thinking",),
        "Answer/Loss": ("answer",),
        "Boundary/Close_Loss": ("close",),
        "Boundary/EOS_Loss": ("end",),
    }
    tags |= {f"Thinking/Loss_By_Position_{i:02d}": (f"tenth {i}",) for i in range(1, 11)}
    for tag, parts in tags.items():
        cpu.values.scalars(tag, cpu.logged(lambda sums, p=parts: sums.mean(*p)), **CLOSE_TO)
    perplexity = cpu.logged(lambda sums: math.exp(sums.mean()))
    cpu.values.scalars("Training/Perplexity", perplexity, rel=1e-4)
    last = cpu.interval(STEPS).mean()
    cpu.values.scalars("Training/Final_Loss", {STEPS: last}, **CLOSE_TO)


def accuracies_and_shares_of_logged_steps(cpu: CpuRun) -> None:
    for name, parts in (
        ("Training/Token_", ()),
        ("Thinking/", ("thinking",)),
        ("Answer/", ("answer",)),
    ):
        right = cpu.logged(lambda sums, p=parts: sums.accuracy(*p))
        assert max(right.values()) > 0, "nothing to see"
        cpu.values.scalars(f"{name}Accuracy", right)
    for name in ("Thinking", "Answer"):
        share = cpu.logged(lambda sums, n=name: 100 * sums.count[n.lower()] / sums.targets)
        cpu.values.scalars(f"{name}/Tokens_Percent", share)
    closing = cpu.logged(lambda sums: sums.closing / sums.count["thinking"])
    cpu.values.scalars("Thinking/Premature_Close_Probability", closing, **CLOSE_TO)


def losses_by_group(cpu: CpuRun) -> None:
    groups = {f"By_Difficulty_{k}": f"difficulty {k}" for k in range(1, 5)}
    groups |= {f"By_Category/{s}": f"category {s}" for s in [*SUBJECTS.values(), "none"]}
    groups |= {f"By_Source/{name}": name for name in ("one.jsonl", "two.jsonl", "held.jsonl")}
    seen = {step: cpu.interval(step) for step in LOGGED}
    for prefix, found in (("Training", seen), ("Eval", cpu.reference.held_out)):
        for tag, group in groups.items():
            losses = {step: sums.mean(group) for step, sums in found.items() if sums.count[group]}
            if losses:
                cpu.values.scalars(f"{prefix}/{tag}", losses, **CLOSE_TO)


def steps_of_the_optimizer(cpu: CpuRun) -> None:
    reference = cpu.reference
    rates = {step: reference.rates[step - 1] for step in LOGGED}
    cpu.values.scalars("Training/Learning_Rate", rates)
    norms = {step: reference.norms[step - 1] for step in LOGGED}
    highest = {step: max(reference.norms[step - 3 : step]) for step in LOGGED}
    assert sum(highest[step] > 1.01 * norms[step] for step in LOGGED) >= 2, "nothing to see"
    falls = [
        a > 1.01 * b for a, b in zip([*highest.values()], [*highest.values()][1:], strict=False)
    ]
    assert any(falls), "a maximum that is never reset would not be seen"
    cpu.values.scalars("Training/Gradient_Norm", norms, rel=1e-4)
    cpu.values.scalars("Training/Gradient_Norm_Max", highest, rel=1e-4)
    cpu.values.scalars("Training/Epoch", {step: step / EPOCH for step in LOGGED})
    cpu.values.scalars("Monitoring/NonFinite_Steps", dict.fromkeys(LOGGED, 0))
    resumes = {step: float(step > STOPPED) for step in LOGGED}
    cpu.values.scalars("Monitoring/Resume_Count", resumes)
    score = dict.fromkeys(LOGGED, 0)  # five losses are no evidence
    cpu.values.scalars("Monitoring/Convergence_Score", score)


def distances_from_the_base(cpu: CpuRun) -> None:
    found = cpu.reference.evaluations
    for tag, of in {
        "KL_Held_Out": lambda evaluation: evaluation.kl_held_out,
        "KL_General": lambda evaluation: evaluation.kl_general,
        "General_Loss": lambda evaluation: sum(evaluation.general, Sums()).mean(),
    }.items():
        values = {step: of(evaluation) for step, evaluation in found.items()}
        assert len(set(values.values())) > 2, "nothing to see"
        cpu.values.scalars(f"Forgetting/{tag}", values, rel=1e-4, abs=1e-6)
    errors = {step: error_of(evaluation.general) for step, evaluation in found.items()}
    cpu.values.scalars("Forgetting/General_Loss_Error", errors, rel=1e-3)


def error_of(samples: list[Sums], *parts: str, of: str = "loss") -> float:
    """By the delta method: each sample's deviation from what its tokens would have at the mean."""
    counts = [sum(s.count[part] for part in parts or PARTS) for s in samples]
    totals = [sum(getattr(s, of)[part] for part in parts or PARTS) for s in samples]
    mean = sum(totals) / sum(counts)
    off = [t - mean * n for t, n in zip(totals, counts, strict=True) if n]
    variance = sum(value**2 for value in off) / (len(off) - 1)
    return math.sqrt(len(off) * variance) / sum(counts)


def held_out_losses(cpu: CpuRun) -> None:
    tags = {
        "Loss": (),
        "Thinking_Loss": ("thinking",),
        "Answer_Loss": ("answer",),
        "Close_Loss": ("close",),
        "EOS_Loss": ("end",),
    }
    for tag, parts in tags.items():
        losses = cpu.evaluated(lambda sums, p=parts: sums.mean(*p))
        cpu.values.scalars(f"Eval/{tag}", losses, **CLOSE_TO)
    for tag, parts, of in (
        ("Loss", (), "loss"),
        ("Thinking_Loss", ("thinking",), "loss"),
        ("Answer_Loss", ("answer",), "loss"),
        ("Token_Accuracy", (), "correct"),
    ):
        found = cpu.reference.evaluations.items()
        errors = {step: error_of(e.samples, *parts, of=of) for step, e in found}
        cpu.values.scalars(f"Eval/{tag}_Error", errors, rel=1e-3)
    perplexity = cpu.evaluated(lambda sums: math.exp(sums.mean()))
    cpu.values.scalars("Eval/Perplexity", perplexity, rel=1e-4)
    right = cpu.evaluated(lambda sums: sums.accuracy())
    ends = cpu.evaluated(lambda sums: sums.correct["end"])
    assert max(ends.values()) > 0, "no end token was right: whether they count would not be seen"
    cpu.values.scalars("Eval/Token_Accuracy", right)


def the_numbers_at_the_end(cpu: CpuRun) -> None:
    held_out = cpu.evaluated(lambda sums: sums.mean())
    adapted = (HIDDEN + QUERIES) + (HIDDEN + KEYS) + (INNER + HIDDEN)
    trainable = LAYERS * RANK * adapted
    frozen = load_file(Path(cpu.config.model_name) / "model.safetensors")
    model = {
        "First_Eval_Loss": held_out[0],
        "Last_Eval_Loss": held_out[STEPS],
        "Best_Eval_Loss": min(held_out.values()),
        "Trainable_Parameters": trainable,
        "Total_Parameters": trainable + sum(t.numel() for t in frozen.values()),
    }
    for name, value in model.items():
        cpu.values.scalars(f"Final_Model/{name}", {STEPS: value}, **CLOSE_TO)
    samples = {"Training_Samples": 9 * 2 + 5, "Held_Out_Samples": 4, "Broken_Samples": 0}
    for name, value in samples.items():
        cpu.values.scalars(f"Final_Dataset/{name}", {STEPS: value})
    settings = dataclasses.asdict(cpu.config)
    numbers = {n: v for n, v in settings.items() if type(v) in (int, float)}
    assert len(numbers) > 20
    for name, value in numbers.items():
        cpu.values.scalars(f"Final_Config/{name}", {STEPS: value})
    cpu.values.scalars("Final_Monitoring/Convergence_Score", {STEPS: 0})
    cpu.values.scalars("Config/Batch_Size", {0: 1})
    cpu.values.scalars("Config/Sequence_Length", {0: 270})
    cpu.values.scalars("Config/Gradient_Accumulation_Steps", {0: 3})


# -----------------------------------------------------------------------------
# Answers


def ten_grams_again(ids: list[int]) -> float:
    """Share of the ten tokens in a row that stood there before."""
    seen, again = set(), 0
    rows = [tuple(ids[i : i + 10]) for i in range(len(ids) - 9)]
    for row in rows:
        again += row in seen
        seen.add(row)
    return again / len(rows) if rows else 0.0


def interval_of(rate: float, count: int) -> np.ndarray:
    """The rates p from which the found one is off by 1.96 of their own standard errors."""
    z2 = 1.96**2 / count
    return np.sort(np.roots([1 + z2, -(2 * rate + z2), rate**2]).real).clip(0, 1)


def answers_to_the_probes(cpu: CpuRun) -> None:
    """Judged by hand. The reference of the last question is longer than the budget, so a reply to it that
    was cut is not judged."""
    long = [sum(map(bool, document.parts)) > BUDGET for document in cpu.held_out]
    assert long == [False, False, False, True]
    values, ids = cpu.values, cpu.answers.ids
    cut = dict(zip(EVALUATED, (1, 1 / 4, 0, 0, 1 / 2), strict=True))
    values.scalars("Eval/Budget_Hit_Rate", cut)
    # At first the fourth is not judged; in the second evaluation 1 and 3 are valid of 4, and so on.
    valid = dict(zip(EVALUATED, (0, 2 / 4, 2 / 4, 3 / 4, 2 / 3), strict=True))
    values.scalars("Eval/Format_Valid_Rate", valid)
    # Question 1 wants SM4 and SM3, 2 wants SM2, 3 wants SM9 and SM2, 4 nothing.
    terms = [0, (1 / 2 + 0 + 1) / 3, (1 / 2 + 0 + 0) / 3, (1 + 1 + 1 / 2) / 3, (1 / 2 + 0 + 0) / 3]
    terms = dict(zip(EVALUATED, terms, strict=True))
    values.scalars("Eval/Term_Recall", terms)
    exact = dict(zip(EVALUATED, (0, 1 / 2, 1, 0, 1), strict=True))
    values.scalars("Eval/Exact_Answer", exact)
    # The numbers 35 and 1,250 are all that must be exact of the references.
    values.scalars("Eval/Fact_Recall", exact)
    # Valid and right: of 1 and 2 the number counts, of 3 two terms; 4 has nothing that could be wrong.
    scores = [0, (1 + 0 + 1 + 0) / 4, (1 + 1 + 0 + 0) / 4, (0 + 0 + 1 / 2 + 0) / 4, (1 + 1 + 0) / 3]
    scores = dict(zip(EVALUATED, scores, strict=True))
    values.scalars("Eval/Answer_Score", scores)
    judged = dict(zip(EVALUATED, (3, 4, 4, 4, 3), strict=True))
    for tag, rates, counts in (
        ("Budget_Hit_Rate", cut, dict.fromkeys(EVALUATED, 4)),
        ("Format_Valid_Rate", valid, judged),
        ("Exact_Answer", exact, dict.fromkeys(EVALUATED, 2)),
        ("Fact_Recall", exact, dict.fromkeys(EVALUATED, 2)),
        ("Term_Recall", terms, dict.fromkeys(EVALUATED, 3)),
        ("Answer_Score", scores, judged),
    ):
        ends = {step: interval_of(rates[step], counts[step]) for step in EVALUATED}
        for place, end in enumerate(("Low", "High")):
            found = {step: float(pair[place]) for step, pair in ends.items()}
            values.scalars(f"Eval/{tag}_{end}", found, rel=1e-6, abs=1e-9)
    repeated = [fmean(ten_grams_again(ids(reply)[0]) for reply in replies) for replies in REPLIES]
    assert repeated[0] == 85 / 86 and repeated[3] > 0
    values.scalars("Eval/Repetition_Rate", dict(zip(EVALUATED, repeated, strict=True)))
    ratios = {}
    for step, replies in zip(EVALUATED, REPLIES, strict=True):
        closed = [
            len(ids(reply.partition("</think>")[0])[0] if reply[0] != "<" else []) / thought
            for reply, thought in zip(replies, thinking_tokens(cpu), strict=True)
            if reply.count("</think>") == 1
        ]
        if closed:
            ratios[step] = fmean(closed)
    values.scalars("Eval/Think_Length_Ratio", ratios)


def thinking_tokens(cpu: CpuRun) -> list[int]:
    return [document.parts.count("thinking") for document in cpu.held_out]


def answers_as_text(cpu: CpuRun) -> None:
    expected = {}
    for step, replies in zip(EVALUATED, REPLIES, strict=True):
        rows = set()
        for row, reply, thought in zip(HELD_OUT, replies, thinking_tokens(cpu), strict=True):
            ids, ended = cpu.answers.ids(reply)
            text = reply or cpu.answers.tokenizer.decode(ids)
            thinking, closed, answer = text.partition("</think>")
            before = (
                len(cpu.answers.ids(thinking)[0])
                if closed and thinking
                else len(ids) * (not closed)
            )
            rows |= {
                ("answer", "<br>".join(answer.strip().splitlines()), row["answer"]),
                ("thinking", thinking.strip(), row["thinking"]),
                ("thinking tokens", str(before), str(thought)),
            }
            assert ended == bool(reply)
        expected[step] = rows
    cpu.values.texts("Eval/Samples", expected, lambda text: set(map(tuple, table_rows(text))))


# -----------------------------------------------------------------------------
# Time and the host


class Diary:
    """What a clock must have counted, step after step, in each session."""

    def __init__(self, cpu: CpuRun) -> None:
        held_out, self.best = cpu.evaluated(lambda sums: sums.mean()), math.inf
        self.found: dict[str, dict[int, float]] = {}
        self.epochs: dict[int, float] = {}  # seconds of the epoch that ends with a step
        self.training = self.of_epoch = 0.0
        for first, last in ((1, STOPPED), (STOPPED + 1, STEPS)):
            self.begin()
            self.overhead += SPENT["logging"]  # of HPARAMS, before the time of training begins
            if first == 1:
                self.overhead += SPENT["logging"]  # of the data
                self.evaluate(0, held_out)
                self.log()
            for step in range(first, last + 1):
                self.step(cpu, step, held_out)
            self.whole = self.training + SPENT["model"]  # the final model's
            # In a session that is stopped, what comes behind the checkpoint is nobody's time.
            self.training, self.of_epoch = self.saved

    def begin(self) -> None:
        self.parts, self.all, self.overhead, self.seconds = Counter(), Counter(), 0.0, 0.0
        self.counts = Counter()

    def wait(self, seconds: float) -> None:
        self.seconds += seconds
        self.training += seconds
        self.of_epoch += seconds

    def spend(self, part: str, seconds: float) -> None:
        self.parts[part] += seconds
        self.all[part] += seconds
        self.wait(seconds)

    def evaluate(self, step: int, held_out: dict[int, float]) -> None:
        self.spend("evaluation", SPENT["evaluation"])
        if held_out[step] < self.best:
            self.best = held_out[step]
            if step:
                self.spend("saving", SPENT["model"])

    def log(self) -> None:
        seconds = SPENT["alerts"] + SPENT["logging"]
        self.overhead += seconds
        self.spend("logging", seconds)

    def step(self, cpu: CpuRun, step: int, held_out: dict[int, float]) -> None:
        for documents in cpu.micro_batches[step - 1]:
            for part in ("data", "forward_backward"):
                self.spend(part, documents * SPENT[part])
        self.spend("optimizer", SPENT["optimizer"])
        self.spend("between", SPENT["between"])
        sums = cpu.reference.steps[step - 1]
        self.counts += Counter(
            steps=1,
            tokens=sums.tokens,
            supervised=sums.targets,
            samples=sum(cpu.micro_batches[step - 1]),
        )
        if step in LOGGED:
            self.read(step)
        if step in EVALUATED:
            self.evaluate(step, held_out)
        if step % EPOCH == 0:
            self.epochs[step], self.of_epoch = self.of_epoch, 0.0
        if step in LOGGED or step in EVALUATED or step % EPOCH == 0:
            self.log()
        if step in SAVED:
            self.saved = self.training, self.of_epoch
            self.spend("saving", SPENT["checkpoint"])

    def read(self, step: int) -> None:
        """The point of a logged step: then a new interval begins."""
        self.overhead += SPENT["forecast"]
        self.spend("logging", SPENT["forecast"])
        training = sum(s for p, s in self.parts.items() if p not in ("evaluation", "saving"))
        counts, phases = self.counts, ("data", "forward_backward", "optimizer", "logging")
        found = {
            "Throughput/Tokens_Per_Second": counts["tokens"] / training,
            "Throughput/Supervised_Tokens_Per_Second": counts["supervised"] / training,
            "Throughput/Samples_Per_Second": counts["samples"] / training,
            "Throughput/Step_Seconds": training / counts["steps"],
            "Monitoring/Logging_Overhead_Percent": 100 * self.overhead / self.seconds,
        }
        for part in phases:
            found[f"Throughput/Step_Seconds_{part.title()}"] = self.parts[part] / counts["steps"]
        for part in ("evaluation", "saving"):
            share = 100 * self.all[part] / sum(self.all.values())
            found[f"Throughput/{part.title()}_Percent"] = share
        for tag, value in found.items():
            self.found.setdefault(tag, {})[step] = value
        self.parts, self.counts = Counter(), Counter()


def time_of_steps_and_epochs(cpu: CpuRun) -> None:
    diary = Diary(cpu)
    for tag, points in diary.found.items():
        cpu.values.scalars(tag, points)
    cpu.values.scalars("Epoch/Duration_Seconds", diary.epochs)
    rate = {step: EPOCH / seconds for step, seconds in diary.epochs.items()}
    cpu.values.scalars("Epoch/Steps_Per_Second", rate)
    means = {
        step: sum(cpu.reference.steps[step - EPOCH : step], Sums()).mean()
        for step in (EPOCH, 2 * EPOCH, 3 * EPOCH)
    }
    cpu.values.scalars("Epoch/Average_Loss", means, **CLOSE_TO)
    tables = {
        step: [
            ["Average Loss", f"{means[step]:.4g}"],
            ["Duration Seconds", f"{diary.epochs[step]:.4g}"],
            ["Steps Per Second", f"{rate[step]:.4g}"],
        ]
        for step in means
    }
    cpu.values.texts(
        "Training/Epoch_Summary",
        {
            step: (f"**Epoch {step // EPOCH}**, {EPOCH} steps", rows)
            for step, rows in tables.items()
        },
        lambda text: (text.splitlines()[0], table_rows(text)),
    )


def tokens_and_rows(cpu: CpuRun) -> None:
    seen = list(accumulate(sums.tokens for sums in cpu.reference.steps))
    cpu.values.scalars("Throughput/Tokens_Seen", {step: seen[step - 1] for step in LOGGED})
    rows = sum(len(m) for m in cpu.micro_batches[:EPOCH])  # a row is a micro-batch here
    full = 100 * seen[EPOCH - 1] / (rows * 270)
    cpu.values.scalars("Throughput/Packing_Efficiency_Percent", dict.fromkeys(LOGGED, full))


def gauges_of_the_host(cpu: CpuRun) -> None:
    looks = dict(zip(LOGGED, looks_of(len(LOGGED)), strict=True))

    def means(value: Callable[[Reading], float]) -> dict[int, float]:
        """Of the looks since the last point; the first look of a session is no rate."""
        first = {LOGGED[0]: 1, 12: 1}
        return {
            step: fmean(map(value, found[first.get(step, 0) :])) for step, found in looks.items()
        }

    def plain(value: Callable[[Reading], float]) -> dict[int, float]:
        return {step: fmean(map(value, found)) for step, found in looks.items()}

    values = cpu.values
    values.scalars("System/CPU_Percent", means(lambda r: r.cpu_percent))
    values.scalars("System/Disk_Read_MBps", means(lambda r: r.disk_bytes / 1048576 / r.seconds))
    values.scalars("System/Net_MBps", means(lambda r: sum(r.net_bytes) / 1048576 / r.seconds))
    values.scalars("Memory/Host_Percent", plain(lambda r: r.memory_percent))
    resident = plain(lambda r: (r.resident + sum(r.of_children)) / 1048576)
    values.scalars("Memory/Host_RSS_MB", resident)
    free = {step: found[-1].disk_free / 1024**3 for step, found in looks.items()}
    values.scalars("System/Disk_Free_GB", free)


# -----------------------------------------------------------------------------
# Adapters


def by_projection(values: dict[str, float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for layer, value in values.items():
        found.setdefault(layer.rpartition(".")[2], []).append(value)
    return found


def adapters_at_evaluations(cpu: CpuRun) -> None:
    found = {step: e.adapters for step, e in cpu.reference.evaluations.items()}
    close = {"rel": 2e-4, "abs": 1e-7}
    for name in cpu.config.target_modules:
        for quantity, of in (
            ("Update_Ratio", lambda a: a.ratios),
            ("Effective_Rank", lambda a: a.ranks),
            ("Gradient_Norm", lambda a: {n: v for n, v in a.gradients.items() if n}),
        ):
            of_steps = {step: by_projection(of(a)) for step, a in found.items()}
            means = {step: fmean(v[name]) for step, v in of_steps.items() if name in v}
            assert len(means) >= 4 and (quantity == "Update_Ratio") == (0 in means)
            cpu.values.scalars(f"LoRA/{name}/{quantity}", means, **close)
        ratios = {step: by_projection(a.ratios)[name] for step, a in found.items()}
        cpu.values.histograms(f"LoRA/{name}/Update_Ratio_Histogram", ratios)
    norms = {step: a.gradients[""] for step, a in found.items() if step}
    cpu.values.scalars("LoRA/Gradient_Norm", norms, **close)
    for kind in "AB":
        weights = {step: a.weights[kind].numpy() for step, a in found.items()}
        cpu.values.histograms(f"LoRA/{kind}", weights, slack=6)
    both = {step: torch.cat([*a.weights.values()]).numpy() for step, a in found.items()}
    cpu.values.histograms("Model/Weights_Distribution", both, slack=12)


def the_table_and_the_picture_of_the_adapters(cpu: CpuRun) -> None:
    tables, figures = {}, dict(zip(EVALUATED, cpu.figures["LoRA/Update_Ratio_Map"], strict=True))
    for step, evaluation in cpu.reference.evaluations.items():
        adapters = evaluation.adapters
        tables[step] = {
            f"`{layer}`": pytest.approx(
                [
                    of.get(layer, math.nan)
                    for of in (adapters.ratios, adapters.ranks, adapters.gradients)
                ],
                rel=1e-3,
                abs=1e-7,
                nan_ok=True,
            )
            for layer in adapters.ratios
        }
        (axes, _), (grid,) = figures[step].axes, figures[step].axes[0].images
        layers = [int(t.get_text()) for t in axes.get_yticklabels()]
        projections = [t.get_text() for t in axes.get_xticklabels()]
        assert layers == [0, 1] and set(projections) == set(cpu.config.target_modules)
        shown = np.ma.filled(grid.get_array().astype(float), 0)
        for row, layer in enumerate(layers):
            for column, projection in enumerate(projections):
                (ratio,) = (
                    r
                    for n, r in adapters.ratios.items()
                    if n.startswith(f"layers.{layer}.") and n.endswith(projection)
                )
                assert shown[row, column] == pytest.approx(ratio, rel=2e-4, abs=1e-7)

    def numbers(text: str) -> dict[str, list[float]]:
        return {
            name: [math.nan if cell == "–" else float(cell) for cell in cells]
            for name, *cells in table_rows(text)
        }

    cpu.values.texts("LoRA/Modules", tables, numbers)
    pixels = {step: np.asarray(figure.canvas.buffer_rgba()) for step, figure in figures.items()}
    cpu.values.images("LoRA/Update_Ratio_Map", pixels)


# -----------------------------------------------------------------------------
# Texts of the run on a CPU


def ranking(text: str) -> list[tuple[str, list[float]]]:
    """`file:line` and the numbers of each row, from the first rank on."""
    rows = table_rows(text.partition("**1**")[0])
    assert [row[0] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    found = []
    for _, place, *cells in rows:
        file = Path(place.partition(" (")[0]).name
        found.append((file, [float(cell) for cell in cells]))
    return found


def shown_losses(sums: Sums) -> list[float]:
    return [sums.mean(), *(sums.mean(part) for part in PARTS)]


def nearly(rows: list[tuple[str, list[float]]]) -> list:
    return [(place, pytest.approx(numbers, abs=2e-3)) for place, numbers in rows]


def the_hardest_training_samples(cpu: CpuRun) -> None:
    """Of each epoch so far: a sample's loss above the level of the steps around it, which forgets a tenth
    of what it holds at each step."""
    total = tokens = 0.0
    best: dict[tuple[str, int], list[float]] = {}
    expected = {}
    for step, samples in enumerate((s.samples for s in cpu.reference.training), start=1):
        whole = cpu.reference.steps[step - 1]
        total = 0.9 * total + whole.mean() * whole.targets
        tokens = 0.9 * tokens + whole.targets
        for key, sums in samples:
            row = [step, sums.mean() - total / tokens, *shown_losses(sums)]
            if key not in best or row[1] > best[key][1]:
                best[key] = row
        if step in EVALUATED or step % EPOCH == 0:
            hardest = sorted(best.items(), key=lambda item: -item[1][1])[:10]
            expected[step] = [(f"{file}:{line}", row) for (file, line), row in hardest]
        if step % EPOCH == 0:
            best = {}
    cpu.values.texts("Training/Hardest_Samples", expected, ranking, nearly)


def the_hardest_held_out_samples(cpu: CpuRun) -> None:
    expected = {}
    for step, evaluation in cpu.reference.evaluations.items():
        rows = [(f"held.jsonl:{i}", shown_losses(s)) for i, s in enumerate(evaluation.samples, 1)]
        expected[step] = sorted(rows, key=lambda row: -row[1][0])
    cpu.values.texts("Eval/Hardest_Samples", expected, ranking, nearly)


def settings_as_text(cpu: CpuRun) -> None:
    rows = []
    # What was left to the program, as it is on a CPU.
    chosen = {
        "precision": "fp32",
        "parallel": "ddp",
        "gradient_checkpointing": "off",
        "compile": "off",
    }
    for name, value in (dataclasses.asdict(cpu.config) | chosen).items():
        text = ", ".join(map(str, value)) if isinstance(value, (tuple, dict)) else str(value)
        rows.append([name, text])
    cpu.values.texts("Config/Training_Settings", {0: rows}, table_rows)


def the_summary_at_the_end(cpu: CpuRun) -> None:
    held_out, seconds = cpu.evaluated(lambda sums: sums.mean()), Diary(cpu).whole
    best = min(held_out, key=held_out.get)
    tokens = sum(sums.tokens for sums in cpu.reference.steps)
    expected = {
        "steps": STEPS,
        "planned_steps": STEPS,
        "epochs": 3,
        "final_loss": cpu.interval(STEPS).mean(),
        "first_eval_loss": held_out[0],
        "last_eval_loss": held_out[STEPS],
        "best_eval_loss": held_out[best],
        "best_step": best,
        "resume_count": 1,
        "training_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "samples": 3 * 23,
    }

    def numbers(text: str) -> dict[str, float]:
        rows = dict(table_rows(text))
        return {name: float(rows[name]) for name in expected}

    cpu.values.texts(
        "Training/Final_Summary",
        {STEPS: expected},
        numbers,
        lambda value: pytest.approx(value, rel=1e-3),
    )


NAMES = {"": "PROMPT", "thinking": "THINKING", "close": "CLOSE", "answer": "ANSWER", "end": "END"}


def audited(document: Document, tokenizer) -> list[str]:
    """The lines of a document: 16 tokens of one part in each, half characters by their ids."""
    lines, start = [], 0
    while start < len(document.ids):
        part, end = document.parts[start], start + 1
        while end < len(document.ids) and document.parts[end] == part and end - start < 16:
            end += 1
        texts = []
        for token in document.ids[start:end]:
            text = tokenizer.decode([token])
            whole = text and "\ufffd" not in text
            texts.append(text.replace("\n", "\\n") if whole else f"⟨{token}⟩")
        sign = "+" if part else "-"
        lines.append(f"{start:6d} {sign} {NAMES[part]:<8} {'│'.join(texts)}")
        start = end
    return lines


def the_audit_of_the_mask(cpu: CpuRun) -> None:
    keys = list(cpu.documents)
    expected = []
    for number in (0, 9, 18):
        document = cpu.documents[keys[number]]
        carry = sum(map(bool, document.parts))
        head = f"**Document {number}** (sample {number}): {len(document.ids)} tokens, {carry} carry loss"
        expected += [head, *audited(document, cpu.answers.tokenizer)]

    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines()[1:] if line and not line.startswith("```")]

    cpu.values.texts("Dataset/Mask_Audit", {0: expected}, lines)


CHECKS = (
    losses_of_logged_steps,
    accuracies_and_shares_of_logged_steps,
    losses_by_group,
    steps_of_the_optimizer,
    held_out_losses,
    distances_from_the_base,
    the_numbers_at_the_end,
    answers_to_the_probes,
    answers_as_text,
    time_of_steps_and_epochs,
    tokens_and_rows,
    gauges_of_the_host,
    adapters_at_evaluations,
    the_table_and_the_picture_of_the_adapters,
    the_hardest_training_samples,
    the_hardest_held_out_samples,
    settings_as_text,
    the_summary_at_the_end,
    the_audit_of_the_mask,
)
