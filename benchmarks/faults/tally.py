"""What a row of the scorecard counts: tried, survived, lost, void, skipped; and what a row is."""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SUITE_ERROR = 71  # exit code of a child in which the suite, not the program, went wrong
_OWN_MISTAKES = (AttributeError, NameError, ImportError, TypeError)

# Whether the fault came, by something that only the fault can have left; and what is wrong then.
Trial = tuple[bool, list[str]]


class SuiteError(Exception):
    """A trial could not be made: it names what the program no longer has, or calls it wrongly."""


class Caught(Exception):
    """A mutant's first loss, which is all that is asked of it."""


def of_the_suite(error: BaseException) -> bool:
    """Whether the suite's own code raised the exception, and not the program that it tries."""
    if isinstance(error, SuiteError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and Path(frames[-1].filename).parent == Path(__file__).parent
    return isinstance(error, _OWN_MISTAKES) and inside


@dataclass
class Tally:
    """The trials of one row. A trial whose fault did not come is void, never survived."""

    row: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    void: int = 0
    skipped: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    mutants: dict[str, str] = field(default_factory=dict)  # name -> what caught it; empty: nothing
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    ends_at_a_loss: bool = False

    def add(self, name: str, fired: bool, problems: list[str]) -> None:
        """Count one trial."""
        self.tried += 1
        if not fired:
            self.void += 1
            self.faults.append(f"{name}: void, the fault did not come; {'; '.join(problems)}")
        elif problems:
            self.lost += 1
            self.faults.append(f"{name}: {'; '.join(problems)}")
            if self.ends_at_a_loss:
                raise Caught
        else:
            self.survived += 1

    def attempt(self, name: str, trial: Callable[[], Trial]) -> None:
        """Count one trial. An exception of the program is a loss; one of the suite itself ends the suite."""
        try:
            fired, problems = trial()
        except Exception as error:
            if of_the_suite(error):
                raise SuiteError(f"{self.row}, {name}") from error
            fired, problems = True, [traceback.format_exc(limit=-4)]
        self.add(name, fired, problems)

    def skip(self, reason: str) -> None:
        """Say that something was not tested, and why."""
        self.skipped.append(reason)

    def write(self, path: Path) -> None:
        """As JSON, for the process that waits for this one."""
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def read(cls, path: Path) -> "Tally":
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Row:
    """One fault of the scorecard.

    `run(rig, tally, count)` does `count` trials (some rows have a fixed number). Each mutant removes one
    protection; under it, `run` with `mutant_count` must lose something. `needs` is made once, by the
    program as it is, before any trial and any mutant.
    """

    id: str
    title: str
    run: Callable[[Any, Tally, int], None]
    full: int
    quick: int
    mutants: Mapping[str, Callable[[], None]]
    mutant_count: int = 1
    needs: Sequence[Callable[[Any], object]] = ()
