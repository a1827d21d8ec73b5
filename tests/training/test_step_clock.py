"""The step clock on clocks we turn by hand, and FLOPs against counts made another way."""

import math

import numpy as np
import pytest
import torch

from finetuning.model.flops import (
    ALL_LINEAR,
    ModelDims,
    dims_from_config,
    lora_parameters,
    peak_flops,
    training_flops,
)
from finetuning.training.step_clock import CudaTimeline, StepClock, straggler

QWEN3_4B = ModelDims(2560, 36, 32, 8, 128, 9728, 151936)


class HandClock:
    """A host clock that moves when told."""

    def __init__(self):
        self.now = 1000.0

    def stamp(self):
        return self.now

    def ready(self, stamp):
        return True

    def seconds(self, start, end):
        return end - start


class HandDevice:
    """A device queue: `work` is queued at once and takes its time later; `finish` ends some of it."""

    def __init__(self):
        self.queued = 0.0  # device time at the end of all that is queued
        self.finished = 0.0

    def work(self, seconds):
        self.queued += seconds

    def stamp(self):
        return self.queued

    def ready(self, stamp):
        return stamp <= self.finished

    def seconds(self, start, end):
        return end - start


def train_step(clock, hand, *, tokens=1000, supervised=600, samples=4, flops=0.0):
    """0.1 s data, 0.7 s forward and backward, 0.2 s optimizer."""
    for phase, seconds in (("data", 0.1), ("forward_backward", 0.7), ("optimizer", 0.2)):
        with clock.phase(phase):
            hand.now += seconds
    clock.count(tokens=tokens, supervised=supervised, samples=samples, flops=flops)


@pytest.fixture
def hand():
    return HandClock()


@pytest.fixture
def clock(hand):
    return StepClock(timeline=hand)


def test_rates_and_parts(clock, hand):
    for _ in range(4):
        train_step(clock, hand)
    hand.now += 0.4  # between phases: training time of no part
    assert clock.read() == pytest.approx(
        {
            "Throughput/Tokens_Per_Second": 4000 / 4.4,
            "Throughput/Supervised_Tokens_Per_Second": 2400 / 4.4,
            "Throughput/Samples_Per_Second": 16 / 4.4,
            "Throughput/Step_Seconds": 1.1,
            "Throughput/Step_Seconds_Data": 0.1,
            "Throughput/Step_Seconds_Forward_Backward": 0.7,
            "Throughput/Step_Seconds_Optimizer": 0.2,
            "Throughput/Step_Seconds_Logging": 0.0,
            "Throughput/Evaluation_Percent": 0.0,
            "Throughput/Saving_Percent": 0.0,
        }
    )


@pytest.mark.parametrize("phase", ["evaluation", "saving"])
def test_evaluation_and_saving_leave_the_rates_unchanged(clock, hand, phase):
    train_step(clock, hand)
    plain = clock.read()
    train_step(clock, hand)
    with clock.phase(phase):
        hand.now += 60
    rates, share = clock.read(), f"Throughput/{phase.title()}_Percent"
    assert rates == pytest.approx(plain | {share: 100 * 60 / 62})
    train_step(clock, hand)
    assert clock.read()[share] == pytest.approx(100 * 60 / 63), "of the whole session"


def test_time_before_the_first_phase_does_not_count_nor_does_an_earlier_run(clock, hand):
    assert clock.read() == {}
    hand.now += 500  # a model is loaded, a checkpoint restored
    train_step(clock, hand)
    assert clock.read()["Throughput/Tokens_Per_Second"] == pytest.approx(1000)


def test_each_read_starts_a_new_interval(clock, hand):
    train_step(clock, hand)
    clock.read()
    train_step(clock, hand, tokens=3000)
    assert clock.read()["Throughput/Tokens_Per_Second"] == pytest.approx(3000)


def test_a_read_before_a_step_ends_keeps_its_time_for_it(clock, hand):
    with clock.phase("data"):
        hand.now += 2.0
    assert clock.read() == {}
    with clock.phase("forward_backward"):
        hand.now += 2.0
    clock.count(tokens=400, supervised=1, samples=1)
    rates = clock.read()
    assert rates["Throughput/Tokens_Per_Second"] == pytest.approx(100)
    assert rates["Throughput/Step_Seconds_Data"] == pytest.approx(2.0)


