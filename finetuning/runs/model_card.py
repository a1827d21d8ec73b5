"""README.md of a saved model: what it is, how good it was measured to be, how to use it, what made it.

It may be shown to anybody: counts and digests of the data, no text of them; settings that are numbers,
switches or words of a choice; no path of a machine. Beside a recorded run it has the run's curves.
"""

import dataclasses
import io
import json
import shlex
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from finetuning.common.files import atomic_write, atomic_write_text, read_json_object
from finetuning.common.formatting import shown
from finetuning.common.text import clean_line, redact, table_cell
from finetuning.config import EMBEDDED, DirectTrainingConfig, allowed_values
from finetuning.runs.before_after import changes, newest_evaluation, start_name
from finetuning.runs.directory import MODELS, ORIGIN, owner
from finetuning.runs.recorded import RecordedRun

CARD, CURVES = "README.md", "curves.png"
Kind = Literal["adapter", "whole", "merged"]
"""A LoRA adapter; a model that was trained whole; an adapter and its base in one."""

_SHOWN = {  # chart of the picture -> its curves
    "Loss": ("Training/Loss", "Eval/Loss"),
    "Held-out loss by part": ("Eval/Thinking_Loss", "Eval/Answer_Loss"),
    "Token accuracy": ("Training/Token_Accuracy", "Eval/Token_Accuracy"),
    "Gradient norm": ("Training/Gradient_Norm",),
}
_PEFT = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")"""
_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")"""
_ASKING = """
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
asked = [{"role": "user", "content": "SM4的分组长度是多少？"}]
options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
prompt = tokenizer.apply_chat_template(asked, **options)
said = model.generate(**prompt, max_new_tokens=2048)[0, prompt["input_ids"].shape[1] :]
thinking, _, answer = tokenizer.decode(said, skip_special_tokens=True).partition("</think>")
print(answer)"""
_OURS = """In the folder of the program that trained it (with its `--output-dir`, where the run had one):

```
uv run python ask.py "SM4的分组长度是多少？" --adapter FOLDER
uv run python export.py --adapter FOLDER --output merged_model
```

"""
_SERVERS = """\
Served with OpenAI's interface by vLLM or SGLang, in the folder that holds this one. What was thought is
apart: vLLM calls it `reasoning` (its older versions `reasoning_content`), SGLang `reasoning_content`.

```
vllm serve FOLDER --served-model-name crypto --reasoning-parser deepseek_r1
python -m sglang.launch_server --model-path FOLDER --served-model-name crypto --reasoning-parser deepseek-r1
```

"""
_FOR_THE_PROGRAM = (
    "origin.json",
    "run.txt",
)  # beside a trained model; the first may hold a text of the data
_ELSEWHERE = """

First write into `adapter_config.json`, as `base_model_name_or_path`, what others call the base: now it is the
place of a folder on the machine that trained it."""
_LIMITS = """\
The model was trained to think before it answers: its reply begins with its reasoning, which ends at
`</think>`. What it says may be wrong. The held-out loss says how well it predicts samples of the same kind,
and nothing about other questions."""


def model_card(
    origin: Mapping[str, Any], kind: Kind, folder: str, record: RecordedRun | None = None
) -> str:
    """Markdown. origin: the content of the model's origin.json, of which anything may be missing.

    folder: the last part of its name, for the lines that others copy. record: its run as it was recorded;
    then changes, curves (the file `CURVES`), data and settings follow.
    """
    base = origin.get("base", {})
    name = public_name(base.get("model", ""))
    sections = [
        _head(base, kind),
        f"# {origin.get('run') or 'A trained model'}\n\n{_what(name, kind)}\n\n{_facts(origin, name)}",
        f"## Use\n\n{_lines_for(folder, _use(kind))}",
        *(_recorded(record, origin.get("step")) if record else []),
        f"## Limits\n\n{_LIMITS}",
        f"## Licence\n\n{_licence(base, name)}",
        f"## Share\n\n{_lines_for(folder, _share(kind, name))}",
    ]
    return "\n\n".join(sections) + "\n"


