"""Several ranks: weak scaling and equal losses on two ranks over gloo, and the formulas of docs/scaling.md.

    uv run python benchmarks/scaling.py            # weak scaling, about 2 minutes on two cores
    uv run python benchmarks/scaling.py --check    # each formula against a measured small case
    uv run python benchmarks/scaling.py --table    # the formulas for 4B to 235B on 1 to 1,024 GPUs

Weak scaling: the same work a rank (one packed row a step) with one rank alone and with two under DDP, in
turns within one group of processes, one thread each; the ratio is the median of the pairs. On two cores
that others use, wall time tells more about them than about us: CPU time of the same steps stands beside.
The last line is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import memory_settings  # noqa: F401, I001  before torch

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

import checkpoint
import distributed
import model_loading
from chat_tokens import Segment, TokenizedSample
from distributed import Distributed
from embedded_model import train_tokenizer
from fast_lora import enable_fast_lora
from optimization import build_optimizer, clip_gradients, forward_backward, update_weights
from packed_model import PackedLossModel
from packing import StepPlan
from run_plan import Placement, activation_bytes
from throughput import ModelDims, StepClock, lora_parameters

HIDDEN, LAYERS, VOCAB, ROW = 256, 4, 2048, 1024
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


def fsdp_gathered(layers: float, root: float, micro_batches: int) -> float:
    """A step under FSDP2: layers for forward and again for backward, embedding and norm once."""
    return micro_batches * (2 * layers + root)


def fsdp_reduced(trained: float, micro_batches: int) -> float:
    """A step under FSDP2: fp32 gradients after every micro-batch, so that none are held whole."""
    return 4 * trained * micro_batches


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


def write_model(folder: Path) -> None:
    """A Qwen3 with random weights."""
    tokenizer = train_tokenizer(["分组密码SM4的分组长度和密钥长度都是128比特，共32轮。"] * 4)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
        resolved = model_loading.resolve_model(str(folder), dist.device)
        tokenizer = model_loading.load_tokenizer(resolved)
        self.base = model_loading.load_model(
            resolved, tokenizer, device=dist.device, precision=precision
        )
        enable_fast_lora(self.base)
        dtype = model_loading.weight_dtype(dist.device, precision)
        packed = PackedLossModel(self.base, -1)
        self.model = distributed.parallelize(packed, mode, dist, dtype).train()
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
            row_tokens=ROW,
            accumulation=accumulation,
            max_steps=10_000,
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
        distributed.average_gradients(self.model)
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
        full = sum(p.nbytes for p in side.base.parameters())  # of all shards
        if mode == "fsdp":
            local = sum(p.to_local().nbytes for p in side.base.parameters())
            cases.append(Case(f"fsdp {precision}: weights on a rank", full / WORLD, local))
        side.update()  # DDP settles its buckets, AdamW makes its moments
        cases += traffic(side, f"{mode} {precision}", mode, full)
    cases.append(saved(side))
    return cases


def traffic(side: Side, name: str, mode: str, full: int) -> list[Case]:
    """Sizes of a step's collectives, and bytes on the wire where nobody else is on it."""
    adapters, dist = side.num_trained, side.dist
    dist.barrier()
    before = loopback_sent() if alone_on_wire() else 0
    dist.barrier()
    with CollectiveBytes() as counted:
        side.update()
    dist.barrier()
    sent = loopback_sent() - before
    sizes = counted.sizes
    if mode == "ddp":
        reduced = ddp_reduced(adapters)
        cases = [Case(f"{name}: all-reduce of a step", reduced, sizes["allreduce"])]
        wire = WORLD * ring_all_reduce(reduced, WORLD)
    else:
        layers = sum(p.nbytes for p in distributed.decoder_layers(side.model)[0].parameters())
        layers *= LAYERS
        gathered = fsdp_gathered(layers, full - layers, micro_batches=2)
        reduced = fsdp_reduced(adapters, micro_batches=2)
        cases = [
            Case(f"{name}: all-gather of a step", gathered, sizes["allgather_base"]),
            Case(f"{name}: reduce-scatter", reduced, sizes["reduce_scatter_base"]),
        ]
        wire = WORLD * ring_all_gather(gathered + reduced, WORLD)
    if alone_on_wire():
        cases.append(Case(f"{name}: on the wire, all ranks", wire, sent))
    return cases


