"""What a run does with a model for which packed rows are wrong, before its weights are loaded.

uv run pytest -m "not long" tests/runs/test_packed_rows.py
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, Qwen3_5TextConfig

from finetuning.common.errors import UserError
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig
from finetuning.model.resolve import ResolvedModel
from finetuning.model.row_proof import RowProof
from finetuning.runs.plan import check_passes, prove_rows
from tests.helpers.tiny_model import make_tiny_model

LEAKS = RowProof("alone", "documents in one row see each other", 0.0)
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def test_a_model_that_no_way_is_right_for_ends_in_one_line(tmp_path, run, capfd):
    model = make_tiny_model(tmp_path / "gemma", kind=Gemma2Config)
    assert run(tmp_path, "--model-name", str(model)) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert "model gemma2 can't be trained here" in line and "final_logit_softcapping" in line
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_plan_says_why_it_reads_documents_one_by_one(tmp_path, run, capfd):
    model = make_tiny_model(tmp_path / "hybrid", kind=Qwen3_5TextConfig, **HYBRID)
    assert run(tmp_path, "--model-name", str(model), "--plan") == 0
    shown = capfd.readouterr()
    assert shown.err.count("one document a forward pass, as packed rows are wrong here") == 1
    assert "not estimated" in shown.out, "its linear attention is not in the estimate of memory"
    assert len(shown.err.splitlines()) == 1, (
        "what transformers says of a small model is no user's matter"
    )


@pytest.mark.parametrize(
    ("parallel", "ranks", "batch", "refused"),
    [
        ("fsdp", 2, {}, True),
        ("fsdp", 2, {"packing": False, "batch_size": 2}, True),
        ("fsdp", 2, {"packing": False}, False),
        ("fsdp", 1, {}, False),
        ("ddp", 2, {}, False),
    ],
)
def test_shards_make_equally_many_passes(parallel, ranks, batch, refused):
    """Ranks that gather a layer another number of times would wait for each other for ever."""
    config, dist = DirectTrainingConfig(**batch), SimpleNamespace(world_size=ranks)
    check_passes(config, dist, RowProof("packed", "", 0.0), parallel)
    if refused:
        with pytest.raises(UserError, match="--no-packing with --batch-size 1"):
            check_passes(config, dist, LEAKS, parallel)
    else:
        check_passes(config, dist, LEAKS, parallel)


def test_compiled_layers_are_for_packed_rows_only(tmp_path):
    model = make_tiny_model(tmp_path / "hybrid", kind=Qwen3_5TextConfig, **HYBRID)
    settings = {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
    config = DirectTrainingConfig(compile="on", **settings)
    found = ResolvedModel(str(model), model, False, "local folder")
    alone = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"compile on does not go with this model: .*see each other"
    ):
        prove_rows(config, found, alone, Terminal(quiet=True))
