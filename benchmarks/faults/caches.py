"""F30: a cache with flipped bytes, halves of dead processes, and folders that somebody else could change."""

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from finetuning.common import cache
from finetuning.common.errors import UserError
from finetuning.readers import dataset
from finetuning.readers.dataset import read_samples

from . import hook
from .rig import Rig, fingerprint, fork, replaced, wait_until, write_records
from .tally import Row, Tally, Trial

DIGESTS, BUILDING = "digests.json", ".building-*"
STRANGER = 54321  # a user


def read(place: Path, data: Path, *, before: Callable[[], None] = lambda: None) -> dict:
    """What reading a file through the cache in `place` comes to, in a child: its samples, or what it says."""
    result = place / "result.json"
    result.unlink(missing_ok=True)

    def action() -> None:
        replaced(dataset, "LARGE_DATA", 0)
        before()
        try:
            found = read_samples([str(data)], cache_dir=place / "cache")
            said = [[s.question, s.thinking, s.answer, s.line] for s in found.samples]
        except UserError as error:
            said = str(error)
        result.write_text(json.dumps(said))

    outcome = fork(place / "console.txt", action).wait()
    if outcome.code:
        return {"code": outcome.code, "said": outcome.output[-400:]}
    return {"code": 0, "said": json.loads(result.read_text())}


def filled(rig: Rig) -> tuple[Path, Path, dict]:
    """A fresh place with a filled cache; the folder of its samples; what reading gives."""
    place = rig.place("f30")
    right = read(place, rig.data)
    (folder,) = (path for path in (place / "cache" / "samples").iterdir() if path.is_dir())
    return place, folder, right


def changed(rig: Rig, change: Callable[[Path], None], refusal: str = "") -> Trial:
    """The cache is another: the samples are those of the file still, or it is refused and says why."""
    place, folder, right = filled(rig)
    whole = _state(folder)
    change(folder)
    fired = _state(folder) != whole and not right["code"]
    again = read(place, rig.data)
    if refusal:
        refused = not again["code"] and refusal in again["said"] and str(folder) in again["said"]
        problems = [] if refused else [f"not refused: {again!s:.200}"]
    else:
        problems = [] if again == right else [f"not what the file holds: {again!s:.200}"]
        problems += _unsound(folder)
        third = read(place, rig.data)
        problems += [] if third == right else [f"and then: {third!s:.200}"]
    shutil.rmtree(place, ignore_errors=True)
    return fired, problems


def _state(folder: Path) -> object:
    """Contents, owners, modes and links."""
    places = [folder, *sorted(folder.rglob("*"))]
    modes = [(p.name, p.lstat().st_mode, p.lstat().st_uid, p.is_symlink()) for p in places]
    return modes, fingerprint(folder)


def _unsound(folder: Path) -> list[str]:
    """What is left in a cache that was to be mended."""
    places = [folder, *folder.rglob("*")]
    problems = [f"{path.name} is a link" for path in places if path.is_symlink()]
    problems += [f"others may write {p.name}" for p in places if p.stat().st_mode & 0o022]
    return problems + [f"left: {path.name}" for path in folder.parent.glob(BUILDING)]


# -----------------------------------------------------------------------------
# Changes


def flipped(draw: random.Random) -> Callable[[Path], None]:
    """One bit of one file."""
    which, where, bit = draw.random(), draw.random(), draw.randrange(8)

    def change(folder: Path) -> None:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        path = files[int(which * len(files))]
        data = bytearray(path.read_bytes())
        data[int(where * len(data))] ^= 1 << bit
        path.write_bytes(data)

    return change


def samples_file(folder: Path) -> Path:
    """The Arrow file."""
    return next(folder.glob("part-*.arrow"))


def cut(folder: Path) -> None:
    """Half of the samples' file is gone."""
    path = samples_file(folder)
    os.truncate(path, path.stat().st_size // 2)


def of_other_samples(rig: Rig, folder: Path) -> None:
    """Somebody puts other samples there, with digests that are right."""
    place = rig.place("f30other")
    write_records(place / "other.jsonl", 3)
    read(place, place / "other.jsonl")
    (other,) = (path for path in (place / "cache" / "samples").iterdir() if path.is_dir())
    for path in other.iterdir():
        shutil.copyfile(path, folder / path.name)


def strangers(rig: Rig) -> Callable[[Path], None]:
    """The folder is another user's."""

    def change(folder: Path) -> None:
        of_other_samples(rig, folder)
        os.chown(folder, STRANGER, -1)

    return change


def open_to_all(rig: Rig, of_file: bool) -> Callable[[Path], None]:
    """Everybody may write the folder, or a file in it, and somebody did."""

    def change(folder: Path) -> None:
        of_other_samples(rig, folder)
        (samples_file(folder) if of_file else folder).chmod(0o777)

    return change


def linked(rig: Rig, of_file: bool) -> Callable[[Path], None]:
    """The folder, or a file in it, is a link to what lies elsewhere."""

    def change(folder: Path) -> None:
        of_other_samples(rig, folder)
        path = samples_file(folder) if of_file else folder
        away = rig.place("f30away") / path.name
        shutil.move(path, away)
        path.symlink_to(away)

    return change


def linked_nowhere(folder: Path) -> None:
    """The folder is a link to nothing."""
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name("nowhere"))


