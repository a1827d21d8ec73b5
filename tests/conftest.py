"""Shared fixtures. Data of others lies beside the checkout and is optional."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

# Before torch: workers share few cores, and subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LC_ALL"] = "C.UTF-8"  # the program speaks the language of the locale

import pytest

# A shell ignores it for what it starts in the background, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tried_tokenizers() -> set[str]:
    """Those that passed in a child process."""
    return set()


@pytest.fixture(autouse=True)
def tried_once(monkeypatch: pytest.MonkeyPatch, tried_tokenizers: set[str]) -> None:
    """A tokenizer is tried in a child process with the first data of all tests only: that takes a second."""
    from finetuning.common.limited import Ended
    from finetuning.data import tokenizer_probe

    real = tokenizer_probe.run_limited

    def tried(*arguments: object, given: bytes) -> Ended:
        tokenizer = json.loads(given)["tokenizer"]
        ended = Ended(0, "", "") if tokenizer in tried_tokenizers else real(*arguments, given=given)
        if not ended.code:
            tried_tokenizers.add(tokenizer)
        return ended

    monkeypatch.setattr(tokenizer_probe, "run_limited", tried)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of other projects' files; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder shared/data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with which a whole run takes seconds."""
    from tests.helpers.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny-qwen3")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short samples with thinking, as JSON lines."""
    from tests.helpers.tiny_model import make_tiny_data

    return make_tiny_data(tmp_path_factory.mktemp("data") / "tiny.jsonl")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of tokenized data and models for all tests of a session, none of the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path, tiny_data: Path, cache_dir: Path) -> Callable[..., int]:
    """`main()` in this process with a tiny model, tiny data and few steps; later arguments win."""
    from direct_finetuning_with_existing_modules import main
    from tests.helpers.tiny_model import FAST

    def run(tmp_path: Path, *more: str, first: Sequence[str] = FAST) -> int:
        inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
        places = ["--output-dir", str(tmp_path / "out"), "--cache-dir", str(cache_dir)]
        return main([*first, *inputs, *places, *more])

    return run


@pytest.fixture(scope="session")
def run(tiny_run: Callable[..., int]) -> Callable[..., int]:
    """The same by a short name, where a file has no other `run`."""
    return tiny_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_run: Callable[..., int]) -> Path:
    """The output directory of one whole run, for all tests; who changes it takes a copy."""
    tmp_path = tmp_path_factory.mktemp("finished")
    assert tiny_run(tmp_path, "--num-probes", "1", "--probe-max-new-tokens", "8") == 0
    return tmp_path / "out"
