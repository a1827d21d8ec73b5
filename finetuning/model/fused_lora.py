"""LoRA linear layers with one autograd node each: y = xWᵀ + b + s·(xAᵀ)Bᵀ.

The ordinary path keeps the input in the adapter's precision, the product xAᵀ, and two results as
wide as the output. This one keeps x, which its neighbours keep anyway, and xAᵀ, and adds the
adapter inside the matrix product. Adapters stay fp32 masters; their cast to the base's precision is
made once per use. Layers that are more than plain LoRA keep their own forward pass. On a GPU the
adapters become part of the matrices, see `joined_lora`.
"""

from functools import cache

import torch
import torch.nn.functional as F

from finetuning.model.joined_lora import Adapter, AdapterCopies, JoinedProjections

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # they read one input
_LARGEST_JOINED_RANK = 192  # in all; above it zeros between the blocks cost more than a product


def enable_fast_lora(model: torch.nn.Module, *, join: bool | None = None, fp8: bool = False) -> int:
    """Give every plain LoRA layer of the model the fused path; return how many there are.

    Plain: an unquantised nn.Linear with a frozen weight, one active adapter, dropout 0, no variant
    (DoRA and others) and no adapter bias. Disabling, merging or switching adapters later works as
    before: the layer looks at its state on each call and then takes its original way.

    join: make adapters part of the matrices, which moves the weights (not for shards) and needs
    `adapter_copies(model).write()` before a forward pass. None: in half precision on CUDA.
    fp8: joined layers make the products of training in FP8, see `fp8_products`.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.__class__ = _fast_class(type(layer), _FastForward)
    if join is None:
        join = bool(layers) and _gains_from_joining(layers[0].base_layer.weight)
    if join:
        for parent in list(model.modules()):
            _join_children(parent, fp8)
        adapter_copies(model).write()
    return len(layers)


def adapter_copies(model: torch.nn.Module) -> AdapterCopies:
    """What brings the matrices of a model up to date with its adapters; nothing if none are joined."""
    groups = {id(m._group): m._group for m in model.modules() if isinstance(m, _JoinedForward)}
    return AdapterCopies(list(groups.values()))


def _gains_from_joining(weight: torch.Tensor) -> bool:
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def _join_children(parent: torch.nn.Module, fp8: bool) -> None:
    """Join the fast layers of one module: siblings together, the others alone."""
    layers = {
        name: child
        for name, child in parent.named_children()
        if isinstance(child, _FastForward) and not isinstance(child, _JoinedForward)
    }
    for names in SIBLINGS:
        adapters = [_adapter_of(layers[name]) for name in names if name in layers]
        rank = sum(len(adapter.a) for adapter in adapters)
        widths = {adapter.base.in_features for adapter in adapters}
        if len(adapters) > 1 and rank <= _LARGEST_JOINED_RANK and len(widths) == 1:
            _join([layers.pop(name) for name in names if name in layers], fp8)
    for layer in layers.values():
        _join([layer], fp8)


def _join(layers: list[torch.nn.Module], fp8: bool) -> None:
    group = JoinedProjections([_adapter_of(layer) for layer in layers], fp8=fp8)
    for place, layer in enumerate(layers):
        layer.__class__ = _fast_class(type(layer).__bases__[1], _JoinedForward)
        layer._group, layer._place, layer._joined_adapter = group, place, _active_adapter(layer)


def _adapter_of(layer: torch.nn.Module) -> Adapter:
    name = _active_adapter(layer)
    return Adapter(
        base=layer.base_layer,
        a=layer.lora_A[name].weight,
        b=layer.lora_B[name].weight,
        scaling=layer.scaling[name],
    )


def _is_plain(module: torch.nn.Module) -> bool:
    base = getattr(module, "base_layer", None)
    return (
        type(base) is torch.nn.Linear
        and not base.weight.requires_grad
        and hasattr(module, "lora_A")
        and not isinstance(module, _FastForward)
        and not getattr(module, "fan_in_fan_out", False)
        and _active_adapter(module) is not None
    )


def _active_adapter(layer: torch.nn.Module) -> str | None:
    """The one adapter that applies in this call, if it is plain LoRA; else None."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged_adapters or len(active) != 1:
        return None
    name = active[0]
    plain = (
        name in layer.lora_A
        and type(layer.lora_dropout[name]) is torch.nn.Identity
        and type(layer.lora_A[name]) is torch.nn.Linear
        and not layer.lora_variant
        and layer.lora_B[name].bias is None
    )
    return name if plain else None


@cache
def _fast_class(original: type, forward: type) -> type:
    """A subclass, so that isinstance tests and everything but forward stay those of the layer."""
    return type(original.__name__, (forward, original), {"__module__": original.__module__})


class _FastForward:
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        name = None if args or kwargs else _active_adapter(self)
        if name is None or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return _LoraLinear.apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )


class _JoinedForward(_FastForward):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        plain = not (args or kwargs) and _active_adapter(self) == self._joined_adapter
        if plain and self._group.fits(x) and not torch.is_autocast_enabled(x.device.type):
            return self._group.output(self._place, x)
        return super().forward(x, *args, **kwargs)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling):
        """x (…, in), weight (out, in), bias (out,), lora_a (r, in), lora_b (out, r)."""
        rows = x.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        out = F.linear(rows, weight, bias)
        projected = rows @ a.t()
        out.addmm_(projected, b.t(), alpha=scaling)
        ctx.save_for_backward(rows, projected, weight, a, b)
        ctx.scaling = scaling
        ctx.adapter_dtypes = lora_a.dtype, lora_b.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, projected, weight, a, b = ctx.saved_tensors
        shape = (*grad.shape[:-1], weight.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        scaled = (grad @ b).mul_(ctx.scaling)  # (n, r), a small product: scaled here once
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(scaled, a).view(shape)
        if ctx.needs_input_grad[3]:
            grad_a = (scaled.t() @ rows).to(ctx.adapter_dtypes[0])
        if ctx.needs_input_grad[4]:
            grad_b = (grad.t() @ projected).to(ctx.adapter_dtypes[1]).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None
