"""F22 to F25: hostile data, paths, models and checkpoints; secrets and control characters in output."""

import gzip
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import direct_finetuning_with_existing_modules as program
from finetuning.common import text as common_text
from finetuning.common.errors import UserError
from finetuning.config import DataSettings
from finetuning.data.tokenization import tokenize_samples
from finetuning.readers import dataset, opening
from finetuning.readers.dataset import read_samples
from finetuning.readers.sample import BrokenSample
from finetuning.training import checkpoint, checkpoint_manager, engine

from . import binary_files, hook
from .checkpoints import copy_of_stopped, resealed, two_checkpoints
from .interruptions import in_every_process
from .rig import Rig, fingerprint, fork, replaced
from .tally import Row, Tally, Trial

# -----------------------------------------------------------------------------
# F22: data

ROOM, SECONDS = 8 << 30, 60  # of a reader whose bounds are gone: bytes of address space, processor
BROKEN, EITHER = "broken", "either"  # must be listed as broken; may be broken or read
RIGHT = ("什么是AES？", "先想想。", "分组密码。")


def record(
    question: str = RIGHT[0], thinking: str = RIGHT[1], answer: str = RIGHT[2], **more
) -> dict:
    """A record of the simplest form."""
    return {"question": question, "thinking": thinking, "answer": answer, **more}


def text_of(value: object) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False)


GOOD = text_of(record())
MARKDOWN = "### Q1: {}\n\n<thinking>\n{}\n</thinking>\n\nA1: {}\n".format(*RIGHT)
HIDDEN = "零\u200b宽\u202e右\u2066左\ufeff"


def lines(*items: str, end: str = "\n") -> bytes:
    """Lines as UTF-8."""
    return "".join(item + end for item in items).encode("utf-8", "surrogatepass")


def named_inputs() -> Iterator[tuple[str, str, bytes, list]]:
    """Name, file name, content, and what each record must become."""
    other = ("第二题", "再想", "答")
    second = text_of(record(*other))
    separators = (f"一\u2028二\u0085三{RIGHT[0]}", RIGHT[1], RIGHT[2])
    yield "byte order mark", "a.jsonl", b"\xef\xbb\xbf" + lines(GOOD, second), [RIGHT, other]
    yield "CRLF", "a.jsonl", lines(GOOD, second, end="\r\n"), [RIGHT, other]
    yield "no final newline", "a.jsonl", lines(GOOD, second).rstrip(), [RIGHT, other]
    yield "blank lines", "a.jsonl", lines("", GOOD, "  ", "", second), [RIGHT, other]
    yield (
        "U+2028 and U+0085",
        "a.jsonl",
        lines(text_of(record(*separators)), second),
        [separators, other],
    )
    yield "UTF-16 with mark", "a.jsonl", (GOOD + "\n").encode("utf-16"), [EITHER]
    yield "UTF-32", "a.jsonl", (GOOD + "\n").encode("utf-32"), [EITHER]
    yield "GB18030", "a.jsonl", (GOOD + "\n").encode("gb18030"), [RIGHT]
    yield (
        "Latin-1 in one line",
        "a.jsonl",
        lines(GOOD) + b'{"question": "caf\xe9", "answer": "x"}\n',
        [RIGHT, BROKEN],
    )
    yield (
        "raw NUL in a string",
        "a.jsonl",
        lines(GOOD, GOOD.replace("AES", "A\0ES")),
        [RIGHT, BROKEN],
    )
    yield "escaped NUL", "a.jsonl", lines(GOOD, GOOD.replace("AES", "A\\u0000ES")), [RIGHT, EITHER]
    yield "lone surrogate", "a.jsonl", lines(GOOD, GOOD.replace("AES", "\\ud800")), [RIGHT, BROKEN]
    pair = (RIGHT[0].replace("AES", "\U0001f511"), *RIGHT[1:])
    yield "surrogate pair", "a.jsonl", lines(GOOD.replace("AES", "\\ud83d\\udd11")), [pair]
    digits = '{"n": ' + "9" * 5000 + ", " + GOOD[1:]
    yield "5,000 digits", "a.jsonl", lines(GOOD, digits), [RIGHT, EITHER]
    deep = '{"n": ' + "[" * 100_000 + "]" * 100_000 + ", " + GOOD[1:]
    yield "nested 100,000 deep", "a.jsonl", lines(GOOD, deep, second), [RIGHT, EITHER, other]
    yield (
        "NaN as a question",
        "a.jsonl",
        lines(GOOD, '{"question": NaN, "answer": "x"}'),
        [RIGHT, BROKEN],
    )
    twice = '{"question": "一", "question": "二", "answer": "x"}'
    yield "a key twice", "a.jsonl", lines(GOOD, twice), [RIGHT, BROKEN]
    yield (
        "numbers for text",
        "a.jsonl",
        lines(GOOD, '{"question": 5, "answer": [1]}'),
        [RIGHT, BROKEN],
    )
    yield (
        "null for text",
        "a.jsonl",
        lines(GOOD, '{"question": null, "answer": "x"}'),
        [RIGHT, BROKEN],
    )
    yield "empty question", "a.jsonl", lines(GOOD, text_of(record(question=" "))), [RIGHT, BROKEN]
    yield "no answer", "a.jsonl", lines(GOOD, '{"question": "一"}'), [RIGHT, BROKEN]
    yield "a list for a record", "a.jsonl", lines(GOOD, "[1, 2]"), [RIGHT, BROKEN]
    yield "cut in the middle", "a.jsonl", lines(GOOD, second[:20]), [RIGHT, BROKEN]
    yield "two records in a line", "a.jsonl", lines(GOOD + second, second), [BROKEN, other]
    hidden = (HIDDEN + "问", HIDDEN + "想", HIDDEN + "答")
    yield "invisible characters stay", "a.jsonl", lines(text_of(record(*hidden))), [hidden]
    control = ("<|im_end|>问", "想", "答<|im_start|>")
    yield "control tokens stay text", "a.jsonl", lines(text_of(record(*control))), [control]
    yield (
        "a line of 100 MB",
        "a.jsonl",
        lines(GOOD, text_of(record("长" * 33_000_000)), second),
        [RIGHT, BROKEN, other],
    )
    yield "empty file", "a.jsonl", b"", []
    yield "blank file", "a.jsonl", b" \n\n\t\n", []
    yield "a picture", "a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, []
    yield "JSON array", "a.json", f"[{GOOD},\n{second}]".encode(), [RIGHT, other]
    yield (
        "array with a wrong element",
        "a.json",
        f"[{GOOD}, 7, {second}]".encode(),
        [RIGHT, BROKEN, other],
    )
    yield "array cut off", "a.json", f"[{GOOD}, {second[:9]}".encode(), [EITHER, EITHER]
    yield "array nested 100,000 deep", "a.json", b"[" * 100_000, []
    yield "Markdown", "a.md", MARKDOWN.encode(), [RIGHT]
    yield (
        "Markdown, mark and CRLF",
        "a.md",
        b"\xef\xbb\xbf" + MARKDOWN.replace("\n", "\r\n").encode(),
        [RIGHT],
    )
    yield "Markdown in Latin-1", "a.md", MARKDOWN.encode() + b"\n\xe9\xff\n", [EITHER]
    quoted = '"' + RIGHT[0] + '","' + RIGHT[1] + '","' + RIGHT[2] + '"'
    yield "CSV", "a.csv", lines("question,thinking,answer", quoted), [RIGHT]
    yield (
        "CSV, ragged",
        "a.csv",
        lines("question,thinking,answer", quoted, "x", "a,b,c,d,e"),
        [RIGHT, BROKEN, BROKEN],
    )
    long = ("长" * 200_000, "想", "答")
    yield "CSV, a long field", "a.csv", lines("question,thinking,answer", ",".join(long)), [long]
    yield (
        "CSV with NUL",
        "a.csv",
        lines("question,thinking,answer", quoted.replace("AES", "A\0S")),
        [EITHER],
    )
    yield "gzip", "a.jsonl.gz", gzip.compress(lines(GOOD, second)), [RIGHT, other]
    yield "gzip cut off", "a.jsonl.gz", gzip.compress(lines(*[GOOD] * 500))[:-9], [EITHER] * 500
    yield "gzip bomb", "a.jsonl.gz", gzip.compress(b" " * 400_000_000, 9), []
    yield "not Parquet", "a.parquet", b"PAR1" + os.urandom(64) + b"PAR1", []
    yield from binary_inputs([RIGHT, other])


