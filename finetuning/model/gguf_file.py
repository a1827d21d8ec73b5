"""A model as one GGUF file, for llama.cpp and what is built on it; and such a file as a model again.

Tensors go through memory one at a time. Which of them a file has, and under which names, the package gguf
says. An architecture is written when a test has shown, for a small model of it, that llama.cpp computes the
same; anything of a model that this proof does not cover is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.model.gguf_package import gguf_package
from finetuning.model.gguf_tokens import vocabulary
from finetuning.model.sampling_defaults import SamplingDefaults

PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Ours -> the file's names of what matrices are held in; vectors are always fp32."""


@dataclass(frozen=True)
class Architecture:
    """How files of one `model_type` differ from its Hugging Face folder."""

    biases: tuple[str, ...] = ()
    """Tensors that may have one."""
    neighbours: bool = False
    """Rotary embeddings turn neighbouring rows of queries and keys, not those half a head apart."""


ARCHITECTURES = {
    "qwen3": Architecture(),
    "qwen2": Architecture(biases=("attn_q", "attn_k", "attn_v")),
    "llama": Architecture(neighbours=True),
}


# -----------------------------------------------------------------------------
# Can it be written?


def check_architecture(config: transformers.PreTrainedConfig) -> None:
    """UserError where a model with this configuration can't be written as GGUF; before weights are loaded."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"GGUF: the architecture {clean_line(kind)} is not one that is written here "
            f"({', '.join(ARCHITECTURES)}). Use --format hf, and llama.cpp's own converter"
        )
    rope = config.rope_parameters or {}
    layers = {*(getattr(config, "layer_types", None) or ()), "full_attention"}
    differs = {
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor") or 1.0, 1.0),
        "hidden_act": (config.hidden_act, "silu"),
        "layer_types": (sorted(layers), ["full_attention"]),
    }
    for name, (found, known) in differs.items():
        if found != known:
            raise UserError(
                f"GGUF: {kind} with {name} {clean_line(str(found), 100)} is not written here. Use --format "
                "hf, and llama.cpp's own converter"
            )


# -----------------------------------------------------------------------------
# Writing


def write_gguf(
    model: transformers.PreTrainedModel, tokenizer: Any, path: Path, precision: str, name: str
) -> None:
    """A new file. precision: a key of `PRECISIONS`. name: what the file calls the model."""
    gguf, config = gguf_package(), model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    tensors = dict(_file_tensors(model))
    held = {
        title: _held_in(gguf, tensor.shape, PRECISIONS[precision])
        for title, tensor in tensors.items()
    }
    _describe_model(writer, config, name)
    _describe_sampling(writer, SamplingDefaults.of(model.generation_config))
    _describe_text(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
    writer.add_file_type(_file_type(gguf, precision))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for title, tensor in tensors.items():
        shape = tuple(tensor.shape)
        size = _bytes(gguf, shape, held[title])
        writer.add_tensor_info(title, shape, torch.float32, size, raw_dtype=held[title])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for title, tensor in tensors.items():
            whole = _ordered(tensor, title, config).float().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(whole, held[title]))
    finally:
        writer.close()


def _file_tensors(model: transformers.PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the file -> tensor, a shared one once. UserError for one that the file has no place for."""
    gguf, config = gguf_package(), model.config
    arch = next(a for a, title in gguf.MODEL_ARCH_NAMES.items() if title == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = set() if not config.tie_word_embeddings else {"lm_head.weight"}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        module, _, kind = name.rpartition(".")
        title = names.get_name(module)
        part = (title or "").rpartition(".")[2]
        if title is None or (
            kind == "bias" and part not in ARCHITECTURES[config.model_type].biases
        ):
            raise UserError(
                f"GGUF: llama.cpp has no place for {clean_line(name, 100)} in a {config.model_type}. Use "
                "--format hf"
            )
        yield f"{title}.{kind}", tensor.detach()


def _held_in(gguf: ModuleType, shape: torch.Size, wanted: str) -> Any:
    """A vector is fp32; a matrix whose rows are not whole blocks of the wanted type is fp16."""
    types = gguf.GGMLQuantizationType
    if len(shape) < 2:
        return types.F32
    block, _ = gguf.GGML_QUANT_SIZES[types[wanted]]
    return types[wanted] if shape[-1] % block == 0 else types.F16


def _bytes(gguf: ModuleType, shape: tuple[int, ...], held: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[held]
    return torch.Size(shape).numel() // block * size


def _file_type(gguf: ModuleType, precision: str) -> int:
    names = {"fp32": "ALL_F32"}
    return gguf.LlamaFileType[names.get(precision, f"MOSTLY_{PRECISIONS[precision]}")]


def _heads(title: str, config: transformers.PreTrainedConfig) -> int:
    """Heads whose rows lie in the other order in the file; 0 where the order is the same."""
    if not ARCHITECTURES[config.model_type].neighbours:
        return 0
    part = title.split(".")[-2]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part, 0)


def _ordered(
    tensor: torch.Tensor, title: str, config: transformers.PreTrainedConfig, *, back: bool = False
) -> torch.Tensor:
    """Rows half a head apart brought side by side where the file wants them so; `back`: the other way."""
    heads = _heads(title, config)
    if not heads:
        return tensor
    pairs = (heads, -1, 2) if back else (heads, 2, tensor.shape[0] // heads // 2)
    return tensor.reshape(*pairs, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _describe_model(writer: Any, config: transformers.PreTrainedConfig, name: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _describe_sampling(writer: Any, defaults: SamplingDefaults) -> None:
    """llama.cpp starts from it."""
    writer.add_sampling_temp(defaults.temperature)
    writer.add_sampling_top_k(defaults.top_k)
    writer.add_sampling_top_p(defaults.top_p)
    writer.add_sampling_min_p(defaults.min_p)
    writer.add_sampling_penalty_repeat(defaults.repeat_penalty)
    writer.add_sampling_penalty_last_n(defaults.repeat_last_n)


def _describe_text(writer: Any, tokenizer: Any, rows: int) -> None:
    text = vocabulary(tokenizer, rows)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(text.pre_tokenizer)
    writer.add_token_list(text.tokens)
    writer.add_token_types(text.kinds)
    writer.add_token_merges(text.merges)
    for end, token in text.ends.items():
        getattr(writer, f"add_{end}_token_id")(token)
    writer.add_eot_token_id(text.ends["eos"])
    writer.add_add_bos_token(text.begins)
    writer.add_chat_template(text.chat_template)


# -----------------------------------------------------------------------------
# Reading back


@torch.no_grad()
def read_gguf(path: Path, model: transformers.PreTrainedModel) -> None:
    """Put the file's weights, as they are rounded there, into a model of its configuration."""
    gguf, config = gguf_package(), model.config
    places = dict(_file_tensors(model))
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        place = places.pop(tensor.name)
        place.copy_(_ordered(values.reshape(place.shape), tensor.name, config, back=True))
    assert not places, f"{path}: without {sorted(places)}"
