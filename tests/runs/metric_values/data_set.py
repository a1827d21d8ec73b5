"""A data set with known faults, as a run describes it."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import pytest
from transformers import AutoTokenizer

import direct_finetuning_with_existing_modules as program
from finetuning.config import DirectTrainingConfig
from finetuning.monitoring.system_monitor import SystemMonitor
from finetuning.runs.directory import new_run
from finetuning.runs.plan import plan_run
from finetuning.runs.record import RunRecord
from finetuning.runs.session import SessionStart, logger_options
from tb_logger import TensorBoardLogger
from tests.helpers.checked_values import Ledger, Values, kept_figures, table_rows
from tests.helpers.reference import Document, tokens_of
from tests.runs.metric_values.cpu_run import write

THOUGHTS = [
    "首先应当了解问题的背景，然后逐步分析各个部分的作用，最后得出结论。",
    "我们需要考虑不同的情况，比较它们的优点和缺点，再选择合适的方法。",
    "这个问题涉及许多方面，应当先从基本概念开始，再讨论具体的例子。",
]
ADMIN = "数据库管理员负责备份数据、检查性能，并且处理用户提出的各种问题。"
SERVER = "服务器需要定期检查，因为设备长时间运行以后容易出现故障，影响工作。"
READING = "阅读程序的时候，应当先了解整体结构，再研究重要的函数和数据。"
BLOCKS = "SM4是一种分组密码，它的分组长度和密钥长度都是一百二十八比特。"
LIBRARY = "图书馆每天早上八点开放，晚上九点关闭，周末开放时间有所不同。"
MAIL = "SM9主要用于电子邮件和移动通信，能够简化系统的各种管理工作。"
BAD = "图书馆（每天早上八点开放,晚上九点关闭,周末开放时间有所不同"
HANDBOOK = "这本手册引用GM/T 0002标准，内容是关于数据库管理员的日常工作安排。"
DUTIES = "请说明数据库管理员每{}需要完成的主要工作内容是什么？"
WHY = "为什么服务器需要定期检查，应当怎样安排？"
LONG = "".join([*THOUGHTS, ADMIN, SERVER, READING, LIBRARY, MAIL])
# Question, thinking, answer, difficulty.
FAULTY = [
    ("什么是分组密码算法，它有什么特点？", THOUGHTS[0], BLOCKS, 1),
    ("什么是分组密码算法，它有什么特点？", THOUGHTS[0], BLOCKS, 1),  # once more
    (DUTIES.format("天"), THOUGHTS[1], ADMIN, 2),
    (DUTIES.format("日"), THOUGHTS[1], ADMIN, 2),  # nearly
    (WHY, THOUGHTS[2], SERVER, 3),
    (WHY, THOUGHTS[2], READING, 3),  # another answer
    ("SM9的主要用途是什么，请举出例子。", "", MAIL, 4),  # no thinking
    ("软件工程师怎样阅读别人写的程序，应当注意什么？", THOUGHTS[0] + READING, READING, 4),  # copied
    ("请介绍这本手册的主要内容，说明它的用途？", THOUGHTS[1], HANDBOOK, 2),  # a wrong citation
    ("学校图书馆的开放时间是怎样规定的？", THOUGHTS[2], BAD, 1),  # damaged
    ("怎样整理会议记录，有哪些步骤？", LONG, LIBRARY, 2),  # too long in the thinking
    ("怎样学习一门新的课程，有哪些步骤？", THOUGHTS[0], LONG, 2),  # too long in the answer
    ("请解释<|im_end|>的作用是什么？", THOUGHTS[1], LIBRARY, 1),  # a control token
]
CONTROL, TOO_LONG = 12, (10, 11)
BROKEN = {"question": "没有答案的问题"}
SHORT, WIDE = 512, 2048  # max_seq_length
PLACES = ("mean", "p50", "p90", "p99", "max")


@dataclass
class Described:
    """A data set as a run describes it, with rows of at most `limit` tokens."""

    values: Values
    limit: int
    documents: list[Document]  # of all that can be tokenized, in the order of FAULTY
    figures: dict[str, list]

    @property
    def left_out(self) -> list[Document]:
        return [d for d in self.documents if len(d.ids) > self.limit]

    def lengths(self, part: str) -> list[int]:
        """Tokens of each kept document that has this part."""
        kept = [d for d in self.documents if len(d.ids) <= self.limit]
        if part == "total":
            return [len(d.ids) for d in kept]
        counts = [d.parts.count("" if part == "prompt" else part) for d in kept]
        return [count for count in counts if count]


def describe(ledger: Ledger, folder: Path, model: Path, cache: Path, limit: int) -> Described:
    rows = [{"question": q, "thinking": t, "answer": a, "difficulty": d} for q, t, a, d in FAULTY]
    held_out = [
        dict(rows[4]),
        {"question": "天气怎么样？", "answer": "今天天气很好，适合出去散步。"},
    ]
    config = DirectTrainingConfig(
        model_name=str(model),
        data_path=(str(folder / write(folder, "data.jsonl", [*rows, BROKEN])),),
        eval_path=(str(folder / write(folder, "held.jsonl", held_out)),),
        max_seq_length=limit,
        num_probes=0,
        device="cpu",
        cache_dir=str(cache),
    )
    trainer, run = program.DirectTrainer(config, quiet=True), new_run(folder / f"out-{limit}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with kept_figures() as figures, pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetuning.training.forecast.matmul_rate", lambda *_: 1e9)  # 0.2 s
        plan = plan_run(config, trainer.dist, trainer.terminal)
        trainer.plan = plan
        options = {"resume_step": None, "alert_state": {}, "alert_actions": {}, "warn": print}
        start = SessionStart(None, "", trainer.state)
        logger = TensorBoardLogger(**logger_options(start, run, config, plan, print))
        record = RunRecord(run, logger, SystemMonitor((), folder), **options)
        record.describe(plan)
        record.close(None)
    documents = [tokens_of(tokenizer, row) for row in rows if row is not rows[CONTROL]]
    return Described(Values(ledger, run.tensorboard), limit, documents, figures)


def check_numbers(data: Described, numbers: dict[str, float], **tolerance: float) -> None:
    for name, value in numbers.items():
        data.values.scalars(f"Dataset/{name}", {0: value}, **tolerance)


def samples_of_a_data_set(data: list[Described]) -> None:
    count = len(FAULTY)
    lengths = [tuple(map(len, row[:3])) for row in FAULTY]
    ratios = sorted(round(t / a, 2) for _, t, a in lengths if t)
    levels = Counter(row[3] for row in FAULTY)
    numbers = {
        "Total_Samples": count,
        "Broken_Samples": 1,
        "Avg_Instruction_Length": sum(q for q, _, _ in lengths) / count,
        "Avg_Output_Length": sum(t + a for _, t, a in lengths) / count,
        "Avg_Thinking_Length": sum(t for _, t, _ in lengths) / (count - 1),
        "Avg_Answer_Length": sum(a for _, _, a in lengths) / count,
        "Thinking_Samples_Percent": 100 * (count - 1) / count,
        "Thinking_Answer_Ratio_P50": median(ratios),
        "Answer_Copied_Into_Thinking": 2,  # and that of the long thinking
        "Citation_Conflicts": 1,
        "Exact_Duplicates": 1,
        "Near_Duplicates": 1,
        "Conflicting_Answers": 1,
        "Train_Eval_Leaks": 1,
        "Control_Tokens": 1,
    }
    for level in range(1, 5):
        numbers[f"Difficulty_{level}_Count"] = levels[level]
        numbers[f"Difficulty_{level}_Percent"] = 100 * levels[level] / count
    for found in data:
        check_numbers(found, numbers)


# Weights of the parts of the quality; of a thinking without the end, of a question without what is behind it.
PARTS_OF_QUALITY = {
    **{"segmentation": 2, "garbling": 2, "charset": 1.5, "script_mix": 1, "cjk_share": 1},
    **{"repetition": 1, "sentence_repetition": 1, "punctuation_width": 1, "brackets": 0.5},
    **{"terminal": 1.5, "punctuation": 1, "clause_length": 0.5, "length": 0.5},
}


def quality_of_bad() -> float:
    """It stops within a sentence, one of its brackets is open, and its commas are half as wide."""
    flaws = {"terminal": 0.25, "brackets": 0.02, "punctuation_width": 0.02}  # 0 counts as 0.02
    logs = sum(PARTS_OF_QUALITY[name] * math.log(value) for name, value in flaws.items())
    return math.exp(logs / sum(PARTS_OF_QUALITY.values()))


def complexities() -> list[float]:
    """S / (S + 8) of each sample: a term of level 2 gives 1 to S, of level 3 2.5, of level 1 nothing. In the
    first two SM4, 分组密码, 分组长度 (2) and 密钥长度 (1); SM9 (3) in the seventh and in LONG."""
    return [3 / 11, 3 / 11, 2.5 / 10.5, 2.5 / 10.5, *[0] * (len(FAULTY) - 4)]


def quality_and_terms_of_a_data_set(data: list[Described]) -> None:
    """All texts are flawless but BAD."""
    count, bad = len(FAULTY), quality_of_bad()
    assert 0.5 < bad < 0.75
    texts = 2 * count - 1  # rated besides the questions
    numbers = {
        "Avg_Instruction_Quality": 1,
        "Avg_Output_Quality": (count - 1 + bad) / count,
        **{
            f"Quality_Level_{k}_Count": n
            for k, n in zip(range(1, 5), (0, 1, 0, count - 1), strict=True)
        },
        **{
            f"Quality_Level_{k}_Percent": 100 * n / count
            for k, n in ((1, 0), (2, 1), (4, count - 1))
        },
        "Quality_Level_3_Percent": 0,
    }
    for name in PARTS_OF_QUALITY:
        flaw = {"terminal": 0.75 / count, "brackets": 1 / texts, "punctuation_width": 1 / texts}
        numbers[f"Quality_{name.title()}"] = 1 - flaw.get(name, 0)
    numbers["Avg_Crypto_Complexity"] = fmean(complexities())
    terms = Counter({4: 2, 1: 2, 0: count - 4})
    numbers |= {f"Crypto_Terms_{k}_Count": terms[k] for k in range(11)}
    for found in data:
        check_numbers(found, numbers, abs=1e-4)


def packed_rows(lengths: list[int], capacity: int) -> int:
    """Longest first, each into the fullest row that has room."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else capacity) - length)
    return len(free)