def public_name(base: str) -> str:
    """A base as others may know it: a hub name as it is, of a folder its last part."""
    text = redact(clean_line(str(base), 200))
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text
    return Path(text.replace("\\", "/")).name if is_path else text


def _head(base: Mapping[str, Any], kind: Kind) -> str:
    """What the hub reads."""
    name = public_name(base.get("model", ""))
    lines = [f"base_model: {name}"] if name.count("/") == 1 else []
    lines += [f"license: {base['licence']}"] if base.get("licence") else []
    lines += ["pipeline_tag: text-generation"]
    is_adapter = kind == "adapter"
    lines += (
        ["library_name: peft", "tags: [lora]"] if is_adapter else ["library_name: transformers"]
    )
    return "\n".join(["---", *lines, "---"])


def _what(name: str, kind: Kind) -> str:
    if name == EMBEDDED:
        return "Of the **demonstration model**, which shows the program at work. Its answers mean nothing."
    of = {
        "adapter": "A LoRA adapter of",
        "whole": "All weights of",
        "merged": "A LoRA adapter merged into",
    }
    return (
        f"{of[kind]} {name or 'a base that it does not name'}, trained on questions with reasoning."
    )


def _facts(origin: Mapping[str, Any], name: str) -> str:
    """The table of what is known."""
    trained = origin.get("trained", {})
    rank, steps = trained.get("lora_r"), trained.get("steps")
    scale = f"LoRA, rank {rank}, alpha {trained['lora_alpha']:g}" if rank else "all weights"
    rows = {
        "base model": "the embedded demonstration model" if name == EMBEDDED else name,
        "base model, by content": origin.get("base", {}).get("model_weights"),
        "run": origin.get("run"),
        "step": f"{origin.get('step')} of {steps}" if steps else None,
        **(_measured(origin) if steps else {}),
        "trained": scale if trained else None,
        "longest sequence": trained.get("max_seq_length"),
        "data, by content": trained.get("data"),
    }
    return _table(("", ""), ((row, value) for row, value in rows.items() if value))


def _measured(origin: Mapping[str, Any]) -> dict[str, str]:
    """The row of the held-out loss, which may have been measured at an earlier step."""
    at, loss = origin.get("evaluated_step"), origin.get("held_out_loss")
    where = "there" if at == origin.get("step") else f"at step {at}" if at is not None else "so far"
    return {f"held-out loss {where}": shown(loss)} if loss is not None else {}


def _use(kind: Kind) -> str:
    code = f"```python\n{_PEFT if kind == 'adapter' else _TRANSFORMERS}{_ASKING}\n```"
    programs = _OURS if kind == "adapter" else _SERVERS
    return f"{programs}In Python, in the folder that holds this one:\n\n{code}"


def _share(kind: Kind, name: str) -> str:
    """The line for the hub, and what has to be done before it."""
    left_out = (
        "" if kind == "merged" else "".join(f" --exclude {file}" for file in _FOR_THE_PROGRAM)
    )
    before = _ELSEWHERE if kind == "adapter" and "/" not in name else ""
    return f"In the folder that holds this one:\n\n```\nhf upload OWNER/NAME FOLDER{left_out}\n```{before}"


def _lines_for(folder: str, text: str) -> str:
    """With the name of the folder in Python's and the shell's lines, where a line can hold it."""
    if not folder.isprintable() or "`" in folder:
        return text
    text = text.replace('"FOLDER"', json.dumps(folder, ensure_ascii=False))
    return text.replace("FOLDER", shlex.quote(folder))


def _licence(base: Mapping[str, Any], name: str) -> str:
    if name == EMBEDDED:
        return "The demonstration model was made by the program that trained it."
    known = base.get("licence")
    said = f"The base is under `{known}`, as its own card says; what was made of it stays under those terms."
    unknown = (
        "The licence of the base is not known here; what was made of it stays under its terms."
    )
    return (
        f"{said if known else unknown} Look at them, and at those of the data, before you share it."
    )


# -----------------------------------------------------------------------------
# From the record of the run


