"""F02, F03, F09 to F12: checkpoints under crashes, cuts, flipped bits, strangers and rotation."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch

from finetuning.training import checkpoint, checkpoint_manager, engine

from . import hook
from .rig import Rig, announced_is_kept, fork, leftovers, nothing_lost, replaced
from .tally import Row, Tally

RUN = "qwen3_4b_thinking_20260101_000000"


def quiet(text: str) -> None:
    """A warning that nobody reads."""


def save(directory: Path, step: int, run: str = RUN) -> Path:
    """A small checkpoint."""
    tensors = {
        "adapter_model": {"a": torch.full((16, 8), float(step))},
        "optimizer": {"a::exp_avg": torch.full((16, 8), -float(step))},
        "rng": {"rank0.cpu": torch.arange(64, dtype=torch.uint8)},
    }
    return checkpoint.save_checkpoint(
        directory,
        step,
        run=run,
        tensors=tensors,
        documents={"adapter_config.json": {"r": 4}},
        state={"train_state": {"step": step}},
    )


def prune(directory: Path, keep: int = 2, protect: Path | None = None) -> None:
    """Rotation as the loop does it."""
    checkpoint.prune_checkpoints(directory, run=RUN, keep=keep, protect=protect, warn=quiet)


# -----------------------------------------------------------------------------
# F02: every crash point


def story(directory: Path, said: Path) -> None:
    """Three saves with rotation to two; each is announced, as by the loop, once it is durable."""
    for step in (5, 10, 15):
        save(directory, step)
        with open(said, "a") as file:
            file.write(f"{step}\n")
        prune(directory)


def crash_point(rig: Rig, k: int, action: int) -> tuple[bool, list[str]]:
    """Die at the k-th change of the story; what was announced, or newer, must load and go on."""
    place = rig.place("f02")
    directory, said, log = place / "checkpoints", place / "said", place / "hook.log"

    def crash() -> None:
        hook.arm(directory, action=action, first=k, log=log)
        story(directory, said)

    outcome = fork(place / "console.txt", crash).wait(30)
    if outcome.code != -signal.SIGKILL:
        return False, []
    problems = []
    announced = int(said.read_text().split()[-1]) if said.exists() else 0
    checkpoint.remove_leftovers(directory)
    found = checkpoint.newest_checkpoint(directory, warn=problems.append)
    step = found.step if found else 0
    if step < announced:
        problems.append(f"{announced} was announced, {step} is what loads")
    if found and float(found.tensors["adapter_model"]["a"][0, 0]) != step:
        problems.append(f"checkpoint {step} holds other weights")
    for later in (5, 10, 15):
        if later > step:
            save(directory, later)
        prune(directory)
    names = sorted(p.name for p in directory.iterdir())
    if names != ["checkpoint-10", "checkpoint-15"]:
        problems.append(f"after going on there is {names}")
    shutil.rmtree(place)
    return hook.fired(log) or outcome.code == -signal.SIGKILL, problems


def number_of_changes(rig: Rig) -> int:
    """How many changes to files the story makes."""
    place = rig.place("f02")

    def count() -> None:
        hook.arm(place / "checkpoints", action=hook.ONLY_LOG, log=place / "hook.log")
        story(place / "checkpoints", place / "said")

    fork(place / "console.txt", count).wait(30)
    return len(hook.lines(place / "hook.log"))


def run_crash_point(rig: Rig, k: int, action: int) -> tuple[bool, list[str]]:
    """A whole run dies at its k-th change below the output directory; the same command ends it."""
    output = rig.place("f02run") / "out"
    log = output.with_name("hook.log")
    first = rig.run(
        output, patch=lambda: hook.arm(output, action=action, first=k, log=log), limit=120
    )
    fired = first.code == -signal.SIGKILL and hook.fired(log)
    problems = announced_is_kept(output) if (output / "checkpoints").is_dir() else []
    second = rig.run(output, limit=120)
    problems += nothing_lost(output, rig.reference, second)
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def changes_of_a_run(rig: Rig) -> int:
    """How many changes to files a whole run makes; about, since the event file has its own thread."""
    output = rig.place("f02run") / "out"
    log = output.with_name("hook.log")
    rig.run(output, patch=lambda: hook.arm(output, action=hook.ONLY_LOG, log=log), limit=120)
    return len(hook.lines(log))


def f02(rig: Rig, tally: Tally, count: int) -> None:
    """All crash points of save and rotation, before and within each; `count` of whole runs."""
    if not hook.preloaded():
        tally.skip("needs a C compiler and LD_PRELOAD")
        return
    total = number_of_changes(rig)
    tally.measures["changes in save and rotation"] = total
    for k in range(1, total + 1, 1 if count else 4):
        for name, action in (("before", hook.KILL_BEFORE), ("half", hook.KILL_IN_HALF)):
            tally.attempt(f"{name} change {k}", lambda k=k, a=action: crash_point(rig, k, a))
    if not count:
        return
    total = changes_of_a_run(rig)
    tally.measures["changes in a run"] = total
    draw = random.Random(2)
    points = sorted(draw.sample(range(1, total - 1), min(count, total - 2)))
    for k in points:
        action = draw.choice([hook.KILL_BEFORE, hook.KILL_IN_HALF, hook.KILL_AFTER])
        tally.attempt(f"run, change {k}", lambda k=k, a=action: run_crash_point(rig, k, a))


def no_staging() -> None:
    """Mutant: files are written where they will stay, the manifest among them."""

    def write_in_place(directory, step, *, run, tensors, documents, state):
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / f"checkpoint-{step}"
        target.mkdir(exist_ok=True)
        manifest = {
            "format": checkpoint.FORMAT,
            "step": step,
            "run": run,
            "sequence": 1
            + max((m["sequence"] for _, m in checkpoint._manifests(directory)), default=0),
        }
        files = {f"{n}.safetensors": checkpoint.save_safetensors(t) for n, t in tensors.items()} | {
            n: checkpoint._json_bytes(d) for n, d in {**documents, "state.json": state}.items()
        }
        manifest["files"] = {
            n: {"bytes": len(d), "sha256": checkpoint.hashlib.sha256(d).hexdigest()}
            for n, d in files.items()
        }
        checkpoint._write(
            target / "manifest.json", checkpoint._json_bytes(checkpoint._sealed(manifest))
        )
        for name, data in files.items():
            checkpoint._write(target / name, data)
        return target

    replaced(checkpoint, "save_checkpoint", write_in_place)
    replaced(checkpoint_manager, "save_checkpoint", write_in_place)


def delete_before_saving() -> None:
    """Mutant: the old checkpoint goes before the new one is there."""
    real = checkpoint.save_checkpoint

    def delete_first(directory, step, **content):
        for path in directory.glob("checkpoint-*"):
            shutil.rmtree(path)
        return real(directory, step, **content)

    replaced(checkpoint, "save_checkpoint", delete_first)


# -----------------------------------------------------------------------------
# F03: order of the calls


def order_faults(log: list[str], directory: Path) -> tuple[int, list[str]]:
    """Publishes in the log, and violations of: fsync of files < rename < fsync of parent < say < delete."""
    faults, publishes, synced, written = [], 0, set(), {}
    waiting_for_parent = waiting_for_word = ""
    for line in log:
        _, call, rest = line.split(" ", 2)
        path, _, target = rest.partition(" -> ")
        if call in ("write", "pwrite", "pwrite64", "writev") and ".staging" in path:
            written.setdefault(str(Path(path).parent), set()).add(path)
            synced.discard(path)
        elif call in ("fsync", "fdatasync"):
            synced.add(path)
            if path == waiting_for_parent:
                waiting_for_parent = ""
        elif call == "rename" and ".staging-removed" not in target and ".staging" in path:
            publishes += 1
            unsynced = {f for f in written.pop(path, set()) if f not in synced}
            if unsynced:
                faults.append(f"published before fsync of {sorted(unsynced)[0]}")
            if path not in synced:
                faults.append("published before fsync of the staged directory")
            if not Path(target).name.startswith("checkpoint-"):
                faults.append(f"published as {target}")
            waiting_for_parent, waiting_for_word = str(directory), Path(target).name
        elif call == "write" and path.endswith(("said", "training.log")) and waiting_for_word:
            if waiting_for_parent:
                faults.append("announced before fsync of the parent")
            waiting_for_word = ""
        elif _removes(call, path, target) and (waiting_for_parent or waiting_for_word):
            faults.append("an old checkpoint removed before the new one was announced")
    return publishes, faults


def _removes(call: str, path: str, target: str) -> bool:
    """Whether a call takes away a checkpoint or a part of one."""
    takes = call.startswith(("unlink", "rmdir")) or ".staging-removed" in target
    return takes and ("/checkpoint-" in path or ".staging-removed" in path)


def f03(rig: Rig, tally: Tally, count: int) -> None:
    """The order of system calls, seen by the preloaded library and by strace."""
    if hook.preloaded():
        _order_of_the_story(rig, tally)
        _order_of_a_run(rig, tally)
    else:
        tally.skip("the preloaded library: needs a C compiler and LD_PRELOAD")


def _order_of_the_story(rig: Rig, tally: Tally) -> None:
    place = rig.place("f03")
    log = place / "hook.log"

    def watched() -> None:
        hook.arm(place, action=hook.ONLY_LOG, log=log)
        story(place / "checkpoints", place / "said")

    fork(place / "console.txt", watched).wait(30)
    publishes, faults = order_faults(hook.lines(log), place / "checkpoints")
    for number in range(3):
        tally.add(f"publish {number + 1}", publishes == 3, faults)


def _order_of_a_run(rig: Rig, tally: Tally) -> None:
    output = rig.place("f03run") / "out"
    log = output.with_name("hook.log")
    rig.run(output, patch=lambda: hook.arm(output, action=hook.ONLY_LOG, log=log), limit=120)
    lines = [
        line for line in hook.lines(log) if "/checkpoints" in line or line.endswith("training.log")
    ]
    publishes, faults = order_faults(lines, output / "checkpoints")
    for number in range(5):
        tally.add(f"publish {number + 1} of a run", publishes == 5, faults)


def no_fsync() -> None:
    """Mutant: files are written, not synced."""
    replaced(checkpoint.os, "fsync", lambda descriptor: None)


def no_parent_fsync() -> None:
    """Mutant: the rename itself is not made durable."""
    replaced(checkpoint, "fsync_directory", lambda path: None)


# -----------------------------------------------------------------------------
# F09, F10: damage


def two_checkpoints(rig: Rig) -> Path:
    """A run that was asked to stop at step 12: its checkpoints are of steps 10 and 12."""
    output = rig.root / "stopped" / "out"
    if not output.exists():
        outcome = rig.run(output, patch=lambda: stop_at(12), limit=180)
        assert outcome.code == 0, outcome.output
    return output


def stop_at(step: int, number: int = signal.SIGTERM) -> None:
    """In a child: a real signal to itself in `step`, which is the last one then."""
    gradients = engine.TrainingEngine.forward_backward

    def with_signal(self, planned, tokens, clock, state, wants_stop):
        if state.step + 1 == step:
            os.kill(os.getpid(), number)
        return gradients(self, planned, tokens, clock, state, wants_stop)

    engine.TrainingEngine.forward_backward = with_signal


def damaged(rig: Rig, damage: Callable[[Path], bool], resume: bool) -> tuple[bool, list[str]]:
    """Damage the newest of two checkpoints; the one before must be used, the bad one kept aside."""
    output = rig.place("damaged") / "out"
    shutil.copytree(two_checkpoints(rig), output)
    truncation = two_checkpoints(rig).with_name("out.truncation.jsonl")
    shutil.copy(truncation, output.with_name(truncation.name))
    newest = output / "checkpoints" / "checkpoint-12"
    fired = damage(newest)
    warnings: list[str] = []
    problems = []
    found = checkpoint.newest_checkpoint(output / "checkpoints", warn=warnings.append)
    if found is None or found.step != 10:
        problems.append(f"loaded {found and found.step} instead of 10")
    if not any("checkpoint-12" in warning for warning in warnings):
        problems.append("no warning names the damaged checkpoint")
    if not list((output / "checkpoints").glob("checkpoint-12*.damaged")):
        problems.append("the damaged checkpoint was not kept aside")
    if resume and not problems:
        problems = nothing_lost(output, rig.reference, rig.run(output, limit=120))
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def checkpoint_files(rig: Rig) -> list[str]:
    """Names of the files of a checkpoint."""
    newest = two_checkpoints(rig) / "checkpoints" / "checkpoint-12"
    return sorted(p.name for p in newest.iterdir())


def cut(name: str, where: str) -> Callable[[Path], bool]:
    """Truncate one file."""

    def damage(path: Path) -> bool:
        file = path / name
        size = file.stat().st_size
        left = {"0": 0, "1": 1, "8": 8, "half": size // 2, "-1": size - 1}[where]
        os.truncate(file, left)
        return left != size

    return damage


def flip(draw: random.Random) -> Callable[[Path], bool]:
    """Flip one random bit of one random byte of all files."""

    def damage(path: Path) -> bool:
        files = sorted(path.iterdir())
        file = draw.choices(files, weights=[f.stat().st_size for f in files])[0]
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        return True

    return damage


def flip_sequence(bit: int) -> Callable[[Path], bool]:
    """Flip one bit of the number by which the manifest says how new it is."""

    def damage(path: Path) -> bool:
        data = bytearray((path / checkpoint.MANIFEST).read_bytes())
        place = data.index(b'"sequence": ') + len(b'"sequence": ')
        data[place] ^= 1 << bit
        (path / checkpoint.MANIFEST).write_bytes(data)
        return True

    return damage


def f09(rig: Rig, tally: Tally, count: int) -> None:
    """Each file of a checkpoint cut to 0, 1, 8 bytes, half and all but one; `count` are resumed."""
    names = checkpoint_files(rig)
    cases = [(n, w) for n in names for w in ("0", "1", "8", "half", "-1")]
    resumed = set(random.Random(9).sample(range(len(cases)), min(count, len(cases))))
    for i, (name, where) in enumerate(cases):
        trial = lambda n=name, w=where, i=i: damaged(rig, cut(n, w), i in resumed)  # noqa: E731
        tally.attempt(f"{name} cut to {where}", trial)


def f10(rig: Rig, tally: Tally, count: int) -> None:
    """Random single-bit flips over all files, the manifest among them."""
    draw = random.Random(10)
    for number in range(count):
        tally.attempt(f"flip {number}", lambda: damaged(rig, flip(draw), False))
    for bit in range(8):  # no other file would notice these
        tally.attempt(f"sequence, bit {bit}", lambda b=bit: damaged(rig, flip_sequence(b), False))


def no_digests() -> None:
    """Mutant: files are read without looking at their digest."""
    replaced(checkpoint, "_verify", lambda file, entry: None)


def no_seal() -> None:
    """Mutant: the manifest is believed as it stands."""
    read = checkpoint._read_manifest

    def believed(path):
        try:
            return read(path)
        except checkpoint.DamagedCheckpoint:
            return json.loads((path / checkpoint.MANIFEST).read_bytes())

    replaced(checkpoint, "_read_manifest", believed)


def overwrite_damaged() -> None:
    """Mutant: a damaged checkpoint is deleted."""
    replaced(checkpoint, "_put_aside", lambda path: shutil.rmtree(path) or path)


# -----------------------------------------------------------------------------
# F11: missing, swapped, foreign


def missing(name: str) -> Callable[[Path], bool]:
    """One file is gone."""

    def damage(path: Path) -> bool:
        (path / name).unlink()
        return True

    return damage


def swapped(name: str) -> Callable[[Path], bool]:
    """One file is that of the older checkpoint."""

    def damage(path: Path) -> bool:
        other = path.with_name("checkpoint-10") / name
        differs = other.read_bytes() != (path / name).read_bytes()
        shutil.copy(other, path / name)
        return differs

    return damage


def resealed(path: Path) -> None:
    """A manifest with right digests for whatever is in the directory: made by hand, not by damage."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_bytes())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        digest = checkpoint.hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"bytes": len(data), "sha256": digest}
    (path / checkpoint.MANIFEST).write_bytes(checkpoint._json_bytes(checkpoint._sealed(manifest)))


