"""What only a CUDA GPU can show; skipped without one.

uv run pytest -m "not long" tests/runs/test_cuda.py
"""

import os

# Read with the first product of the process; deterministic algorithms want it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetuning.common.distributed import Distributed
from finetuning.config import OptimizerSettings
from finetuning.data.packing import build_batch
from finetuning.data.token_table import Segment, TokenizedSamples, TruncationReport
from finetuning.model import attention, packed_model
from finetuning.model.decoding import Decoder, Request
from finetuning.model.fused_lora import adapter_copies, enable_fast_lora
from finetuning.model.loss import _softmax_error, packed_loss
from finetuning.model.packed_model import PackedLossModel
from finetuning.training.engine import Execution, TrainingEngine
from finetuning.training.optimizer import (
    StepResult,
    build_optimizer,
    clip_gradients,
    forward_backward,
    update_weights,
)
from finetuning.training.state import TrainState
from finetuning.training.step_clock import CudaTimeline, StepClock
from tests.helpers.packed import document_bounds
from tests.helpers.settings import step_plan, up_to
from tests.model.test_packed_model import CLOSE, lora_model, make_documents
from tests.runs.test_distributed import OPTIONS, curve, train

LENGTHS = (300, 17, 511, 1, 128, 67)  # 1,024 tokens
HEAD_DIM = 64  # the kernel wants a multiple of 8; small models here use this


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    """Asked where a test runs: when files are read it would make every worker take its share of a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def needs_hopper(needs_a_gpu: None) -> None:
    """Products in FP8 with a scale for each row."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper GPU")


def table(lengths: tuple[int, ...]) -> TokenizedSamples:
    """Documents as training holds them."""
    documents = make_documents(lengths)
    segments = np.concatenate([d.segments for d in documents])
    return TokenizedSamples(
        ids=np.concatenate([d.ids for d in documents]),
        segments=segments,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        sample_index=np.arange(len(lengths)),
        num_targets=np.array([(d.segments != Segment.PROMPT).sum() for d in documents]),
        truncation=TruncationReport(),
        close_id=CLOSE,
        end_id=1,
        max_seq_length=max(lengths),
    )


def cuda_model(**settings) -> torch.nn.Module:
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": HEAD_DIM}
    return lora_model(dtype=torch.bfloat16, **{**shape, **settings}).cuda()


def training(model: torch.nn.Module):
    """(packed model, trainable parameters, optimizer, group) on the GPU."""
    assert enable_fast_lora(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        trainable, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
    )
    dist = Distributed(0, 1, 0, torch.device("cuda"))
    return PackedLossModel(model, CLOSE).train(), trainable, optimizer, dist


