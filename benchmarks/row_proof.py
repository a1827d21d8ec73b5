"""What it costs at a start to prove that packed rows are sound for an architecture.

    uv run python -m benchmarks.row_proof

One proof each, without the cache of proofs; processor seconds of one thread. The imports are not counted.
The last line is JSON.
"""

import json
import time

import torch
from transformers import Gemma3TextConfig, PretrainedConfig, Qwen3Config

from finetuning.model.row_proof import prove

LENGTHS = (2_048, 16_384)  # tokens of the longest sample
CONFIGS: dict[str, type[PretrainedConfig]] = {"Qwen3": Qwen3Config, "Gemma 3": Gemma3TextConfig}


def main() -> None:
    """Print one line for each."""
    torch.set_num_threads(1)
    prove(Qwen3Config(), longest=LENGTHS[0])  # what only the first proof of a process pays
    seconds = {}
    for name, kind in CONFIGS.items():
        for longest in LENGTHS:
            before = time.process_time()
            proof = prove(kind(), longest=longest)
            taken = seconds[f"{name}, {longest} tokens"] = round(time.process_time() - before, 3)
            print(f"{name}, {longest} tokens: {proof.way}, {taken:.2f} s")
    print(json.dumps({"proof_cpu_s": seconds}))


if __name__ == "__main__":
    main()
