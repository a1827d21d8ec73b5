"""The real TensorBoard server for tests: started on a free local port, asked over HTTP, ended for sure."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class TensorBoardServer:
    """`with TensorBoardServer(logdir, load_fast=True) as server: server.scalars(run, tag)`

    With `arguments` the server gets these, in a folder where their relative --logdir is `logdir`.
    """

    def __init__(self, logdir: Path, *, load_fast: bool = True, arguments: Sequence[str] = ()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = open(Path(logdir).parent / f"server-{port}.log", "w+")  # noqa: SIM115
        wanted = arguments or [
            *("--logdir", str(logdir), "--host", "127.0.0.1", "--reload_interval", "1"),
            f"--load_fast={'true' if load_fast else 'false'}",
            *("--samples_per_plugin", "scalars=10000,text=500,images=100"),
        ]
        self._command = [sys.executable, "-m", "tensorboard.main", *wanted, "--port", str(port)]

    def __enter__(self) -> "TensorBoardServer":
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self.wait_for(lambda: self.get("runs") is not None, "server start")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(os, "killpg"):  # the data server is a child of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._log.close()

    def get(self, route: str, **query: str) -> Any:
        """GET /data/<route>?<query> as JSON."""
        url = f"{self.url}/data/{route}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)

    def post(self, route: str, body: dict) -> Any:
        """POST JSON to /data/<route>."""
        request = urllib.request.Request(
            f"{self.url}/data/{route}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """Ask until `condition()` is true; HTTP errors count as not yet."""
        end, last = time.monotonic() + seconds, None
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"server ended: {Path(self._log.name).read_text()[-2000:]}")
            try:
                if last := condition():
                    return last
            except (OSError, ValueError) as error:
                last = error
            time.sleep(0.2)
        raise TimeoutError(f"{what}: last answer {last!r}")

    def scalar_tags(self, run: str) -> dict[str, dict]:
        """{tag: {"displayName", "description"}} of the SCALARS tab."""
        return self.get("plugin/scalars/tags").get(run, {})

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        """[(step, value), ...]; non-finite values come as "NaN", "Infinity", "-Infinity"."""
        points = self.get("plugin/scalars/scalars", run=run, tag=tag)
        return [(step, float(value)) for _, step, value in points]

    def texts(self, run: str, tag: str) -> list[tuple[int, str]]:
        """[(step, HTML), ...] of the TEXT tab."""
        return [(p["step"], p["text"]) for p in self.get("plugin/text/text", run=run, tag=tag)]

    def histogram_steps(self, run: str, tag: str) -> list[int]:
        """Steps of a histogram tag."""
        return [step for _, step, _ in self.get("plugin/histograms/histograms", run=run, tag=tag)]
