"""Several ranks: weak scaling and equal losses on two ranks over gloo, and the formulas of docs/scaling.md.

    uv run python -m benchmarks.scaling            # weak scaling, about 2 minutes on two cores
    uv run python -m benchmarks.scaling --check    # each formula against a measured small case
    uv run python -m benchmarks.scaling --table    # the formulas for 4B to 235B on 1 to 1,024 GPUs

Weak scaling: the same work a rank (one packed row a step) with one rank alone and with two under DDP, in
turns within one group of processes, one thread each; the ratio is the median of the pairs. On two cores
that others use, wall time tells more about them than about us: CPU time of the same steps stands beside.
The last line is JSON.
"""

import finetuning.common.process  # noqa: F401, I001  before torch
import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from finetuning.common import distributed
from finetuning.common.distributed import Distributed
from finetuning.config import BatchSettings, DataSettings, LoraSettings, ModelSettings
from finetuning.data.packing import StepPlan, build_batch
from finetuning.data.token_table import Segment, TokenizedSample
from finetuning.model import adapters as model_adapters
from finetuning.model import loading, parallel, resolve
from finetuning.model.demo_model import train_tokenizer
from finetuning.model.flops import ModelDims, lora_parameters
from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.packed_model import PackedLossModel
from finetuning.training import checkpoint
from finetuning.training.memory_estimate import Placement, activation_bytes
from finetuning.training.optimizer import (
    build_optimizer,
    clip_gradients,
    forward_backward,
    update_weights,
)
from finetuning.training.step_clock import StepClock

HIDDEN, LAYERS, VOCAB, ROW = 256, 4, 2048, 1024
EXPERTS_SMALL = 8
WORLD, STEPS, WARM_UP = 2, 2, 1  # steps in one half of a pair; pairs that are not counted
GIB = 2**30

# -----------------------------------------------------------------------------
# The formulas. Bytes; W ranks


def ring_all_reduce(size: float, world: int) -> float:
    """Sent by each rank: every part goes round twice (Patarasuk & Yuan 2009)."""
    return 2 * (world - 1) / world * size


def ring_all_gather(size: float, world: int) -> float:
    """Sent by each rank so that all have the `size` bytes; a reduce-scatter takes as much."""
    return (world - 1) / world * size


def ddp_reduced(adapters: int) -> int:
    """A step under DDP: the fp32 gradients of all adapters, once, whatever the accumulation."""
    return 4 * adapters


def shard_size(shape: Sequence[int], world: int) -> int:
    """Elements of one rank's shard under FSDP2: it cuts the rows, and all shards are as long as the first."""
    return math.ceil(shape[0] / world) * math.prod(shape[1:])


def padded_size(shape: Sequence[int], world: int) -> int:
    """Elements of all ranks' shards, which is what is gathered and reduced: 16 rows on 64 ranks are 64."""
    return world * shard_size(shape, world)


def fsdp_gathered(layers: float, root: float, micro_batches: int) -> float:
    """A step under FSDP2: layers for forward and again for backward, embedding and norm once.

    layers, root: bytes with their padding.
    """
    return micro_batches * (2 * layers + root)


def fsdp_reduced(trained: float, micro_batches: int) -> float:
    """A step under FSDP2: fp32 gradients after every micro-batch, so that none are held whole.

    trained: weights with their padding.
    """
    return 4 * trained * micro_batches


def hiding_tokens(sent: float, weights: float, passes: int) -> float:
    """Tokens from which the arithmetic takes as long as sending, times F / B.

    weights: that a token meets, each with 2 operations in every pass: one forward or backward, one more
    where it is recomputed first.
    """
    return sent / (2 * weights * passes)


def checkpoint_size(adapters: int) -> int:
    """Weights and both moments in fp32."""
    return 12 * adapters


# -----------------------------------------------------------------------------
# A small case


