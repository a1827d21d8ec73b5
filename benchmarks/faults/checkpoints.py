"""F02, F03, F09 to F12: checkpoints under crashes, cuts, flipped bits, strangers and rotation."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch

from finetuning.common import files
from finetuning.common.files import json_text
from finetuning.training import checkpoint

from . import hook
from .rig import (
    Rig,
    announced_is_kept,
    before_step,
    fingerprint,
    fork,
    ledger_of,
    nothing_lost,
    replaced,
    steps_of,
)
from .tally import Row, SuiteError, Tally, Trial

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


def crash_point(rig: Rig, k: int, action: int) -> Trial:
    """Die at the k-th change of the story; what was announced, or newer, must load and go on."""
    place = rig.place("f02")
    directory, said, log = place / "checkpoints", place / "said", place / "hook.log"

    def crash() -> None:
        hook.arm(directory, action=action, first=k, log=log)
        story(directory, said)

    outcome = fork(place / "console.txt", crash).wait()
    fired = hook.fired(log) and outcome.code == -signal.SIGKILL
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
    return fired, problems


def changes_of_the_story(rig: Rig) -> list[tuple[str, str]]:
    """The changes to files that the story makes."""
    place = rig.place("f02")

    def count() -> None:
        hook.arm(place / "checkpoints", action=hook.ONLY_LOG, log=place / "hook.log")
        story(place / "checkpoints", place / "said")

    fork(place / "console.txt", count).wait()
    return hook.changes(place / "hook.log")


def kinds_of_change(changes: list[tuple[str, str]], draw: random.Random) -> list[int]:
    """Of changes that differ in numbers only, one; their places, from 1."""
    found: dict[tuple[str, str], list[int]] = {}
    for k, (call, path) in enumerate(changes, 1):
        found.setdefault((call, re.sub(r"\d+", "0", path)), []).append(k)
    return sorted(draw.choice(places) for places in found.values())


def run_crash_point(rig: Rig, k: int, action: int) -> Trial:
    """A whole run dies at its k-th change below the output directory; the same command ends it."""
    output = rig.place("f02run") / "out"
    log = output.with_name("hook.log")
    first = rig.run(output, patch=lambda: hook.arm(output, action=action, first=k, log=log))
    fired = first.code == -signal.SIGKILL and hook.fired(log)
    problems = announced_is_kept(output) if (output / "checkpoints").is_dir() else []
    second = rig.run(output)
    problems += nothing_lost(output, rig.reference, second)
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def f02(rig: Rig, tally: Tally, count: int) -> None:
    """Crash points of save and rotation, before each change and within each write; `count` of whole runs.

    200 or more: all crash points; fewer: one of those that differ in numbers only, of a step or a process.
    """
    if not hook.preloaded():
        tally.skip("needs a C compiler and LD_PRELOAD")
        return
    changes, draw = changes_of_the_story(rig), random.Random(2)
    tally.measures["changes in save and rotation"] = len(changes)
    all_places = range(1, len(changes) + 1)
    for k in all_places if count >= 200 else kinds_of_change(changes, draw):
        tally.attempt(f"before change {k}", lambda k=k: crash_point(rig, k, hook.KILL_BEFORE))
        if "write" in changes[k - 1][0]:
            tally.attempt(f"half of {k}", lambda k=k: crash_point(rig, k, hook.KILL_IN_HALF))
    tally.measures["changes in a run"] = len(rig.changes)
    # Its last ones may be fewer in another run: the event file has a thread of its own.
    for k in sorted(draw.sample(range(1, len(rig.changes) - 40), count)):
        action = draw.choice([hook.KILL_BEFORE, hook.KILL_IN_HALF, hook.KILL_AFTER])
        tally.attempt(f"run, change {k}", lambda k=k, a=action: run_crash_point(rig, k, a))


def no_staging() -> None:
    """Mutant: files are written under the name of a checkpoint from the first one on."""

    @contextlib.contextmanager
    def in_the_open(parent, prefix, name=""):
        folder = parent / f"checkpoint-{name.partition('-')[0]}.1"
        folder.mkdir(parents=True)
        yield folder

    replaced(checkpoint, "staging_folder", in_the_open)


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
    """The order of system calls, seen by the preloaded library."""
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

    fork(place / "console.txt", watched).wait()
    publishes, faults = order_faults(hook.lines(log), place / "checkpoints")
    for number in range(3):
        tally.add(f"publish {number + 1}", publishes == 3, faults)


def _order_of_a_run(rig: Rig, tally: Tally) -> None:
    output = rig.place("f03run") / "out"
    log = output.with_name("hook.log")
    rig.run(output, patch=lambda: hook.arm(output, action=hook.ONLY_LOG, log=log))
    lines = [
        line for line in hook.lines(log) if "/checkpoints" in line or line.endswith("training.log")
    ]
    publishes, faults = order_faults(lines, output / "checkpoints")
    for number in range(5):
        tally.add(f"publish {number + 1} of a run", publishes == 5, faults)


def no_fsync() -> None:
    """Mutant: files are written, not synced."""
    replaced(checkpoint.os, "fsync", lambda fd: None)


def no_parent_fsync() -> None:
    """Mutant: the rename itself is not made durable."""
    replaced(files, "fsync_directory", lambda path: None)


# -----------------------------------------------------------------------------
# F09, F10: damage


def two_checkpoints(rig: Rig) -> Path:
    """A run that was asked to stop at step 12: its checkpoints are of steps 10 and 12."""
    output = rig.root / "stopped" / "out"
    if not output.exists():
        outcome = rig.run(output, patch=lambda: stop_at(12))
        if outcome.code or sorted(steps_of(output)) != [10, 12]:
            raise SuiteError(f"no run stopped at step 12: {outcome.output}")
    return output


def copy_of_stopped(rig: Rig, name: str) -> Path:
    """The same, with its ledger, to be damaged."""
    output, stopped = rig.place(name) / "out", two_checkpoints(rig)
    shutil.copytree(stopped, output)
    shutil.copy(ledger_of(stopped), ledger_of(output))
    return output


def stop_at(step: int, number: int = signal.SIGTERM) -> None:
    """In a child: a real signal to itself in `step`, which is the last one then."""
    before_step(step, lambda: os.kill(os.getpid(), number))


def damaged(rig: Rig, damage: Callable[[Path], object], resume: bool) -> Trial:
    """Damage the newest of two checkpoints; the one before must be used, the bad one kept aside."""
    output = copy_of_stopped(rig, "damaged")
    newest = output / "checkpoints" / "checkpoint-12"
    whole = fingerprint(newest)
    damage(newest)
    fired = fingerprint(newest) != whole
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
        problems = nothing_lost(output, rig.reference, rig.run(output))
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def checkpoint_files(rig: Rig) -> list[str]:
    """Names of the files of a checkpoint."""
    newest = two_checkpoints(rig) / "checkpoints" / "checkpoint-12"
    return sorted(p.name for p in newest.iterdir())


def cut(name: str, where: str) -> Callable[[Path], None]:
    """Truncate one file."""

    def damage(path: Path) -> None:
        size = (path / name).stat().st_size
        left = {"0": 0, "1": 1, "8": 8, "half": size // 2, "-1": size - 1}[where]
        os.truncate(path / name, left)

    return damage


def flip(draw: random.Random) -> Callable[[Path], None]:
    """Flip one random bit of one random byte of all files."""

    def damage(path: Path) -> None:
        files = sorted(path.iterdir())
        file = draw.choices(files, weights=[f.stat().st_size for f in files])[0]
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)

    return damage


def flip_sequence(bit: int) -> Callable[[Path], None]:
    """Flip one bit of the number by which the manifest says how new it is."""

    def damage(path: Path) -> None:
        data = bytearray((path / checkpoint.MANIFEST).read_bytes())
        place = data.index(b'"sequence": ') + len(b'"sequence": ')
        data[place] ^= 1 << bit
        (path / checkpoint.MANIFEST).write_bytes(data)

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

    def careless(path):
        manifest = json.loads((path / checkpoint.MANIFEST).read_bytes())
        state = json.loads((path / checkpoint.STATE).read_bytes())
        tensors = {
            file.stem: safetensors.torch.load_file(file) for file in path.glob("*.safetensors")
        }
        return checkpoint.Checkpoint(path, manifest["step"], manifest["run"], tensors, state)

    replaced(checkpoint, "load_checkpoint", careless)


def no_seal() -> None:
    """Mutant: the manifest is believed as it stands."""
    real = checkpoint.newest_checkpoint

    def believes(directory, *, warn, run=None):
        for path in directory.glob("checkpoint-*"):
            with contextlib.suppress(ValueError, OSError):
                sealed(path, json.loads((path / checkpoint.MANIFEST).read_bytes()))
        return real(directory, warn=warn, run=run)

    replaced(checkpoint, "newest_checkpoint", believes)


def overwrite_damaged() -> None:
    """Mutant: a damaged checkpoint is deleted."""
    rename = os.rename

    def delete(src, dst, **places):
        if str(dst).endswith(".damaged"):
            shutil.rmtree(src)
        else:
            rename(src, dst, **places)

    replaced(os, "rename", delete)


# -----------------------------------------------------------------------------
# F11: missing, swapped, foreign


def missing(name: str) -> Callable[[Path], None]:
    """One file is gone."""
    return lambda path: (path / name).unlink()


def swapped(name: str) -> Callable[[Path], None]:
    """One file is that of the older checkpoint."""
    return lambda path: shutil.copy(path.with_name("checkpoint-10") / name, path / name)


def resealed(path: Path) -> None:
    """A manifest with right digests for whatever is in the directory: made by hand, not by damage."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_bytes())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sealed(path, manifest)