def alone_on_wire() -> bool:
    """Whether this is the network namespace that `launch` made for us."""
    return os.environ.get("SCALING_OWN_NETWORK") == "1"


def saved(side: Side) -> Case:
    """A checkpoint on disk against its formula; collectives, so on all ranks."""
    tensors = {
        "adapter_model": model_loading.adapter_state(side.base),
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
    plan = StepPlan(lengths, lengths // 2, row_tokens=8192, accumulation=16, world_size=8)
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


def report_check(cases: list[Case]) -> dict:
    """The table of formulas, then the plan's costs."""
    print(f"{'case':36} {'formula':>12} {'measured':>12} {'off by':>8}")
    for case in cases:
        off = case.measured / case.formula - 1
        print(f"{case.name:36} {case.formula:12,.0f} {case.measured:12,.0f} {off:+8.2%}")
    plans = [plan_costs(count) for count in (10_000, 100_000, 1_000_000)]
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
    print("\n| model | GPUs | DDP: GiB a GPU | FSDP2: GiB a GPU | DDP sends | FSDP2 sends |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        for world in (1, 8, 64, 1024):
            print(world_row(name, world))


def parameters(name: str) -> int:
    """Weights of the base, norms of the layers left out."""
    dims, (experts, _) = MODELS[name], EXPERTS.get(name, (1, 1))
    embedding = dims.vocab * dims.hidden * (1 if name in TIED else 2)
    mlp = dims.layers * 3 * dims.hidden * dims.intermediate
    return dims.linear_parameters() + (experts - 1) * mlp + embedding


def adapters_of(name: str) -> int:
    """Of rank 16 on all linear maps; on attention only where experts are."""
    targets = ATTENTION if name in EXPERTS else "all-linear"
    return lora_parameters(MODELS[name], RANK, targets)


def activations(name: str, checkpointing: bool) -> float:
    """Bytes a token that a compiled bf16 model keeps for backward, as `--plan` counts them."""
    dims = MODELS[name]
    layer = activation_bytes(dims, Placement("cuda", 2, compiled=True))
    if not checkpointing:
        return dims.layers * layer
    return dims.layers * dims.hidden * 2 + layer


def state_bytes(name: str, shards: int) -> float:
    """Weights in bf16; adapters, their gradients and both moments in fp32."""
    return (2 * parameters(name) + 16 * adapters_of(name)) / shards


def world_row(name: str, world: int) -> str:
    """Memory without activations, and bytes that each GPU sends in a step of one micro-batch."""
    adapters, weights = adapters_of(name), 2 * parameters(name)
    root = 2 * MODELS[name].vocab * MODELS[name].hidden * (1 if name in TIED else 2)
    layers = weights - root + 4 * adapters
    layer = layers / MODELS[name].layers
    sharded = state_bytes(name, world) + (root + 2 * layer if world > 1 else 0)
    ddp = ring_all_reduce(ddp_reduced(adapters), world)
    fsdp = ring_all_gather(fsdp_gathered(layers, root, 1) + fsdp_reduced(adapters, 1), world)
    return (
        f"| {name} | {world:,} | {state_bytes(name, 1) / GIB:.1f} | {sharded / GIB:.1f} | "
        f"{ddp / 1e6:,.0f} MB | {fsdp / 1e9:,.1f} GB |"
    )


# -----------------------------------------------------------------------------
# Processes


def launch(arguments: list[str], own_network: bool) -> int:
    """This file under torchrun on two ranks; in a network of its own where the rights exist."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--local-addr", "127.0.0.1", "--nproc-per-node", str(WORLD)),
            *(__file__, *arguments, "--folder", folder),
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
        result = report_check(found) if arguments.check else report_scaling(found)
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
