"""A Qwen3 of a few thousand weights and a few short samples, so that a whole run takes seconds."""

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from finetuning.model.demo_model import train_tokenizer

# Settings of a run of six steps that logs, evaluates and saves.
FAST = (
    *("--max-steps", "6", "--logging-steps", "2", "--eval-steps", "3", "--save-steps", "2"),
    *("--max-seq-length", "768", "--num-probes", "0", "--quiet"),
    *("--learning-rate", "0.0003"),
)
TEXTS = [
    "分组密码SM4的分组长度和密钥长度都是128比特，共32轮。",
    "SM3杂凑算法输出256比特，消息扩展产生132个字。",
    "RSA的安全性依赖大整数分解，签名要先做杂凑和填充。",
    "密评依据GB/T 39786检查物理、网络、设备、应用各层的密码应用。",
    *(f"第{i}题：计算 {i} 乘以 {i + 7} 模 {2 * i + 3}，再验证结果。" for i in range(200)),
]


def make_tiny_model(
    folder: Path, seed: int = 0, kind: type[PreTrainedConfig] = Qwen3Config, **settings: object
) -> Path:
    """Write config, weights and tokenizer below `folder`; the same seed gives the same weights.

    kind: configuration of another architecture, with settings of its own.
    """
    tokenizer = train_tokenizer(TEXTS)
    usual = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = kind(**usual | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(config.dtype or torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_data(path: Path, count: int = 60) -> Path:
    """`count` short samples with thinking, as JSON lines; no two are near duplicates."""
    rng = random.Random(0)
    words = ["密钥", "分组", "杂凑", "签名", "证书", "随机数", "协议", "曲线", "填充", "轮函数"]
    lines = []
    for i in range(count):
        a, b, m = rng.randrange(10, 99), rng.randrange(10, 99), rng.randrange(5, 50)
        first, second = rng.sample(words, 2)
        steps = "，".join(
            f"{rng.choice(words)}{rng.randrange(1000)}" for _ in range(rng.randrange(3, 12))
        )
        record = {
            "question": f"第{i}题：{first}为{a}，{second}为{b}，求{a}×{b} mod {m}。",
            "thinking": f"先算{a}×{b}={a * b}，再除以{m}。{steps}。余数是{a * b % m}。",
            "answer": f"{a}×{b}={a * b}，模{m}得{a * b % m}。最终答案：{a * b % m}",
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path