def sealed(path: Path, manifest: dict) -> None:
    """Write a manifest with the digest of its other entries, as the format has it."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256((json_text(content, indent=1) + "\n").encode()).hexdigest()
    text = json_text({**content, "sha256": digest}, indent=1) + "\n"
    (path / checkpoint.MANIFEST).write_text(text, encoding="utf-8", newline="\n")


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
) -> Trial:
    """A whole checkpoint that does not belong to this run: refused with exit code 2, by name."""
    output = copy_of_stopped(rig, "foreign")
    whole = fingerprint(output)
    if change:
        for name in ("checkpoint-12", "checkpoint-10"):
            change(output / "checkpoints" / name)
    outcome = rig.run(output, *options)
    problems = []
    if outcome.code != 2:
        problems.append(f"exit code {outcome.code} instead of 2: {outcome.output[-300:]}")
    problems += [f"the message does not say {w}" for w in words if w not in outcome.output]
    if "Traceback" in outcome.output:
        problems.append("a traceback instead of a message")
    fired = bool(options) or fingerprint(output / "checkpoints") != {
        name.removeprefix("checkpoints/"): digest
        for name, digest in whole.items()
        if name.startswith("checkpoints/")
    }
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def as_it_is(rig: Rig) -> Trial:
    """The same checkpoint with none of these changes goes on: it is they that are refused."""
    output = copy_of_stopped(rig, "foreign")
    for path in (output / "checkpoints").glob("checkpoint-*"):
        resealed(path)
    outcome = rig.run(output)
    problems = nothing_lost(output, rig.reference, outcome)
    shutil.rmtree(output.parent, ignore_errors=True)
    return "resumed" in outcome.output, problems


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
    tally.attempt("none of these", lambda: as_it_is(rig))


def tolerant_loading() -> None:
    """Mutant: tensors that do not fit are passed over, as peft does."""
    from finetuning.model import adapters

    def tolerant(model, tensors):
        live = adapters.adapter_state(model)
        for name in live.keys() & tensors.keys():
            live[name].copy_(tensors[name])

    replaced(adapters, "load_adapter_state", tolerant)


# -----------------------------------------------------------------------------
# F12: rotation


def saved(rig: Rig, *steps: int, run: str = RUN) -> list[Path]:
    """Small checkpoints of these steps, saved in this order."""
    place = rig.place("f12") / "checkpoints"
    return [save(place, step, run) for step in steps]


def rotated(paths: list[Path], trap: Callable[[], bool], gone: str, stays: str, **how) -> Trial:
    """Rotation with a trap in its way: the steps that must go, those that must stay; whether it stood."""
    place = paths[0].parent
    stood = trap() and all(
        (place / f"checkpoint-{s}").exists() for s in (gone + " " + stays).split()
    )
    prune(place, **how)
    left = sorted(path.name for path in place.iterdir())
    problems = [f"{s} is still there" for s in gone.split() if f"checkpoint-{s}" in left]
    problems += [f"{s} was removed" for s in stays.split() if f"checkpoint-{s}" not in left]
    problems += ["the trap was changed"] if stood and not trap() else []
    return stood, [f"{'; '.join(problems)}; left {left}"] if problems else []


def _stale(rig: Rig) -> Trial:
    paths = saved(rig, 9999, run=RUN.replace("2026", "2025"))
    place = paths[0].parent
    for step in (5, 10, 15):
        save(place, step)

    def newest_is_15() -> bool:
        return checkpoint.newest_checkpoint(place, warn=quiet).step == 15

    fired, problems = rotated(paths, lambda: True, "5 10", "15 9999", keep=1)
    return fired, problems + ([] if newest_is_15() else ["15 is not the newest"])


def _link_inside(rig: Rig) -> Trial:
    paths = saved(rig, 5, 10, 15, 20)
    outside = paths[0].parent.with_name("outside")
    outside.mkdir()
    (outside / "file").write_text("mine")
    (paths[0] / "link").symlink_to(outside)
    return rotated(paths, (outside / "file").is_file, "5 10 15", "20", keep=1)


def _linked(rig: Rig) -> Trial:
    paths = saved(rig, 5, 10, 15, 20)
    elsewhere = paths[0].parent.with_name("elsewhere")
    shutil.move(paths[0], elsewhere)
    paths[0].symlink_to(elsewhere)
    whole = fingerprint(elsewhere)

    def untouched() -> bool:
        return paths[0].is_symlink() and bool(whole) and fingerprint(elsewhere) == whole

    return rotated(paths, untouched, "10 15", "5 20", keep=1)


def _strangers(rig: Rig) -> Trial:
    paths = saved(rig, 5, 10, 15, 20)
    for name in ("checkpoint-7", "checkpoint-3.damaged"):
        (paths[0].with_name(name)).mkdir()
    mine = paths[0].with_name("checkpoint-7") / "mine.txt"
    mine.write_text("mine")
    return rotated(paths, mine.is_file, "5 10 15", "7 3.damaged 20", keep=1)


def _undeletable(rig: Rig) -> Trial:
    paths = saved(rig, 5, 10, 15, 20)
    place, said, log = paths[0].parent, paths[0].parent.with_name("said"), rig.place("f12") / "log"

    def action() -> None:
        hook.arm(
            place,
            action=hook.FAIL,
            number=errno.EPERM,
            count=hook.FOREVER,
            operations=hook.UNLINK | hook.RENAME,
            contains="checkpoint-5",
            log=log,
        )
        warnings: list[str] = []
        checkpoint.prune_checkpoints(place, run=RUN, keep=1, protect=None, warn=warnings.append)
        hook.disarm()
        said.write_text("\n".join(warnings))

    outcome = fork(place.with_name("console.txt"), action).wait()
    problems = [f"exit {outcome.code}: {outcome.output}"] if outcome.code else []
    problems += [] if said.exists() and "checkpoint-5" in said.read_text() else ["not told"]
    left = {path.name for path in place.iterdir()}
    problems += ["the others were not removed"] if "checkpoint-10" in left else []
    return hook.fired(log), problems + ([] if "checkpoint-20" in left else ["20 was removed"])


def rotation(rig: Rig) -> Iterator[tuple[str, Callable[[], Trial]]]:
    """Traps for the code that removes old checkpoints: name and trial."""

    def plain(gone: str, stays: str, *steps: int, best: int = 0, keep: int = 1) -> Trial:
        paths = saved(rig, *(steps or (5, 10, 15, 20)))
        protect = paths[0].with_name(f"checkpoint-{best}") if best else None
        return rotated(paths, lambda: True, gone, stays, keep=keep, protect=protect)

    yield "stale checkpoint-9999 of an older run", lambda: _stale(rig)
    yield "best is not last", lambda: plain("10 15", "5 20", best=5)
    yield "keep 1", lambda: plain("5 10 15", "20")
    yield "keep 0 keeps the newest", lambda: plain("5 10 15", "20", keep=0)
    yield "lower step is newer", lambda: plain("15 20", "5", 15, 20, 5)
    yield "old checkpoint is a link", lambda: _linked(rig)
    yield "link inside an old checkpoint", lambda: _link_inside(rig)
    yield "directories of others", lambda: _strangers(rig)
    if hook.preloaded():
        yield "an old checkpoint can't be removed", lambda: _undeletable(rig)


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


ROWS = [
    Row(
        "F02",
        "crash at every change to a file: save, rotation, publishing; whole runs",
        f02,
        full=200,
        quick=4,
        mutants={"no staging": no_staging, "old one removed first": delete_before_saving},
        mutant_count=0,
    ),
    Row(
        "F03",
        "order: fsync of files < rename < fsync of directory < announced < old one removed",
        f03,
        full=1,
        quick=1,
        mutants={"no fsync": no_fsync, "no fsync of directories": no_parent_fsync},
    ),
    Row(
        "F09",
        "checkpoint files cut short",
        f09,
        full=30,
        quick=1,
        mutants={"digests not looked at": no_digests, "damaged ones deleted": overwrite_damaged},
        mutant_count=0,
        needs=(two_checkpoints,),
    ),
    Row(
        "F10",
        "single-bit flips in a checkpoint",
        f10,
        full=200,
        quick=60,
        mutants={"digests not looked at": no_digests, "manifest without a seal": no_seal},
        mutant_count=10,
        needs=(two_checkpoints,),
    ),
    Row(
        "F11",
        "checkpoint files missing, swapped, of another run or model",
        f11,
        full=4,
        quick=4,
        mutants={"tensors that do not fit are passed over": tolerant_loading},
        mutant_count=4,
        needs=(two_checkpoints,),
    ),
    Row(
        "F12",
        "rotation traps",
        f12,
        full=1,
        quick=1,
        mutants={"by step number": prune_by_step, "best not protected": prune_unprotected},
    ),
]