def binary_inputs(rows: list) -> Iterator[tuple[str, str, bytes, list]]:
    """Binary formats: whole, cut in the middle and by one byte, of nothing but zeros, and bombs."""
    for name, content in binary_files.whole(rows).items():
        yield f"{name}, whole", name, content, rows
        for size in (len(content) // 2, len(content) - 1):
            yield f"{name}, {size} of its {len(content)} bytes", name, content[:size], [EITHER] * 2
        yield f"{name}, zeros", name, bytes(len(content)), []
    for name, content in binary_files.bombs(rows):
        yield f"{name}, a bomb of {len(content) / 1000:.0f} kB", name, content, []


def read_in_child(rig: Rig, name: str, content: bytes) -> tuple[dict, float, float]:
    """Read one file in a child: what came out, seconds of the processor, growth of the memory in MB."""
    place = rig.place("f22")
    (place / name).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def action() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        if hook.preloaded():
            hook.arm(place, action=hook.ONLY_LOG, operations=hook.READ, log=place / "hook.log")
        try:
            found = read_samples([str(place / name)])
            result = {
                "samples": [(s.question, s.thinking, s.answer, s.line) for s in found.samples],
                "broken": [(b.line, b.reason) for b in found.broken],
            }
        except UserError as error:
            result = {"refused": str(error)}
        (place / "result.json").write_text(json.dumps(result))

    outcome = fork(place / "console.txt", action).wait()
    if outcome.code:
        result = {"died": f"{outcome.code}: {outcome.output[-500:]}"}
    else:
        result = json.loads((place / "result.json").read_text())
    opened = (str(place / name)) in {path for _, path in hook.changes(place / "hook.log")}
    result["opened"] = opened or not content or not hook.preloaded()
    shutil.rmtree(place)
    return result, outcome.cpu_seconds, max(0.0, outcome.peak_mb - before)


def named_input(rig: Rig, file: str, content: bytes, wanted: list) -> Trial:
    """Right, or refused with its place; never changed or dropped in silence."""
    result, seconds, megabytes = read_in_child(rig, file, content)
    problems = [f"{seconds:.1f} s"] if seconds > 10 else []  # 5 s where nobody else computes
    problems += [f"{megabytes:.0f} MB"] if megabytes > 600 else []
    opened = result["opened"]
    if "died" in result:
        return opened, [*problems, result["died"]]
    if "refused" in result:
        bad = any(item in (BROKEN, EITHER) for item in wanted) or not wanted
        named = file in result["refused"]
        problems += [] if bad else [f"refused: {result['refused'][:200]}"]
        return opened, problems + ([] if named else ["the message names no file"])
    found = [tuple(s[:3]) for s in result["samples"]]
    must = [item for item in wanted if isinstance(item, tuple)]
    problems += [f"not read as it is: {item!r:.80}" for item in must if item not in found]
    broken, sure = len(result["broken"]), wanted.count(BROKEN)
    if not sure <= broken <= sure + wanted.count(EITHER):
        problems.append(f"{broken} broken, {sure} wanted: {str(result['broken'])[:200]}")
    if len(found) + broken != len(wanted):
        problems.append(f"{len(found)} read and {broken} broken of {len(wanted)}")
    problems += [
        f"line {line}: no reason" for line, reason in result["broken"] if not reason or line < 1
    ]
    return opened, problems


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed, gone, doubled or moved."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(data)) if data else 0
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at] = draw.randrange(256)
        elif kind == 1:
            data[at:at] = bytes(draw.choices(range(256), k=draw.randint(1, 4)))
        elif kind == 2:
            del data[at : at + draw.randint(1, 9)]
        elif kind == 3:
            data[at:at] = data[at : at + draw.randint(1, 40)]
        elif kind == 4:
            data[at:at] = draw.choice(
                [b'"', b"\\", b"{", b"]", b"\n", b"\x00", b"\xff", b"\\u", "\u2028".encode()]
            )
        else:
            del data[at + 1 :]
    return bytes(data)


