"""LoRA linear layers with one autograd node each: y = xWᵀ + b + s·(xAᵀ)Bᵀ.

The ordinary path keeps the input in the adapter's precision, the product xAᵀ, and two results as
wide as the output. This one keeps x, which its neighbours keep anyway, and xAᵀ, and adds the
adapter inside the matrix product. Adapters stay fp32 masters; their cast to the base's precision is
made once per use. Layers that are more than plain LoRA keep their own forward pass.
"""

from functools import cache

import torch
import torch.nn.functional as F


def enable_fast_lora(model: torch.nn.Module) -> int:
    """Give every plain LoRA layer of the model the fused path; return how many there are.

    Plain: an unquantised nn.Linear with a frozen weight, one active adapter, dropout 0, no variant
    (DoRA and others) and no adapter bias. Disabling, merging or switching adapters later works as
    before: the layer looks at its state on each call and then takes its original way.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.__class__ = _fast_class(type(layer))
    return len(layers)


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
def _fast_class(original: type) -> type:
    """A subclass, so that isinstance tests and everything but forward stay those of the layer."""
    return type(original.__name__, (_FastForward, original), {"__module__": original.__module__})


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
