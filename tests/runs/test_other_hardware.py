"""Plans for GPUs that are not here, and the recipes whose plans must fit.

uv run pytest tests/runs/test_other_hardware.py
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from direct_finetuning_with_existing_modules import main
from finetuning.command_line import parse_command_line
from finetuning.common.distributed import Distributed
from finetuning.common.errors import UserError
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig
from finetuning.model.adapters import attach_adapters
from finetuning.model.flops import peak_flops
from finetuning.runs.other_hardware import GPUS, Gpus, PlanElsewhere, plan_elsewhere
from finetuning.runs.placement import placement_of
from finetuning.training.captured_step import why_not_captured
from finetuning.training.forecast import RunForecast

RECIPES = Path(__file__).parents[2] / "docs" / "recipes_by_gpu.md"
PLANS = re.findall(r"^uv run python \S+ (--plan .+)$", RECIPES.read_text("utf-8"), re.MULTILINE)
DOCUMENTED = "/models/Qwen3-4B-Thinking-2507"


@pytest.fixture(scope="module")
def qwen3_4b(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with the configuration of Qwen3-4B and a tokenizer, without a weight."""
    folder = tmp_path_factory.mktemp("qwen3") / "Qwen3-4B"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder)
    Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=262144,
    ).save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    return folder


def planned(arguments: str, model: Path, data: Path, cache: Path) -> PlanElsewhere:
    """The plan of a documented command line."""
    words = shlex.split(arguments.replace(DOCUMENTED, str(model)).replace("my_qa.jsonl", str(data)))
    command = parse_command_line([*words, "--cache-dir", str(cache)])
    trust = {"trust_remote_code": command.trust_remote_code}
    return plan_elsewhere(command.training, Gpus.parse(command.gpus), Terminal(quiet=True), **trust)


@pytest.mark.parametrize("arguments", PLANS)
def test_a_recipe_fits(arguments: str, qwen3_4b, tiny_data, cache_dir):
    plan = planned(arguments, qwen3_4b, tiny_data, cache_dir)
    assert plan.fits
    estimate = plan.forecast.memory.estimate
    assert estimate.total > 7e9 / (plan.gpus.count if plan.parallel == "fsdp" else 1)
    assert plan.forecast.seconds is not None


def test_every_size_of_memory_has_a_recipe():
    gpus = {str(Gpus.parse(re.search(r"--gpus (\S+)", plan)[1])) for plan in PLANS}
    assert {"1x4090-24G", "1xL40S-45G", "1xH100-80G", "8xH100-80G"} <= gpus


def test_what_does_not_fit_is_told_with_what_to_change(
    qwen3_4b, tiny_data, tmp_path, cache_dir, capfd
):
    words = f"--plan --gpus 1xL4-10G --data-path {tiny_data} --model-name {qwen3_4b} --lora-r 0"
    assert main([*words.split(), "--cache-dir", str(cache_dir), "--output-dir", str(tmp_path)]) == 1
    said = capfd.readouterr().out
    assert (
        "no: try" in said
        and "more GPUs with --parallel fsdp" in said
        and "tokens an update" in said
    )


@pytest.mark.slow
def test_shards_where_replicas_do_not_fit(qwen3_4b, tiny_data, cache_dir):
    common = f"--data-path my_qa.jsonl --model-name {DOCUMENTED}"
    small = planned(f"--plan --gpus 8xA10-9G {common}", qwen3_4b, tiny_data, cache_dir)
    large = planned(f"--plan --gpus 8xH100 {common}", qwen3_4b, tiny_data, cache_dir)
    assert (small.parallel, large.parallel) == ("fsdp", "ddp")
    one = planned(f"--plan --gpus 1xH100 {common}", qwen3_4b, tiny_data, cache_dir)
    assert large.steps.num_steps < one.steps.num_steps, "eight ranks take eight rows an update"


COMMON = f"--plan --gpus 1xH100 --data-path my_qa.jsonl --model-name {DOCUMENTED}"


def test_a_folder_has_no_revision(qwen3_4b, tiny_data, cache_dir):
    with pytest.raises(UserError, match="leave --revision out"):
        planned(f"{COMMON} --revision v1", qwen3_4b, tiny_data, cache_dir)


def test_the_revision_is_asked_for(tiny_data, cache_dir, monkeypatch):
    asked = {}

    def download(name: str, **how: object) -> str:
        asked.update(how, name=name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match="no network"):
        planned(f"{COMMON} --revision v1", Path("owner/model"), tiny_data, cache_dir)
    assert (asked["name"], asked["revision"]) == ("owner/model", "v1")


def test_probes_come_from_their_own_file(qwen3_4b, tiny_data, cache_dir, tmp_path):
    """Their answers are longer than those of the data, so that evaluations take longer."""
    own = tmp_path / "probes.jsonl"
    row = {"question": "问", "thinking": "想" * 400, "answer": "答" * 400}
    own.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    words = f"{COMMON} --max-seq-length 4096 --num-probes 1"
    words += " --eval-steps 40"
    plain = planned(words, qwen3_4b, tiny_data, cache_dir)
    asked = planned(f"{words} --probe-path {own}", qwen3_4b, tiny_data, cache_dir)
    assert asked.forecast.seconds > plain.forecast.seconds


