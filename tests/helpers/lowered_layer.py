"""Kernels of one compiled decoder layer of Qwen3-4B on a Hopper GPU, counted on a machine without one.

    python -m tests.helpers.lowered_layer [CASE …]

The program traces the layer over CPU tensors, and its questions for the device are answered as on CUDA.
Inductor divides it into its two passes; these are moved to a pretended H100, for which it decides what is
fused and writes the code. No kernel is compiled or run. The last line of the output is JSON. A process of
its own is needed: torch and Triton remember the pretended device.
"""

import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.tensor import TensorVariable
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, ir, scheduler
from torch._inductor.exc import InductorError
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._subclasses import fake_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._triton import has_triton
from transformers import PretrainedConfig
from triton.backends.compiler import GPUTarget

from finetuning.model.fused_lora import enable_fast_lora
from finetuning.model.packed_model import PackedLossModel
from tests.helpers.traced_step import as_on_cuda, bf16_model, packed_row, qwen3_4b, without_data

TOKENS = 2048
WAYS: dict[str, dict | None] = {  # arguments of `enable_fast_lora`; None: peft's own layers
    "peft": None,
    "apart": {"join": False},
    "joined": {"join": True},
    "fp8": {"join": True, "fp8": True},
}
RECOMPUTED = "-recomputed"
CASES = (*WAYS, *(way + RECOMPUTED for way in WAYS))

TRITON = ("fused", "copy", "quantizing")
# Inductor's names of operations that compute nothing of what they move, a change of type included.
_MOVING = {"load", "store", "output", "masked", "where", "and_", "ge", "lt"}
_MOVING |= {"index_expr", "constant", "to_dtype"}
_TO_FP8 = {"abs", "maximum", "reduction", "store_reduction", "mul", "reciprocal"}  # and moving it
_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block_optin=232448,
)


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel, or one call of a library: product or attention.

    Of Triton kernels, `copy` only moves a whole activation, or changes its type; `quantizing` only makes FP8
    or its scales of one; all others are `fused`. Bytes are as if each value were moved once.
    """

    name: str
    kind: str
    backward: bool
    read: int
    written: int
    results: tuple[str, ...]  # types and shapes: float8_e4m3fn[2048, 2560]


class _Done(Exception):
    """What was looked for is found; nothing is to be compiled or run."""


def kernels_of_a_layer(
    config: PretrainedConfig, tokens: int, way: str, *, recompute: bool = False
) -> list[Kernel]:
    """What the program's compiled layer launches for a packed row, forward and backward, in order."""
    model = bf16_model(config, lora_r=16, recompute=recompute)
    without_data(model, "cpu")
    if WAYS[way] is not None:
        enable_fast_lora(model, **WAYS[way])
    packed = PackedLossModel(model, close_id=5).train()
    whole = (
        tokens * config.num_key_value_heads * config.head_dim * 2
    )  # bytes of keys, the narrowest
    kernels: list[Kernel] = []

    def lower(
        graph: torch.fx.GraphModule, inputs: list, *, is_backward: bool = False, **_
    ) -> Callable:
        kernels.extend(_lowered(graph, whole, is_backward))
        if is_backward:
            raise _Done
        return lambda inputs: None  # never called

    torch._dynamo.reset()
    packed.compile_layers(partial(compile_fx.compile_fx, inner_compile=lower))
    both_passes = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with as_on_cuda(), _traced_as_on_cuda(), both_passes, _until_done(BackendCompilerFailed):
        packed.hidden_states(packed_row(tokens))
    attention = sum(kernel.kind == "attention" for kernel in kernels)
    assert attention == 2 + recompute, "this transformers recomputes outside the compiled layer"
    return kernels


@contextmanager
def _until_done(wrapper: type[Exception]) -> Iterator[None]:
    """What is within ends with `_Done`, inside the compiler's own exception."""
    try:
        yield
    except wrapper as error:
        if not isinstance(error.inner_exception, _Done):
            raise
    else:
        raise AssertionError("the compiler did not ask for what it was to be asked for")


# -----------------------------------------------------------------------------
# One pass


def _lowered(graph: torch.fx.GraphModule, whole: int, backward: bool) -> list[Kernel]:
    """Kernels of one pass; an activation is a whole one from so many bytes on."""
    found: list[Kernel] = []

    def count(lowering: GraphLowering) -> None:
        code = lowering.codegen()[0].value
        names = iter(re.findall(r"(\w+)\.run\(", code))
        nodes = [node for node in lowering.scheduler.nodes if _launches(node)]
        found.extend(_kernel(node, names, whole, backward) for node in nodes)
        assert not list(names), "the code launches more kernels than were counted"
        raise _Done

    mode = fake_tensor.FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    counted = mock.patch.object(GraphLowering, "compile_to_module", count)
    with _pretended_gpu(), counted, _until_done(InductorError), tracing(TracingContext(mode)):
        inputs = _moved(graph, mode)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        compile_fx.compile_fx_inner(graph, inputs, is_backward=backward)
    return found


