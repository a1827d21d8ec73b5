"""README.md of a saved model: what it is, how good it was measured to be, how to use it."""

from collections.abc import Mapping
from typing import Any

from finetuning.common.formatting import shown
from finetuning.common.text import clean_line, redact
from finetuning.model.resolve import EMBEDDED

_CARD = """---
{head}
---

# {run}

{what}

| | |
|---|---|
| base model | {base} |
| run | {run} |
| step | {step} of {steps} |
| held-out loss there | {loss} |
| trained | {trained} |
| longest sequence | {length} |
| data, by content | {data} |

Use it, in the folder of the program that trained it:

```
uv run python ask.py "SM4的分组长度是多少？" --adapter FOLDER
uv run python export.py --adapter FOLDER --output merged_model
```

or in Python:

```python
{code}
```

The model was trained to think before it answers: its reply begins with its reasoning, which ends at
`</think>`. What it says may be wrong. The held-out loss says how well it predicts samples of the same kind,
and nothing about other questions.
"""
_ADAPTER_CODE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
_MODEL_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""


def model_card(
    run: str, step: int, held_out_loss: float | None, identity: Mapping[str, Any]
) -> str:
    """Markdown. held_out_loss: the last one that was measured, nats a token; None where none was.

    identity: that of the run, as `runs.identity.identity` makes it.
    """
    base, rank = redact(clean_line(str(identity["model"]), 200)), identity["lora_r"]
    demonstration = base == EMBEDDED
    if demonstration:
        what = "Of the **demonstration model**, which shows the program at work. Its answers mean nothing."
    else:
        kind = "A LoRA adapter of" if rank else "All weights of"
        what = f"{kind} {base}, trained on questions with reasoning."
    name = not demonstration and base.count("/") == 1 and not base.startswith(("/", "."))
    head = [*([f"base_model: {base}"] if name else []), "pipeline_tag: text-generation"]
    head += ["library_name: peft", "tags: [lora]"] if rank else ["library_name: transformers"]
    scale = f"LoRA, rank {rank}, alpha {identity['lora_alpha']:g}" if rank else "all weights"
    return _CARD.format(
        head="\n".join(head),
        run=run,
        what=what,
        base="the embedded demonstration model" if demonstration else base,
        step=step,
        steps=identity["steps"],
        loss=shown(held_out_loss),
        trained=scale,
        length=identity["max_seq_length"],
        data=identity["data"],
        code=_ADAPTER_CODE if rank else _MODEL_CODE,
    )
