"""Where a saved model has come from, as its folder says."""

from pathlib import Path

from finetuning.common.files import read_json_object
from finetuning.runs.directory import ORIGIN
from finetuning.training.manifest import MANIFEST, STATE


def read_origin(folder: Path) -> dict:
    """What a saved model, or a checkpoint, says about its origin; empty where it says nothing."""
    if (folder / ORIGIN).is_file():
        return read_json_object(folder / ORIGIN)
    if not (folder / STATE).is_file():
        return {}
    state, manifest = (read_json_object(folder / name) for name in (STATE, MANIFEST))
    identity, counters = state.get("identity"), state.get("train_state", {})
    if not isinstance(identity, dict):
        return {}
    known = {name: manifest[name] for name in ("run", "step") if name in manifest}
    known |= {"system_prompt": system} if (system := counters.get("system_prompt")) else {}
    known |= {
        "held_out_loss": counters.get("last_eval_loss"),
        "evaluated_step": counters.get("last_eval_step"),
    }
    return {**known, "base": identity, "trained": identity}
