"""The modules of Qwen3-4B that take adapters, and units of memory."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GIB, KIB = 2**30, 2**10
