"""F05, F13, F14: two ranks over gloo, forked with the environment that torchrun gives them."""

import errno
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from finetuning.training import checkpoint_manager

from . import hook
from .checkpoints import stop_at
from .interruptions import no_random_state
from .rig import (
    NUM_STEPS,
    Child,
    Outcome,
    Reference,
    Rig,
    after_step,
    fork,
    ledger_of,
    nothing_lost,
    read_ledger,
    replaced,
)
from .tally import Row, SuiteError, Tally, Trial

OPTIONS = ("--distributed-timeout", "5")  # seconds that the program waits for a rank
Patch = Callable[[], None]


def start_ranks(
    rig: Rig, output: Path, *more: str, world: int = 2, patches: dict[int, Patch] | None = None
) -> list[Child]:
    """Fork the ranks of one run; `patches` are called in the rank's child first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def action(rank: int) -> int:
        if world > 1:
            os.environ.update(
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            )
        patch = (patches or {}).get(rank)
        return rig.main(output, *more, patch=patch, notes=notes(output, rank))

    children = []
    for rank in range(world):
        console = output.with_name(f"console{rank}.txt")
        console.unlink(missing_ok=True)
        children.append(fork(console, lambda rank=rank: action(rank)))
    return children


def notes(output: Path, rank: int) -> Path:
    """Where a rank's truncation lies beside the output."""
    return output if rank == 0 else output.with_name(f"{output.name}.rank{rank}")


def wait_all(children: list[Child]) -> list[Outcome]:
    """Reap all ranks."""
    return [child.wait() for child in children]


def reference_of_two(rig: Rig) -> None:
    """One uninterrupted run of two ranks."""
    output = rig.root / "reference2" / "out"
    outcomes = wait_all(start_ranks(rig, output))
    if any(o.code for o in outcomes):
        raise SuiteError(outcomes[0].output + outcomes[1].output)
    rig.pair = Reference.read(output)


def same_on_both(output: Path) -> list[str]:
    """Both ranks hold the same weights after every step."""
    first, second = (read_ledger(notes(output, rank))[0] for rank in (0, 1))
    differing = [s for s in first if s in second and first[s]["weights"] != second[s]["weights"]]
    return [f"ranks differ after step {differing[0]}"] if differing else []


def ends_well(rig: Rig, output: Path) -> list[str]:
    """The same command on two ranks comes to its end with nothing lost."""
    outcomes = wait_all(start_ranks(rig, output))
    problems = [f"rank 1: exit {outcomes[1].code}"] if outcomes[1].code else []
    problems += nothing_lost(output, rig.pair, outcomes[0])
    return problems + (same_on_both(output) if not problems else [])


# -----------------------------------------------------------------------------
# F05