def change_adapter(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Other tensors in the adapter's file, digests made right."""

    def apply(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        tensors = change(safetensors.torch.load(file.read_bytes()))
        file.write_bytes(safetensors.torch.save(tensors))
        resealed(path)

    return apply


def foreign(
    rig: Rig, change: Callable[[Path], None] | None, *options: str, words: tuple[str, ...]
) -> tuple[bool, list[str]]:
    """A whole checkpoint that does not belong to this run: refused with exit code 2, by name."""
    output = rig.place("foreign") / "out"
    shutil.copytree(two_checkpoints(rig), output)
    if change:
        for name in ("checkpoint-12", "checkpoint-10"):
            change(output / "checkpoints" / name)
    outcome = rig.run(output, *options, limit=60)
    problems = []
    if outcome.code != 2:
        problems.append(f"exit code {outcome.code} instead of 2: {outcome.output[-300:]}")
    problems += [f"the message does not say {w}" for w in words if w not in outcome.output]
    if "Traceback" in outcome.output:
        problems.append("a traceback instead of a message")
    shutil.rmtree(output.parent, ignore_errors=True)
    return True, problems


def _without_one(tensors: dict) -> dict:
    return dict(list(tensors.items())[1:])


def _with_one_more(tensors: dict) -> dict:
    return {**tensors, "base_model.model.stranger.lora_A.weight": torch.zeros(4, 64)}


def f11(rig: Rig, tally: Tally, count: int) -> None:
    """Files missing or swapped between steps; checkpoints of another rank, data or tensors."""
    for name in checkpoint_files(rig):
        tally.attempt(f"{name} missing", lambda n=name: damaged(rig, missing(n), False))
        if name != "adapter_config.json":  # the same in both
            tally.attempt(f"{name} swapped", lambda n=name: damaged(rig, swapped(n), False))
    other = rig.root / "other.jsonl"
    other.write_text("".join(rig.data.read_text().splitlines(True)[:40]))
    cases = [
        ("rank 8", None, ("--lora-r", "8"), ("lora_r",)),
        ("other data", None, ("--data-path", str(other)), ("data",)),
        ("tensor missing", change_adapter(_without_one), (), ("missing",)),
        ("tensor too many", change_adapter(_with_one_more), (), ("unexpected",)),
    ]
    for name, change, options, words in cases[:count]:
        trial = lambda c=change, o=options, w=words: foreign(rig, c, *o, words=w)  # noqa: E731
        tally.attempt(name, trial)


def tolerant_loading() -> None:
    """Mutant: tensors that do not fit are passed over, as peft does."""
    from finetuning.model import adapters

    def tolerant(model, tensors, source):
        live = adapters.adapter_state(model)
        for name in live.keys() & tensors.keys():
            live[name].copy_(tensors[name])

    replaced(adapters, "_load_exactly", tolerant)


# -----------------------------------------------------------------------------
# F12: rotation


def rotation(rig: Rig) -> Iterator[tuple[str, Callable[[], tuple[bool, list[str]]]]]:
    """Traps for the code that removes old checkpoints: name and trial."""

    def directory(steps=(5, 10, 15, 20)) -> tuple[Path, list[Path]]:
        place = rig.place("f12") / "checkpoints"
        return place, [save(place, step) for step in steps]

    def left(place: Path) -> set[str]:
        return {p.name for p in place.iterdir()}

    def expect(place: Path, *names: str) -> list[str]:
        missing = [n for n in names if n not in left(place)]
        return [f"{', '.join(missing)} removed; left {sorted(left(place))}"] if missing else []

    def stale() -> tuple[bool, list[str]]:
        place = rig.place("f12") / "checkpoints"
        save(place, 9999, run=RUN.replace("2026", "2025"))
        for step in (5, 10, 15):
            save(place, step)
        prune(place, keep=1)
        found = checkpoint.newest_checkpoint(place, warn=quiet)
        problems = expect(place, "checkpoint-9999", "checkpoint-15")
        problems += [f"newest is {found.step}"] if found.step != 15 else []
        return True, problems

    def best() -> tuple[bool, list[str]]:
        place, paths = directory()
        prune(place, keep=1, protect=paths[0])
        gone = [] if "checkpoint-10" not in left(place) else ["nothing was removed"]
        return True, expect(place, "checkpoint-5", "checkpoint-20") + gone

    def one() -> tuple[bool, list[str]]:
        place, _ = directory()
        prune(place, keep=1)
        return True, [] if left(place) == {"checkpoint-20"} else [str(left(place))]

    def none() -> tuple[bool, list[str]]:
        place, _ = directory()
        prune(place, keep=0)
        return True, expect(place, "checkpoint-20")

    def lower_step_newer() -> tuple[bool, list[str]]:
        place, _ = directory((15, 20, 5))  # went back by hand to an early step
        prune(place, keep=1)
        return True, expect(place, "checkpoint-5")

    def linked() -> tuple[bool, list[str]]:
        place, paths = directory()
        elsewhere = place.parent / "elsewhere"
        shutil.move(paths[0], elsewhere)
        paths[0].symlink_to(elsewhere)
        prune(place, keep=1)
        kept = (elsewhere / "manifest.json").is_file() and (elsewhere / "state.json").is_file()
        return True, [] if kept and paths[0].is_symlink() else ["a link was followed or removed"]

    def link_inside() -> tuple[bool, list[str]]:
        place, paths = directory()
        outside = place.parent / "outside"
        outside.mkdir()
        (outside / "file").write_text("mine")
        (paths[0] / "link").symlink_to(outside)
        prune(place, keep=1)
        return True, [] if (outside / "file").is_file() else ["a link inside was followed"]

    def strangers() -> tuple[bool, list[str]]:
        place, _ = directory()
        (place / "checkpoint-7").mkdir()
        (place / "checkpoint-7" / "mine.txt").write_text("mine")
        (place / "checkpoint-3.damaged").mkdir()
        prune(place, keep=1)
        return True, expect(place, "checkpoint-7", "checkpoint-3.damaged", "checkpoint-20")

    def undeletable() -> tuple[bool, list[str]]:
        place, _ = directory()
        result = place.parent / "warnings"

        def action() -> None:
            hook.arm(
                place,
                action=hook.FAIL,
                error=1,
                count=hook.FOREVER,
                operations=hook.UNLINK | hook.RENAME,
                contains="checkpoint-5",
                log=place.parent / "hook.log",
            )
            said: list[str] = []
            checkpoint.prune_checkpoints(place, run=RUN, keep=1, protect=None, warn=said.append)
            hook.disarm()
            result.write_text("\n".join(said))

        outcome = fork(place.parent / "console.txt", action).wait(20)
        problems = [f"exit {outcome.code}: {outcome.output}"] if outcome.code else []
        problems += [] if "checkpoint-5" in result.read_text() else ["no warning names it"]
        problems += ["the others were not removed"] if "checkpoint-10" in left(place) else []
        return hook.fired(place.parent / "hook.log"), problems + expect(place, "checkpoint-20")

    yield "stale checkpoint-9999 of an older run", stale
    yield "best is not last", best
    yield "keep 1", one
    yield "keep 0 keeps the newest", none
    yield "lower step is newer", lower_step_newer
    yield "old checkpoint is a link", linked
    yield "link inside an old checkpoint", link_inside
    yield "directories of others", strangers
    if hook.preloaded():
        yield "an old checkpoint can't be removed", undeletable


def f12(rig: Rig, tally: Tally, count: int) -> None:
    """Rotation traps."""
    if not hook.preloaded():
        tally.skip("an old checkpoint that can't be removed: needs LD_PRELOAD")
    for name, trial in rotation(rig):
        tally.attempt(name, trial)


def prune_by_step() -> None:
    """Mutant: what has the highest step counts as newest, whoever made it."""

    def by_step(directory, *, run, keep, protect, warn):
        paths = sorted(
            directory.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1].split(".")[0])
        )
        for path in paths[: -max(1, keep)]:
            shutil.rmtree(path.resolve())

    replaced(checkpoint, "prune_checkpoints", by_step)


