"""Ranks in one process: devices, groups, waiting for the others."""

import threading
import time

import pytest
import torch

from finetuning.common.distributed import Distributed, _newest_group, pick_device
from finetuning.common.errors import UserError


def test_every_rank_has_a_gpu_of_its_own(monkeypatch):
    """A device without a number would be refused by `torch.cuda.set_device`, or be the first for all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("cuda", 3) == pick_device("auto", 3) == torch.device("cuda", 3)
    assert pick_device("cuda:1", 0) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"cuda:4: 4 GPUs are visible; start fewer ranks"):
        pick_device("cuda", 4)


def test_a_device_that_is_not_here_is_one_clear_line(monkeypatch, subtests):
    for device, said in [
        ("cuda", "none that works here"),
        ("cuda:1", "none that works here"),
        ("mps", "none that works here"),
        ("gpu", "must be auto, cuda"),
        ("cuda:x", "must be auto, cuda"),
        ("cpu:1", "must be auto, cuda"),
        ("", "must be auto, cuda"),
    ]:
        with subtests.test(device=device):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
            assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
            with pytest.raises(UserError, match=said):
                pick_device(device)


def two_ranks(store, timeout: float) -> list[Distributed]:
    cpu = torch.device("cpu")
    return [Distributed(rank, 2, rank, cpu, timeout, 2, store, store) for rank in (0, 1)]


def test_a_slow_rank_is_waited_for_and_a_silent_one_is_not():
    """Far beyond the timeout of a collective, as long as it lives."""
    first, second = two_ranks(torch.distributed.HashStore(), timeout=0.4)
    order = []

    def work(dist: Distributed, seconds: float) -> None:
        with dist.wait_alive("data"):
            time.sleep(seconds)
            order.append(dist.rank)
        order.append("together")

    ranks = [threading.Thread(target=work, args=a) for a in ((first, 0.0), (second, 2.0))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert order == [0, 1, "together", "together"]
    begin = time.monotonic()
    silence = pytest.raises(RuntimeError, match="rank 1 gave no sign of life")
    with silence, first.wait_alive("statistics"):
        pass
    assert time.monotonic() - begin < 10


def test_a_rank_that_starts_before_rank_0_does_not_join_the_group_that_is_gone():
    store, found = torch.distributed.HashStore(), {}

    def join(name: str, rank: int) -> None:
        group = _newest_group(store, rank, 2, 20.0)
        group.set(f"from-{rank}", name)
        found[name] = group.get(f"from-{1 - rank}").decode()

    for attempt, late in (("first", 1), ("second", 0), ("third", 0)):
        ranks = [
            threading.Thread(target=join, args=(f"{attempt}-{r}", r)) for r in (1 - late, late)
        ]
        ranks[0].start()
        time.sleep(0.7)  # long enough to enter the newest group there is
        ranks[1].start()
        for rank in ranks:
            rank.join(20)
        assert found[f"{attempt}-0"] == f"{attempt}-1" and found[f"{attempt}-1"] == f"{attempt}-0"


def test_what_rank_0_has_noted_is_known_to_the_next_group():
    first, second = two_ranks(torch.distributed.HashStore(), timeout=1.0)
    assert first.get("run") == ""
    second.put("run", "of rank 1")
    assert first.get("run") == ""
    first.put("run", "of rank 0")
    assert first.get("run") == second.get("run") == "of rank 0"
    alone = Distributed(0, 1, 0, torch.device("cpu"))
    alone.put("run", "x")
    assert alone.get("run") == ""


def test_a_node_is_the_ranks_with_one_first_rank(monkeypatch):
    """Three nodes of different sizes; every rank finds those beside it."""
    ranks = [
        Distributed(r, 6, local, torch.device("cpu")) for r, local in enumerate((0, 1, 0, 0, 1, 2))
    ]
    everyone = []
    monkeypatch.setattr(
        Distributed, "gather", lambda self, value: everyone.append(value) or everyone
    )
    for rank in ranks:
        rank.gather_on_node(f"gpu-{rank.rank}")
    monkeypatch.setattr(Distributed, "gather", lambda self, value: everyone)
    found = [rank.gather_on_node("not used: what was gathered is told above") for rank in ranks]
    first, last = ("gpu-0", "gpu-1"), ("gpu-3", "gpu-4", "gpu-5")
    assert found == [first, first, ("gpu-2",), last, last, last]
