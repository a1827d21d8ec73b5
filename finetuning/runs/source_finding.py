"""Whether one source gets worse while the others get better, and a run's settings without that source."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from finetuning.data.split import replay_text
from finetuning.runs.recorded import RecordedRun

FEWEST = 5  # held-out samples of a source, and of all others, from which something is said of it
WORSE = 0.05  # rise of a source's held-out loss, as a share of its best
DOUBT = 0.05  # chance of a statement about any source of a run in which no source differs
MOST_FILES = 30  # that a command names instead of their folder
FAMILY = "Eval/By_Source/"


@dataclass(frozen=True)
class WorseSource:
    """source: as it stands in --data-path, or as the run read it from there."""

    source: str
    evidence: str


def worse_source(run: RecordedRun) -> WorseSource | None:
    """The training source whose held-out loss rose most against the others', or of which the alert spoke.

    Of a source with n of N held-out samples: its loss rose by r since its lowest value, that of the others
    in the same time by o (mean weighted by samples), nats/token. It is told where n and N - n are at least
    `FEWEST`, r is `WORSE` of the lowest value, and r - o > z·sqrt(N·(1/n + 1/(N - n))·(E1² + E2²)), with E1
    and E2 the standard errors of the whole held-out loss (Eval/Loss_Error) at both ends. N·E² is the
    variance of a sample's loss, taken as that of each source. The same samples are measured at both ends,
    so their errors partly cancel, and the rule is rather too strict. z: two-sided normal quantile of `DOUBT`,
    divided by the number of sources that are compared (Bonferroni); 1.96 of one.
    """
    names = {source.lstrip("/"): source for source in run.dataset().get("samples_per_file") or ()}
    held_out = run.configuration.get("held_out_samples") or {}
    whole = run.finite("Eval/Loss")
    fell = len(whole) > 1 and whole[max(whole)] < whole[min(whole)]
    judged = [name for name in names if held_out.get(name, 0) >= FEWEST] if fell else []
    worst, most = None, 0.0
    for name in judged:
        rise = _rise(run, name, held_out)
        if rise is None or rise.own < WORSE * rise.best:
            continue
        beyond = rise.own - rise.others - _quantile(len(judged)) * rise.error
        if beyond > most:
            worst, most = (name, rise), beyond
    if worst is not None:
        name, rise = worst
        return WorseSource(
            names[name],
            f"The held-out loss of its {held_out[name]} samples changed by {rise.own:+.2f}, that of the "
            f"others by {rise.others:+.2f}; chance explains a difference of "
            f"{_quantile(len(judged)) * rise.error:.2f}.",
        )
    for alert in run.alerts.newest:
        known = alert.get("evidence", {})
        if alert.get("name") == "Source_Regression" and known.get("losses") == "training":
            source = names.get(known.get("source", ""))
            if source:
                return WorseSource(source, "Its training loss rose while those of the others fell.")
    return None


@dataclass(frozen=True)
class _Rise:
    """Nats/token since the source's lowest held-out loss, `best`. error: standard error of own - others."""

    best: float
    own: float
    others: float
    error: float


def _rise(run: RecordedRun, name: str, held_out: Mapping[str, int]) -> _Rise | None:
    own = run.finite(FAMILY + name)
    errors = run.finite("Eval/Loss_Error")
    if len(own) < 3:
        return None
    first, last = min(own, key=own.get), max(own)
    changes = {}
    for other, number in held_out.items():
        losses = run.finite(FAMILY + other)
        if other != name and number and first in losses and last in losses:
            changes[other] = losses[last] - losses[first]
    rest = sum(held_out[other] for other in changes)
    if rest < FEWEST or first not in errors or last not in errors or first == last:
        return None
    others = sum(held_out[other] * change for other, change in changes.items()) / rest
    spread = sum(held_out.values()) * (errors[first] ** 2 + errors[last] ** 2)
    error = math.sqrt(spread * (1 / held_out[name] + 1 / rest))
    return _Rise(own[first], own[last] - own[first], others, error)


def _quantile(sources: int) -> float:
    return NormalDist().inv_cdf(1 - DOUBT / 2 / sources)


def without_source(run: RecordedRun, source: str) -> dict[str, Any] | None:
    """Settings without the source: --data-path and --data-weights, if any, or --replay; None where that can't
    be told: nothing would be left, or a folder's share of the tokens is that of several files."""
    settings = run.configuration.get("config", {})
    paths, weights = settings.get("data_path") or [], settings.get("data_weights") or []
    if settings.get("replay") and source == replay_text():
        return {"replay": 0.0}
    sources = list(run.dataset().get("samples_per_file") or ())
    kept: dict[str, list[float]] = {}  # a path, and its weight
    for place, path in enumerate(paths):
        rest = [path] if not _holds(path, source) else _others(path, source, sources)
        if len(rest) > 1 and weights and settings.get("data_weights_by") == "tokens":
            return None
        for one in rest:
            kept.setdefault(one, weights[place : place + 1])
    kept_weights = [weight for known in kept.values() for weight in known]
    if not kept or len(kept) > max(MOST_FILES, len(paths)) or list(kept) == list(paths):
        return None
    if weights and not any(kept_weights):
        return None
    return {"data_path": list(kept)} | ({"data_weights": kept_weights} if weights else {})


def _holds(path: str, source: str) -> bool:
    """Whether a source was read from a path of --data-path: a file, a folder or a glob."""
    folder = path.rstrip("/") + "/"
    return source == path or source.startswith(folder) or fnmatch.fnmatchcase(source, path)


def _others(path: str, source: str, sources: Sequence[str]) -> list[str]:
    return [other for other in sources if other != source and _holds(path, other)]
