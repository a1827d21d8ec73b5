"""The common rig: a tiny Qwen3 with adapters, 64 records, 24 updates, and a fork server to run it in.

A trial forks the warm process (torch and transformers are imported, nothing has run) and calls the
program's own `main()` in the child, so a run takes about two seconds instead of ten. Faults and mutants
are applied in the child; the program has no hooks for tests.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import direct_finetuning_with_existing_modules as program
from finetuning.model import demo_model
from finetuning.training import engine

from .tally import SUITE_ERROR, SuiteError, of_the_suite

NUM_RECORDS, NUM_STEPS, SAVE_STEPS = 64, 24, 5
LEDGER = "truncation.jsonl"
_WORDS = list(
    [
        "密钥",
        "分组",
        "密码",
        "公钥",
        "私钥",
        "签名",
        "散列",
        "碰撞",
        "随机",
        "椭圆",
        "曲线",
        "同态",
        "格",
        "侧信道",
        "填充",
        "协议",
        "证书",
        "明文",
        "密文",
        "认证",
        "完整性",
        "机密性",
        "攻击",
        "安全",
        "证明",
        "归约",
        "素数",
        "模数",
        "指数",
        "迭代",
        "轮函数",
        "置换",
        "线性",
        "差分",
        "代数",
        "消息",
        "摘要",
        "计数器",
        "向量",
    ]
)


# -----------------------------------------------------------------------------
# What a run is made of


def write_records(path: Path, count: int = NUM_RECORDS) -> None:
    """Records of random words, each with its number, far from near-duplicates; lengths differ."""
    draw = random.Random(7)

    def text(low: int, high: int) -> str:
        return "".join(draw.choices(_WORDS, k=draw.randint(low, high)))

    records = (
        {
            "question": f"第{i}题：{text(4, 9)}？",
            "thinking": f"先看{text(5, 20)}。再看{text(5, 15)}。",
            "answer": f"答案{i}是{text(5, 12)}。",
        }
        for i in range(count)
    )
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def build_model_folder(folder: Path, records: Path) -> Path:
    """A two-layer Qwen3 folder with hidden size 64 and the embedded model's kind of tokenizer."""
    texts = records.read_text(encoding="utf-8").splitlines()
    tokenizer = demo_model.train_tokenizer(texts)
    config = demo_model._model_config(tokenizer, 2)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(3)
    model = demo_model.Qwen3ForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `code` is the exit code, or minus the signal that killed it."""

    code: int
    seconds: float
    output: str
    left_alive: bool = False


# -----------------------------------------------------------------------------
# Children


@dataclass
class Child:
    """A forked process in a session of its own; its output goes to a file."""

    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)

    def kill(self, number: int) -> bool:
        """Send a signal; False if the child had ended already."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._status = status
            return False
        os.kill(self.pid, number)
        return True

    def wait(self, limit: float = 60.0) -> Outcome:
        """Reap the child; after `limit` seconds it is killed and the code is -SIGALRM."""
        status, late = getattr(self, "_status", None), False
        while status is None:
            pid, got = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                status = got
            elif not late and time.monotonic() - self.began > limit:
                late = True
                os.kill(self.pid, signal.SIGKILL)
            else:
                time.sleep(0.005)
        seconds = time.monotonic() - self.began
        alive = _end_group(self.pid)
        code = -signal.SIGALRM if late else os.waitstatus_to_exitcode(status)
        output = self.log.read_text(encoding="utf-8", errors="replace")
        if code == SUITE_ERROR:
            raise SuiteError(output[-3000:])
        return Outcome(code, seconds, output, alive)


def _end_group(group: int) -> bool:
    """Kill what the dead child left running; True if there was anything."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def fork(log: Path, action: Callable[[], int | None]) -> Child:
    """Run `action` in a forked child; its return value is the exit code, a traceback is 70.

    An error of the suite's own code ends it with `SUITE_ERROR`, for which `Child.wait` raises SuiteError.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 70
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False, buffering=1)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
        code = action() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        code = SUITE_ERROR if of_the_suite(error) else code
        sys.excepthook(*sys.exc_info())  # what a user sees; the program may have put its own there
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# -----------------------------------------------------------------------------
# The rig


