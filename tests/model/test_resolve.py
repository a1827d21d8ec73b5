"""A name becomes a model folder, and a bad folder is refused with its reason."""

import json
import os
import pickle
import shutil
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants as hub_constants

from finetuning.common.errors import UserError
from finetuning.model import resolve
from finetuning.model.resolve import resolve_model
from tests.helpers.models import edit

NAME = "someone/Tiny-1.5B"


@pytest.fixture
def nowhere(monkeypatch, tmp_path) -> Path:
    """Empty caches and no network."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    return tmp_path


# -----------------------------------------------------------------------------
# Which model


def test_without_a_gpu_and_a_name_it_is_the_embedded_one():
    resolved = resolve_model(None, "cpu")
    assert resolved.embedded and resolved.path is None
    assert "no CUDA GPU" in resolved.reason
    assert resolved.reason in resolve.banner(resolved)


def test_on_a_gpu_the_default_is_the_real_model_when_it_fits_and_is_at_hand(
    monkeypatch, nowhere, tiny
):
    free = 40
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 80 * 2**30))
    absent = resolve_model(None, "cuda")
    assert absent.embedded and "not at hand" in absent.reason and "HF_HUB_OFFLINE" in absent.reason
    shutil.copytree(tiny, nowhere / "ms" / "models" / resolve.DEFAULT_MODEL)
    assert resolve_model(None, "cuda").name == resolve.DEFAULT_MODEL
    free = 14.6  # a T4: enough for bf16, which it does not have
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    small = resolve_model(None, "cuda")
    assert small.embedded and "14.6 GiB free" in small.reason and "float32" in small.reason
    with pytest.raises(UserError, match="Tesla T4 has no bf16"):
        resolve_model(None, "cuda", precision="bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert not resolve_model(None, "cuda").embedded
    free = 3
    assert "3.0 GiB free" in resolve_model(None, "cuda").reason


def test_a_folder(tiny):
    resolved = resolve_model(str(tiny), "cpu")
    assert (resolved.path, resolved.embedded) == (tiny.resolve(), False)


@pytest.mark.parametrize("spelling", [NAME, NAME.replace(".", "___")])
@pytest.mark.parametrize("parent", ["models", "hub/models", "hub"])
def test_modelscope_folders(nowhere, tiny, parent, spelling):
    folder = shutil.copytree(tiny, nowhere / "ms" / parent / spelling)
    resolved = resolve_model(NAME, "cpu")
    assert (resolved.path, resolved.reason) == (folder, "ModelScope cache")


def in_hub_cache(root: Path, tiny: Path) -> Path:
    repo = root / "hf" / f"models--{NAME.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    return Path(shutil.copytree(tiny, repo / "snapshots" / "abc123"))


def test_the_hub_cache(nowhere, tiny):
    folder = in_hub_cache(nowhere, tiny)
    assert resolve_model(NAME, "cpu").path == folder


def test_a_folder_of_a_cache_has_the_hub_s_name(nowhere, tiny):
    """Only where this name would lead to that folder again; any other folder has no name but its own."""
    main = in_hub_cache(nowhere, tiny)
    other = Path(shutil.copytree(tiny, main.parent / "def456"))
    alike = Path(shutil.copytree(tiny, nowhere / "models" / "tiny"))
    names = {NAME: NAME, str(main): NAME, str(other): "", str(alike): "", str(tiny): ""}
    for given, name in names.items():
        assert resolve.hub_name(resolve_model(given, "cpu")) == name
    assert resolve.shared_name(resolve_model(str(main), "cpu")) == NAME
    assert resolve.shared_name(resolve_model(str(alike), "cpu")) == "tiny"
    assert resolve.shared_name(resolve_model("embedded", "cpu")) == "embedded"
    shutil.rmtree(nowhere / "hf")
    spelled = NAME.replace(".", "___")
    folder = shutil.copytree(tiny, nowhere / "ms" / "hub" / "models" / spelled)
    assert resolve.hub_name(resolve_model(str(folder), "cpu")) == NAME


def test_a_revision_of_the_hub_is_that_one_or_none(nowhere, tiny):
    """By branch or tag, by commit; another one is not taken for it, nor ModelScope's, which says none."""
    main = in_hub_cache(nowhere, tiny)
    tagged = Path(shutil.copytree(tiny, main.parent / "def456"))
    (main.parents[1] / "refs" / "v2").write_text("def456")
    for revision, folder in (("", main), ("main", main), ("v2", tagged), ("abc123", main)):
        found = resolve_model(NAME, "cpu", revision=revision)
        assert (found.path, found.revision) == (folder, revision)
    shutil.copytree(tiny, nowhere / "ms" / "models" / NAME)
    with pytest.raises(UserError, match="can't be had"):
        resolve_model(NAME, "cpu", revision="v3")
    with pytest.raises(UserError, match="revision v2 is for a model of the hub"):
        resolve_model(str(tiny), "cpu", revision="v2")


