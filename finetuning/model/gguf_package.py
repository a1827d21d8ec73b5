"""The package gguf, which not every installation has."""

from types import ModuleType

from finetuning.common.errors import UserError


def gguf_package() -> ModuleType:
    """The package. UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "--format gguf and ollama need the package gguf, which is not installed; start with "
            "uv run --extra gguf"
        ) from error
    return gguf
