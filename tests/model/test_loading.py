"""Models are found, refused with reasons, loaded, given adapters, saved and merged."""

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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from finetuning.common.errors import UserError
from finetuning.model import adapters, demo_model, loading, resolve, saving
from finetuning.model.loading import load_model, load_tokenizer
from finetuning.model.resolve import resolve_model

TEXTS = ["国密算法 SM2 是椭圆曲线公钥密码算法，密钥长度 256 比特。" * 4]
NAME = "someone/Tiny-1.5B"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """An ordinary model folder: two random layers and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = demo_model.train_tokenizer(TEXTS)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=demo_model.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def nowhere(monkeypatch, tmp_path) -> Path:
    """Empty caches and no network."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    return tmp_path


def load(folder: Path, **options):
    resolved = resolve_model(str(folder), "cpu")
    tokenizer = load_tokenizer(resolved)
    return load_model(resolved, tokenizer, device="cpu", **options), tokenizer


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(2, 12)).logits


def disturb(model) -> None:
    """Adapters away from their start, where they do nothing."""
    generator = torch.Generator().manual_seed(5)
    for tensor in adapters.adapter_state(model).values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


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
        huggingface_hub, "hf_hub_url", lambda name, file: f"{hub_constants.ENDPOINT}/{name}/{file}"
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
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda name, file: url)
        start = time.monotonic()
        with pytest.raises(UserError, match="not reachable"):
            resolve_model(NAME, "cpu")
    assert time.monotonic() - start < 30  # a bound, not a measurement


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere", "C:\\m"])
def test_a_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match="no such folder"):
        resolve_model(name, "cpu")


# -----------------------------------------------------------------------------
# What a folder must hold


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


def lost_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "missing keys.*layers.1.mlp.up_proj"


def other_shape(folder):
    edit(folder / "config.json", intermediate_size=129)
    return "model folder"


def unknown_architecture(folder):
    edit(folder / "config.json", model_type="no_such_model")
    return "no_such_model"


def smaller_vocabulary(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:40].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=40)
    return "tokenizer is of another model"


@pytest.mark.parametrize("fault", [lost_tensor, other_shape, smaller_vocabulary])
def test_weights_that_do_not_fit_are_refused(copy, fault):
    reason = fault(copy)
    with pytest.raises(UserError, match=reason):
        load(copy)


def test_an_unknown_architecture_is_refused(copy):
    reason = unknown_architecture(copy)
    with pytest.raises(UserError, match=reason):
        load(copy)


