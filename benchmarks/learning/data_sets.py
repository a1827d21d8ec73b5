"""Data sets for questions about learning: the bundled Q&A, Python's documentation, sums with thinking.

All are made here, alike for every run: `write_all(folder)` writes `<name>.train.jsonl` and
`<name>.held_out.jsonl`, and the general text in two halves, one for the gauge and one that it never sees.
"""

import hashlib
import importlib
import inspect
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetuning.config import bundled_data
from finetuning.data.split import split_held_out
from finetuning.readers.dataset import read_samples
from finetuning.readers.sample import Sample

HELD_OUT = 0.15
MODULES = """
argparse ast asyncio base64 bisect bz2 calendar cmath codecs collections concurrent.futures
configparser contextlib copy csv dataclasses datetime decimal difflib dis email.utils enum fnmatch
fractions ftplib functools gettext glob gzip hashlib heapq hmac html http.client imaplib importlib
inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox math mimetypes
multiprocessing numbers operator os os.path pathlib pickle platform pprint queue random re sched
secrets selectors shelve shlex shutil signal smtplib socket sqlite3 ssl stat statistics string
struct subprocess sys tarfile tempfile textwrap threading time token tokenize traceback types typing
unicodedata unittest urllib.parse urllib.request uuid warnings wave weakref xml.dom zipfile zlib
"""
DOCUMENTED = (120, 900)  # characters of a docstring that becomes an answer
Record = dict[str, str]


def write_all(folder: Path, *, share: float = 1.0) -> None:
    """Write every data set, or a share of it; a second call writes the same."""
    documents, sums = round(400 * share), round(700 * share)
    folder.mkdir(parents=True, exist_ok=True)
    bundled = read_samples([bundled_data()]).samples
    bundled = [bundled[i] for i in range(round(len(bundled) * share))]
    fields = ("question", "thinking", "answer")
    _write_split(folder, "crypto", [{f: getattr(s, f) for f in fields} for s in bundled])
    _write_split(folder, "docs", documentation(documents))
    for stride in (2, 4, 8):
        _write_part(folder, "docs", stride)
    _write_answers(folder, "crypto")
    thought = word_problems(sums)
    cut = len(thought) // 7  # they are drawn, so that any part is like any other
    for name, records in {
        "sums": thought,
        "sums_answers": [{**record, "thinking": ""} for record in thought],
    }.items():
        _write(folder / f"{name}.train.jsonl", records[cut:])
        _write(folder / f"{name}.held_out.jsonl", records[:cut])
    for part, name in (
        ("gauge", "gauge"),
        ("unseen", "replay"),
    ):  # halves with both languages alike
        text = Path(bundled_data("general"), f"{name}.jsonl").read_text(encoding="utf-8")
        (folder / f"general.{part}.jsonl").write_text(text, encoding="utf-8")


def _write_split(folder: Path, name: str, records: Sequence[Record]) -> None:
    """A share is held out, as the program does it: no near duplicate crosses."""
    samples = [Sample(r["question"], r["thinking"], r["answer"]) for r in records]
    parts = split_held_out(samples, HELD_OUT)
    for part, indices in zip(("train", "held_out"), parts, strict=True):
        _write(folder / f"{name}.{part}.jsonl", [records[i] for i in indices])


def _write_part(folder: Path, name: str, stride: int) -> None:
    """Every so manieth training sample of a data set, and all that it holds out."""
    for part, step in (("train", stride), ("held_out", 1)):
        lines = (folder / f"{name}.{part}.jsonl").read_text(encoding="utf-8").splitlines(True)
        kept = "".join(lines[::step])
        (folder / f"{name}_{stride}.{part}.jsonl").write_text(kept, encoding="utf-8")


