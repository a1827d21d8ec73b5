"""An export appears only when its logits are those of base and adapter apart; and which model it takes.

uv run pytest tests/runs/test_export.py
"""

import ctypes
import errno
import json
import math
import os
import platform
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from transformers import AutoModelForCausalLM, AutoTokenizer

import ask
import export
from export import check, main
from finetuning.common.errors import RunStopped
from finetuning.common.files import sealed_json
from finetuning.common.terminal import Terminal
from finetuning.model.loading import load_for_inference
from finetuning.model.merging import Agreement, MergedModel, merged_model, model_below
from finetuning.model.saving import save_adapter
from finetuning.runs.directory import RunDirectory, new_run, own_models
from finetuning.runs.recorded import read_recorded
from finetuning.runs.result import BEST, FINAL, GOES_ON, Trained, find_trained
from finetuning.runs.summary import closing_lines
from tests.helpers.models import disturb, load
from tests.helpers.ranks import on_ranks, results_of
from tests.helpers.tiny_model import make_tiny_data, make_tiny_model

# What transformers and vLLM read.
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
}


def test_the_folder_is_a_plain_model_that_says_the_same(tmp_path, adapter, capsys):
    output = tmp_path / "new" / "merged"
    assert main(["--adapter", str(adapter), "--output", str(output), "--device", "cpu"]) == 0
    assert "largest difference of a logit" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == FILES
    assert [path.name for path in output.parent.iterdir()] == ["merged"], "no staging is left"
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["use_cache"] is True
    tokenizer = AutoTokenizer.from_pretrained(output)
    merged = AutoModelForCausalLM.from_pretrained(output)
    apart, own = load_for_inference(adapter, device="cpu")
    assert tokenizer.chat_template == own.chat_template
    ids = tokenizer("SM4的分组长度", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (merged(ids).logits - apart(input_ids=ids).logits).abs().max()
    assert difference < 1e-4


def test_sixteen_bits_pass_with_their_own_tolerance(tmp_path, adapter):
    output = tmp_path / "merged"
    options = ["--adapter", str(adapter), "--output", str(output), "--precision", "bf16"]
    assert main([*options, "--device", "cpu"]) == 0
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


def test_a_merge_that_is_wrong_leaves_nothing(tmp_path, adapter, monkeypatch, capsys):
    def base_only(folder: Path, base_model: str) -> MergedModel:
        """As if the adapter had been forgotten."""
        base = model_below(folder, base_model)
        return merged_model(base.path)

    monkeypatch.setattr(export, "merged_model", base_only)
    output = tmp_path / "merged"
    assert main(["--adapter", str(adapter), "--output", str(output), "--device", "cpu"]) == 3
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rounding_that_eats_the_adapter_is_warned_about(capsys):
    check(Agreement(difference=0.02, effect=0.03), 0.25, Terminal())
    assert "--precision fp32" in capsys.readouterr().err
    check(Agreement(difference=0.02, effect=3.0), 0.25, Terminal())
    check(Agreement(difference=0.2, effect=None), 0.25, Terminal())
    assert not capsys.readouterr().err


def test_an_adapter_that_does_nothing_is_told(tmp_path, tiny_model, capsys):
    """One that was never trained; a model that was trained whole has none of which to speak."""
    model, tokenizer = load(tiny_model, lora_r=4)
    save_adapter(model, tokenizer, tmp_path / "final_model")
    places = ["--adapter", str(tmp_path / "final_model"), "--output", str(tmp_path / "merged")]
    assert main([*places, "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert "the adapter changes nothing" in told.err and "probably not trained" in told.err
    check(Agreement(difference=0.0, effect=None), 0.25, Terminal())
    told = capsys.readouterr()
    assert (
        "largest difference of a logit 0 standard" in told.out
        and "adapter" not in told.out + told.err
    )


@pytest.mark.parametrize("difference", [0.3, math.nan, math.inf])
def test_a_difference_above_the_tolerance_stops(difference):
    with pytest.raises(RunStopped, match="more than"):
        check(Agreement(difference, effect=0.5), 0.25, Terminal())


def test_an_adapter_that_is_missing_stops():
    with pytest.raises(RunStopped):
        check(Agreement(difference=8.0, effect=8.0), 0.25, Terminal())


def test_bad_input_is_one_clear_line(tmp_path, adapter, tiny_model, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    output, named = ["--output", str(tmp_path / "merged")], ["--adapter", str(adapter)]
    file = ["--output", str(tmp_path / "merged.gguf")]
    cases = {
        "exists": [*named, "--output", str(full)],
        "taken.gguf: exists": [*named, "--format", "gguf", "--output", str(taken)],
        "train first": ["--output-dir", str(tmp_path), *output],
        "whole model already": ["--adapter", str(tiny_model), *output],
        "--format hf writes a folder": [*named, *file],
        "--format gguf writes a file that ends in .gguf": [*named, "--format", "gguf", *output],
        "--format ollama writes a folder": [*named, "--format", "ollama", *file],
        "--precision q8_0 is for --format gguf": [*named, "--precision", "q8_0", *output],
        "no such folder, here or below": ["--adapter", "checkpoint-7", *output],
        "which a run replaces": [*named, "--output", str(adapter / "merged")],
    }
    for expected, arguments in cases.items():
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert expected in said and "Traceback" not in said, said
    assert (full / "file").read_text() == taken.read_text() == "mine"
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.gguf").exists()


def test_a_place_that_can_not_be_written_is_told(tmp_path, adapter, monkeypatch, capsys):
    """Before anything is loaded; and where a disk gets full in the middle, with what to do."""
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(export, "model_below", None)
        output = tmp_path / "file" / "merged"
        assert main(["--adapter", str(adapter), "--output", str(output), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert (
        "can't be written (Not a directory); choose another place" in said and said.count("\n") == 1
    )

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "save_merged", full)
    output = tmp_path / "merged"
    assert main(["--adapter", str(adapter), "--output", str(output), "--device", "cpu"]) == 3
    said = capsys.readouterr().err
    assert "can't be written (No space left on device); free its disk" in said
    assert said.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_exports_to_one_place_do_not_meet(tmp_path, adapter, monkeypatch, capsys):
    """The second is told so, and what appears is all of the first."""
    pytest.importorskip("gguf", reason="needs the package gguf: uv run --extra gguf")
    arguments = ["--adapter", str(adapter), "--output", str(tmp_path / "model.gguf")]
    arguments += ["--format", "gguf", "--device", "cpu"]
    real, codes = export.check, []

    def check_while_another_starts(*given: object) -> None:
        monkeypatch.setattr(export, "check", real)
        codes.append(main(arguments))
        real(*given)

    monkeypatch.setattr(export, "check", check_while_another_starts)
    assert main(arguments) == 0 and codes == [2]
    assert "another process is writing it; wait for it" in capsys.readouterr().err
    alone = tmp_path / "alone" / "model.gguf"
    assert main([*arguments, "--output", str(alone)]) == 0
    assert (tmp_path / "model.gguf").read_bytes() == alone.read_bytes()


def test_without_the_package_the_way_to_it_is_told(tmp_path, adapter, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    output = tmp_path / "model.gguf"
    assert main(["--adapter", str(adapter), "--format", "gguf", "--output", str(output)]) == 2
    assert "uv run --extra gguf" in capsys.readouterr().err and not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# Which model


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_ask_export_and_the_last_lines_agree_and_say_why(out, tiny_run, tmp_path, capfd):
    """Of a run that went to its end, of one that goes on, and of one that was stopped early."""
    (run,) = (path.name for path in (out / "training_logs").iterdir())
    statistics = json.loads((out / "training_statistics.json").read_text(encoding="utf-8"))
    told = closing_lines(statistics, RunDirectory(out, run))
    assert f"model: {out / 'final_model'} ({FINAL}); ask.py and export.py take it" in told
    assert find_trained("", str(out)) == Trained(out / "final_model", FINAL)
    status = out / "training_logs" / run / "status.json"
    stopped = json.loads(status.read_text(encoding="utf-8")) | {
        "result": "best_model",
        "status": "stopped",
    }
    status.write_text(json.dumps(stopped), encoding="utf-8")
    told = closing_lines(
        statistics | {"result": "best_model", "outcome": "stopped"}, RunDirectory(out, run)
    )
    assert f"model: {out / 'best_model'}, of step " in told and f"({BEST}); ask.py" in told
    assert find_trained("", str(out)) == Trained(out / "best_model", BEST)
    arguments = ["--output-dir", str(out), "--device", "cpu"]
    assert export.main([*arguments, "--output", str(tmp_path / "merged")]) == 0
    assert f"exporting {out / 'best_model'} ({BEST})" in capfd.readouterr().out
    assert ask.main(["q", *arguments, "--max-new-tokens", "1"]) == 0
    assert f"{out / 'best_model'} ({BEST})" in " ".join(capfd.readouterr().err.split())
    status.write_text(json.dumps(stopped | {"result": "", "status": "running"}), encoding="utf-8")
    assert find_trained("", str(out)) == Trained(out / "best_model", GOES_ON), "of step 6"
    shutil.rmtree(out / "best_model")
    assert find_trained("", str(out)) == Trained(out / "checkpoints" / "checkpoint-6", GOES_ON)


@pytest.mark.parametrize("last", ["checkpoints/checkpoint-4", "best_model", "final_model"])
def test_a_copy_has_the_same_result(out, last):
    """Whatever times its files have: the records say what the run has come to."""
    for place in ("checkpoints/checkpoint-6", "final_model", "best_model", last):
        for path in (out / place).iterdir():
            os.utime(path, (2e9 + (place == last), 2e9 + (place == last)))
    assert find_trained("", str(out)) == Trained(out / "final_model", FINAL)


def test_the_newest_run_that_has_something_is_meant(out):
    """One that has only begun has nothing yet: the result is still that of the run before."""
    (old,) = (path.name for path in (out / "training_logs").iterdir())
    new = RunDirectory(out, new_run(out).name)
    new.write_status("running", step=0)
    for path in own_models(new):
        assert path.parent.name == old, "put aside, as every start does it"
    aside = out / "earlier_models" / old / "final_model"
    assert find_trained("", str(out)) == Trained(aside, FINAL)
    checkpoint = shutil.copytree(out / "checkpoints" / "checkpoint-2", out / "checkpoints" / "new")
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    manifest |= {"run": new.name, "step": 1, "sequence": 99}
    (checkpoint / "manifest.json").write_bytes(sealed_json(manifest))
    checkpoint = checkpoint.rename(checkpoint.with_name("checkpoint-1"))
    assert find_trained("", str(out)) == Trained(checkpoint, GOES_ON)
    broken = out / "training_logs" / "20250101_000000"
    broken.mkdir()
    (broken / "status.json").write_text("")
    assert find_trained("", str(out)) == Trained(checkpoint, GOES_ON), "as others are in order"


def test_a_model_is_meant_by_its_name(out, monkeypatch, tmp_path):
    checkpoint = min((out / "checkpoints").iterdir())
    for name in ("final_model", "best_model"):
        assert find_trained(name, str(out)).folder == out / name
    assert find_trained(checkpoint.name, str(out)).folder == checkpoint
    monkeypatch.chdir(tmp_path)
    shutil.copytree(out / "final_model", tmp_path / "final_model")
    assert find_trained("final_model", str(out)).folder == Path("final_model"), (
        "a folder here comes first"
    )


@pytest.mark.slow
def test_an_exported_checkpoint_says_what_it_is(out, tmp_path):
    """Its numbers are those of the evaluation before it, which is named; never those of a later one."""
    (logs,) = (out / "training_logs").iterdir()
    losses = {
        at: f"{v:.4g}" for at, v in read_recorded(RunDirectory(out, logs.name)).series["Eval/Loss"]
    }
    assert sorted(losses) == [0, 3, 6]
    for step, evaluated in ((2, 0), (4, 3), (6, 6)):
        output = tmp_path / f"merged-{step}"
        places = ["--output-dir", str(out), "--output", str(output), "--device", "cpu"]
        assert main([*places, "--adapter", f"checkpoint-{step}"]) == 0
        card = (output / "README.md").read_text(encoding="utf-8")
        where = "there" if step == evaluated else f"at step {evaluated}"
        assert f"| step | {step} of 6 |\n| held-out loss {where} | {losses[evaluated]} |" in card
        before, after = (re.escape(losses[at]) for at in (0, evaluated))
        shown = rf"\| held-out loss \| {before}(?: ± \S+)? \| {after}(?: ± \S+)? \|"
        assert bool(re.search(shown, card)) == bool(evaluated)
        assert ("## Before and after" in card) == bool(evaluated)
        assert ("Measured at step 3, the last time before" in card) == (step == 4)
        assert "vllm serve" in card and (output / "curves.png").is_file()


@pytest.mark.slow
def test_a_base_is_named_as_others_know_it(tiny_run, tiny_model, tmp_path, monkeypatch, capsys):
    """A folder that looks like a hub's name is none; one of the hub's cache has it; so has what is given."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "models/tiny")
    short = ["--model-name", "models/tiny", "--max-steps", "1", "--save-steps", "1"]
    assert tiny_run(tmp_path, *short, "--eval-fraction", "0") == 0
    out = tmp_path / "out"
    origin = json.loads((out / "final_model" / "origin.json").read_text(encoding="utf-8"))
    assert origin["base"]["model"] == "tiny"
    saved = json.loads((out / "final_model" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == str(tmp_path / "models" / "tiny")
    card = (out / "final_model" / "README.md").read_text(encoding="utf-8")
    assert "base_model:" not in card and "First write into `adapter_config.json`" in card

    repo = tmp_path / "hf" / "models--someone--Tiny-1B"
    shutil.copytree(tiny_model, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = {"": "", "someone/Tiny-1B": "base_model: someone/Tiny-1B\n"}
    for name in ("final_model", "checkpoint-1"):
        for base, head in given.items():
            output = tmp_path / f"{name}-{len(base)}"
            places = ["--output-dir", str(out), "--output", str(output), "--device", "cpu"]
            base_model = ["--base-model", base] if base else []
            assert main([*places, *base_model, "--adapter", name]) == 0, capsys.readouterr().err
            card = (output / "README.md").read_text(encoding="utf-8")
            assert head in card and ("base_model:" in card) == bool(head)
            for file in output.glob("*.*"):
                assert str(tmp_path).encode() not in file.read_bytes(), file


def test_a_broken_record_does_not_keep_a_model_back(out, tmp_path, capfd):
    (logs,) = (out / "training_logs").iterdir()
    (logs / "metrics.jsonl").write_text("{broken\n{}\n", encoding="utf-8")
    output = tmp_path / "merged"
    assert main(["--output-dir", str(out), "--output", str(output), "--device", "cpu"]) == 0
    assert "the model's card is without its run" in capfd.readouterr().err
    assert "## Settings" not in (output / "README.md").read_text(encoding="utf-8")


# -----------------------------------------------------------------------------
# For ollama


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_the_system_prompt_of_all_the_data_is_ollama_s(same, tiny_run, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf: uv run --extra gguf")
    data = make_tiny_data(tmp_path / "plain.jsonl")
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    system = [f"你是密码学助手。\n简短。{'' if same else i % 2}" for i in range(len(lines))]
    told = tmp_path / "told.jsonl"
    texts = [json.dumps({**line, "system": s}) for line, s in zip(lines, system, strict=True)]
    told.write_text("\n".join(texts), encoding="utf-8")
    settings = [
        "--data-path",
        str(told),
        "--max-steps",
        "1",
        "--save-steps",
        "1",
        "--eval-fraction",
        "0",
    ]
    assert tiny_run(tmp_path, *settings) == 0
    out = tmp_path / "out"
    for name in ("final_model", "checkpoint-1"):
        output = tmp_path / f"{name}-served"
        places = ["--output-dir", str(out), "--output", str(output), "--device", "cpu"]
        assert main([*places, "--adapter", name, "--format", "ollama"]) == 0
        assert {path.name for path in output.iterdir()} == {"model.gguf", "Modelfile"}
        text = (output / "Modelfile").read_text(encoding="utf-8")
        assert ('SYSTEM """你是密码学助手。\n简短。"""\n' in text) == same
        assert ("SYSTEM" in text) == same and 'PARAMETER stop "<|im_end|>"' in text
        assert "PARAMETER num_ctx 4096\n" in text, "all positions of the tiny model"
        assert "PARAMETER temperature 0\n" in text, "as it has no generation_config that says more"


def test_a_model_that_was_trained_whole_is_exported_too(tiny_model, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf: uv run --extra gguf")
    output = tmp_path / "model.gguf"
    places = ["--adapter", str(tiny_model), "--output", str(output), "--device", "cpu"]
    assert main([*places, "--format", "gguf"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


# -----------------------------------------------------------------------------
# Memory


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def peak_of_export(arguments: list[str]) -> int:
    """Bytes above those at the start that an export holds at most, without what is mapped from files."""

    def held() -> int:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", text)[1])

    # A matrix of this small model is given back at once when it is freed, as one of a large model is.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    before, most, done = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert main(arguments) == 0
    finally:
        done.set()
        watcher.join()
    return most - before


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux and glibc")
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_no_more_than_one_model_is_held(kind: str, tmp_path: Path):
    """In fp32, and beside it a matrix or two; the files are of bf16."""
    if kind == "gguf":
        pytest.importorskip("gguf", reason="needs the package gguf: uv run --extra gguf")
    wide = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64, "num_hidden_layers": 6}
    base = make_tiny_model(tmp_path / "base", **wide, dtype=torch.bfloat16)
    model, tokenizer = load(base, lora_r=4)
    disturb(model)
    save_adapter(model, tokenizer, tmp_path / "final_model")
    size = 4 * sum(p.numel() for p in model.get_base_model().parameters())
    del model
    name = "merged" if kind == "hf" else "model.gguf"
    places = ["--adapter", str(tmp_path / "final_model"), "--output", str(tmp_path / name)]
    options = ["--format", kind, "--device", "cpu", "--precision", "bf16"]
    (peak,) = results_of(on_ranks(0, peak_of_export, [*places, *options]))
    assert 0.9 * size < peak < 1.5 * size, (peak / size, size)