def half_built(rig: Rig, first: int) -> Trial:
    """kill -9 at a change to the cache while it is filled: what is left is removed, nobody believes it."""
    place, log = rig.place("f30"), rig.place("f30") / "hook.log"
    more = place / "more.jsonl"
    write_records(more, 40)

    def kill() -> None:
        where = place / "cache"
        number = {"number": signal.SIGKILL, "first": first}
        hook.arm(where, action=hook.SIGNAL, contains=BUILDING[:-1], log=log, **number)

    killed = read(place, rig.data, before=kill)
    fired = hook.fired(log) and killed["code"] == -signal.SIGKILL
    fired = fired and bool(list((place / "cache" / "samples").glob(BUILDING)))
    other = read(place, more)
    right = read(rig.place("f30right"), rig.data)
    again = read(place, rig.data)
    problems = [] if len(other["said"]) == 40 else [f"other data: {other!s:.200}"]
    problems += [] if again == right else [f"not what the file holds: {again!s:.200}"]
    problems += [f"left: {p.name}" for p in (place / "cache" / "samples").glob(BUILDING)]
    shutil.rmtree(place, ignore_errors=True)
    return fired, problems


def leftovers_of_others(rig: Rig) -> Trial:
    """A half-built folder of other data goes when the cache is next written; not one that is being built."""
    place = rig.place("f30")
    dead, alive = (place / "cache" / "samples" / f".building-{n}" for n in ("dead", "alive"))
    for folder in (dead, alive):
        (folder / "part").mkdir(parents=True)
    gate = place / "go"

    def hold() -> None:
        with cache.FileLock(f"{alive.parent}/alive.lock"):
            (place / "held").touch()
            wait_until(gate.exists)

    holder = fork(place / "holder.txt", hold)
    fired = wait_until((place / "held").exists) and dead.exists()
    found = read(place, rig.data)
    problems = [] if not found["code"] else [f"{found!s:.300}"]
    problems += [] if not dead.exists() else ["what a dead process was building stays"]
    problems += [] if alive.exists() else ["what a process is building is gone"]
    gate.touch()
    holder.wait()
    shutil.rmtree(place, ignore_errors=True)
    return fired, problems


def f30(rig: Rig, tally: Tally, count: int) -> None:
    """`count` flips; cuts, halves, strangers, modes and links."""
    tally.attempt("a half-built folder of other data", lambda: leftovers_of_others(rig))
    draw = random.Random(30)
    for number in range(count):
        flip = flipped(draw)
        tally.attempt(f"flip {number}", lambda c=flip: changed(rig, c))
    kinds = {
        "cut short": cut,
        "everybody may write the folder": open_to_all(rig, of_file=False),
        "everybody may write a file": open_to_all(rig, of_file=True),
        "a file is a link": linked(rig, of_file=True),
        "the folder is a link": linked(rig, of_file=False),
        "the folder is a link to nothing": linked_nowhere,
    }
    for name, change in kinds.items():
        tally.attempt(name, lambda c=change: changed(rig, c))
    if os.getuid() == 0:
        refusal = "belongs to another user"
        tally.attempt("somebody else's", lambda: changed(rig, strangers(rig), refusal))
    else:
        tally.skip("somebody else's folder: needs the right to change owners")
    if not hook.preloaded():
        tally.skip("kill -9 while it is filled: needs a C compiler and LD_PRELOAD")
        return
    for first in (2, 4) if count < 20 else range(2, 8):
        tally.attempt(f"killed at change {first}", lambda f=first: half_built(rig, f))


def digests_say_nothing() -> None:
    """Mutant: every file has the same digest."""
    same = hashlib.sha256()
    replaced(hashlib, "file_digest", lambda fileobj, digest, *, _bufsize=0: same)


def modes_and_owners_say_nothing() -> None:
    """Mutant: whoever may write a folder, it is taken for ours."""
    real = Path.stat

    def ours(self, *, follow_symlinks=True):
        return Ours(real(self, follow_symlinks=follow_symlinks))

    class Ours:
        def __init__(self, found: os.stat_result) -> None:
            self._found = found

        def __getattr__(self, name: str) -> object:
            value = getattr(self._found, name)
            instead = {"st_mode": lambda: value & ~0o022, "st_uid": os.getuid}
            return instead.get(name, lambda: value)()

    replaced(cache.Path, "stat", ours)


def links_say_nothing() -> None:
    """Mutant: nobody asks whether a file is a link."""
    replaced(cache.Path, "is_symlink", lambda self: False)


def halves_stay() -> None:
    """Mutant: no lock is ever free, so what it guards seems to be at work."""

    class Taken(cache.FileLock):
        def __init__(self, path, timeout=-1, mode=0o644) -> None:
            super().__init__(path, timeout=timeout, mode=mode)
            self._never = timeout == 0

        def __enter__(self):
            if self._never:
                raise cache.Timeout(str(self.lock_file))
            return super().__enter__()

    replaced(cache, "FileLock", Taken)


ROWS = [
    Row(
        "F30",
        "the cache: flipped bytes, halves of the dead, strangers, open folders, links",
        f30,
        full=60,
        quick=4,
        mutants={
            "digests say nothing": digests_say_nothing,
            "modes and owners say nothing": modes_and_owners_say_nothing,
            "links say nothing": links_say_nothing,
            "halves stay": halves_stay,
        },
        mutant_count=4,
    ),
]
