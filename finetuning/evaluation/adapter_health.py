"""Is the adapter doing anything? Size, effective rank and gradients of every LoRA update.

For each module: the update ratio ||s·B·A|| / ||W|| (Frobenius norms) and the effective rank of B·A.
B·A is never formed. With the r x r matrices G = A·Aᵀ and H = Bᵀ·B,
||B·A||² = tr(G·H), and the squared singular values of B·A are the eigenvalues of G·H.
Modules of one shape are measured together, and one copy brings everything to the host. With DoRA (Liu et
al. 2024) the update is m·(W + s·B·A)/||W + s·B·A|| - W, norms by rows; it is formed, a module at a time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from finetuning.common.formatting import four_digits
from finetuning.model.parallel import full_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_HISTOGRAM_ELEMENTS = 1 << 23  # weights that are binned at once; bounds the temporary memory
HISTOGRAM_DECADES = (-7.0, 2.0)  # magnitudes between 1e-7 and 1e2 have bins of their own
BINS_PER_DECADE = 8


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer. name: inside the transformer, as `layers.0.self_attn.q_proj`."""

    name: str
    base: torch.nn.Module
    a: torch.nn.Parameter  # (r, in)
    b: torch.nn.Parameter  # (out, r)
    scaling: float
    magnitude: torch.nn.Parameter | None = None  # (out,), DoRA's

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """What is trained of it."""
        return [p for p in (self.a, self.b, self.magnitude) if p is not None]

    @property
    def layer(self) -> int | None:
        """The number of the transformer layer, if the name holds one."""
        found = re.search(r"\.(\d+)\.", f".{self.name}.")
        return int(found[1]) if found else None

    @property
    def projection(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Histogram:
    """Counts between increasing edges, (n,) and (n + 1,), with the moments of the values.

    The bins are logarithmic on both sides of zero: an adapter's B starts at 0 and grows through
    the magnitudes. Non-finite weights are in no bin.
    """

    counts: np.ndarray
    edges: np.ndarray
    minimum: float
    maximum: float
    sum: float
    sum_squares: float


class AdapterHealth:
    """Measures one model; keeps the norms of its frozen weights after the first measurement."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = find_lora_modules(model)
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self._groups: dict[tuple, list[int]] = {}
        for index, module in enumerate(self.modules):
            key = (module.a.shape, module.b.shape, module.a.device)
            self._groups.setdefault(key, []).append(index)
        self._weight_norms: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        return [module.name for module in self.modules]

    def update_ratios(self) -> dict[str, float]:
        """Module name to the update's norm / ||W||: 0 at the start of training, when B is 0.

        A module whose frozen weight has norm 0, or an integer format, is absent.
        """
        squares = self._measure(lambda a, b: (_gram(a) * _gram(b.mT)).sum((1, 2)))
        return self._ratios(np.array([square.item() for square in squares]))

    def scalars(self) -> dict[str, float]:
        """`LoRA/<module>/Update_Ratio` and `LoRA/<module>/Effective_Rank`, from one measurement.

        The effective rank is absent while B·A is zero.
        """
        grams = self._measure(lambda a, b: torch.stack((_gram(a), _gram(b.mT)), 1))
        squares = np.array([(pair[0] * pair[1]).sum() for pair in grams])
        values = {f"LoRA/{n}/Update_Ratio": r for n, r in self._ratios(squares).items()}
        for name, pair in zip(self.names, grams, strict=True):
            rank = effective_rank(_singular_values(*pair))
            if rank is not None:
                values[f"LoRA/{name}/Effective_Rank"] = rank
        return values

    def figure(self, ratios: dict[str, float]) -> "Figure":
        """Picture of `update_ratios`: one row a layer, one column a projection, logarithmic colour."""
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        grid, layers, projections = ratio_map(self.modules, ratios)
        known = grid[grid > 0]
        low, high = (known.min(), known.max()) if len(known) else (1e-6, 1e-3)
        figure = Figure(figsize=(1.5 + 0.9 * len(projections), 1.5 + 0.25 * len(layers)), dpi=100)
        axes = figure.add_subplot(xlabel="projection", ylabel="layer", title="||s B A|| / ||W||")
        picture = axes.imshow(
            np.where(grid > 0, grid, np.nan),
            aspect="auto",
            norm=LogNorm(low, max(high, 1.01 * low)),
        )
        axes.set_xticks(range(len(projections)), projections, rotation=45, ha="right")
        axes.set_yticks(range(len(layers)), layers)
        figure.colorbar(picture)
        figure.set_layout_engine("tight")
        return figure

    def gradient_norms(self) -> dict[str, float]:
        """`LoRA/<module>/Gradient_Norm` of A, B and DoRA's magnitudes, and `LoRA/Gradient_Norm` of all.

        Call it between backward and zero_grad; a module without gradients is absent.
        """
        have = [m for m in self.modules if all(p.grad is not None for p in m.trained)]
        if not have:
            return {}
        gradients = [full_tensor(p.grad) for module in have for p in module.trained]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norms = torch.stack([norm.to(norms[0].device) for norm in norms]).cpu().double().numpy()
        starts = np.cumsum([0, *(len(module.trained) for module in have[:-1])])
        squares = np.add.reduceat(np.square(norms), starts)
        values = {
            f"LoRA/{module.name}/Gradient_Norm": float(np.sqrt(square))
            for module, square in zip(have, squares, strict=True)
        }
        return {"LoRA/Gradient_Norm": float(np.sqrt(squares.sum())), **values}

    def by_projection(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the layers: `LoRA/<projection>/<quantity>` from tags by module.

        A 4B model has 252 modules, too many charts; a tag of no module stays as it is.
        """
        projections = {module.name: module.projection for module in self.modules}
        means: dict[str, list[float]] = {}
        for tag, value in values.items():
            name, _, quantity = tag.removeprefix("LoRA/").rpartition("/")
            mean = f"LoRA/{projections[name]}/{quantity}" if name in projections else tag
            means.setdefault(mean, []).append(value)
        return {tag: sum(group) / len(group) for tag, group in means.items()}

    def ratios_by_projection(self, ratios: dict[str, float]) -> dict[str, np.ndarray]:
        """(layers,) of `update_ratios` for each projection, under the tag of its histogram."""
        groups: dict[str, list[float]] = {}
        for module in self.modules:
            if module.name in ratios:
                groups.setdefault(module.projection, []).append(ratios[module.name])
        return {f"LoRA/{name}/Update_Ratio_Histogram": np.array(g) for name, g in groups.items()}

    def table(self, values: dict[str, float]) -> str:
        """Markdown: one line a module, what `values` (tags by module) know of it."""
        quantities = ("Update_Ratio", "Effective_Rank", "Gradient_Norm")
        heads = " | ".join(quantity.replace("_", " ") for quantity in quantities)
        lines = [f"| module | {heads} |", "| --- " * (1 + len(quantities)) + "|"]
        for name in self.names:
            found = [values.get(f"LoRA/{name}/{quantity}") for quantity in quantities]
            cells = [four_digits(value) for value in found]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
        return "\n".join(lines)

    def weight_histograms(self) -> dict[str, Histogram]:
        """Histograms of LoRA/A, LoRA/B and of all trainable weights, in fixed bins.

        The frozen base is not read. Trainable weights outside the adapters appear in
        Model/Weights_Distribution only.
        """
        matrices = {
            "LoRA/A": [module.a for module in self.modules],
            "LoRA/B": [module.b for module in self.modules],
        }
        adapters = {id(p) for group in matrices.values() for p in group}
        others = [p for p in self._trainable if id(p) not in adapters]
        parts = {tag: _histogram(group) for tag, group in matrices.items() if group}
        every = [*parts.values(), *([_histogram(others)] if others else [])]
        return parts | ({"Model/Weights_Distribution": _merged(every)} if every else {})

    def _measure(self, function) -> list[np.ndarray]:
        """function(A (m, r, in), B (m, out, r)) for each group; its (m, …) rows, by module."""
        results = [
            function(*(self._stacked(members, which) for which in ("a", "b")))
            for members in self._groups.values()
        ]
        rows: list = [None] * len(self.modules)
        flat = [result.flatten() for result in results]
        host = torch.cat([part.to(flat[0].device) for part in flat]).cpu().numpy() if flat else None
        start = 0
        for members, result in zip(self._groups.values(), results, strict=True):
            block = host[start : start + result.numel()].reshape(result.shape)
            start += result.numel()
            for index, row in zip(members, block, strict=True):
                rows[index] = row
        return rows

    def _stacked(self, members: Sequence[int], which: str) -> torch.Tensor:
        """Double precision: the Gram matrix squares the condition number."""
        matrices = torch.stack(
            [full_tensor(getattr(self.modules[i], which).detach()) for i in members]
        )
        if matrices.device.type == "mps":
            matrices = matrices.cpu()
        return matrices.double()

    def _ratios(self, squares: np.ndarray) -> dict[str, float]:
        if self._weight_norms is None:
            self._weight_norms = _weight_norms([module.base for module in self.modules])
        scaling = np.array([module.scaling for module in self.modules])
        norms = np.abs(scaling) * np.sqrt(np.maximum(squares, 0.0))
        for index, module in enumerate(self.modules):
            if module.magnitude is not None:
                norms[index] = _dora_update_norm(module)
        return {
            name: float(norm / weight_norm)
            for name, norm, weight_norm in zip(self.names, norms, self._weight_norms, strict=True)
            if weight_norm > 0
        }


def find_lora_modules(model: torch.nn.Module) -> list[LoraModule]:
    """Every layer with an active adapter on a linear base, in the model's order."""
    found = []
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A") or not hasattr(module, "base_layer"):
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                name = re.sub(r"^(module\.|base_model\.|model\.|_orig_mod\.)+", "", path)
                a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                scaling = float(module.scaling[adapter])
                magnitudes = getattr(module, "lora_magnitude_vector", {})
                magnitude = magnitudes[adapter].weight if adapter in magnitudes else None
                found.append(LoraModule(name, module.base_layer, a, b, scaling, magnitude))
    return found


def update_ratios(model: torch.nn.Module) -> dict[str, float]:
    """One measurement of a model; hold a AdapterHealth to measure again and again."""
    return AdapterHealth(model).update_ratios()


def ratio_map(
    modules: Sequence[LoraModule], ratios: dict[str, float]
) -> tuple[np.ndarray, list[int], list[str]]:
    """Ratios for a picture: (layers, projections) array, layer numbers and projection names.

    NaN where a layer has no such module. Modules outside numbered layers are left out.
    """
    placed = [m for m in modules if m.layer is not None and m.name in ratios]
    layers = sorted({module.layer for module in placed})
    projections = list(dict.fromkeys(module.projection for module in placed))
    grid = np.full((len(layers), len(projections)), np.nan)
    for module in placed:
        grid[layers.index(module.layer), projections.index(module.projection)] = ratios[module.name]
    return grid, layers, projections


def effective_rank(singular_values: np.ndarray) -> float | None:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), in [1, r].

    None for a zero matrix, which has no such distribution.
    """
    total = singular_values.sum()
    if not total > 0:
        return None
    shares = singular_values[singular_values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _gram(matrices: torch.Tensor) -> torch.Tensor:
    """M·Mᵀ of (m, r, n) matrices: (m, r, r)."""
    return matrices @ matrices.mT


def _singular_values(gram_a: np.ndarray, gram_b: np.ndarray) -> np.ndarray:
    """Singular values (r,) of B·A: with G = L·Lᵀ, the roots of the eigenvalues of Lᵀ·H·L."""
    if not (np.isfinite(gram_a).all() and np.isfinite(gram_b).all()):
        return np.full(len(gram_a), np.nan)
    values, vectors = np.linalg.eigh(gram_a)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ gram_b @ root), 0.0))


def _weight_norms(bases: Sequence[torch.nn.Module]) -> np.ndarray:
    """Frobenius norms of the frozen weights, each read once; NaN for a format we cannot read."""
    norms = [_weight_norm(base.weight.detach()) for base in bases]
    if not norms:
        return np.zeros(0)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).cpu().double().numpy()


def _weight_norm(weight: torch.Tensor) -> torch.Tensor:
    weight = _restored(weight)
    if not weight.is_floating_point():
        return torch.tensor(torch.nan, device=weight.device)
    # By rows first: on a CPU one fp32 norm of 25M weights is off by 1e-3.
    rows = torch.linalg.vector_norm(full_tensor(weight), dim=-1, dtype=torch.float32)
    return torch.linalg.vector_norm(rows)


def _restored(weight: torch.Tensor) -> torch.Tensor:
    """A frozen weight, one of four bits restored for this purpose."""
    if getattr(weight, "quant_state", None) is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _dora_update_norm(module: LoraModule) -> float:
    """Frobenius norm of m·(W + s·B·A)/||W + s·B·A|| - W; NaN for a weight we cannot read."""
    weight = _restored(module.base.weight.detach())
    if not weight.is_floating_point():
        return float("nan")
    a, b, magnitude = (full_tensor(p.detach()).float() for p in module.trained)
    weight = full_tensor(weight).float()
    moved = torch.addmm(weight, b, a, alpha=module.scaling)
    rows = magnitude / torch.linalg.vector_norm(moved, dim=1)
    update = moved.mul_(rows[:, None]).sub_(weight)
    return torch.linalg.vector_norm(torch.linalg.vector_norm(update, dim=1)).item()


def _histogram(parameters: Sequence[torch.Tensor]) -> Histogram:
    """Bin the weights by sign and magnitude with torch.histc, a bounded number at a time."""
    low, high = HISTOGRAM_DECADES
    half = round((high - low) * BINS_PER_DECADE)
    counts, moments = [], []
    for values in _blocks(parameters):
        # In decades above the smallest magnitude, with the sign of the weight: equal bins here.
        decades = values.abs().log10_().sub_(low).clamp_(0.0, high - low).mul_(values.sign())
        counts.append(torch.histc(decades, 2 * half, low - high, high - low))
        moments.append(
            torch.stack((values.min(), values.max(), values.sum(), values.square().sum()))
        )
    device = counts[0].device
    table = torch.stack([torch.cat(pair).to(device) for pair in zip(counts, moments, strict=True)])
    table = table.cpu().double().numpy()
    magnitudes = 10.0 ** (low + np.arange(half + 1) / BINS_PER_DECADE)
    magnitudes[0] = 0.0  # everything smaller
    edges = np.concatenate((-magnitudes[:0:-1], magnitudes))
    minimum, maximum, total, squares = table[:, -4:].T
    return Histogram(
        counts=table[:, :-4].sum(0).astype(np.int64),
        edges=edges,
        minimum=float(minimum.min()),
        maximum=float(maximum.max()),
        sum=float(total.sum()),
        sum_squares=float(squares.sum()),
    )


def _blocks(parameters: Sequence[torch.Tensor]):
    """Flat fp32 runs of the parameters, joined until they are large."""
    block: list[torch.Tensor] = []
    for parameter in parameters:
        flat = full_tensor(parameter.detach()).float().flatten()
        if block and (
            flat.device != block[0].device
            or sum(map(len, block)) + len(flat) > MAX_HISTOGRAM_ELEMENTS
        ):
            yield torch.cat(block)
            block = []
        block.append(flat)
    yield torch.cat(block)


def _merged(parts: Sequence[Histogram]) -> Histogram:
    return Histogram(
        counts=sum(part.counts for part in parts),
        edges=parts[0].edges,
        minimum=min(part.minimum for part in parts),
        maximum=max(part.maximum for part in parts),
        sum=sum(part.sum for part in parts),
        sum_squares=sum(part.sum_squares for part in parts),
    )