def test_an_inner_phase_stops_the_outer_one(clock, hand):
    with clock.phase("logging"):
        hand.now += 1.0
        with clock.phase("saving"):
            hand.now += 50.0
        hand.now += 2.0
    clock.count(tokens=1, supervised=1, samples=1)
    rates = clock.read()
    assert rates["Throughput/Step_Seconds_Logging"] == pytest.approx(3.0)
    assert rates["Throughput/Step_Seconds"] == pytest.approx(3.0)


def test_a_read_inside_logging_splits_the_logging_time(clock, hand):
    train_step(clock, hand)
    with clock.phase("logging"):
        hand.now += 0.25
        first = clock.read()
        hand.now += 0.5
    train_step(clock, hand)
    assert first["Throughput/Step_Seconds_Logging"] == pytest.approx(0.25)
    assert clock.read()["Throughput/Step_Seconds_Logging"] == pytest.approx(0.5)


def test_an_error_inside_a_phase_ends_it(clock, hand):
    with pytest.raises(KeyError), clock.phase("data"):
        raise KeyError
    hand.now += 5.0
    clock.count(tokens=1, supervised=1, samples=1)
    assert clock.read()["Throughput/Step_Seconds_Data"] == 0.0


def test_no_time_no_rate(clock):
    with clock.phase("data"):
        pass
    clock.count(tokens=1, supervised=1, samples=1)
    rates = clock.read()
    assert "Throughput/Tokens_Per_Second" not in rates
    assert rates["Throughput/Step_Seconds"] == 0.0


def test_an_unknown_phase_is_our_mistake(clock):
    with pytest.raises(AssertionError), clock.phase("lunch"):
        pass


def test_the_default_clock_is_the_monotonic_one(monkeypatch):
    monkeypatch.setattr("time.time", lambda: math.nan)
    clock = StepClock()
    with clock.phase("data"):
        pass
    clock.count(tokens=5, supervised=5, samples=5)
    assert clock.read()["Throughput/Tokens_Per_Second"] > 0


# ---- the device's timeline ----------------------------------------------------------------------


def device_step(clock, device, waiting_for_data=0.0):
    with clock.phase("data"):
        device.work(waiting_for_data)  # the queue ran dry while the host was reading
    with clock.phase("forward_backward"):
        device.work(0.8)
    with clock.phase("optimizer"):
        device.work(0.2)
    clock.count(tokens=1000, supervised=500, samples=2)


def test_only_steps_that_the_device_has_finished_are_reported():
    device = HandDevice()
    clock = StepClock(timeline=device)
    for _ in range(3):
        device_step(clock, device)
    assert clock.read() == {}  # all queued, nothing done: no wait for it
    device.finished = 2.0
    rates = clock.read()
    assert rates["Throughput/Tokens_Per_Second"] == pytest.approx(1000)
    assert rates["Throughput/Step_Seconds_Forward_Backward"] == pytest.approx(0.8)
    device.finished = 3.0
    assert clock.read()["Throughput/Tokens_Per_Second"] == pytest.approx(1000)


def test_data_time_on_the_device_is_the_time_it_stood_waiting():
    device = HandDevice()
    clock = StepClock(timeline=device)
    device_step(clock, device, waiting_for_data=1.0)
    device.finished = device.queued
    rates = clock.read()
    assert rates["Throughput/Step_Seconds_Data"] == pytest.approx(1.0)
    assert rates["Throughput/Tokens_Per_Second"] == pytest.approx(500)


def test_evaluation_is_left_out_on_the_device_even_with_training_work_still_queued():
    device = HandDevice()
    clock = StepClock(timeline=device)
    device_step(clock, device)
    with clock.phase("evaluation"):
        device.work(30.0)
    device_step(clock, device)
    device.finished = device.queued
    assert clock.read()["Throughput/Tokens_Per_Second"] == pytest.approx(1000)


