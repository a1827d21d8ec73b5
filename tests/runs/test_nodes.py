"""Two nodes on one machine: two torchrun agents, each in a network namespace of its own.

    uv run pytest -m "not long" tests/runs/test_nodes.py        # as root on Linux; skipped elsewhere

The nodes share nothing but a virtual cable (veth) and the file system, as nodes of a cluster do.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.runs.test_distributed import OPTIONS, SCRIPT, curve, train

pytestmark = pytest.mark.slow

PREFIX = "qwen3-nodes"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
STEPS = ["--max-steps", "4", "--eval-steps", "0"]


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """iproute2's command."""
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces joined by a cable; gone afterwards, whatever happened."""
    if not sys.platform.startswith("linux") or os.geteuid() or not shutil.which("ip"):
        pytest.skip("two nodes on one machine need Linux, root and the command `ip` (iproute2)")
    remove_leftovers()
    names = tuple(f"{PREFIX}-{os.getpid()}-{side}" for side in "ab")
    try:
        for name in names:
            made = ip("netns", "add", name, check=False)
            if made.returncode:
                pytest.skip(f"no right to make a network namespace: {made.stderr.strip()}")
        cable = ip(
            *("link", "add", "cable", "netns", names[0]),
            *("type", "veth", "peer", "name", "cable", "netns", names[1]),
            check=False,
        )
        if cable.returncode:
            pytest.skip(f"no right to make a virtual cable: {cable.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)  # and the cable with it


def remove_leftovers() -> None:
    """Namespaces of a test process that was killed before it could clean up."""
    for line in ip("netns", "list").stdout.splitlines():
        name = line.split()[0]
        owner = name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if name.startswith(f"{PREFIX}-") and not psutil.pid_exists(int(owner)):
            ip("netns", "del", name, check=False)


def start_agent(node: int, names: tuple[str, str], command: list[str]) -> subprocess.Popen:
    """torchrun on one node; the first one keeps the rendezvous."""
    launcher = [
        *("ip", "netns", "exec", names[node], sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-id", "two-nodes"),
        # Both nodes have this machine's host name, so that neither can be told by it.
        *("--rdzv-conf", f"is_host={int(node == 0)}", "--local-addr", ADDRESSES[node]),
    ]
    return subprocess.Popen(
        [*launcher, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "cable"},
    )


def end_all(agents: list[subprocess.Popen]) -> None:
    """No process may stay in a namespace that is to go."""
    for agent in agents:
        below = psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else []
        for process in below:
            process.kill()  # ranks lead sessions of their own
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
        agent.communicate()


def test_two_nodes_give_the_losses_of_one_rank(nodes, tiny_model, tiny_data, cache_dir, tmp_path):
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    arguments = [*OPTIONS, *STEPS, *inputs, "--cache-dir", str(cache_dir)]
    alone = train(arguments, tmp_path / "alone", ranks=1, accumulation=2)
    assert alone.returncode == 0, alone.stderr[-2000:]

    together = tmp_path / "together"
    batch = ["--gradient-accumulation-steps", "1", "--output-dir", str(together)]
    agents = [start_agent(node, nodes, [str(SCRIPT), *arguments, *batch]) for node in (0, 1)]
    try:
        said = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        end_all(agents)
    for agent, text in zip(agents, said, strict=True):
        assert agent.returncode == 0, text[-3000:]
    losses = curve(together)
    assert len(losses) == 4
    np.testing.assert_allclose(losses, curve(tmp_path / "alone"), rtol=1e-6)
    assert len(list((Path(together) / "tensorboard_logs").iterdir())) == 1, "one run for all nodes"
    assert len(curve(together, "Throughput/Straggler_Percent")) == 4


def test_a_node_sees_the_other_and_nothing_else(nodes):
    """The control: the namespaces are apart, or the test above would have proved nothing."""
    for node, name in enumerate(nodes):
        shown = ip("-n", name, "-br", "addr").stdout
        assert ADDRESSES[node] in shown and ADDRESSES[1 - node] not in shown
        assert {line.split("@")[0].split()[0] for line in shown.splitlines()} == {"lo", "cable"}