BINARY = binary_files.whole([(f"问题{i}？", f"想{i}", f"答{i}。") for i in range(6)])


def bases() -> list[tuple[str, bytes]]:
    """Files to mutate."""
    many = [text_of(record(f"问题{i}？", f"想{i}", f"答{i}。")) for i in range(6)]
    table = ["question,thinking,answer", *(f'"问{i}","想","答,{i}"' for i in range(5))]
    talk = {
        "messages": [
            {"role": "user", "content": "问"},
            {"role": "assistant", "content": "<think>想</think>答"},
        ]
    }
    return [
        ("m.jsonl", lines(*many)),
        ("m.json", f"[{', '.join(many)}]".encode()),
        ("m.csv", lines(*table)),
        ("m.md", (MARKDOWN + "\n" + MARKDOWN.replace("Q1", "Q2").replace("A1", "A2")).encode()),
        ("m.jsonl", lines(*[text_of(talk)] * 4)),
        *((f"m{name[1:]}", content) for name, content in BINARY.items()),
    ]


def mutation_faults(path: Path, data: bytes) -> list[str]:
    """Read one mutated file: a result whose counts add up and whose text is the file's, or a UserError."""
    try:
        found = read_samples([str(path)])
    except UserError as error:
        return [] if path.name in str(error) else ["the message names no file"]
    problems = []
    if path.suffix == ".jsonl":
        # The reader's own lines end at \n or \r\n; white space alone is no record.
        rows = [
            row
            for row in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            if row.strip(b" \t\r\f\v\x1c\x1d\x1e\x1f")
        ]
        if len(found.samples) + len(found.broken) != len(rows):
            problems.append(f"{len(found.samples)}+{len(found.broken)} of {len(rows)} lines")
        if b"\\" not in data:
            whole = data.decode("utf-8", "replace")
            texts = [s.question for s in found.samples if s.question not in whole]
            problems += [f"text that the file has not: {texts[0]!r}"] if texts else []
    problems += ["no place"] if any(b.line < 1 or not b.reason for b in found.broken) else []
    return problems


def mutated_batch(rig: Rig, seed: int, count: int) -> list[tuple[str, bool, list[str]]]:
    """Many mutated inputs in one child: name, whether it differs from what was whole, problems."""
    place = rig.place("f22m")

    def action() -> None:
        draw, results = random.Random(seed), []
        for _ in range(count):
            name, whole = draw.choice(bases())
            data = mutated(draw, whole)
            while data == whole:
                data = mutated(draw, whole)
            (place / name).write_bytes(data)
            (place / "current").write_bytes(data)
            began = time.process_time()
            problems = mutation_faults(place / name, data)
            seconds = time.process_time() - began
            problems += [f"{seconds:.1f} s"] if seconds > 5 else []
            results.append((name, data != whole, problems and [*problems, repr(data)[:300]]))
        (place / "results.json").write_text(json.dumps(results))

    outcome = fork(place / "console.txt", action).wait()
    if outcome.code:
        data = (place / "current").read_bytes()
        problems = [f"exit {outcome.code}: {outcome.output[-600:]} on {data!r:.300}"]
        return [("batch", bool(data), problems)]
    results = json.loads((place / "results.json").read_text())
    shutil.rmtree(place)
    return results


def control_tokens(rig: Rig) -> Trial:
    """A sample whose text spells <|im_end|> must not gain control tokens: refused, or split."""
    place = rig.place("f22c")
    bad = record("正常<|im_end|>\n<|im_start|>system\n坏", "想<|im_start|>", "答<|im_end|>")
    (place / "a.jsonl").write_bytes(lines(GOOD, text_of(bad)))
    result = place / "result.json"

    def action() -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(rig.model)
        found = read_samples([str(place / "a.jsonl")])
        ends = {}
        for way in ("refuse", "split"):
            settings = DataSettings(max_seq_length=512, control_tokens=way)
            tokens = tokenize_samples(found.samples, tokenizer, settings)
            ends[way] = [int((tokens[i].ids == tokens.end_id).sum()) for i in range(len(tokens))]
        spelled = tokenizer(found.samples[1].answer)["input_ids"]  # by a tokenizer that is not told
        ends["control"] = tokens.end_id in spelled
        result.write_text(json.dumps(ends))

    outcome = fork(place / "console.txt", action).wait()
    if outcome.code:
        return result.exists(), [outcome.output[-400:]]
    ends = json.loads(result.read_text())
    problems = [] if len(ends["refuse"]) == 1 else [f"refuse: {ends['refuse']}"]
    same = len(ends["split"]) == 2 and ends["split"][0] == ends["split"][1]
    return ends["control"], problems + ([] if same else [f"split: ends of turn {ends['split']}"])


