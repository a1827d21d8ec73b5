"""The parts of a run that hold the model: engine and evaluator, and the hardware monitor beside them."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from finetuning.common.cache import private_folder
from finetuning.common.distributed import Distributed
from finetuning.common.paths import home_cache
from finetuning.common.terminal import Terminal
from finetuning.config import DirectTrainingConfig
from finetuning.data.packing import StepPlan, build_batch
from finetuning.data.training_data import DataPart
from finetuning.evaluation.evaluator import Evaluator, HeldOut, Questions
from finetuning.evaluation.forgetting import BaseStates, Forgetting, GeneralText
from finetuning.model.adapters import parts_without_adapters
from finetuning.model.attention_choice import AttentionRow, choose_attention
from finetuning.model.decoding import Decoder
from finetuning.model.flops import dims_from_config
from finetuning.model.gpu_segments import let_segments_grow
from finetuning.model.loading import load_model
from finetuning.model.parallel import full_tensor
from finetuning.monitoring.system_monitor import SystemMonitor, gpu_uuid
from finetuning.runs.plan import RunPlan
from finetuning.training.engine import TrainingEngine


def build_engine(
    config: DirectTrainingConfig, plan: RunPlan, dist: Distributed, terminal: Terminal
) -> TrainingEngine:
    """Weights, adapters, fast kernels, the wrapper of several ranks, optimizer."""
    execution = plan.execution
    let_segments_grow(dist.device)
    with terminal.working("loading the model"):
        model = load_model(
            plan.inputs.model,
            plan.inputs.tokenizer,
            config,
            config,
            device=dist.device,
            recomputed_layers=execution.recomputed_layers,
            seed=config.seed,
            sharded=execution.parallel == "fsdp",
        )
    bare = parts_without_adapters(model)
    if bare:
        parts = (f"{p} of {n} layers ({', '.join(m[:6])})" for p, (n, m) in bare.items())
        terminal.warning(
            f"no adapter is in {'; '.join(parts)}: that stays as it is; --target-modules names linear layers"
        )
    if home_cache("matplotlib") is None:  # it says so at length, and makes a new folder each time
        os.environ.setdefault("MPLCONFIGDIR", str(config.cache_path / "matplotlib"))
    if execution.batch_shape:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        compiled = private_folder(config.cache_path / f"compiled-{user}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    choose_kernels(model, config.cache_path, plan, dist, terminal)
    close_id = plan.data.train.tokens.close_id
    engine = TrainingEngine(model, close_id, dist, execution, config, terminal.warning)
    torch.manual_seed(config.seed + dist.rank)  # dropout, if any, differs between ranks
    return engine


def choose_kernels(
    model: torch.nn.Module, cache_dir: Path, plan: RunPlan, dist: Distributed, terminal: Terminal
) -> None:
    """Have attention computed by the fastest kernels that are installed, for rows like the first one."""
    shape, half = dims_from_config(model.config.get_text_config()), plan.execution.dtype
    packed = plan.execution.way == "packed" and half in (torch.bfloat16, torch.float16)
    if dist.device.type != "cuda" or not packed or shape is None:
        return
    tokens, row = plan.data.train.tokens, plan.steps[1].micro_batches[0]
    batch = build_batch(tokens, row, **plan.execution.batch_shape)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    heads, bounds = (shape.heads, shape.kv_heads, shape.head_dim), batch.cu_seqlens.tolist()
    trial = AttentionRow(*heads, tuple(bounds), batch.max_length, window)
    choice = choose_attention(trial, dist.device, cache_dir)
    if text := choice.text():
        terminal.info(text)


def build_evaluator(
    config: DirectTrainingConfig, plan: RunPlan, engine: TrainingEngine, dist: Distributed
) -> Evaluator:
    """Held-out data and questions, for the engine's model."""
    sharded, probing = plan.execution.parallel == "fsdp", plan.probing
    decoder = Decoder(
        engine.packed.model,
        engine.packed.write_adapters,
        why_no_graph="weights are gathered" if sharded else "",
        warn=engine.warn,
        sampling=probing.sampling,
    )
    return Evaluator(
        engine.packed,
        plan.inputs.tokenizer,
        HeldOut(
            plan.data.held_out,
            plan.evaluation,
            plan.groups[1],
            forgetting_of(config, plan, engine, dist),
        ),
        Questions(probing.probes, decoder, probing.most, sharded, probing.only_at(plan.steps)),
        dist,
        histograms=config.log_weight_histograms,
    )


def forgetting_of(
    config: DirectTrainingConfig, plan: RunPlan, engine: TrainingEngine, dist: Distributed
) -> Forgetting | None:
    """What the base makes of held-out and of general text, before anything has changed it."""
    if not config.forgetting:
        return None

    head = None
    if not config.lora_r and not config.init_adapter:
        head = full_tensor(engine.packed.head_weight).to(plan.execution.dtype, copy=True)

    def states(part: DataPart, once: StepPlan) -> BaseStates:
        return BaseStates(engine.packed, part.tokens, once, dist, head=head)

    held_out = plan.evaluation and states(plan.data.held_out, plan.evaluation)
    general = plan.general and GeneralText(*plan.general, states(*plan.general))
    return Forgetting(held_out, general)


def start_system_monitor(
    dist: Distributed, output_dir: Path, warn: Callable[[str], None]
) -> SystemMonitor:
    """The monitor of this node's hardware; it runs on the node's first rank. A collective."""
    on_cuda = dist.device.type == "cuda"
    gpus = dist.gather_on_node(gpu_uuid(dist.device)) if on_cuda else ()
    monitor = SystemMonitor(gpus, output_dir, 1.0, dist.rank, warn=warn)  # one GPU a rank
    if dist.local_rank == 0:
        monitor.start()
    return monitor