def stopped_pair(rig: Rig, step: int) -> Trial:
    """SIGTERM to rank 1 only: both stop at the same step, both go on bit-equal."""
    output = rig.place("f05") / "out"
    outcomes = wait_all(start_ranks(rig, output, patches={1: lambda: stop_at(step)}))
    problems = [
        f"rank {r}: exit {o.code}: {o.output[-300:]}" for r, o in enumerate(outcomes) if o.code
    ]
    lasts = [max(read_ledger(notes(output, rank))[0], default=0) for rank in (0, 1)]
    problems += [f"ranks stopped after {lasts}"] if lasts[0] != lasts[1] else []
    fired = lasts[1] == step
    problems += ends_well(rig, output)
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def other_world(rig: Rig, tally: Tally, worlds: tuple[int, int, int]) -> Trial:
    """Ranks change at two stops with the same global batch: same documents, same losses but for rounding."""
    output, whole = rig.place("f05w") / "out", rig.place("f05w") / "out"

    def options(world: int) -> list[str]:
        accumulation = str(4 // world)
        return ["--lora-dropout", "0", "--gradient-accumulation-steps", accumulation]

    wait_all(start_ranks(rig, whole, *options(1), world=1))
    changed = True
    for world, stop in zip(worlds, (8, 16, 0), strict=True):
        patches = {0: lambda stop=stop: stop_at(stop)} if stop else None
        outcomes = wait_all(start_ranks(rig, output, *options(world), world=world, patches=patches))
        changed &= max(read_ledger(output)[0], default=0) == (stop or NUM_STEPS)
        if any(o.code for o in outcomes):
            return changed, [f"exit {[o.code for o in outcomes]}: {outcomes[0].output[-400:]}"]
    found, wanted = Reference.read(output), Reference.read(whole)
    documents = [
        s
        for s, r in wanted.truncation.items()
        if sorted(found.truncation[s]["documents"]) != sorted(r["documents"])
    ]
    problems = [f"step {documents[0]} has other documents"] if documents else []
    curves = found.curves["Training/Loss"], wanted.curves["Training/Loss"]
    worst = max(abs(curves[0].get(s, 0) / v - 1) for s, v in curves[1].items())
    tally.measures[f"ranks {worlds}: largest relative difference of a loss"] = f"{worst:.1e}"
    problems += [f"losses differ by {worst:.1e}"] if worst > 1e-4 else []
    return changed, problems


def f05(rig: Rig, tally: Tally, count: int) -> None:
    """Two ranks: stops, and other numbers of ranks at the same global batch."""
    draw = random.Random(5)
    for step in sorted(draw.sample(range(1, NUM_STEPS), min(count, NUM_STEPS - 1))):
        tally.attempt(f"stop {step} by rank 1", lambda s=step: stopped_pair(rig, s))
    for worlds in ((1, 2, 1), (2, 1, 2))[:count]:
        tally.attempt(f"ranks {worlds}", lambda w=worlds: other_world(rig, tally, w))


# -----------------------------------------------------------------------------
# F13, F14


def killed_peer(rig: Rig, rank: int, step: int, later: float) -> Trial:
    """kill -9 of one rank: the other ends by itself; both again, nothing lost."""
    output = rig.place("f13") / "out"
    log = output.with_name("hook.log")

    def kill() -> None:
        hook.arm(
            ledger_of(notes(output, rank)),
            action=hook.SIGNAL,
            number=signal.SIGKILL,
            first=step,
            computing=later,
            log=log,
        )

    children = start_ranks(rig, output, *OPTIONS, patches={rank: kill})
    killed, other = children[rank].wait(), children[1 - rank].wait()
    fired = hook.fired(log) and killed.code == -signal.SIGKILL
    problems = [] if other.code not in (-signal.SIGALRM, 0) else [f"the other: exit {other.code}"]
    problems += ends_well(rig, output)
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def f13(rig: Rig, tally: Tally, count: int) -> None:
    """kill -9 of either rank, anywhere in or soon after a step."""
    if not hook.preloaded():
        tally.skip("needs a C compiler and LD_PRELOAD")
        return
    draw = random.Random(13)
    for number in range(count):
        step = draw.randrange(1, NUM_STEPS - 8)
        later = draw.uniform(0, rig.cpu_seconds / NUM_STEPS)
        tally.attempt(
            f"rank {number % 2}, {later * 1000:.0f} ms after step {step}",
            lambda r=number % 2, s=step, t=later: killed_peer(rig, r, s, t),
        )


def disturbed(rig: Rig, kind: str, rank: int) -> Trial:
    """One rank hangs, raises, or has no disk: all end, not with 0; then nothing is lost."""
    output = rig.place("f14") / "out"
    marker = output.with_name("fired")

    def explode() -> None:
        marker.touch()
        raise RuntimeError("a fault of this rank only")

    def no_disk() -> None:
        def full(*_: object, **__: object) -> None:
            marker.touch()
            raise OSError(errno.ENOSPC, "No space left on device")

        replaced(checkpoint_manager, "save_checkpoint", full)

    action = {
        "hangs": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "raises": explode,
        "has no disk": no_disk,
    }[kind]
    patches = {rank: lambda: after_step(8, action)}
    children = start_ranks(rig, output, *OPTIONS, patches=patches)
    stopped = kind == "hangs" and children[rank].stopped()
    others = [c for r, c in enumerate(children) if kind != "hangs" or r != rank]
    outcomes = wait_all(others)
    if kind == "hangs":
        children[rank].kill(signal.SIGKILL)
        children[rank].wait()
    codes = [o.code for o in outcomes]
    problems = [f"exit codes {codes}"] if 0 in codes or -signal.SIGALRM in codes else []
    if kind == "has no disk" and rank == 0 and codes != [3, 3]:
        problems.append(f"exit codes {codes}, wanted 3 on both: {outcomes[1].output[-300:]}")
    fired = marker.exists() or stopped
    problems += ends_well(rig, output)
    shutil.rmtree(output.parent, ignore_errors=True)
    return fired, problems


def f14(rig: Rig, tally: Tally, count: int) -> None:
    """One rank of two hangs, raises or can't save."""
    cases = [("has no disk", 0), ("hangs", 1), ("raises", 1), ("raises", 0), ("hangs", 0)]
    for number in range(count):
        kind, rank = cases[number % len(cases)]
        tally.attempt(f"rank {rank} {kind}", lambda k=kind, r=rank: disturbed(rig, k, r))
    tally.skip("a DataLoader worker that dies: the program has no DataLoader")


def every_rank_for_itself() -> None:
    """Mutant: ranks do not agree on a signal."""
    from finetuning.common import distributed

    replaced(distributed.Distributed, "any", lambda self, *flags: list(flags))


def only_rank_0_notices() -> None:
    """Mutant: the other ranks are not told that the checkpoint could not be written."""
    from finetuning.common import distributed

    real = distributed.Distributed.broadcast

    def silent(self, value):
        result = real(self, value)
        return (
            value
            if self.rank and isinstance(result, str) and "can't be written" in result
            else result
        )

    replaced(distributed.Distributed, "broadcast", silent)


ROWS = [
    Row(
        "F05",
        "two ranks: stop and resume bit-equal; 1, 2, 1 ranks at one global batch",
        f05,
        full=8,
        quick=1,
        mutants={"ranks do not agree": every_rank_for_itself, "random state": no_random_state},
        mutant_count=1,
        needs=(reference_of_two,),
    ),
    Row(
        "F13",
        "two ranks: kill -9 of one",
        f13,
        full=20,
        quick=2,
        mutants={"random state": no_random_state},
        mutant_count=2,
        needs=(reference_of_two,),
    ),
    Row(
        "F14",
        "two ranks: one hangs, raises, or has no disk",
        f14,
        full=12,
        quick=3,
        mutants={"only rank 0 notices": only_rank_0_notices},
        mutant_count=1,
        needs=(reference_of_two,),
    ),
]