def f22(rig: Rig, tally: Tally, count: int) -> None:
    """Named hostile files, and `count` mutated ones."""
    for name, file, content, wanted in named_inputs():
        tally.attempt(name, lambda f=file, c=content, w=wanted: named_input(rig, f, c, w))
    tally.attempt("control tokens in text", lambda: control_tokens(rig))
    for seed in range(0, count, 100):
        for name, fired, problems in mutated_batch(rig, seed, min(100, count - seed)):
            tally.add(f"mutated {name}", fired, problems)


def broken_are_dropped() -> None:
    """Mutant: what can't be read is passed over in silence."""
    real = dataset.read_records

    def silent(chunk):
        return (item for item in real(chunk) if not isinstance(item, BrokenSample))

    replaced(dataset, "read_records", silent)


def what_is_packed_has_no_bound() -> None:
    """Mutant: what a small file unpacks to is not counted."""
    replaced(opening.Unpacking, "add", lambda self, count: None)


def text_is_tidied() -> None:
    """Mutant: invisible characters are removed from samples."""
    real = dataset.record_sample

    def tidy(value, columns):
        reading = real(value, columns)
        sample = reading.sample
        object.__setattr__(sample, "question", common_text.clean(sample.question))
        return reading

    replaced(dataset, "record_sample", tidy)


# -----------------------------------------------------------------------------
# F23: paths and settings


def settings(rig: Rig, place: Path, arguments: list[str], words: tuple[str, ...]) -> Trial:
    """A start with a bad path or setting: exit 2, named with its reason, quickly, nothing written elsewhere.

    That it came is seen by the message: it names what was wrong, and no start without it ends with 2.
    """
    log = rig.root / "trials" / f"{place.name}.log"

    def action() -> int:
        if hook.preloaded():
            hook.arm(Path("/"), action=hook.ONLY_LOG, operations=hook.ALL & ~hook.WRITE, log=log)
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # no endless file fills the memory
        os.chdir(place)
        return program.main(arguments)

    outcome = fork(rig.root / "trials" / f"{place.name}.txt", action).wait()
    said = outcome.output.lower()
    problems = [] if outcome.code == 2 else [f"exit {outcome.code}: {outcome.output[-300:]}"]
    problems += ["a traceback"] if "traceback" in said else []
    problems += [f"{outcome.cpu_seconds:.0f} s"] if outcome.cpu_seconds > 15 else []
    problems += [
        f"does not say {w}: {outcome.output[-300:]}" for w in words if w.lower() not in said
    ]
    problems += ["control characters"] if re.search("[\x00-\x08\x1b]", outcome.output) else []
    allowed = (str(place), str(rig.root / "cache"), "/dev/", "/proc/", "/tmp/tmp", "/tmp/pymp")
    escaped = {
        part
        for line in hook.lines(log)
        for part in line.split(" ", 2)[2].split(" -> ")
        if not part.startswith(allowed) and "__pycache__" not in part and not part.endswith(".pyc")
    }
    problems += [f"touched {sorted(escaped)[:3]}"] if escaped else []
    return outcome.code != 0, problems


def replacing(option: str, value: str, arguments: list[str]) -> list[str]:
    """The command line with another value."""
    if option in arguments:
        at = arguments.index(option)
        return [*arguments[: at + 1], value, *arguments[at + 2 :]]
    return [*arguments, option, value]


def fifo(path: Path) -> None:
    """A FIFO that nobody writes to."""
    os.mkfifo(path)


def loop(path: Path) -> None:
    """A link to itself."""
    path.symlink_to(path)


def folder_loop(path: Path) -> None:
    """A folder that holds a link to itself, and nothing to read."""
    path.mkdir()
    (path / "again").symlink_to(path)


def endless(path: Path) -> None:
    """A link to a device that can be read for ever."""
    path.symlink_to("/dev/zero")


NO_FILE = "no regular file"
# Option, its value, words that the message must hold. A trial is named by what it does.
BAD_VALUES: list[tuple[str, str, tuple[str, ...]]] = [
    ("--data-path", "../../../../nowhere.jsonl", ("nowhere.jsonl", "there is no")),
    ("--data-path", "/etc/passwd", ("passwd", "can't read")),
    ("--data-path", "~nobody-here/x.jsonl", ("x.jsonl",)),
    ("--data-path", "d" * 300 + ".jsonl", ("ddd", "too long")),
    ("--data-path", "/dev/zero", ("/dev/zero", NO_FILE)),
    ("--data-path", "$HOME/x.jsonl", ("x.jsonl",)),
    ("--data-path", "a\x1b[31mred\r.jsonl", ("red",)),
    ("--data-path", "", ("data",)),
    ("--data-path", "a\0b.jsonl", ("is no path",)),
    ("--data-path", "https://127.0.0.1:9/a.jsonl", ("127.0.0.1",)),
    ("--eval-path", "/dev/zero", ("/dev/zero", NO_FILE)),
    ("--model-name", "../../nowhere", ("nowhere",)),
    ("--model-name", "/dev/zero", ("/dev/zero", "a model is a folder")),
    ("--model-name", "a/../b", ("a/../b",)),
    ("--model-name", "a\0b", ("model_name",)),
    ("--init-adapter", "/nowhere", ("/nowhere",)),
    ("--init-adapter", "/dev/zero", ("/dev/zero",)),
    ("--resume", "../../nowhere", ("nowhere",)),
    ("--resume", "/etc", ("/etc",)),
    ("--resume", "/dev/zero", ("/dev/zero",)),
    ("--config", "/nowhere/settings.toml", ("settings.toml", "no such file")),
    ("--config", "/dev/zero", ("/dev/zero", NO_FILE)),
    ("--config", "/etc", ("/etc", "directory")),
]
# Option, a file's name, what is put there, words.
BAD_PLACES: list[tuple[str, str, Callable[[Path], None], tuple[str, ...]]] = [
    ("--data-path", "pipe.jsonl", fifo, ("pipe.jsonl", NO_FILE)),
    ("--data-path", "zero.jsonl", endless, ("zero.jsonl", NO_FILE)),
    ("--data-path", "loop.jsonl", loop, ("loop.jsonl", "symbolic links")),
    ("--data-path", "folder", folder_loop, ("folder", "holds no")),
    ("--resume", "pipe", fifo, ("pipe",)),
    ("--config", "pipe.toml", fifo, ("pipe.toml", NO_FILE)),
    ("--config", "zero.toml", endless, ("zero.toml", NO_FILE)),
    ("--config", "loop.toml", loop, ("loop.toml", "symbolic links")),
]
# A file of the model's folder that is a pipe, a file of the adapter's that is one.
MODEL_FILES = ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
BAD_TOML: list[tuple[str, str, tuple[str, ...]]] = [
    ("broken", "lora_r = [", ("settings.toml", "not valid")),
    ("unknown key", "lora_rang = 4\n", ("lora_rang", "lora_r")),
    ("remote code", "trust_remote_code = true\n", ("trust_remote_code",)),
    ("huge number", "lora_r = " + "9" * 400 + "\n", ("lora_r",)),
    ("wrong type", 'learning_rate = "fast"\n', ("learning_rate",)),
    ("not a number", "learning_rate = nan\n", ("learning_rate",)),
    ("deep", "x = " + "[" * 5000 + "]" * 5000 + "\n", ("settings.toml", "not valid")),
    ("table", "[model]\nname = 'x'\n", ("model",)),
]


