"""Does what was read from a file have the kinds of values that a type says? Anyone may have written it."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


def misfit(value: Any, kind: Any, name: str = "") -> str:
    """Why a value, as JSON gives it, is not of a type; empty where it is.

    kind: int, float (an integer passes), bool, str, None, Any, unions, list[…], dict[str, …], tuple[…] (a
    list of that length), a TypedDict, or a dataclass, whose fields must all be there and no others.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return ""
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _fields_misfit(value, kind, name)
    if origin in (typing.Union, types.UnionType):
        return "" if any(not misfit(value, one) for one in inner) else _wrong(name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            return _wrong(name)
        faults = (misfit(entry, one, name) for entry, one in zip(value, inner, strict=True))
        return next(filter(None, faults), "")
    if kind in (list, dict) or origin in (list, dict):
        plain = origin or kind
        if not isinstance(value, plain):
            return _wrong(name)
        content = value.values() if plain is dict else value
        faults = (misfit(entry, inner[-1], name) for entry in content) if inner else ()
        return next(filter(None, faults), "")
    if kind is float:
        kind = (int, float)
    if isinstance(value, bool) and kind is not bool:
        return _wrong(name)
    return "" if isinstance(value, type(None) if kind is None else kind) else _wrong(name)


def _fields_misfit(value: Any, kind: Any, name: str) -> str:
    if not isinstance(value, Mapping):
        return _wrong(name)
    fields = typing.get_type_hints(kind)
    optional = getattr(kind, "__optional_keys__", frozenset())
    for field in sorted(fields.keys() - optional - value.keys()):
        return f"{field} is missing"
    for field in sorted(value.keys() - fields.keys(), key=str):
        return f"{str(field)[:60]} is not known"
    faults = (misfit(value[field], fields[field], field) for field in value)
    return next(filter(None, faults), "")


def _wrong(name: str) -> str:
    return f"{name or 'it'} is of another kind"