def test_cuda_events_need_no_synchronisation():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here; a hand-made device queue stands in for it above")
    clock = StepClock(timeline=CudaTimeline())
    matrix = torch.randn(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with clock.phase("forward_backward"):
                matrix = matrix @ matrix
            clock.count(tokens=1, supervised=1, samples=1)
        clock.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with clock.phase("forward_backward"):
        matrix @ matrix
    clock.count(tokens=1, supervised=1, samples=1)
    torch.cuda.synchronize()
    assert clock.read()["Throughput/Step_Seconds_Forward_Backward"] > 0


# ---- energy -------------------------------------------------------------------------------------


def test_energy_per_1k_tokens_is_the_counters_difference(clock, hand):
    tag = "Throughput/Energy_J_Per_1K_Tokens"
    assert tag not in clock.read({"GPU_0/Energy_J": 5.0, "GPU_1/Energy_J": 50.0})
    train_step(clock, hand)
    assert tag not in clock.read({})  # no new sample: its tokens wait for the next one
    train_step(clock, hand)
    rates = clock.read({"GPU_0/Energy_J": 305.0, "GPU_1/Energy_J": 150.0, "GPU_0/Power_W": 1e9})
    assert rates[tag] == pytest.approx(200.0)


@pytest.mark.parametrize(
    "later", [{"GPU_0/Energy_J": 1.0}, {"GPU_0/Energy_J": 90.0, "GPU_1/Energy_J": 90.0}]
)
def test_energy_is_absent_when_a_counter_restarts_or_a_gpu_comes_or_goes(clock, hand, later):
    clock.read({"GPU_0/Energy_J": 5.0})
    train_step(clock, hand)
    assert "Throughput/Energy_J_Per_1K_Tokens" not in clock.read(later)


# ---- FLOPs and peak -----------------------------------------------------------------------------


def test_mfu_is_flops_over_time_and_peak(hand):
    clock = StepClock(peak_flops=1e6, timeline=hand)
    train_step(clock, hand, flops=4e5)
    assert clock.read()["Throughput/MFU_Percent"] == pytest.approx(40.0)


def test_mfu_is_absent_for_an_unknown_gpu_or_unknown_flops(hand):
    for clock, flops in ((StepClock(timeline=hand), 4e5), (StepClock(peak_flops=1e6), 0.0)):
        train_step(clock, hand, flops=flops)
        assert "Throughput/MFU_Percent" not in clock.read()


def products_by_hand(dims, lengths, num_targets, r, targets):
    """Every matrix product of one LoRA step, one by one: (what, rows, inner, columns)."""
    q, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    maps = [
        ("q_proj", dims.hidden, q),
        ("k_proj", dims.hidden, kv),
        ("v_proj", dims.hidden, kv),
        ("o_proj", q, dims.hidden),
        ("gate_proj", dims.hidden, dims.intermediate),
        ("up_proj", dims.hidden, dims.intermediate),
        ("down_proj", dims.intermediate, dims.hidden),
    ]
    tokens = sum(lengths)
    for _ in range(dims.layers):
        for name, wide_in, wide_out in maps:
            yield tokens, wide_in, wide_out  # y = xW
            yield tokens, wide_out, wide_in  # dx = dy Wᵀ
            if name in targets:
                yield tokens, wide_in, r  # xA
                yield tokens, r, wide_out  # (xA)B
                yield tokens, wide_out, r  # dy Bᵀ
                yield tokens, r, wide_in  # … Aᵀ
                yield wide_in, tokens, r  # dA
                yield r, tokens, wide_out  # dB
        for length in lengths:
            for _ in range(dims.heads):
                seen = (length + 1) / 2  # keys that a query sees, on average
                for _ in range(6):  # QKᵀ, PV, and two products backward for each
                    yield length, dims.head_dim, seen
    yield num_targets, dims.hidden, dims.vocab  # logits
    yield num_targets, dims.vocab, dims.hidden  # their input's gradient


@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "v_proj")])
@pytest.mark.parametrize("lengths", [[900, 1500, 300], [8192], [120] * 30])
def test_lora_flops_are_within_one_percent_of_a_count_by_hand(lengths, targets):
    num_targets = sum(lengths) * 3 // 4
    by_hand = sum(
        2 * rows * inner * columns
        for rows, inner, columns in products_by_hand(QWEN3_4B, lengths, num_targets, 16, targets)
    )
    weights = lora_parameters(QWEN3_4B, 16, targets)
    ours = training_flops(QWEN3_4B, lengths, num_targets, lora_weights=weights)
    assert ours == pytest.approx(by_hand, rel=0.01)