def test_a_tokenizer_without_chat_template_is_refused(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load(copy)


# -----------------------------------------------------------------------------
# Adapters


def test_the_same_seed_gives_the_same_adapters(tiny):
    torch.manual_seed(123)
    first = adapters.adapter_state(load(tiny, seed=3)[0])
    torch.manual_seed(456)
    again = adapters.adapter_state(load(tiny, seed=3)[0])
    other = adapters.adapter_state(load(tiny, seed=4)[0])
    assert first.keys() == again.keys() and len(first) == 2 * 7 * 2
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("precision, dtype", [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_adapters_are_fp32_whatever_the_base_is(tiny, precision, dtype):
    model, _ = load(tiny, precision=precision)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, dtype)}


def test_parameter_counts(tiny):
    model, _ = load(tiny, lora_r=4)
    total = sum(p.numel() for p in model.parameters())
    shapes = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
    trainable = 2 * sum(4 * (a + b) for a, b in shapes)
    assert loading.parameter_counts(model) == (trainable, total)


def test_peft_options_by_name(tiny):
    model, _ = load(
        tiny,
        lora_r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        use_rslora=True,
        use_dora=True,
    )
    state = adapters.adapter_state(model)
    assert {n.split(".")[-3] for n in state if "lora_A" in n} == {"q_proj", "down_proj"}
    assert state["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape[0] == 2
    assert any("lora_magnitude_vector" in name for name in state)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(6 / 4**0.5)
    assert layer.lora_dropout["default"].p == 0.1


def test_unknown_target_modules_are_refused_with_those_that_exist(tiny):
    with pytest.raises(UserError, match=r"q_prj; .*down_proj, gate_proj, k_proj, o_proj"):
        load(tiny, target_modules=["q_prj", "k_proj"])
    with pytest.raises(UserError, match="no module of this model fits"):
        load(tiny, rank_pattern={"q_prj": 4})


def test_all_linear(tiny):
    state = adapters.adapter_state(load(tiny, target_modules=["all-linear"])[0])
    assert len(state) == 2 * 7 * 2


def test_rank_zero_trains_everything(tiny):
    model, _ = load(tiny, lora_r=0)
    trainable, total = loading.parameter_counts(model)
    assert trainable == total == sum(p.numel() for p in model.parameters())
    assert adapters.adapter_documents(model) == {}
    with pytest.raises(UserError, match="lora_r 0"):
        load(tiny, lora_r=0, quantization="4bit")


def test_gradient_checkpointing_changes_no_gradient(tiny):
    gradients = []
    for checkpointing in (False, True):
        model, _ = load(tiny, gradient_checkpointing=checkpointing)
        disturb(model)
        assert model.get_base_model().is_gradient_checkpointing is checkpointing
        ids = torch.arange(16).reshape(1, 16)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_r": 0}])
def test_state_goes_out_and_in(tiny, options):
    model, _ = load(tiny, **options)
    disturb(model)
    state = {n: t.clone() for n, t in adapters.adapter_state(model).items()}
    fresh, _ = load(tiny, **options)
    adapters.load_adapter_state(fresh, state)
    assert torch.equal(logits(fresh), logits(model))


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(tiny):
    model, _ = load(tiny)
    before = {n: t.clone() for n, t in adapters.adapter_state(model).items()}
    state = {n: torch.ones_like(t) for n, t in before.items()}
    name = next(iter(state))
    faults = {
        "1 missing, first": {n: t for n, t in state.items() if n != name},
        "1 unexpected, first extra": {**state, "extra": torch.ones(1)},
        "1 of another shape": {**state, name: torch.ones(3)},
    }
    for reason, wrong in faults.items():
        with pytest.raises(UserError, match=reason):
            adapters.load_adapter_state(model, wrong)
    after = adapters.adapter_state(model)
    assert all(torch.equal(before[n], after[n]) for n in before)


# -----------------------------------------------------------------------------
# Saved adapters


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A disturbed adapter, saved: (folder, logits of the live model)."""
    model, tokenizer = load(tiny, lora_r=4)
    disturb(model)
    folder = tmp_path_factory.mktemp("run") / "final_model"
    saving.save_adapter(model, tokenizer, folder)
    return folder, logits(model)


def test_peft_loads_what_we_save(trained, tiny):
    folder, expected = trained
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == tiny.resolve()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), folder)
    torch.testing.assert_close(logits(model), expected)
    assert load_tokenizer(resolve_model(str(tiny), "cpu")).get_vocab()
    assert (folder / "tokenizer.json").is_file()


def test_saving_again_replaces_and_leaves_nothing_behind(tiny, tmp_path):
    model, tokenizer = load(tiny)
    for _ in range(2):
        (tmp_path / "final_model").mkdir(exist_ok=True)
        (tmp_path / "final_model" / "old.txt").write_text("old")
        saving.save_adapter(model, tokenizer, tmp_path / "final_model")
    assert [p.name for p in tmp_path.iterdir()] == ["final_model"]
    assert not (tmp_path / "final_model" / "old.txt").exists()


def test_full_fine_tuning_saves_a_whole_model(tiny, tmp_path):
    model, tokenizer = load(tiny, lora_r=0)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    saving.save_adapter(model, tokenizer, tmp_path / "out")
    again, _ = load(tmp_path / "out", lora_r=0)
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_is_a_start(trained, tiny):
    folder, expected = trained
    model, _ = load(tiny, init_adapter=str(folder), lora_r=16)
    torch.testing.assert_close(logits(model), expected)
    assert model.peft_config["default"].r == 4
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_an_adapter_that_peft_itself_saved_is_a_start(tiny, tmp_path):
    """The form in which TRL and LLaMA-Factory leave theirs."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    config = LoraConfig(
        r=2, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    edit(tmp_path / "adapter_config.json", base_model_name_or_path="meta/other", later_option=1)
    ours, _ = load(tiny, init_adapter=str(tmp_path))
    torch.testing.assert_close(logits(ours), logits(model))
    document = adapters.adapter_documents(ours)["adapter_config.json"]
    assert document["base_model_name_or_path"] == str(tiny.resolve())


def adapter_without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    return "pickle"


def adapter_without_config(folder):
    (folder / "adapter_config.json").unlink()
    return "adapter_config.json is missing"


def adapter_of_another_kind(folder):
    edit(folder / "adapter_config.json", peft_type="IA3")
    return "only LORA"


def adapter_that_changed_its_base(folder):
    edit(folder / "adapter_config.json", init_lora_weights="pissa_niter_4")
    return "changes the base"


def adapter_with_fewer_tensors(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    return "1 missing"


def adapter_of_another_rank(folder):
    edit(folder / "adapter_config.json", r=8)
    return "of another shape"


def adapter_of_another_model(folder):
    edit(folder / "adapter_config.json", target_modules=["c_attn"])
    return "c_attn"


@pytest.mark.parametrize(
    "fault",
    [
        adapter_without_weights,
        adapter_without_config,
        adapter_of_another_kind,
        adapter_that_changed_its_base,
        adapter_with_fewer_tensors,
        adapter_of_another_rank,
        adapter_of_another_model,
    ],
)
def test_a_bad_adapter_is_refused_with_its_reason(trained, tiny, tmp_path, fault):
    folder = Path(shutil.copytree(trained[0], tmp_path / "adapter"))
    reason = fault(folder)
    with pytest.raises(UserError, match=reason):
        load(tiny, init_adapter=str(folder))


def test_the_merged_model_gives_the_same_logits(trained, tmp_path):
    folder, expected = trained
    merged = saving.export_merged(folder, tmp_path / "merged")
    model, _ = load(merged, lora_r=0)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in n for n in load_file(merged / "model.safetensors"))


# -----------------------------------------------------------------------------
# Embedded and 4-bit


def test_the_embedded_model_takes_the_same_path(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "WARM_START_STEPS", 2)
    resolved = resolve_model("embedded", "cpu")
    tokenizer = load_tokenizer(resolved, lambda: TEXTS, tmp_path / "cache")
    model = load_model(resolved, tokenizer, device="cpu")
    saving.save_adapter(model, tokenizer, tmp_path / "final_model")
    named = adapters.adapter_documents(model)["adapter_config.json"]["base_model_name_or_path"]
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(named), tmp_path / "final_model"
    )
    torch.testing.assert_close(logits(again), logits(model))


def test_4bit_without_bitsandbytes_says_how_to_get_it(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--extra qlora"):
        load(tiny, quantization="4bit")


def adapter_gradients(model) -> list[torch.Tensor]:
    ids = torch.arange(16).reshape(1, 16)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    model.zero_grad(set_to_none=True)
    return gradients


def test_4bit(tiny):
    pytest.importorskip("bitsandbytes", reason="the optional extra qlora is not installed")
    model, _ = load(tiny, quantization="4bit", lora_r=4)
    plain, _ = load(tiny, lora_r=4)
    assert loading.parameter_counts(model) == loading.parameter_counts(plain)
    before = adapter_gradients(model)
    assert len(before) == 14 and all(g.norm() > 0 for g in before)
    difference = (logits(model).float() - logits(plain)).norm() / logits(plain).norm()
    assert 0 < difference < 0.3
    # An evaluation in between must not change what training sees.
    for gradient, again in zip(before, adapter_gradients(model), strict=True):
        torch.testing.assert_close(gradient, again)


@pytest.mark.parametrize(
    "fault",
    [
        SafetensorError("I/O error: No space left"),
        Exception("No space left"),
        OSError(28, "No space left"),
    ],
)
def test_a_full_disk_is_an_oserror_and_the_earlier_folder_stays(tmp_path, fault):
    target = tmp_path / "final_model"
    target.mkdir()
    (target / "weights").write_text("of before")

    def full(path):
        raise fault

    with pytest.raises(OSError, match="No space left"):
        saving._save_folder(target, None, full)
    assert (target / "weights").read_text() == "of before"
    assert [p.name for p in tmp_path.iterdir()] == ["final_model"]
    with pytest.raises(TypeError):  # our own mistake is no full disk
        saving._save_folder(target, None, lambda: None)