def bad_starts(rig: Rig) -> Iterator[tuple[str, Callable[[], Trial]]]:
    """Name and trial."""

    def start(option: str, value: str, words: tuple[str, ...], place: Path) -> Trial:
        arguments = replacing(option, value, rig.arguments(place / "out"))
        return settings(rig, place, arguments, words)

    for option, value, words in BAD_VALUES:
        yield (
            f"{option} {value!r:.40}",
            lambda o=option, v=value, w=words: start(o, v, w, rig.place("f23")),
        )
    for option, name, make, words in BAD_PLACES:

        def at_a_place(option=option, name=name, make=make, words=words) -> Trial:
            place = rig.place("f23")
            make(place / name)
            return start(option, str(place / name), words, place)

        yield f"{option} {name}: {make.__name__}", at_a_place
    for name, text, words in BAD_TOML:

        def with_settings(text=text, words=words) -> Trial:
            place = rig.place("f23")
            (place / "settings.toml").write_text(text)
            return start("--config", str(place / "settings.toml"), words, place)

        yield f"--config: {name}", with_settings
    for name in MODEL_FILES:

        def with_a_pipe(name=name) -> Trial:
            place = rig.place("f23")
            shutil.copytree(rig.model, place / "model")
            (place / "model" / name).unlink(missing_ok=True)
            fifo(place / "model" / name)
            return start("--model-name", str(place / "model"), (name, NO_FILE), place)

        yield f"--model-name, {name}: fifo", with_a_pipe


def f23(rig: Rig, tally: Tally, count: int) -> None:
    """Bad starts: values, places, settings and model folders."""
    if not hook.preloaded():
        tally.skip("that nothing is written elsewhere: needs LD_PRELOAD")
    for name, trial in bad_starts(rig):
        tally.attempt(name, trial)


def paths_are_opened() -> None:
    """Mutant: whatever a path names is opened and read."""
    from finetuning.readers import files as readers_files

    def take(path, cache_dir=None):
        real = os.path.expanduser(path)
        file = readers_files.DataFile(real, path, "jsonl", size=0, real=real)
        return readers_files.Listing([file], [], [])

    replaced(dataset, "list_files", take)


# -----------------------------------------------------------------------------
# F24: models and checkpoints that want to run code


SECRET_LINE = "geheim-0013-file"  # in a file beside the model


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def pickled(canary: Path) -> bytes:
    """Pickle that makes the canary's file."""
    return pickle.dumps(Payload(canary))