class Documents(list):
    """Tokenized samples as `build_batch` takes them."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sample.ids) for sample in self])

    @property
    def num_targets(self) -> np.ndarray:
        return np.array([(s.segments != Segment.PROMPT).sum() for s in self])


def make_documents(count: int = 120) -> Documents:
    """Random documents of 60 to 400 tokens, a quarter of each prompt."""
    rng = np.random.default_rng(0)
    made = Documents()
    for index in range(count):
        length = int(rng.integers(60, 400))
        segments = np.full(length, Segment.THINKING, dtype=np.uint8)
        segments[: length // 4], segments[-1] = Segment.PROMPT, Segment.END
        made.append(TokenizedSample(rng.integers(0, 300, length, dtype=np.int32), segments, index))
    return made


def write_model(folder: Path, experts: bool = False) -> None:
    """A Qwen3 with random weights; with experts, a mixture."""
    tokenizer = train_tokenizer(["分组密码SM4的分组长度和密钥长度都是128比特，共32轮。"] * 4)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    if experts:
        mixture = {
            "num_experts": EXPERTS_SMALL,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": HIDDEN,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **mixture))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_small(
    folder: Path,
    dist: Distributed,
    mode: str,
    precision: str,
    lora: LoraSettings,
    **options: object,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model with its adapters, and as all ranks train it."""
    resolved = resolve.resolve_model(str(folder), dist.device)
    tokenizer = loading.load_tokenizer(resolved)
    base = loading.load_model(
        resolved,
        tokenizer,
        ModelSettings(precision=precision),
        lora,
        device=dist.device,
        **options,
    )
    enable_fast_lora(base)
    dtype = resolve.weight_dtype(dist.device, precision)
    packed = PackedLossModel(base, -1)
    return base, parallel.parallelize(packed, mode, dist, dtype).train()


