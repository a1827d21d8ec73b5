"""A configuration's small relative: the same kinds of layers, heads and masks with a fraction of the weights.

There is no table of architectures. Numbers are told apart by the words of their names: widths are divided
by one number, so that their products and sums still fit each other; counts of heads, groups and experts
stay; layers become as few as show every kind. Lengths keep their places: what a run's longest document or
longest row goes beyond, that of the trial goes beyond, too, and nothing else. Whether the result is a
model is found by building it.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

# Documents of a trial. The second begins off any round number and is longer than the chunks of 64 that some
# layers have in their code; the third is shorter than a convolution.
LENGTHS = (19, 70, 3, 33)
LONGEST, ROW = max(LENGTHS), sum(LENGTHS)
LIMIT = 8  # tokens: what windows and chunks become that documents cross
_ROW_LIMIT = 96  # what a window or chunk becomes that rows cross, but no document does
# Numbers of positions: the longest one that documents cross, so that some end between it and LONGEST; by how
# much one may be larger than LONGEST and still be crossed by a row.
CROSSED_POSITIONS, _BEYOND = 64, 48
# Layers, where nothing says which kinds there are; where kinds come back after so many others; at most.
DEPTH, DEPTH_OF_PATTERNS, MOST_LAYERS = 4, 8, 16
_POSITIONS, _VOCABULARY, _ORDINARY_IDS = 256, 256, 128  # ids from here on may be special ones
_HIDDEN = 48  # the least width of a hidden state that is aimed at

_LAYERS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|num_blocks|depth|num_layers_per_stack"
)
_LAYER_NUMBER = re.compile(r"layer|first_k")  # counts or names some of the layers
_PATTERN = re.compile(r"period|interval|every|step|offset|group|pattern|mlp")
_PATTERNS = re.compile(r"period|interval|every_n")
_LIMIT = re.compile(
    r"window(?!_layers|_pattern)|chunk(?!s|_size_feed)|block_size|local_attention|original_max|index_topk|n_floor|floor_scale"
    r"|^(compressed_sparse|heavily_compressed)_attention$"
)
_TABLE = re.compile(r"position|_length$|seq_len|^n_ctx$|model_max")
_WIDTH = re.compile(
    r"(^|_)(size|dim|rank|width|embd|inner|channels|ff|dff|headdim|kv|model|ssm|state|head|out|lowrank"
    r"|mlp|global|input|hc)($|_)|^d_|^dim_"
)
_NO_WIDTH = re.compile(
    r"^(num|n)_(?!embd|inner)|^max_|kernel|conv|image|patch|codebook|group|vocab|feature|sample|ratio|factor|merge|temporal"
    r"|grid|crop|_heads?$(?<!_head)|top_?k|multiple|rate|spatial|pool|stride|max_"
)
_EXPERTS = re.compile(r"^(?!.*(per_tok|shared|group)).*_experts$")
_CHOSEN_EXPERTS = re.compile(r"per_tok|^(moe_)?top_?k|^n_group$|expert_group$|^moe_k$")
_SPECIAL = re.compile(r"token|bos|eos|pad|sep|cls|mask|unk|lang")
_ID = re.compile(r"_(id|index)$")
_INDICES = re.compile(r"_(ids|idxs?|indices|indexes|layers)$")


def small_configs(config: Any, longest: int, row: int = 0) -> Iterator[Any]:
    """Small relatives of a transformers configuration, the most promising one first.

    longest, row: tokens of the longest document and of the longest row of a run; 0: a document is the longest
    row. Limits that none reaches stay out of reach. Numbers that do not fit each other are tried and passed
    over. Raises ValueError if all are.
    """
    hidden, best = hidden_size(config) or 1024, 1
    while hidden % (2 * best) == 0 and hidden // (2 * best) >= _HIDDEN:
        best *= 2
    divisors = [best, 2 * best, 4 * best]
    while best > 1:
        best //= 2
        divisors.append(best)
    refusals = []
    for divisor in divisors:
        try:
            small = _Shrinker(divisor, _Scale(longest, max(row, longest))).config(config)
        except Exception as error:  # libraries raise what they like at numbers that do not fit
            refusals.append(error)
            continue
        yield small
    if len(refusals) == len(divisors):
        raise ValueError(f"no smaller numbers fit each other: {refusals[-1]}") from refusals[-1]


def hidden_size(config: Any) -> int:
    """Width of the text model's hidden states, under whatever name transformers knows it by; 0: nothing."""
    text = config.get_text_config(decoder=True)
    sizes = (getattr(text, name, None) for name in ("hidden_size", "d_model", "n_embd"))
    return next((size for size in sizes if _is_int(size) and size > 0), 0)


def is_layer_count(name: str) -> bool:
    """Whether a setting of this name says how many layers there are."""
    return bool(_LAYERS.fullmatch(name))


def is_width(name: str) -> bool:
    """Whether a setting of this name is the size of a tensor's axis; limits on positions are none."""
    limit = _LIMIT.search(name) or _TABLE.search(name)
    wide = _WIDTH.search(name) and not _NO_WIDTH.search(name)
    return "vocab" in name or bool(wide and not limit)


def lengths_within(config: Any, longest: int) -> list[int]:
    """The limits on lengths of a configuration that documents of up to `longest` tokens may reach, the
    largest one first."""
    found: set[int] = set()

    def look(content: Any, key: str = "") -> None:
        if isinstance(content, Mapping):
            for name, value in content.items():
                look(value, str(name))
        elif isinstance(content, (list, tuple)):
            for value in content:
                look(value, key)
        elif _is_int(content) and (_LIMIT.search(key) or _TABLE.search(key)):
            found.add(content)

    look(config.to_dict())
    return sorted((n for n in found if LIMIT < n <= longest), reverse=True)