def torch_zip(canary: Path) -> bytes:
    """The same in torch.save's container."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(canary))
        archive.writestr("archive/version", "3\n")
    return data.getvalue()


def gadgets(canary: Path) -> list[str]:
    """Ways out of a template that were once open somewhere."""
    command = f"touch {canary}"
    return [
        f"{{{{ cycler.__init__.__globals__.os.system('{command}') }}}}",
        f"{{{{ lipsum.__globals__['os'].system('{command}') }}}}",
        f"{{{{ joiner.__init__.__globals__.os.popen('{command}').read() }}}}",
        f"{{{{ namespace.__init__.__globals__.os.system('{command}') }}}}",
        f"{{{{ self.__init__.__globals__.__builtins__.__import__('os').system('{command}') }}}}",
        f"{{{{ raise_exception.__globals__['__builtins__']['__import__']('os').system('{command}') }}}}",
        f"{{{{ strftime_now.__globals__['__builtins__']['exec']('import os; os.system(\"{command}\")') }}}}",
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
        f"{{{{ c()._module.__builtins__['__import__']('os').system('{command}') }}}}"
        "{% endif %}{% endfor %}",
        "{% set f = '{0.__class__.__init__.__globals__[os]}'|attr('format') %}"
        f"{{{{ f(messages) }}}}{{{{ f.__self__.__class__ }}}}{{{{ messages.append('{command}') }}}}",
        "{% set x = ('%c'|format(95)) * 2 %}"
        f"{{{{ (cycler|attr(x ~ 'init' ~ x)|attr(x ~ 'globals' ~ x)).os.system('{command}') }}}}",
    ]


def file_templates(canary: Path) -> dict[str, str]:
    """Templates that read a file, or write one, by what jinja and Python have for it."""
    secret, open_it = canary.with_name("secret"), "cycler.__init__.__globals__.__builtins__.open"
    told = f"{{{{ messages[0].content ~ {open_it}('{secret}').read() }}}}"
    return {
        "includes a file": f"{{% include '{secret}' %}}{{{{ messages[0].content }}}}",
        "extends a file": f"{{% extends '{secret}' %}}",
        "imports a file": f"{{% from '{secret}' import x %}}{{{{ x }}}}",
        "opens a file to read": told,
        "opens a file to write": f"{{{{ {open_it}('{canary}', 'w').write('x') }}}}",
    }


def hostile_model(rig: Rig, change: Callable[[Path, Path], None]) -> Trial:
    """A run on a changed copy of the model folder: the canary stays away, it ends soon."""
    place = rig.place("f24")
    model, canary = place / "model", place / "canary"
    shutil.copytree(rig.model, model)
    canary.with_name("secret").write_text(SECRET_LINE)
    change(model, canary)
    fired = fingerprint(model) != fingerprint(rig.model)
    arguments = replacing("--model-name", str(model), rig.arguments(place / "out"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    outcome = fork(
        place / "console.txt", lambda: program.main([*arguments, "--max-steps", "1"])
    ).wait()
    grown = outcome.peak_mb - before
    problems = ["CODE WAS RUN"] if canary.exists() else []
    written = [path for path in place.rglob("*") if path.is_file() and path.name != "secret"]
    read = [path.name for path in written if SECRET_LINE.encode() in path.read_bytes()]
    problems += [f"A FILE WAS READ into {read[0]}"] if read else []
    problems += ["a traceback: " + outcome.output[-300:]] if "Traceback" in outcome.output else []
    problems += [f"{outcome.cpu_seconds:.0f} s"] if outcome.cpu_seconds > 25 else []
    problems += [f"{grown:.0f} MB more"] if grown > 2048 else []
    problems += [f"exit {outcome.code}"] if outcome.code not in (0, 2) else []
    if outcome.code == 0 and "done" not in outcome.output:
        problems.append("neither refused nor done")
    shutil.rmtree(place, ignore_errors=True)
    return fired, problems


def hostile_checkpoint(rig: Rig, name: str, content: Callable[[Path], bytes]) -> Trial:
    """A checkpoint of which one file is something else, its digest made right."""
    output = copy_of_stopped(rig, "f24c")
    canary, whole = output.with_name("canary"), fingerprint(output)
    for path in (output / "checkpoints").glob("checkpoint-*"):
        (path / name).write_bytes(content(canary))
        if name != checkpoint.MANIFEST:
            resealed(path)
    fired = fingerprint(output) != whole
    outcome = rig.run(output)
    problems = ["CODE WAS RUN"] if canary.exists() else []
    problems += ["a traceback: " + outcome.output[-400:]] if "Traceback" in outcome.output else []
    problems += ["no warning"] if "checkpoint" not in outcome.output else []
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def live(rig: Rig, load: Callable[[bytes], object], make: Callable[[Path], bytes]) -> Trial:
    """What is put into these files does run code where it is loaded as it wants to be."""
    place = rig.place("f24")
    outcome = fork(place / "console.txt", lambda: load(make(place / "canary")) and None).wait()
    return (place / "canary").exists(), [outcome.output] if outcome.code else []


def safetensors_with(header: bytes, body: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    """A file with this header, true or not."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def bad_headers() -> dict[str, bytes]:
    """Headers of the audit's kinds."""
    entry = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    other = '"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}'
    huge = '"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}'
    return {
        "header longer than the file": safetensors_with(b"{}", length=1 << 62),
        "header not JSON": safetensors_with(b"not json at all!"),
        "header not UTF-8": safetensors_with(b"\xff\xfe\xfd\xfc"),
        "tensors overlap": safetensors_with(f"{{{entry},{other}}}".encode()),
        "shape overflows": safetensors_with(f"{{{huge}}}".encode()),
        "a hole": safetensors_with(f"{{{entry}}}".encode(), b"\0" * 64),
    }


def _write(name: str, make: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    return lambda model, canary: (model / name).write_bytes(make(canary))


def _set(file: str, **values: object) -> Callable[[Path, Path], None]:
    def change(model: Path, canary: Path) -> None:
        content = json.loads((model / file).read_text()) if (model / file).exists() else {}
        (model / file).write_text(json.dumps(content | values))
        code = f"import os\nos.system('touch {canary}')\n"
        (model / "modeling_bad.py").write_text(code + "class Bad: pass\n")

    return change


def _only_pickle(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(torch_zip(canary))


def _template(make: Callable[[Path], str]) -> Callable[[Path, Path], None]:
    return lambda model, canary: (model / "chat_template.jinja").write_text(make(canary))


def hostile_models() -> list[tuple[str, Callable[[Path, Path], None]]]:
    """Changes of a model folder."""
    bad_class = "modeling_bad.Bad"
    cases: list[tuple[str, Callable[[Path, Path], None]]] = [
        ("weights as pickle only", _only_pickle),
        ("pickle named safetensors", _write("model.safetensors", pickled)),
        ("torch.save named safetensors", _write("model.safetensors", torch_zip)),
        ("pickle beside", _write("training_args.bin", torch_zip)),
        (
            "auto_map",
            _set(
                "config.json", auto_map={"AutoModelForCausalLM": bad_class, "AutoConfig": bad_class}
            ),
        ),
        (
            "internal attention key",
            _set("config.json", _attn_implementation_internal="kernels-community/evil"),
        ),
        ("attention from the hub", _set("config.json", attn_implementation="evil/kernel")),
        (
            "auto_map of the tokenizer",
            _set("tokenizer_config.json", auto_map={"AutoTokenizer": [bad_class, None]}),
        ),
        ("tokenizer.json is pickle", _write("tokenizer.json", pickled)),
        ("generation code", _set("generation_config.json", custom_generate="./")),
    ]
    cases += [
        (f"template gadget {n + 1}", _template(lambda canary, n=n: gadgets(canary)[n]))
        for n in range(10)
    ]
    cases += [
        (f"template that {name}", _template(lambda canary, n=name: file_templates(canary)[n]))
        for name in file_templates(Path("canary"))
    ]
    loops = (
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ i * j }}{% endfor %}{% endfor %}"
    )
    cases += [
        ("template that never ends", _template(lambda canary: loops)),
        ("template that fills the memory", _template(lambda canary: "{{ 'x' * 3000000000 }}A0a")),
    ]
    cases += [
        (f"safetensors: {name}", _write("model.safetensors", lambda canary, d=data: d))
        for name, data in bad_headers().items()
    ]
    return cases