def test_a_download_asks_for_its_revision(monkeypatch, nowhere, tiny):
    asked = {}
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub, "get_hf_file_metadata", lambda url, **_: asked.update(url=url)
    )
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: asked.update(options) or str(tiny),
    )
    found = resolve.ensure_local(resolve_model(NAME, "cpu", revision="v2"))
    assert found.path == tiny and asked["revision"] == "v2" and "/v2/" in asked["url"]


def test_an_incomplete_download_is_named(nowhere, tiny):
    (in_hub_cache(nowhere, tiny) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"Hugging Face cache \(.*has no model.safetensors"):
        resolve_model(NAME, "cpu")


def test_a_name_that_can_not_be_had_says_what_was_tried(nowhere):
    with pytest.raises(UserError) as error:
        resolve_model(NAME, "cpu")
    text = str(error.value)
    for part in (NAME, "local folder", str(nowhere / "hf"), str(nowhere / "ms"), "HF_HUB_OFFLINE"):
        assert part in text
    assert "HF_ENDPOINT" in text and "\n" not in text


def test_an_unreachable_endpoint_is_named_without_its_password(monkeypatch, nowhere):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://me:canary99@127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_url",
        lambda name, file, **_: f"{hub_constants.ENDPOINT}/{name}/{file}",
    )
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    with pytest.raises(UserError) as error:
        resolve_model(NAME, "cpu")
    assert "127.0.0.1:9" in str(error.value) and "canary" not in str(error.value)


def test_a_hub_that_never_answers_costs_seconds(monkeypatch, nowhere):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(resolve, "HUB_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/config.json"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda name, file, **_: url)
        start = time.monotonic()
        with pytest.raises(UserError, match="not reachable"):
            resolve_model(NAME, "cpu")
    assert time.monotonic() - start < 30  # a bound, not a measurement


def test_a_path_is_not_looked_for_on_the_hub(subtests):
    for name in ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere", "C:\\m"]:
        with subtests.test(name=name), pytest.raises(UserError, match="no such folder"):
            resolve_model(name, "cpu")


def without_weights(folder):
    (folder / "model.safetensors").unlink()
    return "has no model.safetensors"


def only_pickle(folder):
    without_weights(folder)

    class Canary:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "executed"),))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    return "pickle"


def without_config(folder):
    (folder / "config.json").unlink()
    return "config.json is missing"


def broken_config(folder):
    (folder / "config.json").write_text("{" * 100_000)
    return "can't be read"


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")
    return "not a JSON object"


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return "no tokenizer"


def remote_code(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(folder / 'executed')!r})")
    return "--trust-remote-code"


def remote_tokenizer(folder):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    return "--trust-remote-code"


def internal_key(folder):
    edit(folder / "config.json", _attn_implementation_internal="evil/kernel")
    return "not allowed"


def giant_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    return "not a whole safetensors"


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    return "not a whole safetensors"


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return "not a whole safetensors"


def shard_outside(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "outside the folder"


def shard_missing(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "has no model-00001-of-00002"


def an_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")
    return "--init-adapter"


FAULTS = [
    without_weights,
    only_pickle,
    without_config,
    broken_config,
    config_is_a_list,
    without_tokenizer,
    remote_code,
    remote_tokenizer,
    internal_key,
    giant_header,
    cut_weights,
    empty_weights,
    shard_outside,
    shard_missing,
    an_adapter,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_refused_with_its_reason(copy, fault):
    reason = fault(copy)
    with pytest.raises(UserError, match=reason) as error:
        resolve_model(str(copy), "cpu")
    assert str(copy) in str(error.value) and "\n" not in str(error.value)
    assert not (copy / "executed").exists()


def test_the_flag_allows_remote_code(copy):
    remote_code(copy)
    assert resolve_model(str(copy), "cpu", trust_remote_code=True).trust_remote_code


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX special files")
@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "merges.txt", "other.json"])
def test_a_pipe_in_a_model_folder_is_refused_and_not_read(tmp_path: Path, tiny: Path, name: str):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name} is no regular file"):
        resolve_model(str(folder), "cpu")