@dataclass(frozen=True)
class _Scale:
    """From lengths of a run to those of a trial: their order to its longest document and row is kept."""

    longest: int
    row: int

    def limit(self, value: int) -> int:
        """A window or chunk."""
        if value <= LIMIT:
            return value
        if value <= self.longest:
            return LIMIT
        return _ROW_LIMIT if value < self.row else max(value, ROW)

    def positions(self, value: int) -> int:
        """A number of positions. What is left of it behind the longest document is left here, too."""
        if value <= LIMIT:
            return value
        if value < self.longest:
            return min(max(LONGEST * value // self.longest, LIMIT), CROSSED_POSITIONS)
        if value < self.row:
            return LONGEST + min(value - self.longest, _BEYOND)
        return min(ROW + value - self.row, _POSITIONS)


class _Shrinker:
    """Turns one configuration after the other into a small one.

    Args:
        divisor: of widths.
        scale: of lengths.
    """

    def __init__(self, divisor: int, scale: _Scale) -> None:
        self._divisor, self._scale = divisor, scale

    def config(self, config: Any) -> Any:
        """The small configuration, of the same class."""
        content = copy.deepcopy(config.to_dict())
        content.pop("quantization_config", None)
        return type(config).from_dict(self._dictionary(content))

    def _dictionary(self, content: Mapping[str, Any]) -> dict[str, Any]:
        depths = {
            key: value
            for key, value in content.items()
            if is_layer_count(key) and _is_int(value) and value > 0
        }
        layers = {depth: chosen_layers(content, depth) for depth in set(depths.values())}
        small = {key: self._value(key, value, depths, layers) for key, value in content.items()}
        return small | fewer_experts(small)

    def _value(self, key: str, value: Any, depths: Mapping, layers: Mapping) -> Any:
        if key in depths:
            return len(layers[value])
        if key in ("dtype", "torch_dtype"):
            return "float32" if value else value
        if isinstance(value, dict):
            if value and all(str(name).isdigit() for name in value):
                value = _renumbered(value, layers)
            return self._dictionary(value)
        if isinstance(value, (list, tuple)):
            return self._list(key, list(value), layers)
        return self._number(key, value, layers) if _is_int(value) else value

    def _list(self, key: str, value: list, layers: Mapping) -> list:
        for depth, chosen in layers.items():
            if is_index_list(key, value, depth):
                return [new for new, old in enumerate(chosen) if old in value]
            if len(value) == depth:
                value = [value[old] for old in chosen]
                break
        if key.endswith("_factor") and len(value) > 1:  # one number for each pair of a head's width
            value = value[:: self._divisor]
        return [self._number(key, v, {}) if _is_int(v) else v for v in value]

    def _number(self, key: str, value: int, layers: Mapping) -> int:
        if _SPECIAL.search(key) and _ID.search(key):
            return value if value < _ORDINARY_IDS else _ORDINARY_IDS + value % _ORDINARY_IDS
        if "vocab" in key:
            return min(value, _VOCABULARY)
        if _LIMIT.search(key):
            return self._scale.limit(value)
        if _TABLE.search(key):
            return self._scale.positions(value)
        if _LAYER_NUMBER.search(key) and not _PATTERN.search(key) and layers:
            depth, chosen = max(layers.items())
            return value if value <= 0 else max(1, round(value * len(chosen) / depth))
        if is_width(key) and value % self._divisor == 0 and value >= 2 * self._divisor:
            return value // self._divisor
        return value


def chosen_layers(content: Mapping[str, Any], depth: int) -> list[int]:
    """Numbers of the layers to keep: two of each kind and the last one; more where no kinds are told.

    A layer's kind is what all lists that speak of the layers say of it.
    """
    kinds: list[list] = [[] for _ in range(depth)]
    for key, value in content.items():
        if not isinstance(value, (list, tuple)):
            continue
        if is_index_list(key, value, depth):
            told = [layer in value for layer in range(depth)]
        elif len(value) == depth:
            told = list(value)
        else:
            continue
        for kind, word in zip(kinds, told, strict=True):
            kind.append(word)
    seen = Counter()
    kept = {depth - 1}
    for layer, kind in enumerate(map(str, kinds)):
        seen[kind] += 1
        if seen[kind] <= 2 and len(kept) < MOST_LAYERS:
            kept.add(layer)
    wanted = 0 if kinds[0] else DEPTH
    if any(map(_PATTERNS.search, content)):
        wanted = DEPTH_OF_PATTERNS
    others = (layer for layer in range(depth) if layer not in kept)
    return sorted([*kept, *islice(others, max(0, wanted - len(kept)))])


def fewer_experts(content: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of experts, so many that each group of them still has two, and twice the chosen ones."""
    counts = {key: value for key, value in content.items() if _is_int(value)}
    needed = [value for key, value in counts.items() if _CHOSEN_EXPERTS.search(key)]
    most = 16
    while most < 2 * max(needed, default=0):
        most *= 2
    return {key: most for key, value in counts.items() if _EXPERTS.search(key) and value > most}


def is_index_list(key: str, value: Any, depth: int) -> bool:
    """Whether a list names some of the layers by their numbers, as `[3, 7, 11]`."""
    ascending = all(_is_int(v) for v in value) and list(value) == sorted(set(value))
    return bool(value and _INDICES.search(key) and ascending and value[-1] < depth)


def _renumbered(content: Mapping[str, Any], layers: Mapping) -> dict[str, Any]:
    """Settings by layer number, as `{"05": {...}}`, of the layers that are kept."""
    _, chosen = max(layers.items(), default=(0, []))
    old = {int(name): value for name, value in content.items()}
    return {str(new): old[layer] for new, layer in enumerate(chosen) if layer in old}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