@dataclass
class Rig:
    """Model, data and one uninterrupted run to compare with, below one temporary directory."""

    root: Path
    reference: "Reference | None" = None
    pair: "Reference | None" = None  # of two ranks

    def __post_init__(self) -> None:
        self.data, self.model = self.root / "records.jsonl", self.root / "model"
        self._count = 0
        if not self.data.is_file():
            self.root.mkdir(parents=True, exist_ok=True)
            write_records(self.data)
            build_model_folder(self.model, self.data)

    def place(self, name: str) -> Path:
        """A fresh directory for a trial."""
        self._count += 1
        path = self.root / "trials" / f"{name}-{os.getpid()}-{self._count}"
        path.mkdir(parents=True)
        return path

    def arguments(self, output: Path, *more: str) -> list[str]:
        """The command line of a run."""
        fixed = f"""--data-path {self.data} --model-name {self.model} --output-dir {output}
            --cache-dir {self.root / "cache"} --lora-r 4 --lora-dropout 0.1 --learning-rate 1e-3
            --max-seq-length 256 --gradient-accumulation-steps 3 --max-steps {NUM_STEPS}
            --save-steps {SAVE_STEPS} --save-total-limit 2 --logging-steps 1 --eval-steps 8
            --num-probes 0 --workers 1 --device cpu --resume auto"""
        return [*fixed.split(), *more]

    def start(
        self,
        output: Path,
        *more: str,
        patch: Callable[[], None] | None = None,
        notes: Path | None = None,
    ) -> Child:
        """Fork a run of the program writing below `output`; `patch` is called in the child first.

        Console and truncation are written beside `notes` (the output directory, unless it is said).
        """
        notes = notes or output

        def action() -> int:
            torch.set_num_threads(1)
            write_ledger(notes.with_name(notes.name + "." + LEDGER))
            if patch is not None:
                patch()
            return program.main(self.arguments(output, *more))

        log = notes.with_name(notes.name + ".console.txt")
        log.unlink(missing_ok=True)
        return fork(log, action)

    def run(
        self,
        output: Path,
        *more: str,
        patch: Callable[[], None] | None = None,
        limit: float = 60.0,
        notes: Path | None = None,
    ) -> Outcome:
        """`start` and wait."""
        return self.start(output, *more, patch=patch, notes=notes).wait(limit)

    def make_reference(self) -> "Reference":
        """One uninterrupted run."""
        output = self.root / "reference" / "out"
        outcome = self.run(output, limit=180)
        if outcome.code:
            raise RuntimeError(f"the reference run failed:\n{outcome.output[-4000:]}")
        self.reference = Reference.read(output)
        self.reference.seconds = outcome.seconds
        return self.reference


def write_ledger(path: Path) -> None:
    """In a child: note every update's documents, losses, rate, gradient and random state, as hex."""
    update = engine.update_weights
    collect = program.DirectTrainer.advance
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if path.stat().st_size and not path.read_bytes().endswith(
        b"\n"
    ):  # a killed process's last line
        os.write(handle, b"\n")
    seen: dict[str, object] = {}

    def update_weights(optimizer, grad_norm, **options):
        seen["lr"] = float(optimizer.param_groups[0]["lr"]).hex()
        seen["grad"] = float(grad_norm).hex()
        update(optimizer, grad_norm, **options)

    def advance(self, step, planned):
        sums = torch.stack([s.per_document.double().sum() for _, s in self.pending[-1].sums]).sum()
        random_state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16]
        weights = hashlib.sha256()
        for parameter in self.engine.parameters:
            weights.update(parameter.detach().contiguous().numpy().tobytes())
        record = {
            "step": step,
            "epoch": planned.epoch,
            "documents": planned.documents,
            "loss": float(sums).hex(),
            "rng": random_state,
            "weights": weights.hexdigest()[:16],
            **seen,
        }
        os.write(handle, (json.dumps(record) + "\n").encode())
        return collect(self, step, planned)

    engine.update_weights = update_weights
    program.DirectTrainer.advance = advance


# -----------------------------------------------------------------------------
# Nothing lost


@dataclass
class Reference:
    """What an uninterrupted run left behind."""

    truncation: dict[int, dict]
    curves: dict[str, dict[int, float]]
    adapter: str
    totals: dict
    seconds: float = 0.0

    @classmethod
    def read(cls, output: Path) -> "Reference":
        """Read a finished run."""
        return cls(
            truncation=read_ledger(output)[0],
            curves=read_curves(output),
            adapter=adapter_hash(output),
            totals=totals(output),
        )


def read_ledger(output: Path) -> tuple[dict[int, dict], int]:
    """Step -> last record, and how many steps were done again. A step done twice must not differ."""
    found, again = {}, 0
    path = output.with_name(output.name + "." + LEDGER)
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line in which the process was killed
            continue
        again += record["step"] in found
        found[record["step"]] = record
    return found, again