def _recorded(record: RecordedRun, step: int | None) -> list[str]:
    return [
        *_before_and_after(record, step),
        f"## Curves\n\n![losses, accuracy and gradient norm over the steps]({CURVES})",
        f"## Data\n\n{_data(record.dataset())}",
        f"## Settings\n\n{_settings(record.configuration.get('config', {}))}",
    ]


def _before_and_after(record: RecordedRun, step: int | None) -> list[str]:
    """At this step, or at the newest evaluation before it, which is said; never at a later one."""
    step = record.steps if step is None else step
    at = newest_evaluation(record.series, step)
    rows = [
        (change.name, *change.texts, change.verdict)
        for change in (changes(record.series, at) if at else ())
    ]
    if not rows:
        return []
    table = _table(("", start_name(record.configuration), "tuned", ""), rows)
    earlier = f"Measured at step {at}, the last time before this model's.\n\n" if at != step else ""
    return [f"## Before and after\n\n{earlier}{table}"]


def _data(statistics: Mapping[str, Any]) -> str:
    """Counts only."""
    tokens = statistics.get("tokens", {}).get("total", {})
    rows = {
        "samples": statistics.get("total_samples"),
        "with reasoning": statistics.get("thinking_samples"),
        "left out, broken": statistics.get("broken_samples"),
        "exact duplicates": statistics.get("exact_duplicates"),
        "near duplicates": statistics.get("near_duplicates"),
        "tokens of a sample, median": tokens.get("p50"),
        "tokens of the longest": tokens.get("max"),
    }
    return _table(
        ("", ""), ((row, f"{value:g}") for row, value in rows.items() if value is not None)
    )


def _settings(config: Mapping[str, Any]) -> str:
    """Those that say how it was trained; no name, path, command or other text of somebody's."""
    fields = {field.name: field for field in dataclasses.fields(DirectTrainingConfig)}
    known = {
        name: value
        for name, value in config.items()
        if name in fields and _is_plain(value, allowed_values(fields[name])[0])
    }
    rows = _table(("setting", "value"), known.items())
    return f"<details><summary>{len(known)} settings</summary>\n\n{rows}\n\n</details>"


def _is_plain(value: Any, words: Container[Any]) -> bool:
    """Whether it is a number, a switch, or a word of a choice; or several of these."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_plain(part, words) for part in value)
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and value in words)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [tuple(header), *(tuple(row) for row in rows)]
    cells = [[redact(table_cell(str(cell), 200)) for cell in line] for line in lines]
    marks = ["---"] * len(cells[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], marks, *cells[1:]))


def curves(record: RecordedRun) -> bytes:
    """A PNG of the curves that matter, each chart of which the run has points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = {
        title: found
        for title, tags in _SHOWN.items()
        if (found := {tag: record.series[tag] for tag in tags if record.series.get(tag)})
    }
    figure = Figure(figsize=(10, 3.2 * ((len(charts) + 1) // 2 or 1)), layout="constrained")
    for place, (title, found) in enumerate(charts.items(), 1):
        axes = figure.add_subplot((len(charts) + 1) // 2, 2, place, title=title, xlabel="step")
        for tag, points in found.items():
            axes.plot(*zip(*points, strict=True), label=tag, marker="." if len(points) < 40 else "")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def write_card(
    folder: Path, name: str, kind: Kind, origin: Mapping[str, Any], record: RecordedRun | None
) -> None:
    """README.md of a model's folder, which is to be called `name`, and the picture that it shows."""
    if record is not None:
        with atomic_write(folder / CURVES, folder / f".{CURVES}.tmp") as file:
            file.write(curves(record))
    atomic_write_text(folder / CARD, model_card(origin, kind, name, record))


def complete_cards(record: RecordedRun) -> None:
    """What the run's saved models could not know while it ran: changes, curves, data, settings."""
    for name in MODELS:
        folder = record.directory.output_dir / name
        if owner(folder) == record.name and (folder / ORIGIN).is_file():
            origin = read_json_object(folder / ORIGIN)
            kind: Kind = "adapter" if origin.get("trained", {}).get("lora_r") else "whole"
            write_card(folder, name, kind, origin, record)
