"""Tallies as lines, JSON and docs/reliability.md."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version

from .tally import Row, Tally

PEER_ENDS = ("tried", "survived", "refused", "lost", "void")
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tensorboard")


def totals(tallies: Sequence[Tally]) -> dict[str, int]:
    """Sums over rows."""
    names = ("tried", "survived", "lost", "void")
    return {name: sum(getattr(t, name) for t in tallies) for name in names}


def is_clean(tally: Tally) -> bool:
    """Nothing lost, nothing void, every mutant caught."""
    return not tally.lost and not tally.void and all(tally.mutants.values())


def line(row: Row, tally: Tally) -> str:
    """One row for the console, what went wrong below it."""
    parts = [
        f"{row.id}  {tally.survived} of {tally.tried}",
        f"lost {tally.lost}",
        f"void {tally.void}",
        f"{tally.seconds:.0f} s, {tally.cpu_seconds:.1f} s of processor time",
        row.title,
    ]
    lines = ["  ".join(parts)]
    lines += [f"    SKIPPED: {reason}" for reason in tally.skipped]
    return "\n".join([*lines, *(f"    {fault}" for fault in tally.faults[:8])])


def mutants(tally: Tally) -> str:
    """A line for each of its mutants: what caught it."""
    return "".join(
        f"{tally.row}  {name}: caught by {caught[:150]!r}\n"
        if caught
        else f"{tally.row}  MUTANT NOT CAUGHT: {name}\n"
        for name, caught in tally.mutants.items()
    )


def as_json(tallies: Sequence[Tally]) -> str:
    """All tallies."""
    return json.dumps([asdict(tally) for tally in tallies], indent=1, default=str)


def markdown(
    rows: Sequence[Row],
    tallies: Sequence[Tally],
    command: str,
    peer: Mapping[str, Mapping[str, int]],
    parts: int = 1,
) -> str:
    """docs/reliability.md. command: options of the run, done in so many parts. peer: what
    benchmarks/faults/faults_hf_trainer.py found, by names that begin with the row's.
    """
    in_parts = f" in {parts} parts of some rows each," if parts > 1 else ""
    sums = totals(tallies)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    head = f"""\
# Reliability: what was broken on purpose, and what it cost

{time.strftime("%Y-%m-%d")}, `uv run python -m benchmarks.faults {command}`,{in_parts} Python
{platform.python_version()}, {versions}, {platform.system()} without a GPU.

**{sums["tried"]} trials: {sums["survived"]} survived, {sums["lost"]} lost, {sums["void"]} void.**

A trial survives when nothing is lost: the newest announced checkpoint loads, every later loss, gradient,
learning rate, random state and the final adapter's SHA-256 equal those of an uninterrupted run to the last
bit, every document was trained once per epoch, TensorBoard shows each step once,
`training_statistics.json` is strict JSON with the same totals, no temporary file and no process is left.
A trial is void unless something shows that its fault came: the call that fired, the file that is another,
the process that died there. A mutant is the program with one protection removed; its trials must fail,
else the row proves nothing.

`--quick` has every row, every kind of trial and every mutant, and CI runs it whole. What it leaves to
`--all`: of crash points that differ in numbers only it takes one; of steps, kills, bits, bytes and error
codes some, drawn with a fixed seed; one case of a kind (a jump of the clock, a full disk in a place)
instead of all; no soak.
CPU s: processor time of the row's trials and mutants.

| | fault | tried | survived | lost | void | mutants caught | CPU s | Trainer + peft survived |
|---|---|---|---|---|---|---|---|---|
"""
    lines = [
        f"| {r.id} | {r.title} | {t.tried} | {t.survived} | {t.lost} | {t.void} | "
        f"{sum(map(bool, t.mutants.values()))} of {len(t.mutants)} | {t.cpu_seconds:.0f} | "
        f"{_peer_cell(r, peer)} |"
        for r, t in zip(rows, tallies, strict=True)
    ]
    return head + "\n".join(lines) + "\n" + _peer_section(peer) + _details(rows, tallies)


def _peer_cell(row: Row, peer: Mapping[str, Mapping[str, int]]) -> str:
    found = next((f for name, f in peer.items() if name.startswith(row.id)), None)
    return f"{found.get('survived', 0)} of {found['tried']}" if found else ""


def _peer_section(peer: Mapping[str, Mapping[str, int]]) -> str:
    if not peer:
        return ""
    lines = [
        f"| {name} | {' | '.join(str(found.get(k, 0)) for k in PEER_ENDS)} |"
        for name, found in peer.items()
    ]
    return (
        f"""
## The same faults on transformers.Trainer with peft

`uv run python -m benchmarks.faults.faults_hf_trainer`: same model, adapters, records, steps and save
interval, resumed the documented way, `resume_from_checkpoint=get_last_checkpoint(...)`. Survived: the same
command comes to its end with the uninterrupted run's losses and adapter, bit for bit. Refused: it stops
with an error and needs a person. Lost: it ends with other losses or another adapter, or steps were lost at
a signal.

| fault | {" | ".join(PEER_ENDS)} |
|---{"|---" * len(PEER_ENDS)}|
"""
        + "\n".join(lines)
        + "\n"
    )


def _trial(fault: str) -> str:
    return fault.partition(": ")[0]


def _details(rows: Sequence[Row], tallies: Sequence[Tally]) -> str:
    text = "\n## Measured\n\n"
    for row, tally in zip(rows, tallies, strict=True):
        for name, value in tally.measures.items():
            text += f"- {row.id}: {name}: {value}\n"
    text += "\n## Mutants\n\n"
    for row, tally in zip(rows, tallies, strict=True):
        for name, caught in tally.mutants.items():
            text += f"- {row.id}: {name}: {'caught by ' + _trial(caught) if caught else '**not caught**'}\n"
    skipped = [(r.id, reason) for r, t in zip(rows, tallies, strict=True) for reason in t.skipped]
    text += "\n## Not tested\n\n"
    text += "".join(f"- {row}: {reason}\n" for row, reason in skipped)
    text += (
        "- Power loss and torn sectors: F03 covers the order of the calls only.\n"
        "- A CUDA device, NCCL, real NVML and MIG: these machines have no GPU; F18 drives the real NVML "
        "bindings over a fake driver.\n"
    )
    lost = [(r.id, fault) for r, t in zip(rows, tallies, strict=True) for fault in t.faults]
    if lost:
        text += "\n## Lost and void\n\n"
        text += "".join(f"- {row}: {fault[:300]}\n" for row, fault in lost)
    return text