@pytest.mark.parametrize("heads,kv_heads,head_dim", [(32, 8, 128), (8, 8, 64), (4, 1, 64)])
def test_the_kernel_equals_attention_per_document(heads: int, kv_heads: int, head_dim: int):
    """Forward and backward, with grouped heads, in bf16 against fp64."""
    torch.manual_seed(0)
    shapes = [(1, h, sum(LENGTHS), head_dim) for h in (heads, kv_heads, kv_heads)]
    rounded = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
    exact = [t.double().requires_grad_() for t in rounded]
    rounded = [t.requires_grad_() for t in rounded]
    bounds = document_bounds(LENGTHS, pad_to=9).cuda()
    module = torch.nn.Module()
    out, _ = attention.packed_attention(
        module, *rounded, None, packed_bounds=bounds, packed_max_length=512
    )
    expected, _ = attention.packed_attention(module, *exact, None, packed_lengths=LENGTHS)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, rounded, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for got, want in zip((out, *gradients), (expected, *wanted), strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()


def test_loss_of_a_bf16_head_is_summed_in_fp32():
    """Large vocabulary, many chunks: loss to 1e-4, gradient to bf16's precision."""
    torch.manual_seed(0)
    tokens, hidden_size, vocab = 4096, 256, 151_936
    hidden = torch.randn(tokens, hidden_size, device="cuda").bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(vocab, hidden_size, device="cuda")).bfloat16()
    labels = torch.randint(vocab, (tokens,), device="cuda")
    zeros = torch.zeros_like(labels)
    loss, sums = packed_loss(
        hidden,
        weight,
        target_positions=torch.arange(tokens, device="cuda"),
        labels=labels,
        segments=zeros + 3,
        document=zeros,
        num_documents=1,
        thinking_bucket=zeros - 1,
        close_id=CLOSE,
        num_targets=tokens,
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    total, wanted = 0.0, torch.empty(tokens, hidden_size, device="cuda")
    for part in torch.arange(tokens, device="cuda").split(512):
        rows = hidden[part].detach().double().requires_grad_()
        value = torch.nn.functional.cross_entropy(
            rows @ weight.double().t(), labels[part], reduction="sum"
        )
        (wanted[part],) = (g.float() for g in torch.autograd.grad(value / tokens, rows))
        total += value.item()
    assert abs(loss.item() - total / tokens) < 1e-4 * total / tokens
    assert (gradient.float() - wanted).norm() < 0.01 * wanted.norm()
    assert sums.per_document[0, 3, 2].item() == tokens


def test_full_logits_never_exist_on_the_gpu():
    tokens, vocab = 8192, 151_936
    hidden = torch.randn(tokens, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocab, 64, device="cuda").bfloat16()
    zeros = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = packed_loss(
        hidden,
        weight,
        target_positions=torch.arange(tokens, device="cuda"),
        labels=zeros,
        segments=zeros,
        document=zeros,
        num_documents=1,
        thinking_bucket=zeros - 1,
        close_id=CLOSE,
        num_targets=tokens,
    )
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 0.6 * 4 * tokens * vocab


def test_the_packed_model_equals_the_cpu():
    documents = make_documents((300, 17, 511, 60, 128, 8))
    batch = build_batch(documents, range(len(documents)))
    losses = []
    for model in (cuda_model(), cuda_model().float().cpu()):
        packed, *_ = training(model)
        device = next(model.parameters()).device
        loss, _ = packed(batch.to(device), len(batch.labels))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=0.03)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_steps_are_one_graph_and_equal_eager_ones(recompute: bool):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lengths = (300, 17, 511, 60, 128, 67, 400, 220, 90, 333, 150, 75)
    tokens = table(lengths)
    plan = step_plan(tokens.lengths, tokens.num_targets, data=up_to(512), max_steps=5)
    losses = []
    for compiled in (True, False):
        packed, trainable, optimizer, dist = training(cuda_model(recompute=recompute))
        if compiled:
            packed.compile_layers()
        shape = plan.constant_shape if compiled else {}
        losses.append([])
        for step in range(1, len(plan) + 1):
            sums = forward_backward(
                packed, plan[step], tokens, dist, StepClock(), batch_shape=shape
            )
            update_weights(optimizer, clip_gradients(trainable, 1.0))
            losses[-1] += [sum(s.per_document[..., 0].sum().item() for _, s in sums)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    np.testing.assert_allclose(*losses, rtol=0.01)


def captured_run(graph: bool, accumulation: int) -> tuple[list[float], list[torch.Tensor], object]:
    """Losses and norms of five steps, the weights after them, and the model in training."""
    lengths = (300, 17, 511, 60, 128, 67, 400, 220, 90, 333, 150, 75)
    tokens = table(lengths)
    plan = step_plan(
        tokens.lengths,
        tokens.num_targets,
        data=up_to(512),
        gradient_accumulation_steps=accumulation,
        max_steps=5,
    )
    torch.manual_seed(0)
    training = TrainingEngine(
        cuda_model(),
        CLOSE,
        Distributed(0, 1, 0, torch.device("cuda")),
        Execution("ddp", torch.bfloat16, plan.constant_shape, must_compile=True),
        OptimizerSettings(learning_rate=1e-3),
        warn=pytest.fail,
    )
    training.not_captured = "" if graph else "not wanted"
    state, numbers = TrainState(), []
    for step in range(1, len(plan) + 1):
        clock = StepClock(timeline=CudaTimeline())
        sums, _ = training.forward_backward(plan[step], tokens, clock, state, lambda: False)
        norm = training.update(1e-3, max_grad_norm=1.0)
        numbers += [StepResult(step, 1e-3, plan[step], sums, norm)]
    values = []
    for result in numbers:
        norm, micro_batches = result.read()
        values += [norm, *(float(part.sum()) for _, parts in micro_batches for part in parts)]
    return values, [p.detach().clone() for p in training.parameters], training


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_replayed_graph_gives_the_numbers_of_its_kernels(accumulation: int):
    """To the last bit, where attention adds up in a fixed order."""
    torch.use_deterministic_algorithms(True)
    try:
        torch._dynamo.reset()
        plain, weights, training = captured_run(False, accumulation)
        assert training.captured is None
        values, replayed, training = captured_run(True, accumulation)
    finally:
        torch.use_deterministic_algorithms(False)
    assert training.captured is not None and training.captured.peak_bytes > 0
    assert values == plain
    assert all(map(torch.equal, replayed, weights))


def test_where_capture_fails_steps_go_on_without(monkeypatch):
    """Here the loss looks at its own number, which nothing that is recorded may."""
    said: list[str] = []
    original = packed_model.packed_loss

    def looks(*args, **kwargs):
        loss, sums = original(*args, **kwargs)
        assert loss.item() == loss.item()
        return loss, sums

    expected, weights, _ = captured_run(False, 1)
    monkeypatch.setattr(packed_model, "packed_loss", looks)
    monkeypatch.setattr(pytest, "fail", said.append)
    values, found, training = captured_run(True, 1)
    assert training.captured is None and len(said) == 1 and "no CUDA graph" in said[0]
    assert torch.randn(3, device="cuda").isfinite().all(), "the generator waits for the capture"
    assert values == pytest.approx(expected, rel=0.01)
    assert all((a - b).abs().max() < 0.01 for a, b in zip(found, weights, strict=True))


def test_a_step_never_waits_for_the_gpu():
    tokens = table((300, 17, 511, 60, 128, 67, 400, 220))
    plan = step_plan(
        tokens.lengths,
        tokens.num_targets,
        data=up_to(512),
        gradient_accumulation_steps=2,
        max_steps=6,
    )
    packed, trainable, optimizer, dist = training(cuda_model())
    clock, results = StepClock(timeline=CudaTimeline()), []
    try:
        for step in range(1, len(plan) + 1):
            if step == 3:  # the first ones may set up handles and workspaces
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            results += forward_backward(
                packed, plan[step], tokens, dist, clock, batch_shape=plan.constant_shape
            )
            with clock.phase("optimizer"):
                update_weights(optimizer, clip_gradients(trainable, 1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(results) >= 6 and all(s.per_document.isfinite().all() for _, s in results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_is_left_out_on_the_device(bad: float):
    _, trainable, optimizer, _ = training(cuda_model())
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    update_weights(optimizer, clip_gradients(trainable, 1.0))
    before = [p.detach().clone() for p in trainable]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in trainable]
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    trainable[0].grad.view(-1)[0] = bad
    update_weights(optimizer, clip_gradients(trainable, 1.0))
    for parameter, old, moment in zip(trainable, before, moments, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
        assert optimizer.state[parameter]["step"].item() == 1


def test_fp32_trains_without_the_kernel():
    """A GPU without bf16, or --precision fp32."""
    tokens = table(LENGTHS[:3])
    losses = []
    for model in (cuda_model().float(), cuda_model()):
        packed, *_ = training(model)
        batch = build_batch(tokens, range(3)).to(torch.device("cuda"))
        losses.append(packed(batch, len(batch.labels))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "more"),
    [("ddp", ()), ("fsdp", ()), ("fsdp", ("--lora-r", "0"))],
    ids=["ddp", "fsdp", "all weights"],
)
def test_one_rank_in_a_group_gives_the_losses_of_a_plain_run(
    tiny_model, tiny_data, cache_dir, tmp_path, mode, more
):
    options = [option if option != "cpu" else "cuda" for option in OPTIONS]
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    command = [*options, *inputs, "--cache-dir", str(cache_dir), *more]
    for ranks, name, parallel in ((0, "plain", "auto"), (1, mode, mode)):
        done = train(command, tmp_path / name, ranks, 4, "--parallel", parallel)
        assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(curve(tmp_path / mode), curve(tmp_path / "plain"), rtol=5e-3)


@pytest.mark.slow
def test_all_weights_trained_in_bf16_learn_as_in_fp32(tiny_model, tiny_data, cache_dir, tmp_path):
    """The losses are near those of fp32, and what a checkpoint holds is fp32."""
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    options = [option if option != "cpu" else "cuda" for option in OPTIONS]
    command = [*options, *inputs, "--cache-dir", str(cache_dir), "--lora-r", "0"]
    for precision in ("bf16", "fp32"):
        done = train(command, tmp_path / precision, 0, 4, "--precision", precision)
        assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(curve(tmp_path / "bf16"), curve(tmp_path / "fp32"), rtol=5e-3)
    state = load_file(tmp_path / "bf16/checkpoints/checkpoint-8/adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def in_a_fixed_order() -> None:
    """Sums of a GPU have an order of their own in each run, but for these."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # in a process that has not read this file
    torch.use_deterministic_algorithms(True)


@pytest.mark.slow
def test_a_resumed_run_is_equal_to_the_last_bit(tiny_model, tiny_data, cache_dir, tmp_path):
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    options = [option if option != "cpu" else "cuda" for option in OPTIONS]
    command = [*options, *inputs, "--cache-dir", str(cache_dir)]
    resumed = ("--resume", str(tmp_path / "whole/checkpoints/checkpoint-3"))
    for name, more in (("whole", ()), ("resumed", resumed)):
        done = train(command, tmp_path / name, 0, 1, *more, fault=in_a_fixed_order)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, rest = curve(tmp_path / "whole"), curve(tmp_path / "resumed")
    assert len(whole) == 8 and whole[3:].tolist() == rest[-5:].tolist()
    files = [
        load_file(tmp_path / name / "checkpoints/checkpoint-8/adapter_model.safetensors")
        for name in ("whole", "resumed")
    ]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


@torch.no_grad()
def test_answers_written_by_graph_are_those_of_generate():
    """In fp32, where near scores do not change places; the second answer reads the adapters anew."""
    model = cuda_model().float().eval()
    ids = torch.randint(8, 90, (5, 13), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[3, :9] = 0
    request = Request(ids, mask, most=40, end_id=1)
    with attention.ordinary_attention(model):
        decoder, plain = Decoder(model), Decoder(model, why_no_graph="to compare")
        for _ in range(2):
            found, expected = (one.write(request).tolist() for one in (decoder, plain))
            assert decoder.why_no_graph == ""
            for row, wanted in zip(found, expected, strict=True):
                end = wanted.index(1) if 1 in wanted else len(wanted)
                assert row[:end] == wanted[:end]
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)


def test_recomputation_lowers_the_peak():
    batch = build_batch(make_documents((1024, 1024)), range(2)).to(torch.device("cuda"))
    peaks = []
    for recompute in (False, True):
        packed, *_ = training(cuda_model(recompute=recompute, num_hidden_layers=12))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        packed(batch, len(batch.labels))[0].backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del packed
    assert peaks[1] < 0.5 * peaks[0]


# -----------------------------------------------------------------------------
# Kernels of our own


def joined_pair(**options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same adapters in bf16, joined, and in fp64 as the library has them."""
    exact = cuda_model().double()
    model = cuda_model()
    enable_fast_lora(model, join=True, **options)
    return model, exact


def gradients_by_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}


def trained_once(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    batch = build_batch(make_documents((300, 17, 511, 60, 128, 8)), range(6))
    packed = PackedLossModel(model, CLOSE).train()
    packed(batch.to(torch.device("cuda")), len(batch.labels))[0].backward()
    return gradients_by_name(model)


def test_adapters_are_written_into_the_matrices_by_one_kernel():
    model, _ = joined_pair()
    layers = [m for m in model.modules() if hasattr(m, "_group")]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.25).add_(0.01)
    copies = adapter_copies(model)
    assert copies._in_one_kernel()
    copies.write()
    for layer in layers:
        for master, place, scaling in layer._group.copies():
            assert torch.equal(place, (master * scaling).bfloat16())


def test_joined_adapters_have_the_gradients_of_exact_ones():
    model, exact = joined_pair()
    wanted = trained_once(exact)
    for name, gradient in trained_once(model).items():
        assert (gradient - wanted[name]).norm() < 0.05 * wanted[name].norm(), name


def test_a_softmax_in_one_kernel_equals_torchs_operations():
    from finetuning.model.triton_kernels import softmax_error

    torch.manual_seed(0)
    rows, vocab = 37, 151_936
    logits = 6 * torch.randn(rows, vocab, device="cuda")
    logits[3, 7] = logits[3, 9] = 50.0  # a tie for the top
    labels = torch.randint(vocab, (rows,), device="cuda")
    labels[3] = 9
    mine, plain = ([torch.empty(rows, device="cuda") for _ in range(3)] for _ in range(2))
    expected = _softmax_error(logits, labels, CLOSE, *plain, torch.empty_like(logits))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 4e-3)):
        error = softmax_error(logits.clone(), labels, CLOSE, tuple(mine), dtype)
        torch.testing.assert_close(error.float(), expected, atol=1e-6, rtol=tolerance)
    for got, want in zip(mine, plain, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert mine[1][3] == 1


@pytest.mark.usefixtures("needs_hopper")
def test_fp8_products_have_gradients_near_exact_ones():
    model, exact = joined_pair(fp8=True)
    wanted, got = trained_once(exact), trained_once(model)
    for name, gradient in got.items():
        similarity = torch.nn.functional.cosine_similarity(
            gradient.flatten(), wanted[name].flatten(), 0
        )
        assert similarity > 0.97, (name, similarity)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_joined_layers_compile_to_one_graph_and_equal_eager_ones(fp8: bool, recompute: bool):
    if fp8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper GPU")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    batch = build_batch(make_documents((300, 17, 511, 60, 128, 8)), range(6))
    for compiled in (True, False):
        model = cuda_model(recompute=recompute)
        enable_fast_lora(model, join=True, fp8=fp8)
        packed = PackedLossModel(model, CLOSE).train()
        if compiled:
            packed.compile_layers()
        loss, _ = packed(batch.to(torch.device("cuda")), len(batch.labels))
        loss.backward()
        results.append((loss.item(), gradients_by_name(model)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert results[0][0] == pytest.approx(results[1][0], rel=0.01)
    for name, gradient in results[1][1].items():
        difference = (results[0][1][name] - gradient).norm()
        assert difference < (0.3 if fp8 else 0.06) * gradient.norm(), name