def tokens_of_a_data_set(data: list[Described]) -> None:
    for found in data:
        total, dropped = found.lengths("total"), len(found.left_out)
        numbers = {}
        for part in ("prompt", "thinking", "answer", "total"):
            counts = found.lengths(part)
            values = [np.mean(counts), *np.quantile(counts, [0.5, 0.9, 0.99]), max(counts)]
            for place, value in zip(PLACES, values, strict=True):
                numbers[f"{part.title()}_Tokens_{place.title()}"] = value
        rows = packed_rows(total, found.limit)
        numbers |= {
            "Packing_Efficiency_Percent": 100 * sum(total) / (rows * found.limit),
            "Truncated_Percent": 100 * dropped / (len(total) + dropped),
            "Dropped": dropped,
            # A cut behind SHORT tokens: of the long thinking it takes all that follows.
            "Lost_Think_Close": sum(close_at(d) >= found.limit for d in found.left_out),
            "Lost_Answer": dropped,
            "Lost_EOS": dropped,
        }
        every = [len(d.ids) for d in found.documents]
        for length in (512, 1024) if found.limit == WIDE else (512,):
            longer = sum(n > length for n in every)
            numbers[f"Exceeding_{length}_Percent"] = 100 * longer / len(every)
        for length in (2048, 4096, 8192, 16384, 32768) if found.limit == WIDE else ():
            numbers[f"Exceeding_{length}_Percent"] = 0
        if found.limit == WIDE:
            numbers["Advised_Max_Seq_Length"] = 1024
        check_numbers(found, numbers)
    short, wide = data
    assert [len(d.left_out) for d in data] == [2, 0]
    assert [close_at(d) >= SHORT for d in short.left_out] == [True, False]
    assert 512 < max(len(d.ids) for d in wide.documents) < 1024


