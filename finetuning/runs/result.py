"""Which model is the result of a run: for those who ask it, and for those who export it."""

from pathlib import Path

from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object
from finetuning.common.paths import expanded
from finetuning.model.resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from finetuning.runs.directory import RunDirectory, owner

_CONFIG = "config.json"  # of a whole model, after full fine-tuning


def find_trained(named: str, output_dir: str) -> Path:
    """Folder of an adapter, or of a whole model.

    `named` as it is; when empty, the newest of final_model/, best_model/ and checkpoints/ below
    `output_dir`; best_model/ in place of final_model/ where its run was stopped early. Raises UserError
    where there is none.
    """
    if named:
        folder = Path(expanded(named, "--adapter"))
        if not folder.is_dir():
            raise UserError(f"--adapter {named}: no such folder")
        if not is_adapter(folder) and not (folder / _CONFIG).is_file():
            raise UserError(
                f"--adapter {named}: neither an adapter ({ADAPTER_CONFIG}) nor a model ({_CONFIG}); "
                "give a folder such as final_model/ or checkpoints/checkpoint-50/"
            )
        return folder
    output = Path(expanded(output_dir, "--output-dir"))
    best, final = output / "best_model", output / "final_model"
    places = [*output.glob("checkpoints/checkpoint-*"), best, final]
    found = [(_age(folder), i, folder) for i, folder in enumerate(places) if _age(folder)]
    if not found:
        raise UserError(
            f"--output-dir {output_dir}: no final_model/, best_model/ or checkpoint with an adapter "
            "below it; train first, or name a folder with --adapter"
        )
    newest = max(found)[2]  # written at the same moment: final_model, then best_model
    return best if newest == final and _best_counts(best, final) else newest


def _best_counts(best: Path, final: Path) -> bool:
    """Whether the run of both has named the best one its result."""
    run = owner(final)
    status = RunDirectory(final.parent, run).logs / "status.json"
    if not run or owner(best) != run or not _age(best) or not status.is_file():
        return False
    return read_json_object(status).get("result") == best.name


def _age(folder: Path) -> float:
    """When the folder's weights were written, s; 0 where there are none, or damaged ones."""
    if folder.suffix == ".damaged":
        return 0.0
    weights = [folder / ADAPTER_WEIGHTS] if is_adapter(folder) else []
    if (folder / _CONFIG).is_file():
        weights += folder.glob("*.safetensors")
    return max((path.stat().st_mtime for path in weights), default=0.0)