def test_an_adapter_brings_its_settings(qwen3_4b, tiny_data, cache_dir, finished, tmp_path, capfd):
    words = COMMON.replace("my_qa.jsonl", str(tiny_data)).replace(DOCUMENTED, str(qwen3_4b))
    words += f" --cache-dir {cache_dir} --output-dir {tmp_path}"
    words += f" --init-adapter {finished / 'final_model'}"
    assert main([*words.split(), "--lora-r", "3"]) == 0
    assert "brings its own settings: lora_r" in "".join(capfd.readouterr())
    assert main([*words.split(), "--lora-r", "0"]) == 2


def test_a_model_runs_its_own_code_where_it_may(
    qwen3_4b, tiny_data, cache_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    own = tmp_path / "own"
    shutil.copytree(qwen3_4b, own)
    config = json.loads((own / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own_kind", "auto_map": classes}
    (own / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (own / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own_kind'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError):
        planned(COMMON, own, tiny_data, cache_dir)
    assert planned(f"{COMMON} --trust-remote-code", own, tiny_data, cache_dir).fits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xH100", "8xH100-80G"),
        ("1x4090", "1x4090-24G"),
        ("rtx4090", "1x4090-24G"),
        ("1xA100-40G", "1xA100-40G"),
        ("2xa100-40gb", "2xA100-40G"),
    ],
)
def test_ways_to_write_gpus(text: str, expected: str):
    assert str(Gpus.parse(text)) == expected


@pytest.mark.parametrize("text", ["", "8x", "0xH100", "8xH9", "H100x8", "8 H100"])
def test_other_ways_are_answered(text: str):
    with pytest.raises(UserError, match="such as 8xH100"):
        Gpus.parse(text)


@pytest.mark.parametrize("more", [[], ["--check-data"], ["--resume", "latest"]])
def test_gpus_are_for_a_plan(more: list[str], capfd):
    assert main(["--gpus", "1xH100", *more]) == 2
    assert "--gpus is for --plan" in capfd.readouterr().err


def test_the_peak_of_every_gpu_is_known():
    assert not [name for name, (driver_name, _) in GPUS.items() if peak_flops(driver_name) is None]


def test_a_plan_knows_of_the_base_that_goes_along(qwen3_4b, tiny_data, cache_dir):
    """Such a step is no CUDA graph, and goes through the layers once more."""

    def plan(more: str) -> RunForecast:
        return planned(f"{COMMON} {more}", qwen3_4b, tiny_data, cache_dir).forecast

    free, held = plan(""), plan("--kl-anchor 0.1")
    assert free.memory.estimate.evaluation > 0 == held.memory.estimate.evaluation
    assert held.seconds[0] > 1.05 * free.seconds[0]


@pytest.mark.slow
def test_a_plan_knows_of_general_text(qwen3_4b, tiny_data, cache_dir):
    every = f"{COMMON} --eval-steps 5"
    with_it = planned(every, qwen3_4b, tiny_data, cache_dir).forecast
    without = planned(f"{every} --no-forgetting", qwen3_4b, tiny_data, cache_dir).forecast
    assert with_it.seconds[0] > without.seconds[0]
    for general, evaluations in (("", "first and last"), ("--no-forgetting", "none")):
        words = f"{COMMON} --eval-fraction 0 --num-probes 0 --eval-steps 0 {general}"
        work = dict(planned(words, qwen3_4b, tiny_data, cache_dir).forecast.work)
        assert evaluations in work["evaluations"]


@pytest.mark.parametrize("kl_anchor", [0.0, 0.1])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_a_graph_is_planned_where_one_is_made(tiny_model, kl_anchor, lora_dropout):
    config = DirectTrainingConfig(kl_anchor=kl_anchor, lora_dropout=lora_dropout)
    dist = Distributed(0, 1, 0, torch.device("cuda"))
    place = {"compiled": True, "parallel": "ddp"}
    plan = placement_of(config, dist, torch.bfloat16, **place)
    base = Qwen3ForCausalLM.from_pretrained(tiny_model)
    model = attach_adapters(base, config, str(tiny_model), seed=0)
    run = {"device": dist.device, "compiled": True, "alone": True, "sharded": False}
    reason = why_not_captured(model, **run, anchored=bool(kl_anchor))
    assert plan.captured is not bool(reason), reason


def test_the_positions_of_the_model_count_there_too(
    qwen3_4b, tiny_data, tmp_path, cache_dir, capfd
):
    model = shutil.copytree(qwen3_4b, tmp_path / "short")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 200}), encoding="utf-8"
    )
    words = (
        f"--plan --gpus 1xH100 --data-path {tiny_data} --model-name {model} --max-seq-length 1024"
    )
    assert main([*words.split(), "--cache-dir", str(cache_dir), "--output-dir", str(tmp_path)]) == 0
    assert "--max-seq-length 200 stays within" in " ".join(capfd.readouterr().err.split())
