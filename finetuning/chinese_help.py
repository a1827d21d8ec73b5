"""`--help` in Chinese: every option with its values, its default and what it is for."""

import dataclasses
from collections.abc import Iterator

from finetuning.common.language import meanings
from finetuning.config import (
    BatchSettings,
    DataSettings,
    DeviceSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    allowed_values,
)

GROUPS = {
    "模型": ModelSettings,
    "适配器": LoraSettings,
    "数据": DataSettings,
    "批量与步数": BatchSettings,
    "优化器": OptimizerSettings,
    "设备": DeviceSettings,
    "输出": OutputSettings,
}
_TYPES = {int: "整数", float: "数", str: "文本", tuple: "一个或多个", dict: "名字 值 …"}


def help_text(program: str, command: type) -> str:
    """The whole page. command: the dataclass of options that are no settings."""
    parts = [
        f"用法：{program} [选项]",
        "带推理的问答微调，用 TensorBoard 观看。设置也可以写进 TOML 文件（--config），命令行优先。",
    ]
    own = [field for field in dataclasses.fields(command) if field.name != "training"]
    groups = {"运行方式": own} | {n: dataclasses.fields(kind) for n, kind in GROUPS.items()}
    for title, fields in groups.items():
        parts.append("\n".join([f"{title}：", *(line for f in fields for line in _lines(f))]))
    return "\n\n".join(parts)


def _lines(field: dataclasses.Field) -> Iterator[str]:
    flag = f"--{field.name.replace('_', '-')}"
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, bool):
        yield f"  {flag}" + (f", --no-{flag[2:]}（默认打开）" if default else "（默认关闭）")
    else:
        choices, types = allowed_values(field)
        values = "|".join([*choices, *(_TYPES[kind] for kind in types)])
        yield f"  {flag} {{{values}}}（默认 {_shown(default)}）"
    yield f"      {meanings('settings_zh.tsv').get(field.name, '')}"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "空"
    return "空" if value in ("", {}) else str(value)