def close_at(document: Document) -> int:
    return document.parts.index("close")


def histograms_of_a_data_set(data: list[Described]) -> None:
    bad, count = quality_of_bad(), len(FAULTY)
    texts = {
        "Question_Chars": [len(row[0]) for row in FAULTY],
        "Thinking_Chars": [len(row[1]) for row in FAULTY if row[1]],
        "Answer_Chars": [len(row[2]) for row in FAULTY],
        "Question_Quality": [1] * count,
        "Output_Quality": [round(bad, 4), *[1] * (count - 1)],
        "Complexity": [round(value, 4) for value in complexities()],
        "Distinct_Terms": [4, 4, 1, 1, *[0] * (count - 4)],
    }
    for found in data:
        tokens = {
            f"{part.title()}_Tokens": found.lengths(part)
            for part in ("prompt", "thinking", "answer", "total")
        }
        for name, values in (texts | tokens).items():
            found.values.histograms(f"Dataset/{name}_Histogram", {0: values})


def pictures_of_a_data_set(data: list[Described]) -> None:
    terms = {"SM4": 2, "分组密码": 2, "分组长度": 2, "密钥长度": 2, "SM9": 2}
    # Besides question and answer, the thinking counts: SM9 stands in that of the long one, too.
    terms["SM9"] += 1
    for found in data:
        (lengths,), (names,) = (
            found.figures[f"Dataset/{name}_Distribution"] for name in ("Length", "Term")
        )
        bins = {
            bars.get_label(): [b.get_height() for b in bars] for bars in lengths.axes[0].containers
        }
        ends = [int(label.get_text()) for label in lengths.axes[0].get_xticklabels()]
        for part, heights in bins.items():
            counts = found.lengths(part)
            expected = [sum((end > 16) * end / 2 < n <= end for n in counts) for end in ends]
            assert heights == expected and sum(heights) == len(counts), part
        assert set(bins) == {"prompt", "thinking", "answer", "total"}
        (bars,) = names.axes[0].containers
        assert sorted(b.get_width() for b in bars) == sorted(terms.values())
        for name, figure in (("Length", lengths), ("Term", names)):
            pixels = np.asarray(figure.canvas.buffer_rgba())
            found.values.images(f"Dataset/{name}_Distribution", {0: pixels})