def test_numpy_lengths_do_not_overflow():
    lengths = [60_000, 70_000]
    as_numpy = np.array(lengths, dtype=np.int32)
    assert training_flops(QWEN3_4B, as_numpy, 9, lora_weights=5) == training_flops(
        QWEN3_4B, lengths, 9, lora_weights=5
    )


def test_documents_attend_to_themselves_only():
    def attention(lengths):
        one = training_flops(QWEN3_4B, lengths, 0, lora_weights=0)
        return one - 4 * QWEN3_4B.linear_parameters() * sum(lengths)

    assert attention([4000]) == 4 * attention([2000]) == 8 * attention([1000, 1000])


TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def counted_by_torch(model, length, *, embeddings_want_gradient):
    """FLOPs of forward and backward that torch sees dispatched, over one document."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(length).remainder(TINY["vocab_size"]).unsqueeze(0)
    if embeddings_want_gradient:  # else torch skips the first layer's input gradient
        model.enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
    return counter.get_total_flops()


def tiny_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**TINY)
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM(config)


def test_full_fine_tuning_flops_are_those_torch_counts():
    model = tiny_qwen3()
    length, dims = 48, dims_from_config(model.config)
    counted = counted_by_torch(model, length, embeddings_want_gradient=False)
    masked_half = 6 * dims.heads * dims.head_dim * length**2 * dims.layers  # eager computes it too
    ours = training_flops(dims, [length], length, lora_weights=None)
    assert ours + masked_half == pytest.approx(counted, rel=0.01)


def test_lora_flops_are_those_torch_counts():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=list(ALL_LINEAR))
    model = get_peft_model(tiny_qwen3(), config)
    length, dims = 48, dims_from_config(model.config)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert weights == lora_parameters(dims, 4, "all-linear")
    counted = counted_by_torch(model, length, embeddings_want_gradient=True)
    masked_half = 6 * dims.heads * dims.head_dim * length**2 * dims.layers
    ours = training_flops(dims, [length], length, lora_weights=weights)
    assert ours + masked_half == pytest.approx(counted, rel=0.01)


def test_the_known_sizes_of_qwen3_4b():
    assert QWEN3_4B.linear_parameters() == 3_633_315_840
    assert lora_parameters(QWEN3_4B, 16) == 33_030_144


def test_dims_of_models_that_the_count_does_not_fit_are_absent():
    from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

    assert dims_from_config(GPT2Config()) is None
    assert dims_from_config(Qwen3MoeConfig()) is None
    assert dims_from_config(LlamaConfig()).head_dim == 128


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 2g.20gb", None),
        ("NVIDIA A10-24Q", None),
        ("GRID A100-40C", None),
        ("NVIDIA H100", None),  # which of three? no guess
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_peaks_of_known_gpus_and_no_guess_for_others(name, teraflops):
    assert peak_flops(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


# ---- several ranks ------------------------------------------------------------------------------


def test_waiting_for_other_ranks_is_not_a_ranks_own_time():
    hand = HandClock()
    clock = StepClock(timeline=hand)
    with clock.phase("data"):
        hand.now += 1.0
    with clock.phase("forward_backward"):
        hand.now += 2.0
        clock.gradients_are_ready()
        hand.now += 5.0
    with clock.phase("optimizer"):
        hand.now += 0.5
    clock.count(tokens=1, supervised=1, samples=1)
    read = clock.read()
    assert clock.own_seconds == pytest.approx(3.0)
    assert read["Throughput/Step_Seconds_Forward_Backward"] == pytest.approx(7.0)
    assert read["Throughput/Step_Seconds"] == pytest.approx(8.5)


def test_without_a_wait_own_time_is_unknown():
    hand = HandClock()
    clock = StepClock(timeline=hand)
    train_step(clock, hand)
    clock.read()
    assert clock.own_seconds is None


@pytest.mark.parametrize(
    ("seconds", "percent", "rank"),
    [([1.0, 1.0, 1.5, 1.0], 50.0, 2), ([3.0, 1.0], 50.0, 0), ([2.0, 2.0], 0.0, 0)],
)
def test_the_slowest_rank_against_the_median(seconds, percent, rank):
    assert straggler(seconds) == (pytest.approx(percent), rank)