def _write_answers(folder: Path, name: str) -> None:
    """The same questions without their thinking."""
    for part in ("train", "held_out"):
        lines = (folder / f"{name}.{part}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [{**json.loads(line), "thinking": ""} for line in lines]
        _write(folder / f"{name}_answers.{part}.jsonl", records)


def _write(path: Path, records: Sequence[Record]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


# -----------------------------------------------------------------------------
# Python's own documentation


def documentation(count: int) -> list[Record]:
    """Questions about functions, classes and methods of the standard library; the docstring is the answer."""
    found: dict[str, Record] = {}
    for name in MODULES.split():
        module = importlib.import_module(name)
        for thing, text in _documented(module, name):
            question = f"What does `{thing}` do in Python?"
            found.setdefault(text, {"question": question, "thinking": "", "answer": text})
    return sorted(found.values(), key=_place)[:count]


def _documented(module: object, name: str) -> Iterator[tuple[str, str]]:
    owners = [(name, module)]
    owners += [
        (f"{name}.{key}", value)
        for key, value in sorted(vars(module).items())
        if inspect.isclass(value) and value.__module__ == name and not key.startswith("_")
    ]
    for prefix, owner in owners:
        for key, value in sorted(vars(owner).items()):
            if key.startswith("_") or not callable(value):
                continue
            if owner is module and getattr(value, "__module__", name) != name:
                continue
            text = inspect.cleandoc(getattr(value, "__doc__", None) or "")
            if DOCUMENTED[0] <= len(text) <= DOCUMENTED[1]:
                yield f"{prefix}.{key}", text


def _place(record: Record) -> str:
    return hashlib.blake2b(record["question"].encode(), digest_size=8).hexdigest()


# -----------------------------------------------------------------------------
# Sums with thinking

NAMES = "Ana Ben Chloe David Emma Felix Grace Hugo Iris Jonas Kira Leo Mina Noah Olga Paul"
THINGS = "apples pencils stamps marbles tickets candles shells cards buttons cookies"


def word_problems(count: int, seed: int = 7) -> list[Record]:
    """Questions with two or three steps of arithmetic, each in the thinking; the answer is the number."""
    draw, records = random.Random(seed), []
    while len(records) < count:
        question, steps, number = KINDS[len(records) % len(KINDS)](draw)
        thinking = "\n".join(steps)
        records.append(
            {"question": question, "thinking": thinking, "answer": f"The answer is {number}."}
        )
    return records


def _shopping(draw: random.Random) -> tuple[str, list[str], int]:
    name, thing = draw.choice(NAMES.split()), draw.choice(THINGS.split())
    count, price, bag = draw.randint(3, 12), draw.randint(2, 15), draw.randint(1, 9)
    cost, paid = count * price, 200
    question = (
        f"{name} buys {count} {thing} for {price} coins each and a bag for {bag} coins. {name} pays with "
        f"{paid} coins. How many coins come back?"
    )
    steps = [
        f"The {thing} cost {count} x {price} = {cost} coins.",
        f"With the bag it is {cost} + {bag} = {cost + bag} coins.",
        f"Back come {paid} - {cost + bag} = {paid - cost - bag} coins.",
    ]
    return question, steps, paid - cost - bag


def _sharing(draw: random.Random) -> tuple[str, list[str], int]:
    name, thing = draw.choice(NAMES.split()), draw.choice(THINGS.split())
    friends, each, kept = draw.randint(2, 9), draw.randint(3, 14), draw.randint(2, 20)
    total = friends * each + kept
    question = (
        f"{name} has {total} {thing}, keeps {kept} and shares the rest equally among {friends} friends. "
        "How many does each friend get?"
    )
    steps = [
        f"To share are {total} - {kept} = {friends * each} {thing}.",
        f"Each of {friends} friends gets {friends * each} / {friends} = {each}.",
    ]
    return question, steps, each


def _journey(draw: random.Random) -> tuple[str, list[str], int]:
    name = draw.choice(NAMES.split())
    speed, hours, more = draw.randint(4, 18), draw.randint(2, 6), draw.randint(3, 25)
    question = (
        f"{name} rides a bicycle at {speed} km per hour for {hours} hours and then walks {more} km. How many "
        "kilometres is that in all?"
    )
    steps = [
        f"Riding: {speed} x {hours} = {speed * hours} km.",
        f"In all: {speed * hours} + {more} = {speed * hours + more} km.",
    ]
    return question, steps, speed * hours + more


def _saving(draw: random.Random) -> tuple[str, list[str], int]:
    name, weeks = draw.choice(NAMES.split()), draw.randint(3, 12)
    start, weekly, spent = draw.randint(10, 60), draw.randint(3, 15), draw.randint(2, 20)
    saved = start + weeks * weekly
    question = (
        f"{name} has {start} coins, saves {weekly} coins a week for {weeks} weeks and spends {spent}. How "
        "many coins are left?"
    )
    steps = [
        f"In {weeks} weeks {name} saves {weeks} x {weekly} = {weeks * weekly} coins.",
        f"Together with the first ones: {start} + {weeks * weekly} = {saved}.",
        f"Left are {saved} - {spent} = {saved - spent} coins.",
    ]
    return question, steps, saved - spent


def _garden(draw: random.Random) -> tuple[str, list[str], int]:
    rows, plants, dead = draw.randint(3, 14), draw.randint(4, 15), draw.randint(1, 9)
    question = (
        f"A garden has {rows} rows of {plants} plants. {dead} plants die. How many plants are left?"
    )
    steps = [
        f"Planted are {rows} x {plants} = {rows * plants}.",
        f"Left are {rows * plants} - {dead} = {rows * plants - dead}.",
    ]
    return question, steps, rows * plants - dead


KINDS = (_shopping, _sharing, _journey, _saving, _garden)
