"""Load a model folder on the CPU and look at what it computes."""

import json
from dataclasses import fields
from pathlib import Path

import torch

from finetuning.config import LoraSettings, ModelSettings
from finetuning.model import adapters
from finetuning.model.loading import load_model, load_tokenizer
from finetuning.model.resolve import resolve_model

TEXTS = ["国密算法 SM2 是椭圆曲线公钥密码算法，密钥长度 256 比特。" * 4]


def load(folder: Path, *, trust_remote_code: bool = False, **options):
    """Model and tokenizer; `options` are settings of the model or the adapters, or `load_model`'s own."""
    resolved = resolve_model(str(folder), "cpu", trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(resolved)
    of = {
        group: {f.name: options.pop(f.name) for f in fields(group) if f.name in options}
        for group in (ModelSettings, LoraSettings)
    }
    settings = [group(**chosen) for group, chosen in of.items()]
    return load_model(resolved, tokenizer, *settings, device="cpu", **options), tokenizer


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(2, 12)).logits


def disturb(model) -> None:
    """Adapters away from their start, where they do nothing."""
    generator = torch.Generator().manual_seed(5)
    for tensor in adapters.adapter_state(model).values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
