"""Nothing waits for news, and what is lost is told once. Over real connections.

uv run pytest tests/monitoring/test_notifier.py
"""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from finetuning.common.bounds import NOTICE_END, NOTICE_PATIENCE, NOTICES
from finetuning.monitoring import notifier
from finetuning.monitoring.channels import Channel, Notice, read_channels
from finetuning.monitoring.notifier import Notifier
from tests.helpers.services import HANGS, TOKEN, chat_server, until


@pytest.fixture(autouse=True)
def hurried(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(notifier, "FIRST_PAUSE", 0.02)
    monkeypatch.delenv("http_proxy", raising=False)
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("notify") and not t.daemon]


def news(*numbers: int) -> list[Notice]:
    return [Notice(f"news {number}", ()) for number in numbers]


def start(*settings: str) -> tuple[Notifier, list[str]]:
    said: list[str] = []
    return Notifier(read_channels(settings), said.append), said


def test_all_channels_hear_all_in_order():
    with chat_server("slack") as one, chat_server("wecom") as other:
        teller, said = start(one.setting, other.setting)
        for notice in news(*range(9)):
            teller.tell(notice)
        teller.close()
    assert one.texts == other.texts == [f"news {i}" for i in range(9)] and said == []


def test_what_fails_at_first_is_tried_again_after_longer_pauses(monkeypatch):
    monkeypatch.setattr(notifier, "FIRST_PAUSE", 0.05)
    with chat_server("slack", first=[(500, "")] * 3) as chat:
        teller, said = start(chat.setting)
        teller.tell(*news(1))
        until(lambda: chat.texts)
        pauses = [b - a for a, b in zip(chat.times, chat.times[1:], strict=False)]
        teller.close()
    assert chat.texts == ["news 1"] and said == []
    assert [pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True)] == [
        True
    ] * 3


def test_the_last_notice_is_tried_again_while_the_end_waits():
    with chat_server("slack", first=[(500, "")] * 2) as chat:
        teller, said = start(chat.setting)
        teller.tell(*news(1))
        teller.close()
    assert chat.texts == ["news 1"] and said == []


def test_what_never_arrives_is_dropped_and_told_once(monkeypatch):
    monkeypatch.setattr(notifier, "NOTICE_PATIENCE", replace(NOTICE_PATIENCE, limit=0.1))
    monkeypatch.setattr(notifier, "NOTICE_END", replace(NOTICE_END, limit=0.2))
    with chat_server("slack", always=(503, f"{TOKEN} is busy")) as chat:
        teller, said = start(chat.setting)
        for notice in news(1, 2):
            teller.tell(notice)
        until(lambda: len(said) == 1 and len(chat.times) > 5)
        teller.close()
    assert len(said) == 1 and said[0].startswith(
        "notify slack: a notice did not arrive (HTTP 503: "
    )
    assert TOKEN not in said[0]


def test_what_is_refused_for_good_is_not_tried_again():
    with chat_server("slack", first=[(404, "no_service")]) as chat:
        teller, said = start(chat.setting)
        for notice in news(1, 2):
            teller.tell(notice)
        teller.close()
    assert chat.texts == ["news 2"] and len(chat.times) == 2 and len(said) == 1


def test_a_mistake_of_ours_is_told_and_the_next_notice_goes_out(monkeypatch):
    deliver, tried = Channel.deliver, []

    def breaks_twice(self: Channel, notice: Notice, *timeout: float) -> None:
        tried.append(notice)
        if len(tried) < 3:
            raise RuntimeError(f"{TOKEN}: nobody has thought of this")
        deliver(self, notice, *timeout)

    monkeypatch.setattr(Channel, "deliver", breaks_twice)
    with chat_server("slack") as chat:
        teller, said = start(chat.setting)
        for notice in news(1, 2, 3):
            teller.tell(notice)
        teller.close()
    assert chat.texts == ["news 3"]
    assert said == [
        "notify slack: a notice did not arrive (RuntimeError); the run goes on, and no other loss is told"
    ]


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(notifier, "NOTICE_END", replace(NOTICE_END, limit=0.2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"slack=http://127.0.0.1:{free.getsockname()[1]}/services/{TOKEN}"
    teller, said = start(address)
    teller.tell(*news(1))
    teller.close()
    assert len(said) == 1 and "refused" in said[0] and TOKEN not in said[0]


def test_a_server_that_hangs_holds_up_nobody(monkeypatch):
    """Not the caller, not another channel, and the end no longer than its bound, for all together."""
    monkeypatch.setattr(notifier, "NOTICE_END", replace(NOTICE_END, limit=0.4))
    with (
        chat_server("slack", always=HANGS) as one,
        chat_server("wecom", always=HANGS) as other,
        chat_server("feishu") as third,
    ):
        teller, said = start(one.setting, other.setting, third.setting)
        begin = time.monotonic()
        for notice in news(*range(1000)):
            teller.tell(notice)
        told = time.monotonic() - begin
        until(lambda: "news 999" in third.texts)
        assert not said
        begin = time.monotonic()
        teller.close()
        closed = time.monotonic() - begin
    assert told < 0.5 and 0.3 < closed < 2
    assert sorted(line.partition(":")[0] for line in said) == ["notify slack", "notify wecom"]


def test_the_queue_is_bounded():
    with chat_server("slack", first=[HANGS]) as chat:
        teller, _ = start(chat.setting)
        teller.tell(*news(0))
        until(lambda: chat.times)
        for notice in news(*range(1, 500)):
            teller.tell(notice)
        chat.let_go.set()
        until(lambda: len(chat.texts) >= NOTICES.limit)
        teller.close()
    newest = [f"news {i}" for i in range(500 - NOTICES.limit, 500)]
    assert [text for text in chat.texts if text != "news 0"] == newest


def test_without_channels_there_is_no_thread():
    before = threading.active_count()
    teller, _ = start()
    teller.tell(*news(1))
    teller.close()
    assert not teller and threading.active_count() == before
