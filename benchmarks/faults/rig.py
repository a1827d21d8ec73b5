"""The common rig: a tiny Qwen3 with adapters, 64 records, 24 updates, and a fork server to run it in.

A trial forks the warm process (all that a run imports is imported, nothing has run) and calls the
program's own `main()` in the child, so a run takes about a second instead of ten. Faults and mutants
are applied in the child; the program has no hooks for tests.

Nothing waits for seconds: what a trial waits for is the end of a process, its being stopped, or a file;
the seconds in a call are those after which the wait is given up, and the trial lost.
"""

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import direct_finetuning_with_existing_modules as program
from finetuning.analysis import crypto_terms, text_quality
from finetuning.analysis import report as analysis_report
from finetuning.common.errors import UserError
from finetuning.common.limited import Ended
from finetuning.model import demo_model
from finetuning.runs import report as run_report
from finetuning.runs.recorded import find_runs
from finetuning.training import engine, forecast

from . import hook
from .tally import SUITE_ERROR, SuiteError, of_the_suite

NUM_RECORDS, NUM_STEPS, SAVE_STEPS = 64, 24, 5
LIMIT = 300.0  # seconds after which something hangs, however busy the machine
LEDGER = "truncation.jsonl"
_WORDS = [
    "密钥", "分组", "密码", "公钥", "私钥", "签名", "散列", "碰撞", "随机", "椭圆", "曲线", "同态", "格",
    "侧信道", "填充", "协议", "证书", "明文", "密文", "认证", "完整性", "机密性", "攻击", "安全", "证明",
    "归约", "素数", "模数", "指数", "迭代", "轮函数", "置换", "线性", "差分", "代数", "消息", "摘要",
    "计数器", "向量",
]  # fmt: skip


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
    """A Qwen3 folder of one layer with hidden size 64 and the embedded model's kind of tokenizer."""
    texts = records.read_text(encoding="utf-8").splitlines()
    tokenizer = demo_model.train_tokenizer(texts)
    config = Qwen3Config(
        vocab_size=demo_model.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `code` is the exit code, or minus the signal that killed it.

    cpu_seconds: of it and of the children that it waited for. peak_mb: what the largest of them held.
    """

    code: int
    output: str
    cpu_seconds: float
    peak_mb: float
    left_alive: bool = False


# -----------------------------------------------------------------------------
# Children


@dataclass
class Child:
    """A forked process in a session of its own; its output goes to a file."""

    pid: int
    log: Path
    _end: tuple[int, resource.struct_rusage] | None = None

    def _look(self) -> bool:
        """Whether it is stopped now; notes its end."""
        if self._end is not None:
            return False
        pid, status, usage = os.wait4(self.pid, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            return True
        if pid:
            self._end = status, usage
        return False

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self._end is None:
            self._look()
        return self._end is None

    def kill(self, number: int) -> bool:
        """Send a signal; False if the child had ended already."""
        if self.running():
            os.kill(self.pid, number)
        return self._end is None

    def stopped(self, limit: float = LIMIT) -> bool:
        """Wait until SIGSTOP has stopped it; False where it ended, or went on for so many seconds."""
        seen: list[bool] = []
        wait_until(lambda: seen.append(self._look()) or seen[-1] or self._end is not None, limit)
        return seen[-1]

    def wait(self, limit: float = LIMIT) -> Outcome:
        """Reap the child; after `limit` seconds it is killed and the code is -SIGALRM."""
        late = not wait_until(lambda: not self.running(), limit)
        if late:
            self.kill(signal.SIGKILL)
            wait_until(lambda: not self.running(), LIMIT)
        status, usage = self._end
        alive = _end_group(self.pid)
        code = -signal.SIGALRM if late else os.waitstatus_to_exitcode(status)
        output = self.log.read_text(encoding="utf-8", errors="replace")
        if code == SUITE_ERROR:
            raise SuiteError(output[-3000:])
        return Outcome(code, output, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, alive)


def wait_until(condition: Callable[[], object], limit: float = LIMIT) -> bool:
    """Look again and again; False where it was not so for so many seconds."""
    end, pause = time.monotonic() + limit, 0.0005
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True


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
        # A suite that was started under nohup, or in the background, ignores signals; its trials don't.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
    changes: list[tuple[str, str]] = field(default_factory=list)  # to files, by a whole run
    cpu_seconds: float = 0.0  # of a whole run
    peak_mb: float = 0.0  # of a short one

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
            --max-seq-length 256 --gradient-accumulation-steps 2 --max-steps {NUM_STEPS}
            --save-steps {SAVE_STEPS} --save-total-limit 2 --logging-steps 1 --eval-steps 8
            --num-probes 0 --workers 1 --device cpu --resume auto"""
        return [*fixed.split(), *more]

    def main(
        self,
        output: Path,
        *more: str,
        patch: Callable[[], None] | None = None,
        notes: Path | None = None,
    ) -> int:
        """The program itself, in a child, with a ledger of what it does."""
        notes = notes or output
        torch.set_num_threads(1)
        write_ledger(ledger_of(notes))
        if patch is not None:
            patch()
        return program.main(self.arguments(output, *more))

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
            return self.main(output, *more, patch=patch, notes=notes)

        log = notes.with_name(notes.name + ".console.txt")
        log.unlink(missing_ok=True)
        return fork(log, action)

    def run(
        self,
        output: Path,
        *more: str,
        patch: Callable[[], None] | None = None,
        limit: float = LIMIT,
        notes: Path | None = None,
    ) -> Outcome:
        """`start` and wait."""
        return self.start(output, *more, patch=patch, notes=notes).wait(limit)

    def make_reference(self) -> None:
        """One uninterrupted run, which also says how many changes to files it makes and what it imports.

        That is imported here then, so that no trial has to; none of its code runs here.
        """
        spare_what_no_fault_meets()
        output, names = self.root / "reference" / "out", self.root / "modules.txt"
        log = output.with_name("hook.log")

        def action() -> int:
            if hook.preloaded():
                hook.arm(output, action=hook.ONLY_LOG, log=log)
            code = self.main(output)
            names.write_text("\n".join(sys.modules))
            return code

        outcome = fork(self.root / "reference.txt", action).wait()
        if outcome.code:
            raise SuiteError(f"a plain run of the program fails here:\n{outcome.output[-4000:]}")
        self.reference = Reference.read(output)
        self.changes, self.cpu_seconds = hook.changes(log), outcome.cpu_seconds
        for name in names.read_text().split("\n"):
            if name not in sys.modules and not name.startswith(("tests", "benchmarks")):
                with contextlib.suppress(Exception):  # made at run time, or only on the way
                    importlib.import_module(name)
        crypto_terms.load_terms()
        text_quality.character_classes("密")


def spare_what_no_fault_meets() -> None:
    """Half of a short run's time: pictures of the dataset, and how fast a matrix product is here."""
    replaced(analysis_report, "figures", lambda report: {})
    replaced(run_report, "run_limited", report_here)
    replaced(forecast, "matmul_rate", lambda device, dims, dtype: 1e10)


def report_here(
    module: str, arguments: tuple[str, ...], limits: object, *, given: bytes = b"", unwanted=None
) -> Ended:
    """In this process, where the faults are, and without the second that another one takes to start."""
    try:
        return Ended(0, str(run_report.write_report(find_runs(arguments)[-1])), "")
    except (OSError, UserError) as error:
        return Ended(2, "", str(error))


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

    def update_weights(optimizer, grad_norm, *, skip=False):
        seen["lr"] = float(optimizer.param_groups[0]["lr"]).hex()
        seen["grad"] = float(grad_norm).hex()
        update(optimizer, grad_norm, skip=skip)

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

    replaced(engine, "update_weights", update_weights)
    replaced(program.DirectTrainer, "advance", advance)


# -----------------------------------------------------------------------------
# Nothing lost


@dataclass
class Reference:
    """What an uninterrupted run left behind."""

    truncation: dict[int, dict]
    curves: dict[str, dict[int, float]]
    adapter: str
    totals: dict

    @classmethod
    def read(cls, output: Path) -> "Reference":
        """Read a finished run."""
        return cls(
            truncation=read_ledger(output)[0],
            curves=read_curves(output),
            adapter=adapter_hash(output),
            totals=totals(output),
        )


def ledger_of(output: Path) -> Path:
    """The ledger of a run, beside its output."""
    return output.with_name(f"{output.name}.{LEDGER}")


def read_ledger(output: Path) -> tuple[dict[int, dict], int]:
    """Step -> last record, and how many steps were done again. A step done twice must not differ."""
    found, again = {}, 0
    for line in ledger_of(output).read_text().splitlines():
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


# -----------------------------------------------------------------------------
# Faults in a child


def replaced(owner: object, name: str, value: object) -> None:
    """Set an attribute that must exist, and that is called as the new one can be.

    A fault or a mutant of something renamed would do nothing, and one that is called otherwise would
    break the program in its own way; both end the suite.
    """
    if not hasattr(owner, name):
        raise SuiteError(f"{owner} has no {name}")
    real = getattr(owner, name)
    if callable(real) and callable(value):
        _called_alike(f"{owner}.{name}", real, value)
    setattr(owner, name, value)


def _called_alike(name: str, real: Callable, value: Callable) -> None:
    """SuiteError unless `value` takes all arguments of `real`, by place and by name."""
    try:
        wanted, given = inspect.signature(real), inspect.signature(value)
    except (TypeError, ValueError):  # of a function in C
        return
    named = [p for p in wanted.parameters.values() if p.kind is p.KEYWORD_ONLY]
    placed = [
        p
        for p in wanted.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    either = [p for p in placed[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]  # the first may be self
    try:
        given.bind(*[None] * len(placed), **{p.name: None for p in named})
        first = len(placed) - len(either)
        given.bind(*[None] * first, **{p.name: None for p in [*either, *named]})
    except TypeError as error:
        raise SuiteError(f"{name}{wanted} is replaced by one that takes {given}: {error}") from None


def before_call(owner: object, name: str, when: int, action: Callable[[], object]) -> None:
    """Do something at the beginning of the `when`-th call of a function."""
    if not hasattr(owner, name):
        raise SuiteError(f"{owner} has no {name}")
    real, calls = getattr(owner, name), []

    def first(*arguments, **options):
        calls.append(name)
        if len(calls) == when:
            action()
        return real(*arguments, **options)

    replaced(owner, name, first)


def before_step(step: int, action: Callable[[], object]) -> None:
    """Do something when the gradients of an update are about to be computed."""
    gradients = engine.TrainingEngine.forward_backward

    def first(self, planned, tokens, clock, state, wants_stop):
        if state.step + 1 == step:
            action()
        return gradients(self, planned, tokens, clock, state, wants_stop)

    replaced(engine.TrainingEngine, "forward_backward", first)


def after_step(step: int, action: Callable[[], object]) -> None:
    """Do something when an update is done and counted, by this process."""
    advance = program.DirectTrainer.advance

    def then(self, *arguments, **options):
        advance(self, *arguments, **options)
        if self.state.step == step:
            action()

    replaced(program.DirectTrainer, "advance", then)


def steps_done() -> Callable[[], int]:
    """The number of the last update that is done, from now on."""
    last, advance = [0], program.DirectTrainer.advance

    def counted(self, step, planned):
        last[0] = step
        return advance(self, step, planned)

    replaced(program.DirectTrainer, "advance", counted)
    return lambda: last[0]


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder: whether something was altered, and what."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
