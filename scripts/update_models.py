"""docs/models.md: what becomes of every causal architecture that the installed transformers knows.

    uv run python scripts/update_models.py            tries them all and writes the page, 20 minutes
    uv run python scripts/update_models.py qwen3 phi3  tries these and writes their rows

Each is tried as a run tries its model before the first step (`finetuning/model/row_proof.py`), with the
default configuration of its class, and once more with what `VARIANTS` and a sliding window add. They run in
another process, which is started anew where one of them ends it.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from finetuning.common.text import table_cell  # noqa: E402
from finetuning.model import row_proof  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
LONGEST = 10**9  # tokens: documents that cross every limit an architecture may have
SECONDS = 600  # for one architecture
COLUMNS = ["| architecture | documents go through it in | difference | why |", "|---|---|---|---|"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
# What a class needs because its own defaults give no model, or none of the kind that is used.
NEEDED = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]},
    "lfm2_moe": {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True},
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
}
GROWING = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
VARIANTS = {
    "phi3": {"positions beyond the original ones": {"rope_parameters": LONG_ROPE}},
    "falcon": {"ALiBi": {"alibi": True}},
    "gemma2": {"plain logits": {"final_logit_softcapping": None}},
    "gpt2": {"no dropout": {"attn_pdrop": 0.0}},
    "qwen3": {
        "dropout of attention": {"attention_dropout": 0.1},
        "positions that grow": {"rope_parameters": GROWING},
    },
}
OUTCOMES = {
    "packed": "packed rows",
    "marked": "packed rows, marked",
    "alone": "one document a pass",
}


def cases(names: list[str]) -> Iterator[tuple[str, str, dict]]:
    """Architecture, variant and settings of everything to try."""
    for name in names:
        needed = NEEDED.get(name, {})
        yield name, "", needed
        yield from ((name, "windows", {**needed, **more}) for more in windows(name, needed))
        for variant, settings in VARIANTS.get(name, {}).items():
            yield name, variant, {**needed, **settings}


def windows(name: str, needed: dict) -> Iterator[dict]:
    """Settings that give a class windows which its defaults do not have, if it knows any."""
    try:
        content = CONFIG_MAPPING[name](**needed).to_dict()
    except Exception:  # there is a row that says so
        return
    layers = content.get("layer_types") or []
    if "sliding_window" not in content or "sliding_attention" in layers:
        return
    settings = {"sliding_window": 4096}
    if "use_sliding_window" in content:
        settings["use_sliding_window"] = True
    if set(layers) == {"full_attention"}:
        half = (["full_attention", "sliding_attention"] * len(layers))[: len(layers)]
        settings["layer_types"] = half
    if content["sliding_window"] and "layer_types" not in settings:
        return
    yield settings


class Trials:
    """Trials in another process, which is started anew after one that ends or hangs it."""

    def __init__(self) -> None:
        self._pool = new_pool()

    def tried(self, name: str, settings: dict) -> row_proof.RowProof:
        """The outcome for one configuration."""
        try:
            return self._pool.submit(trial, name, settings).result(SECONDS)
        except (BrokenProcessPool, TimeoutError):
            for process in list(self._pool._processes.values()):
                process.kill()
            self._pool = new_pool()
            return row_proof.RowProof("", f"the trial ended its process or took {SECONDS} s", 0)


def new_pool() -> ProcessPoolExecutor:
    """One process, which has not the memory of this one."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def trial(name: str, settings: dict) -> row_proof.RowProof:
    """Runs in the other process."""
    torch.set_num_threads(1)
    try:
        return row_proof.prove(CONFIG_MAPPING[name](**settings), longest=LONGEST)
    except Exception as error:  # of the configuration's class
        first = str(error).strip().splitlines() or [type(error).__name__]
        return row_proof.RowProof("", f"its class makes no configuration ({first[-1].strip()})", 0)


def row(name: str, variant: str, proof: row_proof.RowProof) -> str:
    """One line of the table."""
    outcome = OUTCOMES.get(proof.way, "**refused**")
    difference = f"{proof.difference:.0e}".replace("0e+00", "0") if proof.way else ""
    title = f"{name}, {variant}" if variant else name
    reason = proof.reason.replace(
        "`", "'"
    )  # a command that a library names is none of this project's
    if proof.tokens and not proof.way:
        reason += f"; documents of up to {proof.tokens:,} tokens can be trained"
    return f"| {title} | {outcome} | {difference} | {table_cell(reason, 300)} |"


def head() -> str:
    """What the page says before its table."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    return f"""# Which models can be trained

Made by `scripts/update_models.py` with {versions}; change nothing by hand.

Nobody keeps a list of models that work. Before the first step a run builds a small model of the same class,
with random weights and the same kinds of layers, windows and heads, and compares its way of training with
what transformers computes for each document alone: hidden states, logits, loss and the gradients of all
weights (`finetuning/model/row_proof.py`). The answer is kept in the cache. Three things can come out:

- **packed rows**: several documents in one row do not see each other, and everything is equal. The number is
  the largest difference of hidden states, as a share of their spread; 0 where even the last bit agrees.
- **one document a pass**: packed rows would be wrong, for the reason in the last column, and documents that
  go through the model one after the other are right. Steps, batches and losses are those of the plan; a step
  takes longer.
- **refused**: neither is right. The run ends at once with the reason.

With flash-linear-attention and causal-conv1d on a GPU some models of the second kind are of the first: they
are told where documents begin by transformers' own arguments (`cu_seq_lens_q`, `seq_idx`), if a trial agrees
that they listen.

The table holds every architecture in transformers' list of causal language models, tried with the default
configuration of its class and with documents that cross all of its windows and chunks, or are as long as it
has positions. Your model is tried
with its own configuration, so the answer may be another one: a window that no document reaches hides nothing,
and a model with a soft cap is refused even if its class has none by default.

"""


def main(names: list[str]) -> None:
    """Write the page, or the rows of some architectures into it, if it was made with the same versions."""
    trials, lines = Trials(), []
    for name, variant, settings in cases(names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        start = time.perf_counter()
        lines.append(row(name, variant, trials.tried(name, settings)))
        print(f"{time.perf_counter() - start:5.1f} s {lines[-1]}", flush=True)
    before = PAGE.read_text(encoding="utf-8") if names and PAGE.exists() else ""
    if before.startswith(head()):
        kept = [line for line in before.splitlines() if line.startswith("| ")][1:]
        lines += [line for line in kept if architecture(line) not in names]
    if not names or before.startswith(head()):
        table = "\n".join([*COLUMNS, *sorted(lines, key=architecture)])
        PAGE.write_text(f"{head()}{table}\n", encoding="utf-8")


def architecture(line: str) -> str:
    """Of a row, which sorting keeps in its order among those of the same architecture."""
    return line.removeprefix("| ").partition(" |")[0].partition(",")[0]


if __name__ == "__main__":
    main(sys.argv[1:])