def the_summary_of_a_data_set(data: list[Described]) -> None:
    count, bad = len(FAULTY), quality_of_bad()
    for found in data:
        advised = "1,024" if found.limit == WIDE else "–"
        expected = {
            "Samples": str(count),
            "Records that could not be read": "1",
            "With thinking": f"{count - 1} ({100 * (count - 1) / count:.1f} %)",
            "Quality of the questions": "1",
            "Quality of the outputs": f"{(count - 1 + bad) / count:.3f}",
            "Complexity by terms": f"{fmean(complexities()):.3f}",
            "Held-out samples seen in training": "1",
            "Exact duplicates": "1",
            "Near duplicates": "1",
            "Questions with several answers": "1",
            "Citation conflicts": "1",
            "Answers copied into the thinking": "2",
            "Advised max_seq_length": advised,
            "1": f"{3 + 1} ({100 * 4 / count:.1f} %)",
        }

        def rows(text: str, names=tuple(expected)) -> dict[str, str]:
            found: dict[str, str] = {}
            for name, value, *_ in table_rows(text):
                found.setdefault(name, value)
            return {name: found[name] for name in names}

        found.values.texts("Dataset/Summary", {0: expected}, rows)


CHECKS = (
    samples_of_a_data_set,
    quality_and_terms_of_a_data_set,
    tokens_of_a_data_set,
    histograms_of_a_data_set,
    pictures_of_a_data_set,
    the_summary_of_a_data_set,
)