class Side:
    """Model, optimizer and plan of one way to train; the same weights on every side."""

    def __init__(
        self,
        folder: Path,
        dist: Distributed,
        mode: str = "ddp",
        *,
        accumulation: int = 1,
        precision: str = "fp32",
    ) -> None:
        self.dist, self.documents = dist, make_documents()
        self.base, self.model = load_small(folder, dist, mode, precision, LoraSettings())
        self.names = {p: n for n, p in self.base.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        self.optimizer = build_optimizer(
            self.parameters,
            learning_rate=1e-3,
            betas=(0.9, 0.999),
            epsilon=1e-8,
            weight_decay=0.0,
        )
        self.plan = StepPlan(
            self.documents.lengths,
            self.documents.num_targets,
            data=DataSettings(max_seq_length=ROW),
            batch=BatchSettings(gradient_accumulation_steps=accumulation, max_steps=10_000),
            rank=dist.rank,
            world_size=dist.world_size,
        )
        self.step = 0

    @property
    def num_trained(self) -> int:
        """Weights of the adapters, all ranks."""
        return sum(p.numel() for p in self.parameters)

    def update(self) -> torch.Tensor:
        """One step; this rank's loss sum over the step's targets."""
        self.step += 1
        planned = self.plan[self.step]
        sums = forward_backward(self.model, planned, self.documents, self.dist, StepClock())
        parallel.average_gradients(self.model)
        update_weights(self.optimizer, clip_gradients(self.parameters, 1.0))
        own = sum(s.per_document[..., 0].double().sum() for _, s in sums)
        return own / planned.num_targets

    def losses(self, steps: int) -> list[float]:
        """Of the next steps, all ranks together."""
        return [self.dist.sum(self.update()).item() for _ in range(steps)]


# -----------------------------------------------------------------------------
# Weak scaling


def weak_scaling(folder: Path, dist: Distributed, pairs: int) -> dict:
    """Seconds a step of one rank alone and of two, in turns; then the losses of one global batch."""
    alone = Side(folder, single(dist)) if dist.is_main else None
    together = Side(folder, dist)
    seconds: dict[str, list[tuple[float, float]]] = {"alone": [], "together": []}
    for pair in range(pairs + WARM_UP):
        for name in ("alone", "together") if pair % 2 else ("together", "alone"):
            dist.barrier()
            took = timed(together if name == "together" else alone)
            if pair >= WARM_UP:
                seconds[name].append(took)
    return {"seconds": seconds, "difference": largest_difference(folder, dist)}


def timed(side: Side | None) -> tuple[float, float]:
    """Wall and CPU seconds of a step; a rank that has no part waits at the next barrier."""
    if side is None:
        return 0.0, 0.0
    start = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        side.update()
    return (time.perf_counter() - start[0]) / STEPS, (time.process_time() - start[1]) / STEPS


def largest_difference(folder: Path, dist: Distributed, steps: int = 5) -> dict[str, float]:
    """Of the losses of two ranks from those of one with the same global batch, relative."""
    reference = []
    if dist.is_main:
        reference = Side(folder, single(dist), accumulation=WORLD).losses(steps)
    found = {}
    for mode in ("ddp", "fsdp"):
        losses = Side(folder, dist, mode).losses(steps)
        pairs = zip(losses, reference, strict=dist.is_main)
        found[mode] = max((abs(a / b - 1) for a, b in pairs), default=0.0)
    return found


def single(dist: Distributed) -> Distributed:
    """This process as the only one."""
    return Distributed(0, 1, 0, dist.device)


def report_scaling(found: dict) -> dict:
    """The table, and what belongs into the last line."""
    seconds = {name: np.array(steps) for name, steps in found["seconds"].items()}
    for name, steps in seconds.items():
        wall, cpu = 1e3 * np.median(steps, axis=0)
        print(f"{name:9} {wall:8.1f} ms a step, {cpu:8.1f} ms CPU of rank 0 (medians)")
    ratios = seconds["alone"] / seconds["together"]
    quartiles = {
        name: statistics.quantiles(ratios[:, k], n=4) for k, name in enumerate(("wall", "cpu"))
    }
    for name, values in quartiles.items():
        print(
            f"one rank over two, {name}: " + ", ".join(f"{v:.3f}" for v in values) + " (quartiles)"
        )
    for mode, value in found["difference"].items():
        print(f"losses of 2 ranks, {mode}, against 1 rank: {value:.1e} relative at most")
    return {
        "weak_scaling_2_ranks": quartiles["wall"][1],
        "weak_scaling_2_ranks_cpu_time": quartiles["cpu"][1],
        "wall_quartiles": quartiles["wall"],
        "losses_equal": max(found["difference"].values()) <= 1e-6,
        "largest_loss_difference": found["difference"],
        "pairs": len(ratios),
    }


# -----------------------------------------------------------------------------
# The formulas against measured cases


class CollectiveBytes(TorchDispatchMode):
    """Sizes of the tensors that go through collectives, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            whole = args[1] if name == "reduce_scatter_base" else args[0]
            tensors = whole if isinstance(whole, list) else [whole]
            self.sizes[name] += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    """A formula, and what was measured."""

    name: str
    formula: float
    measured: float


def loopback_sent() -> int:
    """Bytes sent over this network namespace's loopback, by all that is in it."""
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def check(folder: Path, dist: Distributed) -> list[Case]:
    """All cases of two ranks; the same list on both."""
    cases = []
    for mode, precision in (("ddp", "fp32"), ("fsdp", "fp32"), ("fsdp", "bf16")):
        side = Side(folder, dist, mode, accumulation=2, precision=precision)
        if mode == "fsdp":
            cases.append(weights_on_a_rank(side.base, f"fsdp {precision}", WORLD))
        side.update()  # DDP settles its buckets, AdamW makes its moments
        cases += traffic(side, f"{mode} {precision}", mode)
    cases.append(saved(side))
    return cases


def weights_on_a_rank(model: torch.nn.Module, name: str, world: int) -> Case:
    """What this rank holds of a sharded model, padding included."""
    formula = padded_bytes(model.parameters(), world) / world
    held = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
    return Case(f"{name}: weights on a rank", formula, held)


def padded_bytes(parameters: Iterable[torch.nn.Parameter], world: int) -> int:
    """Of all ranks' shards."""
    return sum(p.element_size() * padded_size(p.shape, world) for p in parameters)


def gathered_and_reduced(
    model: torch.nn.Module, world: int, micro_batches: int
) -> tuple[float, float]:
    """What the formulas say that a step of a sharded model gathers and reduces."""
    everything = padded_bytes(model.parameters(), world)
    layers = sum(padded_bytes(n.parameters(), world) for n in parallel.decoder_layers(model))
    trained = sum(padded_size(p.shape, world) for p in model.parameters() if p.requires_grad)
    gathered = fsdp_gathered(layers, everything - layers, micro_batches)
    return gathered, fsdp_reduced(trained, micro_batches)


def traffic(side: Side, name: str, mode: str) -> list[Case]:
    """Sizes of a step's collectives, and bytes on the wire where nobody else is on it."""
    dist = side.dist
    dist.barrier()
    before = loopback_sent() if alone_on_wire() else 0
    dist.barrier()
    with CollectiveBytes() as counted:
        side.update()
    dist.barrier()
    sent = loopback_sent() - before
    sizes = counted.sizes
    if mode == "ddp":
        reduced = ddp_reduced(side.num_trained)
        cases = [Case(f"{name}: all-reduce of a step", reduced, sizes["allreduce"])]
        wire = WORLD * ring_all_reduce(reduced, WORLD)
    else:
        gathered, reduced = gathered_and_reduced(side.model, WORLD, micro_batches=2)
        cases = [
            Case(f"{name}: all-gather of a step", gathered, sizes["allgather_base"]),
            Case(f"{name}: reduce-scatter", reduced, sizes["reduce_scatter_base"]),
        ]
        wire = WORLD * ring_all_gather(gathered + reduced, WORLD)
    if alone_on_wire():
        cases.append(Case(f"{name}: on the wire, all ranks", wire, sent))
    return cases


def check_many(folder: Path) -> list[Case]:
    """Sizes given to the collectives of 64 and 1,024 ranks by the last of them; nothing is sent.

    torch's fake group takes every collective and does nothing: no other rank is there, and the values
    of the gathered weights are arbitrary.
    """
    cases = []
    with tempfile.TemporaryDirectory() as mixture:
        write_model(Path(mixture), experts=True)
        for world, path, name, options in (
            (64, folder, "", {}),
            (64, folder, ", recomputed", {"recomputed_layers": LAYERS}),
            (64, Path(mixture), ", experts", {"target_modules": ATTENTION}),
            (1024, folder, "", {}),
        ):
            group = {"store": FakeStore(), "rank": world - 1, "world_size": world}
            torch.distributed.init_process_group("fake", **group)
            dist = Distributed(world - 1, world, 0, torch.device("cpu"))
            cases += sharded_micro_batch(path, dist, f"{world:,} ranks{name}", options)
            torch.distributed.destroy_process_group()
    return cases


def sharded_micro_batch(
    folder: Path, dist: Distributed, name: str, options: dict[str, object]
) -> list[Case]:
    """Of bf16 weights with fp32 adapters."""
    base, model = load_small(folder, dist, "fsdp", "bf16", **options)
    held = weights_on_a_rank(base, name, dist.world_size)
    gathered, reduced = gathered_and_reduced(model, dist.world_size, micro_batches=1)
    with CollectiveBytes() as counted:
        model(build_batch(make_documents(1), [0]), 100)[0].backward()
    return [
        held,
        Case(f"{name}: all-gather", gathered, counted.sizes["allgather_base"]),
        Case(f"{name}: reduce-scatter", reduced, counted.sizes["reduce_scatter_base"]),
    ]


def alone_on_wire() -> bool:
    """Whether this is the network namespace that `launch` made for us."""
    return os.environ.get("SCALING_OWN_NETWORK") == "1"


def saved(side: Side) -> Case:
    """A checkpoint on disk against its formula; collectives, so on all ranks."""
    tensors = {
        "adapter_model": model_adapters.adapter_state(side.base),
        "optimizer": checkpoint.optimizer_tensors(side.optimizer, side.names),
        "rng": checkpoint.rng_tensors(side.dist.device),
    }
    with tempfile.TemporaryDirectory() as folder:
        size = 0
        if side.dist.is_main:
            path = checkpoint.save_checkpoint(
                Path(folder), 1, run="check", tensors=tensors, documents={}, state={}
            )
            size = sum(file.stat().st_size for file in path.iterdir())
        else:
            checkpoint.give_shards(tensors)
    return Case("checkpoint on disk", checkpoint_size(side.num_trained), size)


def plan_costs(count: int) -> dict[str, float]:
    """Seconds and resident bytes of a plan for so many documents, measured in this process."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.8, 0.7, count), 32, 8192).astype(np.int64)
    process = psutil.Process()
    before, start = process.memory_info().rss, time.process_time()
    data = DataSettings(max_seq_length=8192)
    batch = BatchSettings(gradient_accumulation_steps=16, num_epochs=1)
    plan = StepPlan(lengths, lengths // 2, data=data, batch=batch, world_size=8)
    made = time.process_time() - start
    size = process.memory_info().rss - before
    start = time.process_time()
    steps = min(100, plan.num_steps)
    for step in range(1, steps + 1):
        plan[step]
    looked_up = (time.process_time() - start) / steps
    return {
        "documents": count,
        "seconds": made,
        "bytes_a_document": size / count,
        "efficiency": plan.efficiency,
        "seconds_a_step": looked_up,
    }


def report_check(cases: list[Case], plans: list[dict[str, float]]) -> dict:
    """The table of formulas, then the plan's costs."""
    print(f"{'case':40} {'formula':>12} {'measured':>12} {'off by':>8}")
    for case in cases:
        off = case.measured / case.formula - 1
        print(f"{case.name:40} {case.formula:12,.0f} {case.measured:12,.0f} {off:+8.2%}")
    for plan in plans:
        print(
            f"plan of {plan['documents']:>9,} documents: {plan['seconds']:.2f} s CPU, "
            f"{plan['bytes_a_document']:.0f} B a document, {plan['efficiency']:.2%} full, "
            f"{plan['seconds_a_step'] * 1e3:.2f} ms a step"
        )
    return {"cases": [vars(case) for case in cases], "plans": plans}


# -----------------------------------------------------------------------------
# The table of the document

MODELS = {  # published shapes; the mixture has 128 experts of width 1,536, 8 of them for a token
    "4B": ModelDims(2560, 36, 32, 8, 128, 9728, 151936),
    "8B": ModelDims(4096, 36, 32, 8, 128, 12288, 151936),
    "32B": ModelDims(5120, 64, 64, 8, 128, 25600, 151936),
    "235B": ModelDims(4096, 94, 64, 4, 128, 1536, 151936),
}
EXPERTS = {"235B": (128, 8)}
TIED = ("4B",)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, TOKENS = 16, 8192


def table() -> None:
    """Markdown: memory of one GPU and bytes of one step."""
    print("| model | weights | adapters | kept a token (ckpt) | 8,192 tokens (ckpt) | checkpoint |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        dense = name not in EXPERTS
        plain, light = (activations(name, ckpt) for ckpt in (False, True))
        kept = f"{plain / 1024:,.0f} ({light / 1024:,.0f}) KiB" if dense else "not modelled"
        row = f"{TOKENS * plain / GIB:.1f} ({TOKENS * light / GIB:.1f}) GiB" if dense else "–"
        print(
            f"| {name} | {2 * parameters(name) / GIB:.1f} GiB | {adapters_of(name) / 1e6:.1f}M, "
            f"{16 * adapters_of(name) / GIB:.2f} GiB | {kept} | {row} | "
            f"{checkpoint_size(adapters_of(name)) / 1e6:,.0f} MB |"
        )
    print(
        "\n| model | GPUs | DDP: GiB a GPU | FSDP2: GiB a GPU | DDP sends | FSDP2 sends | unpadded | "
        "hides from: forward | backward (recomputed) |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for world in (1, 8, 64, 1024):
            print(world_row(name, world))


def layer_shapes(name: str) -> list[tuple[int, ...]]:
    """Of the base weights of one layer as torch holds them, rows first; norms are left out."""
    dims = MODELS[name]
    maps = {n: (rows, columns) for n, (columns, rows) in dims.linear_shapes().items()}
    if name not in EXPERTS:
        return list(maps.values())
    experts, _ = EXPERTS[name]
    fused = [
        (experts, 2 * dims.intermediate, dims.hidden),  # gate and up in one
        (experts, dims.hidden, dims.intermediate),
        (experts, dims.hidden),  # the router
    ]
    return [maps[n] for n in ATTENTION] + fused


def adapter_shapes(name: str) -> list[tuple[int, int]]:
    """Of A and B in one layer: rank 16 on all linear maps; on attention only where experts are."""
    maps = MODELS[name].linear_shapes()
    targets = ATTENTION if name in EXPERTS else maps
    return [s for n in targets for s in ((RANK, maps[n][0]), (maps[n][1], RANK))]


def root_shapes(name: str) -> list[tuple[int, int]]:
    """Of the embedding, and of the head if it is not the same."""
    dims = MODELS[name]
    return [(dims.vocab, dims.hidden)] * (1 if name in TIED else 2)


def padded_sum(shapes: Iterable[Sequence[int]], world: int) -> int:
    """Elements of all ranks' shards of these; without padding for one rank."""
    return sum(padded_size(shape, world) for shape in shapes)


def parameters(name: str) -> int:
    """Weights of the base, norms left out."""
    layers = MODELS[name].layers * padded_sum(layer_shapes(name), 1)
    return layers + padded_sum(root_shapes(name), 1)


def adapters_of(name: str) -> int:
    """Of rank 16 on all linear maps; on attention only where experts are."""
    targets = ATTENTION if name in EXPERTS else "all-linear"
    return lora_parameters(MODELS[name], RANK, targets)


def active_in_layer(name: str) -> int:
    """Weights of one layer that a token meets."""
    dims, shapes = MODELS[name], layer_shapes(name)
    every = padded_sum(shapes, 1)
    if name not in EXPERTS:
        return every
    experts, chosen = EXPERTS[name]
    return every - (experts - chosen) * 3 * dims.hidden * dims.intermediate


def activations(name: str, checkpointing: bool) -> float:
    """Bytes a token that a compiled bf16 model keeps for backward, as `--plan` counts them."""
    dims = MODELS[name]
    layer = activation_bytes(dims, Placement("cuda", 2, compiled=True))
    if not checkpointing:
        return dims.layers * layer
    return dims.layers * dims.hidden * 2 + layer


def state_bytes(name: str, world: int) -> float:
    """Of one shard. Weights in bf16; adapters, their gradients and both moments in fp32."""
    base, adapters = (padded_sum(f(name), world) for f in (layer_shapes, adapter_shapes))
    layers = MODELS[name].layers * (2 * base + 16 * adapters)
    return (layers + 2 * padded_sum(root_shapes(name), world)) / world


def layer_and_root(name: str, world: int) -> tuple[int, int, int]:
    """Bytes of a gathered layer and of the gathered root, and trained weights of a layer."""
    adapters = padded_sum(adapter_shapes(name), world)
    layer = 2 * padded_sum(layer_shapes(name), world) + 4 * adapters
    return layer, 2 * padded_sum(root_shapes(name), world), adapters


def sharded_bytes(name: str, world: int) -> float:
    """On each GPU, without activations: its shard, the root and two layers in flight."""
    layer, root, _ = layer_and_root(name, world)
    return state_bytes(name, world) + root + 2 * layer


def sharded_sends(name: str, world: int, padded_for: int) -> float:
    """By each GPU in a step of one micro-batch; shards padded for so many ranks, 1: not."""
    layers = MODELS[name].layers
    layer, root, adapters = layer_and_root(name, padded_for)
    gathered = fsdp_gathered(layers * layer, root, 1)
    return ring_all_gather(gathered + fsdp_reduced(layers * adapters, 1), world)


def layer_hides_from(name: str, world: int) -> tuple[float, float, float]:
    """`hiding_tokens` of a layer's forward, of its backward, and of that with recomputation."""
    layer, _, adapters = layer_and_root(name, world)
    forward = ring_all_gather(layer, world)
    backward = forward + ring_all_gather(fsdp_reduced(adapters, 1), world)
    active = active_in_layer(name)
    return (
        hiding_tokens(forward, active, 1),
        hiding_tokens(backward, active, 1),
        hiding_tokens(backward, active, 2),
    )


def world_row(name: str, world: int) -> str:
    """Memory without activations, bytes that each GPU sends in a step of one micro-batch, and from how
    many tokens that hides, in F / B."""
    ddp = ring_all_reduce(ddp_reduced(adapters_of(name)), world)
    row = [name, f"{world:,}", f"{state_bytes(name, 1) / GIB:.1f}"]
    if world == 1:
        return "| " + " | ".join([*row, "–", "0 MB", *"––––"]) + " |"
    forward, backward, recomputed = layer_hides_from(name, world)
    row += [
        f"{sharded_bytes(name, world) / GIB:.1f}",
        f"{ddp / 1e6:,.0f} MB",
        f"{sharded_sends(name, world, world) / 1e9:,.1f} GB",
        f"{sharded_sends(name, world, 1) / 1e9:,.1f} GB",
        f"{forward:.2f}",
        f"{backward:.2f} ({recomputed:.2f})",
    ]
    return "| " + " | ".join(row) + " |"


# -----------------------------------------------------------------------------
# Processes


def launch(arguments: list[str], own_network: bool) -> int:
    """This file under torchrun on two ranks; in a network of its own where the rights exist."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--local-addr", "127.0.0.1", "--nproc-per-node", str(WORLD)),
            *("-m", "benchmarks.scaling", *arguments, "--folder", folder),
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if own_network and may_unshare():
            env |= {"SCALING_OWN_NETWORK": "1", "GLOO_SOCKET_IFNAME": "lo"}
            up = 'ip link set lo up && exec "$@"'
            command = ["unshare", "--net", "sh", "-c", up, "sh", *command]
        return subprocess.run(command, env=env).returncode


def may_unshare() -> bool:
    """Whether this user can make a network namespace."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


def main() -> int:
    """One of the three reports; without torchrun's environment, start it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return 0
    if "RANK" not in os.environ:
        return launch(sys.argv[1:], own_network=arguments.check)
    torch.set_num_threads(1)
    dist = distributed.init_distributed("cpu", 300)
    if arguments.check:
        found = check(arguments.folder, dist)
    else:
        found = weak_scaling(arguments.folder, dist, arguments.pairs)
    distributed.leave()
    if dist.is_main:
        if arguments.check:
            plans = [plan_costs(count) for count in (10_000, 100_000, 1_000_000)]
            result = report_check(found + check_many(arguments.folder), plans)
        else:
            result = report_scaling(found)
        machine = {
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, 1 thread a rank",
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        print(json.dumps(result | machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
