"""Which model is the result of a run, and why: for its last lines, and for those who ask or export it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object
from finetuning.common.paths import expanded
from finetuning.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from finetuning.runs.directory import MODELS, RunDirectory, owner

BEST = "the result of its run: it was stopped early, and this is its best model"
CHOSEN = "the result of its run: its best model, as --best-by asks"
FINAL = "the result of its run: the last step"
_CONFIG = "config.json"  # of a whole model, after full fine-tuning


@dataclass(frozen=True)
class Trained:
    """A trained model, and why it is the one that is meant."""

    folder: Path
    """Of an adapter, or of a whole model."""
    reason: str


def find_trained(named: str, output_dir: str) -> Trained:
    """`named`, a folder or the name of one below `output_dir`; when empty, the result of the newest run.

    That is what the run says it has come to: `best_model` where it was stopped early or --best-by was set,
    else `final_model`. Where a newer checkpoint or best model is there, its run goes on, and the newest
    counts. Raises UserError where there is none.
    """
    output = Path(expanded(output_dir, "--output-dir"))
    if named:
        return Trained(_named(named, output), "as --adapter says")
    best, final = output / MODELS[1], output / MODELS[0]
    places = [*output.glob("checkpoints/checkpoint-*"), best, final]
    found = [(_age(folder), i, folder) for i, folder in enumerate(places) if _age(folder)]
    if not found:
        raise UserError(
            f"--output-dir {output_dir}: no final_model/, best_model/ or checkpoint with an adapter "
            "below it; train first, or name a folder with --adapter"
        )
    newest = max(found)[2]  # written at the same moment: final_model, then best_model
    if newest != final:
        return Trained(newest, "the newest; its run has not come to its end")
    status = _status(best, final)
    if status.get("result") == best.name:
        return Trained(best, why_best(status.get("status", "")))
    return Trained(final, FINAL)


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


def _status(best: Path, final: Path) -> dict[str, Any]:
    """What the run of both models says of its end; empty where they are not of one run."""
    run = owner(final)
    status = RunDirectory(final.parent, run).logs / "status.json"
    if not run or owner(best) != run or not _age(best) or not status.is_file():
        return {}
    return read_json_object(status)


def _age(folder: Path) -> float:
    """When the folder's weights were written, s; 0 where there are none, or damaged ones."""
    if folder.suffix == ".damaged":
        return 0.0
    weights = [folder / ADAPTER_WEIGHTS] if is_adapter(folder) else []
    if (folder / _CONFIG).is_file():
        weights += folder.glob("*.safetensors")
    return max((path.stat().st_mtime for path in weights), default=0.0)