def adapter_hash(output: Path) -> str:
    """SHA-256 of the final adapter's file."""
    return hashlib.sha256(
        (output / "final_model" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


CURVES = ("Training/Loss", "Training/Learning_Rate", "Training/Gradient_Norm", "Eval/Loss")


def read_curves(output: Path) -> dict[str, dict[int, float]]:
    """Training curves of the newest run by TensorBoard's own loader; a step seen twice is -1."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    curves: dict[str, dict[int, float]] = {tag: {} for tag in CURVES}
    runs = sorted((output / "tensorboard_logs").iterdir(), key=lambda p: p.stat().st_mtime)
    for path in sorted(runs[-1].glob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in curves:
                    number = value.tensor.float_val[0] if value.tensor.float_val else 0.0
                    seen = event.step in curves[value.tag]
                    curves[value.tag][event.step] = -1.0 if seen else number
    return curves


def strict_json(path: Path) -> dict:
    """A JSON file without NaN, Infinity or duplicate keys."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{path.name} holds {name}")

    def no_twice(pairs: list) -> dict:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError(f"{path.name} has a key twice")
        return dict(pairs)

    return json.loads(
        path.read_text(encoding="utf-8"), parse_constant=no_constant, object_pairs_hook=no_twice
    )


def totals(output: Path) -> dict:
    """Everything countable in training_statistics.json: no times, rates, paths."""
    return _countable(strict_json(output / "training_statistics.json"))


_COUNTED = ("step", "token", "sample", "loss", "epoch")
_UNCOUNTED = ("second", "per_", "resume", "throughput", "time", "dir", "path", "percent")


def _countable(value: dict, prefix: str = "") -> dict:
    found = {}
    for key, item in value.items():
        name = f"{prefix}{key}".lower()
        if isinstance(item, dict):
            found |= _countable(item, f"{name}.")
        elif isinstance(item, (int, float, type(None))):
            counts = any(word in name for word in _COUNTED)
            if counts and not any(word in name for word in _UNCOUNTED):
                found[name] = item
    return found


LEFTOVERS = ("**/.staging-*", "**/*.tmp", "**/.probe-*", "**/.final_model-*", "**/.best_model-*")


def leftovers(output: Path) -> list[str]:
    """Temporary files that a finished run left in its directory."""
    return [p.name for pattern in LEFTOVERS for p in output.glob(pattern)]


def nothing_lost(
    output: Path, reference: Reference, outcome: Outcome, notes: Path | None = None
) -> list[str]:
    """Criteria (b) to (h) on a run that came to its end; the faults found, in words."""
    if outcome.code != 0:
        return [f"the last run ended with {outcome.code}: {outcome.output[-400:]}"]
    faults = ["a process was left running"] if outcome.left_alive else []
    truncation, _ = read_ledger(notes or output)
    for step, record in reference.truncation.items():
        if truncation.get(step) != record:
            keys = [k for k in record if truncation.get(step, {}).get(k) != record[k]]
            faults.append(f"step {step} differs from the uninterrupted run in {', '.join(keys)}")
            break
    faults += epoch_faults(truncation, reference.truncation)
    if adapter_hash(output) != reference.adapter:
        faults.append("the final adapter differs")
    for tag, curve in read_curves(output).items():
        if curve != reference.curves[tag]:
            steps = set(curve.items()) ^ set(reference.curves[tag].items())
            faults.append(f"curve {tag} differs at steps {sorted({s for s, _ in steps})[:6]}")
    if totals(output) != reference.totals:
        different = set(totals(output).items()) ^ set(reference.totals.items())
        faults.append(f"training_statistics.json differs in {sorted({k for k, _ in different})}")
    if left := leftovers(output):
        faults.append(f"left behind: {', '.join(left[:4])}")
    return faults


def epoch_faults(truncation: dict[int, dict], reference: dict[int, dict]) -> list[str]:
    """Every document exactly once per whole epoch."""
    epochs: dict[int, list[int]] = {}
    for record in truncation.values():
        epochs.setdefault(record["epoch"], []).extend(record["documents"])
    everything = sorted(d for r in reference.values() if r["epoch"] == 0 for d in r["documents"])
    whole = [e for e in epochs if e < max(epochs)]
    return [
        f"epoch {e}: not every document exactly once"
        for e in whole
        if sorted(epochs[e]) != everything
    ]


def announced(output: Path) -> list[Path]:
    """Checkpoints that the run's log says are saved, in order."""
    lines = []
    for log in sorted((output / "training_logs").glob("*/training.log")):
        text = log.read_text(encoding="utf-8", errors="replace")
        lines += text[: text.rfind("\n") + 1].splitlines()  # a torn line announces nothing
    return [Path(line.partition(" saved ")[2]) for line in lines if " saved " in line]


def announced_is_kept(output: Path) -> list[str]:
    """Criterion (a): the newest announced checkpoint, or a newer one, loads."""
    from finetuning.training.checkpoint import newest_checkpoint

    said = announced(output)
    if not said:
        return []
    step = int(said[-1].name.removeprefix("checkpoint-").partition(".")[0])
    found = newest_checkpoint(output / "checkpoints", warn=lambda text: None)
    if found is None or found.step < step:
        return [f"{said[-1].name} was announced, the newest that loads is {found and found.step}"]
    return []


def steps_of(output: Path) -> Iterator[int]:
    """Steps of the checkpoints that are there."""
    for path in (output / "checkpoints").glob("checkpoint-*"):
        if not path.name.endswith(".damaged"):
            yield int(path.name.removeprefix("checkpoint-").partition(".")[0])


def status_of(output: Path) -> dict:
    """The newest run's status file."""
    paths = sorted((output / "training_logs").glob("*/status.json"))
    return strict_json(paths[-1]) if paths else {}


def replaced(owner: object, name: str, value: object) -> None:
    """Set an attribute that must exist: a mutant of something renamed would prove nothing."""
    if not hasattr(owner, name):
        raise SuiteError(f"{owner} has no {name}")
    setattr(owner, name, value)


def as_dict(value: object) -> dict:
    """A dataclass as plain data."""
    return dataclasses.asdict(value)


def find_all(text: str, words: Sequence[str]) -> list[str]:
    """Words that the text does not hold."""
    return [word for word in words if word.lower() not in text.lower()]
