"""Segments of GPU memory that grow, where that can be had.

uv run pytest tests/model/test_gpu_segments.py
"""

import pytest
import torch

from finetuning.model import gpu_segments
from finetuning.model.gpu_segments import SETTINGS, let_segments_grow

CUDA, ON, OFF = torch.device("cuda", 0), "expandable_segments:True", "expandable_segments:False"


@pytest.fixture
def set_to(monkeypatch) -> list[str]:
    """What torch's allocator was set to, one after the other; the real one checks each."""
    found: list[str] = []
    real = torch.cuda.memory._set_allocator_settings

    def setting(text: str) -> None:
        real(text)
        found.append(text)

    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", setting)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    yield found
    real(OFF)


def allocator(monkeypatch, error: Exception | None) -> None:
    """One that takes memory, or fails as the driver does."""
    asked = []

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        asked.append((size, device))
        if error:
            raise error

    monkeypatch.setattr(gpu_segments.torch, "empty", empty)


def test_they_grow_where_the_gpu_can(set_to: list[str], monkeypatch):
    allocator(monkeypatch, None)
    assert let_segments_grow(CUDA) and set_to == [ON]


@pytest.mark.parametrize("said", ["CUDA driver error: operation not supported", "unknown error"])
def test_a_driver_that_has_none_leaves_all_as_it_was(set_to: list[str], monkeypatch, said: str):
    allocator(monkeypatch, RuntimeError(said))
    assert not let_segments_grow(CUDA) and set_to == [ON, OFF]


@pytest.mark.parametrize("name", SETTINGS)
def test_who_has_set_the_allocator_has_set_all_of_it(set_to: list[str], monkeypatch, name: str):
    monkeypatch.setenv(name, "garbage_collection_threshold:0.8")
    allocator(monkeypatch, None)
    assert not let_segments_grow(CUDA) and not set_to


def test_other_devices_are_left_alone(set_to: list[str]):
    assert not let_segments_grow(torch.device("cpu")) and not set_to
