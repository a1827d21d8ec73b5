"""Which trained model is meant: a folder that is named, or the newest one of an output directory."""

from pathlib import Path

from errors import UserError
from model_loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_CONFIG = "config.json"  # of a whole model, after full fine-tuning


def find_trained(named: str, output_dir: str) -> Path:
    """Folder of an adapter, or of a whole model.

    `named` as it is; when empty, the newest of final_model/, best_model/ and checkpoints/ below
    `output_dir`. Raises UserError where there is none.
    """
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise UserError(f"--adapter {named}: no such folder")
        if not is_adapter(folder) and not (folder / _CONFIG).is_file():
            raise UserError(
                f"--adapter {named}: neither an adapter ({ADAPTER_CONFIG}) nor a model ({_CONFIG}); "
                "give a folder such as final_model/ or checkpoints/checkpoint-50/"
            )
        return folder
    output = Path(output_dir).expanduser()
    places = [
        *output.glob("checkpoints/checkpoint-*"),
        output / "best_model",
        output / "final_model",
    ]
    found = [(_age(folder), i, folder) for i, folder in enumerate(places) if _age(folder)]
    if not found:
        raise UserError(
            f"--output-dir {output_dir}: no final_model/, best_model/ or checkpoint with an adapter "
            "below it; train first, or name a folder with --adapter"
        )
    return max(found)[2]  # written at the same moment: final_model, then best_model


def is_adapter(folder: Path) -> bool:
    """Whether a PEFT adapter is in the folder."""
    return (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def _age(folder: Path) -> float:
    """When the folder's weights were written, s; 0 where there are none, or damaged ones."""
    if folder.suffix == ".damaged":
        return 0.0
    weights = [folder / ADAPTER_WEIGHTS] if is_adapter(folder) else []
    if (folder / _CONFIG).is_file():
        weights += folder.glob("*.safetensors")
    return max((path.stat().st_mtime for path in weights), default=0.0)