def _moved(graph: torch.fx.GraphModule, mode: fake_tensor.FakeTensorMode) -> list:
    """Inputs on a GPU for the graph, which then makes its tensors there, too."""
    device, inputs = torch.device("cuda", 0), []
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
        if node.op == "placeholder":
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                shape, strides = value.shape, value.stride()
                with mode:
                    value = torch.empty_strided(shape, strides, dtype=value.dtype, device=device)
            inputs.append(value)
    return inputs


def _launches(node: scheduler.BaseSchedulerNode) -> bool:
    is_part_of_a_result = isinstance(node.node, ir.MultiOutput)
    return not isinstance(node, scheduler.NopKernelSchedulerNode) and not is_part_of_a_result


def _kernel(
    node: scheduler.BaseSchedulerNode, names: Iterator[str], whole: int, backward: bool
) -> Kernel:
    written = node.get_read_write_buffer_accesses(include_reads=False, include_writes=True)
    results = tuple(_described(buffer.node) for buffer in _kept(node))
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        name = node.node.python_kernel_name or str(node.node.op_overload)
        kind = "attention" if "varlen_attn" in name else "product"
        assert kind == "attention" or re.search(r"mm|add_product", name), name
        read = sum(map(_bytes, node.node.inputs))
    else:
        name = next(names)
        accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
        read = sum(accesses.values())
        kind = _kind_of_triton(node.get_nodes(), read >= whole)
    return Kernel(name, kind, backward, read, sum(written.values()), results)


def _kind_of_triton(nodes: Sequence[scheduler.SchedulerNode], reads_a_whole_one: bool) -> str:
    operations = set().union(*(node._body.op_counts for node in nodes))
    if reads_a_whole_one and operations <= _MOVING:
        return "copy"
    if reads_a_whole_one and operations <= _MOVING | _TO_FP8 and operations & {"abs", "maximum"}:
        return "quantizing"
    return "fused"


def _kept(node: scheduler.BaseSchedulerNode) -> list[scheduler.SchedulerBuffer]:
    """What others read, of what the node makes."""
    inside = set(node.get_nodes())
    outputs = [buffer for buffer in node.get_outputs() if isinstance(buffer.node.layout, ir.Layout)]
    return [b for b in outputs if {user.node for user in b.users} - inside]


def _described(value: ir.IRNode) -> str:
    shape = ", ".join(map(str, value.get_size()))
    return f"{str(value.get_dtype()).removeprefix('torch.')}[{shape}]"


def _bytes(value: ir.IRNode) -> int:
    elements = 1
    for size in value.get_size():
        elements *= int(size)
    return elements * value.get_dtype().itemsize


# -----------------------------------------------------------------------------
# The device


@contextmanager
def _traced_as_on_cuda() -> Iterator[None]:
    """What the program's `is_cuda` says while it is traced, and inductor's passes ask before the division."""
    with (
        mock.patch.object(
            TensorVariable, "method_attr_is_cuda", lambda tensor, tx: ConstantVariable.create(True)
        ),
        mock.patch.object(joint_graph, "check_device", lambda *tensors: True),
    ):
        yield


class _Driver:
    """In place of Triton's for a GPU that is there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    """What inductor asks about a GPU while it makes code, answered for an H100."""

    def always(value: object) -> Callable:
        return lambda *_, **__: value

    answers = {
        torch.cuda: {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_properties": _H100,
            "get_device_capability": (9, 0),
            "get_rng_state": torch.empty(0),
            "set_rng_state": None,
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
        },
        CudaInterface: {"get_device_properties": _H100},
        fake_tensor: {"init_gpu_context": None},
    }
    driver = importlib.import_module("triton.runtime.driver").driver  # hidden by its package's name
    has_triton.cache_clear()
    with ExitStack() as stack:
        for owner, values in answers.items():
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, always(value)))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        stack.enter_context(torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False))
        yield


# -----------------------------------------------------------------------------
# The table


def row(case: str, kernels: Sequence[Kernel]) -> str:
    """A line of docs/performance.md."""

    def megabytes(chosen: Iterator[Kernel]) -> str:
        return f"{sum(kernel.read + kernel.written for kernel in chosen) / 1e6:,.0f}"

    kinds = Counter(kernel.kind for kernel in kernels)
    backward = sum(kernel.backward for kernel in kernels)
    cells = [
        case,
        *(len(kernels) - backward, backward, kinds["product"], kinds["attention"]),
        *(sum(kinds[kind] for kind in TRITON), kinds["copy"], kinds["quantizing"]),
        megabytes(k for k in kernels if k.kind in ("copy", "quantizing")),
        megabytes(k for k in kernels if k.kind != "product"),
        megabytes(k for k in kernels if k.kind == "product"),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(cases: Sequence[str]) -> None:
    """Print a row for each case, and all kernels of all as JSON."""
    found = {}
    for case in cases or CASES:
        way, recompute = case.removesuffix(RECOMPUTED), case.endswith(RECOMPUTED)
        found[case] = kernels_of_a_layer(qwen3_4b(1), TOKENS, way, recompute=recompute)
        print(row(case, found[case]), flush=True)
    print(json.dumps({case: list(map(asdict, kernels)) for case, kernels in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
