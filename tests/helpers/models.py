"""Load a model folder on the CPU and look at what it computes."""

import json
from pathlib import Path

import torch

from finetuning.model import adapters
from finetuning.model.loading import load_model, load_tokenizer
from finetuning.model.resolve import resolve_model

TEXTS = ["国密算法 SM2 是椭圆曲线公钥密码算法，密钥长度 256 比特。" * 4]


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


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
