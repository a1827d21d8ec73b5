"""What became of everything that was read: kept, left out, or kept with less to learn from.

The first table of a run, `--plan` and `--check-data` show the same rows, those of `Accounts`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.config import DataSettings
from finetuning.data.token_table import EMPTY_BLOCK, TokenizedSamples, TruncationReport
from finetuning.data.training_data import TrainingData
from finetuning.readers.dataset import SampleSet
from finetuning.readers.sample import BrokenSample

WARNED = 0.05  # share of all that is left out, or kept with less to learn from, above which it is a warning
KEPT = (0.95, 0.99)  # shares of the documents for which a max_seq_length is named
_LENGTH_STEP = 64  # tokens; a named max_seq_length is a multiple
_SHOWN = 3  # places named in a message
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class _Share:
    """A row of the accounts: how many of how many, and what that means."""

    name: str
    count: int
    of: int
    text: str
    left_out: bool = False
    remedy: str = ""

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0

    def shown(self) -> str:
        """The count with its share and meaning; 0 says nothing else."""
        text = f"{self.count:,} of {self.of:,} ({self.share:.1%}) {self.text}"
        return "0" if not self.count else f"{text}; {self.remedy}" if self.remedy else text


@dataclass(frozen=True)
class Accounts:
    """What became of some files' samples: those for training with those split off, or held-out files.

    read, tokens: of these files. whose: "data" or "held-out data". splits: samples that spell a control token
    are kept as ordinary text. all_turns: every turn is learnt. chosen_length: max_seq_length is the user's,
    who has decided what is too long. empty_thinking: the setting. general: (k,) indices of the samples that
    are general text of the program's own, which do not count.
    """

    read: SampleSet
    tokens: TokenizedSamples
    whose: str
    splits: bool
    all_turns: bool
    chosen_length: bool
    empty_thinking: str
    general: np.ndarray

    @cached_property
    def report(self) -> TruncationReport:
        """What tokenization tells."""
        samples = self.read.samples
        return self.tokens.truncation.without([samples[int(i)] for i in self.general])

    @property
    def broken(self) -> tuple[BrokenSample, ...]:
        """What could not be read, and what the chat template refuses or loses."""
        return (*self.read.broken, *self.report.broken)

    @property
    def documents(self) -> int:
        """Turns that are learnt, with those that are too long."""
        kept = len(self.tokens) - len(self.tokens.documents_of(self.general))
        return kept + len(self.report.dropped) + len(self.report.empty_thinking)

    def rows(self) -> Rows:
        """Names and texts, always the same names."""
        files = len(self.read.samples_per_file) - bool(len(self.general))
        read = f"{self._samples:,} samples of {files:,} file{'s' * (files != 1)}"
        return [
            ("read", read),
            *((share.name, share.shown()) for share in self._shares),
            ("skipped files", self._skipped()),
        ]

    @property
    def _samples(self) -> int:
        return len(self.read.samples) - len(self.general)

    def _skipped(self) -> str:
        """How many files are not read, the first of them, and what to do about them; those of which something
        can be done come first."""
        skipped = self.read.skipped
        todo = {remark.source: remark.text.partition("; ")[2] for remark in skipped}
        names = sorted(todo, key=lambda name: not todo[name])
        told = [f"{clean_line(n, 100)}{todo[n] and ': ' + todo[n]}" for n in names[:_SHOWN]]
        between = "; " if any(todo.values()) else ", "
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"{len(names)}: {between.join(told)}{more}" if names else "0"

    def warnings(self) -> Iterator[str]:
        """Rows with a share above `WARNED`, and what the template had to be asked for."""
        for share in self._shares:
            if share.share > WARNED:
                yield f"{self.whose}: {share.name}: {share.shown()}{self._first(share)}"
        if self.tokens.asked_with:
            yield (
                f"the chat template closes the think block unless asked with {self.tokens.asked_with}; this "
                "program asks so, and who uses the trained model has to, too"
            )

    def check(self, max_fraction: float) -> None:
        """UserError where more than `max_fraction` of all is left out for one reason."""
        for share in self._shares:
            if share.left_out and share.share > max_fraction:
                remedy = share.remedy or "mend them (--check-data lists them)"
                raise UserError(
                    f"{self.whose}: {share.count} of {share.of} samples {share.text}, more than "
                    f"max_broken_fraction {max_fraction:g} allows{self._first(share)}. What helps: {remedy}; "
                    "or raise --max-broken-fraction"
                )

    def _first(self, share: _Share) -> str:
        places = "; ".join(map(str, self.broken[:_SHOWN]))
        return f". First: {places}" if share.name == "broken" else ""

    @cached_property
    def _shares(self) -> list[_Share]:
        report, documents, turns = self.report, self.documents, self.report.assistant_turns
        everything = self._samples + len(self.read.broken)
        kept = "are kept as ordinary text: their" if self.splits else "are left out: their"
        silent = turns - report.learnt_turns
        return [
            _Share("broken", len(self.broken), everything, "are broken and left out", True),
            _Share(
                "control tokens",
                len(report.control_tokens),
                everything,
                f"{kept} text spells a control token",
                not self.splits,
                "" if self.splits else "--control-tokens split keeps them",
            ),
            self._too_long(),
            _Share(
                "shortened",
                len(report.shortened),
                documents,
                "are too long and lose the middle of their thinking",
            ),
            _Share(
                "without thinking",
                len(report.without_thinking),
                documents,
                "have no thinking to learn" + EMPTY_BLOCK[self.empty_thinking],
            ),
            _Share(
                "empty thinking",
                len(report.empty_thinking),
                documents,
                "have no thinking and are left out",
            ),
            _Share(
                "turns without loss",
                silent,
                turns,
                "assistant turns carry no loss: nobody asked before them, or they say so"
                if self.all_turns
                else "assistant turns carry no loss, and a template may leave out what they thought",
                remedy="" if self.all_turns else "--loss-on all_turns trains them",
            ),
        ]

    def _too_long(self) -> _Share:
        lengths = {self.length_for(kept): kept for kept in KEPT}  # of one length the larger share
        named = ", ".join(
            f"{length} keeps {kept:.0%}" for length, kept in lengths.items() if length
        )
        others = "--over-length truncate_thinking shortens them"
        return _Share(
            "too long",
            len(self.report.dropped),
            self.documents,
            f"are longer than {self.tokens.max_seq_length} tokens and left out",
            not self.chosen_length,
            f"--max-seq-length {named}; {others}" if named else others,
        )

    def length_for(self, kept: float) -> int | None:
        """The max_seq_length with which so large a share of the documents is whole; None: it is already."""
        long = sorted(self.report.long_lengths)
        beyond = math.ceil(kept * self.documents) - (self.documents - len(long))
        if beyond <= 0:
            return None
        return math.ceil(long[beyond - 1] / _LENGTH_STEP) * _LENGTH_STEP


def accounts_of(data: TrainingData, settings: DataSettings) -> tuple[Accounts, ...]:
    """Of the files for training, and of the user's own held-out files where there are some."""
    chosen = settings.max_seq_length != "auto"
    rules = {
        "splits": settings.control_tokens == "split",
        "all_turns": settings.loss_on == "all_turns",
        "chosen_length": chosen,
        "empty_thinking": settings.empty_thinking,
    }
    general = data.split.general
    own = Accounts(data.split.read, data.train.tokens, "data", **rules, general=general)
    if data.split.eval_read is None:
        return (own,)
    whose, tokens = "held-out data", data.held_out.tokens
    return own, Accounts(data.split.eval_read, tokens, whose, **rules, general=general[:0])


def account_rows(accounts: Sequence[Accounts]) -> Rows:
    """The rows of all; those of held-out files say so."""
    first, *others = accounts
    return [
        *first.rows(),
        *((f"{other.whose}: {name}", text) for other in others for name, text in other.rows()),
    ]