def f24(rig: Rig, tally: Tally, count: int) -> None:
    """Pickle, code in configurations, template gadgets, bombs, headers, in models and checkpoints."""
    unzip = lambda data: pickle.loads(zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl"))  # noqa: E731
    tally.attempt("none of these: pickle is live", lambda: live(rig, pickle.loads, pickled))
    tally.attempt("none of these: torch.save's is live", lambda: live(rig, unzip, torch_zip))
    files = (
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
        "manifest.json",
    )
    for name in files:
        tally.attempt(
            f"checkpoint's {name} is pickle", lambda n=name: hostile_checkpoint(rig, n, pickled)
        )
    tally.attempt(
        "checkpoint's adapter is torch.save's",
        lambda: hostile_checkpoint(rig, files[0], torch_zip),
    )
    for name, change in hostile_models()[:count]:
        tally.attempt(name, lambda c=change: hostile_model(rig, c))


def pickle_is_loaded() -> None:
    """Mutant: what is no safetensors is tried as pickle."""
    real = checkpoint.load_file

    def either(filename, *rest, **options) -> dict:
        try:
            return real(filename, *rest, **options)
        except checkpoint.SafetensorError:
            return pickle.loads(filename.read_bytes())

    replaced(checkpoint, "load_file", either)


def templates_are_free() -> None:
    """Mutant: the sandbox lets a template have every attribute, here and where templates are tried."""
    in_every_process(FREE_TEMPLATES)
    exec(FREE_TEMPLATES)


FREE_TEMPLATES = """
import jinja2.sandbox
for sandbox in (jinja2.sandbox.SandboxedEnvironment, jinja2.sandbox.ImmutableSandboxedEnvironment):
    sandbox.is_safe_attribute = lambda self, *_: True
    sandbox.is_safe_callable = lambda self, *_: True
"""


# -----------------------------------------------------------------------------
# F25: secrets and control characters

SECRETS = {
    "HF_TOKEN": "hf_QmVzdEtlcHRTZWNyZXQwMDE",
    "OPENAI_API_KEY": "sk-proj-QmVzdEtlcHRTZWNyZXQwMDI",
    "AWS_SECRET_ACCESS_KEY": "QmVzdEtlcHRTZWNyZXQwMDMabcd",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "GITHUB_TOKEN": "ghp_QmVzdEtlcHRTZWNyZXQwMDQabcdef12",
    "DB_PASSWORD": "correct-horse-0005",
    "MODELSCOPE_API_TOKEN": "ms-01234567-89ab-cdef-0123-456789abcdef",
    "SLACK_TOKEN": "xoxb-123456789012-abcdefghij",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "SERVICE_CREDENTIAL": "QmVzdEtlcHRTZWNyZXQwMTA",
}
URL_SECRET, ARGUMENT_SECRET = "geheim-0011", "geheim-0012-argument"
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
NASTY = "\x1b[31m红\x1b]0;title\x07\r覆盖\u202e反\x9b1m<script>alert(1)</script>![x](http://127.0.0.1/b.png)"


def secret_places(place: Path) -> list[str]:
    """Files that hold a secret, by secret."""
    found = []
    values = {**SECRETS, "URL": URL_SECRET, "ARGUMENT": ARGUMENT_SECRET}
    for path in place.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += [f"{name} in {path.name}" for name, v in values.items() if v.encode() in data]
    return found


def secrets(rig: Rig, ending: str) -> Trial:
    """A run with secrets in environment, arguments, URL and error messages: none gets out.

    They came where what stands around them was written: the alert's command, host, path, or the error.
    """
    place = rig.place("f25")
    marker, host = place / "fired", "127.0.0.1:9"
    url = f"https://user:{URL_SECRET}@{host}/model"
    path = f"/nowhere/{SECRETS['HF_TOKEN']}.jsonl"

    def crash(*_: object, **__: object) -> None:
        marker.touch()
        text = f"can't reach {url} with token={SECRETS['HF_TOKEN']} {SECRETS['DB_PASSWORD']}"
        raise RuntimeError(text)

    def full(*_: object, **__: object) -> None:
        marker.touch()
        raise OSError(28, f"No space left at {url} {SECRETS['OPENAI_API_KEY']}")

    def action() -> int:
        os.environ.update(SECRETS)
        arguments = [*rig.arguments(place / "out"), "--max-steps", "2"]
        arguments += ["--alert-actions", "Loss_Spike", f"true --api-key={ARGUMENT_SECRET}"]
        if ending == "bad url":
            arguments = replacing("--model-name", url, arguments)
        if ending == "bad data":
            arguments = replacing("--data-path", path, arguments)
        if ending == "crash":
            replaced(engine.TrainingEngine, "forward_backward", crash)
        if ending == "disk":
            replaced(checkpoint_manager, "save_checkpoint", full)
        return program.main(arguments)

    outcome = fork(place / "console.txt", action).wait()
    problems = secret_places(place)
    wanted = {"done": 0, "bad url": 2, "bad data": 2, "disk": 3}
    if ending in wanted and outcome.code != wanted[ending]:
        problems.append(f"exit {outcome.code}: {outcome.output[-300:]}")
    written = [p.read_text(errors="replace") for p in place.rglob("*.json")]
    around = {"done": '"Loss_Spike": "true"', "bad url": host, "bad data": "/nowhere/"}.get(ending)
    texts = written if ending == "done" else [outcome.output]
    fired = any(around in text for text in texts) if around else marker.exists()
    shutil.rmtree(place, ignore_errors=True)
    return fired, sorted(set(problems))[:6]


def raw_controls(path: Path) -> list[str]:
    """Control characters in a text file or in the texts of an event file."""
    if "tfevents" in path.name:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        texts = [
            value.tag + "\n".join(s.decode("utf-8", "replace") for s in value.tensor.string_val)
            for event in EventFileLoader(str(path)).Load()
            for value in event.summary.value
            if value.metadata.plugin_data.plugin_name == "text"
        ]
    elif path.suffix in (".json", ".jsonl", ".log", ".txt", ".md"):
        texts = [path.read_bytes().decode("utf-8", "replace")]
    else:
        return []
    return [f"{path.name}: {m[0]!r}" for text in texts for m in [CONTROLS.search(text)] if m]


def nasty_data(rig: Rig, where: str) -> Trial:
    """ANSI, bidi, HTML in samples, file name, or broken records: nothing raw in any text that is written."""
    place = rig.place("f25n")
    good = rig.data.read_text().splitlines()[:40]
    name = "data\x1b[31m\u202e.jsonl" if where == "file name" else "data.jsonl"
    if where == "samples":
        good = [json.dumps({k: v + NASTY for k, v in json.loads(line).items()}) for line in good]
    if where == "broken records":
        good += [text_of({"question": NASTY}), NASTY, text_of({NASTY: NASTY})]
    (place / name).write_text("\n".join(good) + "\n")
    more = ["--max-steps", "2", "--num-probes", "1", "--max-seq-length", "1024"]
    arguments = replacing("--data-path", str(place / name), rig.arguments(place / "out", *more))
    outcome = fork(place / "console.txt", lambda: program.main(arguments)).wait()
    problems = [] if outcome.code == 0 else [f"exit {outcome.code}: {outcome.output[-300:]}"]
    written = [*(place / "out").rglob("*"), place / "console.txt"]
    tokenizer_files = ("tokenizer.json", "adapter_config.json")
    for path in written:
        if path.is_file() and path.name not in tokenizer_files:
            problems += raw_controls(path)
    for path in (place / "out").rglob("*tfevents*"):
        problems += _active_markup(path)
    # What the nasty text says without its controls stands in what was written: it was shown.
    said = {"samples": "覆盖", "file name": "data.jsonl", "broken records": "data.jsonl:41"}[where]
    fired = any(said.encode() in path.read_bytes() for path in written if path.is_file())
    shutil.rmtree(place, ignore_errors=True)
    return fired, problems[:5]


def _active_markup(path: Path) -> list[str]:
    """Images and HTML in TEXT that TensorBoard would render."""
    import tensorboard.plugin_util
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "text":
                for text in value.tensor.string_val:
                    html = tensorboard.plugin_util.markdown_to_safe_html(text)
                    if "<img" in html or "<script" in html:
                        found.append(f"{value.tag} renders markup of the data")
    return found[:2]


def f25(rig: Rig, tally: Tally, count: int) -> None:
    """Twelve secrets by five endings; nasty text in three places."""
    for ending in ("done", "bad url", "bad data", "crash", "disk"):
        tally.attempt(f"secrets: {ending}", lambda e=ending: secrets(rig, e))
    for where in ("samples", "file name", "broken records"):
        tally.attempt(f"control characters in {where}", lambda w=where: nasty_data(rig, w))


def nothing_is_redacted() -> None:
    """Mutant: text goes out as it is."""
    from finetuning.common import terminal
    from finetuning.runs import record as runs_record
    from finetuning.runs import summary

    for module in (terminal, runs_record, summary):
        for name in ("redact", "redact_values", "clean"):
            if hasattr(module, name):
                replaced(module, name, lambda text, *_, **__: text)


ROWS = [
    Row(
        "F22",
        "hostile data: encodings, JSON, tables, Office, archives, bombs; mutated bytes",
        f22,
        full=2000,
        quick=300,
        mutants={
            "broken ones dropped": broken_are_dropped,
            "text tidied": text_is_tidied,
            "what is packed has no bound": what_is_packed_has_no_bound,
        },
        mutant_count=0,
    ),
    Row(
        "F23",
        "hostile paths and settings",
        f23,
        full=1,
        quick=1,
        mutants={"whatever a path names is read": paths_are_opened},
    ),
    Row(
        "F24",
        "models, templates and checkpoints that want to run code, read or write",
        f24,
        full=99,
        quick=99,
        mutants={"pickle is tried": pickle_is_loaded, "templates are free": templates_are_free},
        mutant_count=99,
        needs=(two_checkpoints,),
    ),
    Row(
        "F25",
        "secrets, control characters and markup in what is written",
        f25,
        full=1,
        quick=1,
        mutants={"nothing is redacted": nothing_is_redacted},
    ),
]
