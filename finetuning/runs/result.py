"""Which model is the result of a run, and why: for its last lines, and for those who ask or export it."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object
from finetuning.common.paths import check_there, expanded
from finetuning.config import EMBEDDED
from finetuning.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from finetuning.runs.directory import MODELS, RunDirectory, owner
from finetuning.runs.origin import read_origin
from finetuning.training.manifest import manifests

BEST = "the result of its run: it was stopped early, and this is its best model"
CHOSEN = "the result of its run: its best model, as --best-by asks"
FINAL = "the result of its run: the last step"
GOES_ON = "the newest; its run has not come to its end"
_CONFIG = "config.json"  # of a whole model, after full fine-tuning


@dataclass(frozen=True)
class Trained:
    """A trained model, and why it is the one that is meant."""

    folder: Path
    """Of an adapter, or of a whole model."""
    reason: str


def find_trained(named: str, output_dir: str) -> Trained:
    """`named`, a folder or the name of one below `output_dir`; when empty, the result of the newest run.

    The records say which run that is, and what it has come to: `best_model` where it was stopped early or
    --best-by was set, else `final_model`; while it goes on, its newest best model or checkpoint. Without
    records the files' times decide, which a copy need not keep. Raises UserError where there is none.
    """
    output = Path(expanded(output_dir, "--output-dir"))
    if named:
        return Trained(_named(named, output), "as --adapter says")
    recorded = (_of_run(RunDirectory(output, name), status) for name, status in _runs(output))
    found = next(filter(None, recorded), None) or _newest(output)
    if found is None:
        raise UserError(
            f"--output-dir {output_dir}: no final_model/, best_model/ or checkpoint with an adapter "
            "below it; train first, or name a folder with --adapter"
        )
    return found


def base_named(base_model: str) -> str:
    """What --base-model says, a folder or a name of the hub; UserError for a folder that is not there."""
    name = expanded(base_model, "--base-model")
    if name == EMBEDDED:
        raise UserError(
            f"--base-model {name}: a run makes the demonstration model, and its adapter says where; leave "
            "it out"
        )
    check_there(name, "--base-model")
    return name


def _runs(output: Path) -> list[tuple[str, dict[str, Any]]]:
    """Names of the runs that say how they stand, and what they say; the newest word first."""
    paths = output.glob("training_logs/*/status.json")
    said = [(path.parent.name, _said(path)) for path in paths]
    return sorted(said, key=lambda run: (_moment(run[1].get("at")), run[0]), reverse=True)


def _said(path: Path) -> dict[str, Any]:
    """How a run stands; nothing where that can't be read: another run may be meant."""
    try:
        return read_json_object(path)
    except UserError:
        return {}


def _moment(text: Any) -> float:
    """Seconds since 1970 of a record's time; 0, before all others, where it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _of_run(run: RunDirectory, status: dict[str, Any]) -> Trained | None:
    """What a run has come to, or how far it is; None where nothing of it is left."""
    final, best = (_own(run, name) for name in MODELS)
    if best and status.get("result") == best.name:
        return Trained(best, why_best(status.get("status", "")))
    if final and status.get("result"):
        return Trained(final, FINAL)
    checkpoints = run.output_dir / "checkpoints"
    own = [(m["step"], 0, p) for p, m in manifests(checkpoints) if m["run"] == run.name and _age(p)]
    steps = own[-1:]  # in the order in which they were saved
    if best and isinstance(step := read_origin(best).get("step"), int):
        steps.append((step, 1, best))
    if steps:
        return Trained(max(steps)[2], GOES_ON)
    left = final or best
    return Trained(left, FINAL if final else GOES_ON) if left else None


def _own(run: RunDirectory, name: str) -> Path | None:
    """The run's `final_model` or `best_model`, where it has one; a later run has put it aside."""
    aside = run.output_dir / "earlier_models" / run.name
    places = (place / name for place in (run.output_dir, aside))
    return next((p for p in places if owner(p) == run.name and _age(p)), None)


def _newest(output: Path) -> Trained | None:
    """By the times of the files."""
    best, final = output / MODELS[1], output / MODELS[0]
    places = [*output.glob("checkpoints/checkpoint-*"), best, final]
    found = [(_age(folder), i, folder) for i, folder in enumerate(places) if _age(folder)]
    if not found:
        return None
    newest = max(found)[2]  # written at the same moment: final_model, then best_model
    return Trained(newest, FINAL if newest == final else GOES_ON)


def why_best(outcome: str) -> str:
    """Why the best model is the result of a run that has ended so."""
    return BEST if outcome == "stopped" else CHOSEN


def _named(named: str, output: Path) -> Path:
    """The folder that `--adapter` means: a path, or a name below the output directory."""
    folder = Path(expanded(named, "--adapter"))
    if not folder.is_dir() and folder.name == named:
        below = (output / named, output / "checkpoints" / named)
        folder = next((path for path in below if path.is_dir()), folder)
    if not folder.is_dir():
        raise UserError(
            f"--adapter {named}: no such folder, here or below {output}; give a folder, or a name such as "
            "final_model, best_model or checkpoint-50"
        )
    if not is_adapter(folder) and not (folder / _CONFIG).is_file():
        raise UserError(
            f"--adapter {named}: neither an adapter ({ADAPTER_CONFIG}) nor a model ({_CONFIG}); "
            "give a folder such as final_model/ or checkpoints/checkpoint-50/"
        )
    return folder


def _age(folder: Path) -> float:
    """When the folder's weights were written, s; 0 where there are none, or damaged ones."""
    if folder.suffix == ".damaged":
        return 0.0
    weights = [folder / ADAPTER_WEIGHTS] if is_adapter(folder) else []
    if (folder / _CONFIG).is_file():
        weights += folder.glob("*.safetensors")
    return max((path.stat().st_mtime for path in weights), default=0.0)
