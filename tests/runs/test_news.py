"""A run tells people who are not there, in their language; no address is in anything that it leaves.

uv run pytest tests/runs/test_news.py
"""

import re
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from finetuning.common import language
from finetuning.common.bounds import NOTICE_END
from finetuning.common.errors import RunStopped
from finetuning.monitoring import notifier
from tests.helpers.ranks import results_of
from tests.helpers.services import (
    HANGS,
    SECRET,
    TAKES,
    TOKEN,
    ChatServer,
    chat_server,
    mail_server,
    until,
)
from tests.helpers.sessions import settings, spoil_at, stop_at, train, train_on_ranks

SHORT = ("--max-steps", "3", "--eval-steps", "2", "--num-probes", "0")


@pytest.fixture(autouse=True)
def plain_network(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def holders(folder: Path, secret: str) -> list[Path]:
    """Files that hold it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [path for path in files if secret.encode() in path.read_bytes()]


def titles(chat: ChatServer) -> list[str]:
    """Of what was taken, without the run's name."""
    return [re.sub(r" qwen3_4b_thinking_\S+", "", text.split("\n")[0]) for text in chat.texts]


@pytest.mark.slow
def test_every_service_hears_begin_and_end_in_the_language_of_the_run(
    tmp_path: Path, run, monkeypatch, capfd: pytest.CaptureFixture
):
    with ExitStack() as stack:
        signs = {"feishu": SECRET, "dingtalk": SECRET}
        chats = [stack.enter_context(chat_server(s, secret=signs.get(s, ""))) for s in TAKES]
        mail = stack.enter_context(mail_server())
        monkeypatch.setenv("MY_ROBOT", chats[0].address)
        whom = f"mail=smtp://127.0.0.1:{mail.port}?to={TOKEN}@x.example"
        notify = ["--notify", "feishu=env:MY_ROBOT", *(c.setting for c in chats[1:]), whom]
        try:
            assert run(tmp_path, *SHORT, *notify, "--language", "zh") == 0
        finally:
            language.use("en")
    name = next((tmp_path / "out" / "training_logs").iterdir()).name
    for texts in (*(chat.texts for chat in chats), [m.get_content() for m in mail.mails]):
        begun, done = (text.replace("\r", "").strip().split("\n") for text in texts)
        assert (
            len(begun) == 6
            and begun[0] == f"训练开始 {name}"
            and "步数: 3" in "\n".join(begun).replace("：", ": ")
        )
        assert done[0] == f"训练完成 {name}" and done[1].startswith("完成：3 步")
        told = "three steps change nothing that is more than chance: no verdict stands behind the numbers"
        assert any(re.fullmatch(r"留出损失: \S+ ± \S+ → \S+ ± \S+", line) for line in done), told
        assert not any("--logdir" in line for line in done)
    printed = capfd.readouterr()
    for secret in (TOKEN, SECRET):
        assert holders(tmp_path / "out", secret) == []
        assert secret not in printed.out + printed.err
    services = ["feishu", "dingtalk", "wecom", "slack", "mail"]
    (written,) = (tmp_path / "out").glob("training_logs/*/configuration.json")
    recorded = re.search(r'"notify": \[([^]]*)\]', written.read_text(encoding="utf-8"))
    assert re.findall(r"\w+", recorded[1]) == services


@pytest.mark.slow
def test_an_alert_and_a_failure_are_told(tmp_path: Path, tiny_model, cache_dir):
    with chat_server("slack") as chat:
        config = settings(tmp_path, tiny_model, cache_dir, max_steps=4, notify=(chat.setting,))
        with pytest.raises(RunStopped):
            train(config, tmp_path, after_backward=spoil_at(2))
        assert titles(chat) == ["run begun", "alert NonFinite", "run failed"]
    assert "NonFinite at step 2: " in chat.texts[1]
    assert "step 2: non-finite gradient" in chat.texts[2]


@pytest.mark.slow
def test_an_interruption_and_the_session_that_goes_on(tmp_path: Path, tiny_model, cache_dir):
    with chat_server("wecom") as chat:
        config = settings(tmp_path, tiny_model, cache_dir, max_steps=4, notify=(chat.setting,))
        train(config, tmp_path, before_update=stop_at(2))
        train(config, tmp_path, resume="latest")
        told = ["run begun", "run interrupted", "run goes on from step 3", "run done"]
        assert titles(chat) == told
    assert "SIGTERM: saved step 3 of 4" in chat.texts[1]


def test_a_run_that_ends_before_it_begins_is_told(tmp_path: Path, run, tiny_data):
    with chat_server("slack") as chat:
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"question": "a"}\n' * 30, encoding="utf-8")
        assert run(tmp_path, *SHORT, "--data-path", str(broken), "--notify", chat.setting) == 2
        (text,) = chat.texts
    assert text.startswith("run failed qwen3_4b_thinking\n") and "broken" in text


@pytest.mark.slow
@pytest.mark.parametrize("always", [HANGS, (500, TOKEN)])
def test_a_service_that_is_away_costs_the_run_a_moment(
    tmp_path: Path, run, monkeypatch, capfd: pytest.CaptureFixture, always
):
    monkeypatch.setattr(notifier, "NOTICE_END", replace(NOTICE_END, limit=0.3))
    with chat_server("dingtalk", always=always) as chat:
        assert run(tmp_path, *SHORT, "--notify", chat.setting) == 0
        assert chat.times
    printed = capfd.readouterr()
    warning = "warning: notify dingtalk: a notice did not arrive"
    assert (printed.out + printed.err).count(warning) == 1
    assert TOKEN not in printed.out + printed.err and holders(tmp_path / "out", TOKEN) == []


def test_a_variable_that_is_not_there_is_told_at_once(tmp_path: Path, run, capfd):
    begin = time.monotonic()
    assert run(tmp_path, "--notify", "slack=env:NO_SUCH_ROBOT") == 2
    assert time.monotonic() - begin < 5 and not (tmp_path / "out").exists()
    said = capfd.readouterr().err
    assert said == "error: notify slack: the environment has no variable NO_SUCH_ROBOT; export it\n"


@pytest.mark.slow
def test_of_two_ranks_the_first_tells(tmp_path: Path, tiny_model, cache_dir):
    with chat_server("slack") as chat:
        config = settings(tmp_path, tiny_model, cache_dir, max_steps=2, notify=(chat.setting,))
        results_of(train_on_ranks(2, config, tmp_path))
        until(lambda: len(chat.texts) >= 2)
        assert titles(chat) == ["run begun", "run done"]