def prune_unprotected() -> None:
    """Mutant: the best is not protected."""
    real = checkpoint.prune_checkpoints
    replaced(
        checkpoint,
        "prune_checkpoints",
        lambda *a, protect, **o: real(*a, protect=None, **o),
    )


def leftovers_of(output: Path) -> list[str]:
    """Temporary files."""
    return leftovers(output)


ROWS = [
    Row(
        "F02",
        "crash at every change to a file: save, rotation, publishing; whole runs",
        f02,
        full=200,
        quick=4,
        in_quick=True,
        mutants={"no staging": no_staging, "old one removed first": delete_before_saving},
        mutant_count=0,
    ),
    Row(
        "F03",
        "order: fsync of files < rename < fsync of directory < announced < old one removed",
        f03,
        full=1,
        quick=1,
        in_quick=True,
        mutants={"no fsync": no_fsync, "no fsync of directories": no_parent_fsync},
    ),
    Row(
        "F09",
        "checkpoint files cut short",
        f09,
        full=30,
        quick=1,
        in_quick=True,
        mutants={"digests not looked at": no_digests, "damaged ones deleted": overwrite_damaged},
        mutant_count=0,
    ),
    Row(
        "F10",
        "single-bit flips in a checkpoint",
        f10,
        full=200,
        quick=60,
        in_quick=True,
        mutants={"digests not looked at": no_digests, "manifest without a seal": no_seal},
        mutant_count=10,
    ),
    Row(
        "F11",
        "checkpoint files missing, swapped, of another run or model",
        f11,
        full=4,
        quick=4,
        in_quick=True,
        mutants={"tensors that do not fit are passed over": tolerant_loading},
        mutant_count=4,
    ),
    Row(
        "F12",
        "rotation traps",
        f12,
        full=1,
        quick=1,
        in_quick=True,
        mutants={"by step number": prune_by_step, "best not protected": prune_unprotected},
    ),
]
