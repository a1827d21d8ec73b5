"""Each service gets what its documentation describes, over real connections; and no address is ever shown.

uv run pytest tests/monitoring/test_channels.py
"""

import json
import re
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from finetuning.common.bounds import NOTICE, NOTICE_ANSWER
from finetuning.common.errors import UserError
from finetuning.common.text import redact
from finetuning.config import SERVICES, OutputSettings
from finetuning.monitoring import channels
from finetuning.monitoring.channels import Channel, Notice, Undelivered, read_channels
from tests.helpers.services import (
    DRIPS,
    FAULT_CODES,
    PATHS,
    SECRET,
    TAKES,
    TOKEN,
    certificate,
    chat_server,
    mail_server,
)

NOTICE_ = Notice(
    "训练完成 run", ("held-out loss 2 -> 1 <b> & more", "<@everyone> @all 损失：2 → 1")
)
TEXT = "\n".join((NOTICE_.title, *NOTICE_.lines))
CHATS = tuple(TAKES)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_the_settings_know_the_services_that_there_are():
    assert SERVICES == channels.SERVICES


# ------------------------------------------------------------------------ chats


@pytest.mark.parametrize("service", CHATS)
def test_a_chat_takes_a_notice(service: str):
    with chat_server(service) as chat:
        Channel.of(chat.setting).deliver(NOTICE_, 5)
    shown = TEXT.replace("<@everyone>", "< @everyone>") if service == "wecom" else TEXT
    assert chat.texts == [shown]


@pytest.mark.parametrize("service", ["feishu", "dingtalk"])
def test_a_robot_that_signs(service: str):
    with chat_server(service, secret=SECRET) as chat:
        Channel.of(chat.setting).deliver(NOTICE_, 5)
        assert chat.texts == [TEXT]
        for wrong in (chat.setting.partition("#")[0], chat.setting + "x"):
            with pytest.raises(
                Undelivered, match=f"HTTP 200, code {FAULT_CODES[service]}"
            ) as error:
                Channel.of(wrong).deliver(NOTICE_, 5)
            assert error.value.lasting and SECRET not in str(error.value)
    assert chat.texts == [TEXT]


def test_the_address_may_stand_in_the_environment(monkeypatch):
    with chat_server("dingtalk", secret=SECRET) as chat:
        monkeypatch.setenv("ROBOT_1", f" {chat.address}\n")
        Channel.of("dingtalk=env:ROBOT_1").deliver(NOTICE_, 5)
    assert chat.texts == [TEXT]


@pytest.mark.parametrize(
    ("service", "answer", "lasting"),
    [
        ("slack", (500, "rollup_error"), False),
        ("slack", (429, "slow down"), False),
        ("slack", (404, "no_service"), True),
        ("slack", (200, "welcome to the hotel"), True),
        ("slack", (302, "http://127.0.0.1:9/else"), True),
        ("feishu", (400, '{"code":9499,"msg":"Bad Request","data":{}}'), True),
        ("feishu", (200, '{"code":11232,"msg":"frequency limited"}'), False),
        ("dingtalk", (200, '{"errcode":310000,"errmsg":"keywords not in content"}'), True),
        ("dingtalk", (200, '{"errcode":130101,"errmsg":"send too fast"}'), False),
        ("wecom", (200, '{"errcode":45009,"errmsg":"api freq out of limit"}'), False),
        ("wecom", (200, "[]"), True),
        ("wecom", (200, "[" * 20_000), True),
        ("wecom", (502, ""), False),
    ],
)
def test_an_answer_says_whether_to_try_again(service, answer, lasting):
    with chat_server(service, first=[answer]) as chat:
        with pytest.raises(Undelivered, match=f"HTTP {answer[0]}") as error:
            Channel.of(chat.setting).deliver(NOTICE_, 5)
        assert error.value.lasting == lasting and chat.texts == []
        assert len(str(error.value)) <= 301 and "\n" not in str(error.value)


def test_nothing_of_the_address_is_in_what_the_other_side_says():
    said = f'{{"errcode":310000,"errmsg":"token {TOKEN} of {TOKEN.upper()} \\u200b{TOKEN}"}}'
    with chat_server("dingtalk", first=[(200, said)]) as chat:
        channel = Channel.of(chat.setting)
        with pytest.raises(Undelivered) as error:
            channel.deliver(NOTICE_, 5)
    assert TOKEN not in str(error.value) and "code 310000" in str(error.value)
    assert TOKEN not in repr(channel) and error.value.__suppress_context__


@pytest.mark.parametrize("service", ["feishu", "dingtalk"])
def test_nothing_of_the_secret_that_signs_is_in_what_the_other_side_says(service: str):
    """It is base64, in which `+` and `/` may make words of two letters."""
    secret = "ab+cd/ef=="
    said = json.dumps({"code": 19021, "errcode": 310000, "msg": f"sign {secret}, not ab+cd"})
    told = pytest.raises(Undelivered, match=r"sign .*, not")
    with chat_server(service, secret=secret, first=[(200, said)]) as chat, told as error:
        Channel.of(chat.setting).deliver(NOTICE_, 5)
    assert not [piece for piece in ("ab+c", "cd/e", "ef==") if piece in str(error.value)]


def test_a_refused_connection_and_a_host_that_is_none():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}{PATHS['slack']}"
    for setting in (f"slack={address}", f"slack=http://{'a' * 70}.invalid/services/{TOKEN}"):
        with pytest.raises(Undelivered) as error:
            Channel.of(setting).deliver(NOTICE_, 5)
        assert not error.value.lasting and TOKEN not in str(error.value)


def test_a_silent_server_is_left():
    with chat_server("wecom", first=[(0, "")]) as chat:
        begin = time.monotonic()
        with pytest.raises(Undelivered) as error:
            Channel.of(chat.setting).deliver(NOTICE_, 0.2)
        assert time.monotonic() - begin < 5 and not error.value.lasting


def test_a_server_that_sends_a_byte_now_and_then_is_left():
    with chat_server("slack", first=[DRIPS]) as chat:
        begin = time.monotonic()
        with pytest.raises(Undelivered, match=r"HTTP 200: \.+$"):
            Channel.of(chat.setting).deliver(NOTICE_, 0.3)
        assert 0.2 < time.monotonic() - begin < 5


def test_an_endless_answer_is_left(monkeypatch):
    monkeypatch.setattr(channels, "NOTICE_ANSWER", replace(NOTICE_ANSWER, limit=9))
    with chat_server("slack", first=[(500, "no" * 5000)]) as chat:
        channel = Channel.of(chat.setting)
        with pytest.raises(Undelivered, match=r"HTTP 500: nonononon$"):
            channel.deliver(NOTICE_, 5)


@pytest.mark.parametrize("service", CHATS)
def test_a_long_notice_is_cut(service: str):
    """After a whole character, and where characters become longer."""
    for title, line in (("t", "密" * 5000), ("tt", "密" * 5000), ("ttt", "<@" * 3000)):
        with chat_server(service) as chat:
            Channel.of(chat.setting).deliver(Notice(title, (line,)), 5)
        (text,) = chat.texts
        assert NOTICE.limit - 8 < len(text.encode()) <= NOTICE.limit
        assert text.endswith("…") and "�" not in text


def test_what_just_fits_is_not_cut():
    assert Notice("a", ("b" * (NOTICE.limit - 2),)).text() == "a\n" + "b" * (NOTICE.limit - 2)
    assert Notice("a", ("b" * (NOTICE.limit - 1),)).text() == "a\n" + "b" * (NOTICE.limit - 5) + "…"


def test_a_notice_holds_no_secret_of_ours(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_aSecretOfTheUser99")
    notice = Notice("failed", ("hf_aSecretOfTheUser99 at https://me:mine@host/x\x1b[31m",))
    assert notice.text() == "failed\n[redacted] at https://[redacted]@host/x"


# ------------------------------------------------------------------------ mail


def test_mail_takes_a_notice():
    with mail_server() as mail:
        Channel.of(f"mail=smtp://127.0.0.1:{mail.port}?to=a@x.example,b@y.example").deliver(
            NOTICE_, 5
        )
    (message,) = mail.mails
    assert (
        message["Subject"] == NOTICE_.title
        and message.get_content().splitlines() == TEXT.splitlines()
    )
    assert message["From"] == "a@x.example" and message["To"] == "a@x.example, b@y.example"
    assert message["Date"] and message["Message-ID"] and mail.whom == ["a@x.example", "b@y.example"]
    assert mail.logins == []


@pytest.mark.parametrize("plus", ["+", "%2B"])
def test_mail_goes_to_a_name_with_a_plus(plus: str):
    whom = f"to=me{plus}runs@x.example,b@y.example&from=bot{plus}1@x.example"
    with mail_server() as mail:
        Channel.of(f"mail=smtp://127.0.0.1:{mail.port}?{whom}").deliver(NOTICE_, 5)
    assert mail.whom == ["me+runs@x.example", "b@y.example"]
    (message,) = mail.mails
    assert message["To"] == "me+runs@x.example, b@y.example"
    assert message["From"] == "bot+1@x.example"


def test_mail_goes_to_a_name_beyond_ascii_where_the_server_takes_it():
    """SMTPUTF8, RFC 6531; elsewhere the notice says what is the matter."""
    setting = "mail=smtp://127.0.0.1:{}?to=%E5%BC%A0%E4%B8%89@x.example"
    with mail_server(takes_utf8=True) as mail, mail_server() as plain:
        Channel.of(setting.format(mail.port)).deliver(NOTICE_, 5)
        with pytest.raises(Undelivered, match="no address with letters beyond ASCII") as error:
            Channel.of(setting.format(plain.port)).deliver(NOTICE_, 5)
    assert error.value.lasting and plain.mails == []
    assert mail.whom == ["张三@x.example"]
    (message,) = mail.mails
    assert message["To"] == "张三@x.example" and message["Subject"] == NOTICE_.title
    assert message.get_content().splitlines() == TEXT.splitlines()


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl for a certificate")
def test_mail_sends_the_password_over_an_encrypted_connection_only(tmp_path: Path, monkeypatch):
    tls, trusted = certificate(tmp_path)
    monkeypatch.setenv("SMTP_PASSWORD", SECRET)
    with mail_server(tls=tls) as mail, mail_server() as plain:
        setting = "mail=smtp://me%40x.example@127.0.0.1:{}?to=a@x.example&from=bot@x.example"
        with pytest.raises(Undelivered, match="CERTIFICATE_VERIFY_FAILED"):
            Channel.of(setting.format(mail.port)).deliver(NOTICE_, 5)
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        Channel.of(setting.format(mail.port)).deliver(NOTICE_, 5)
        assert mail.logins == [("me@x.example", SECRET, True)]
        assert [message["From"] for message in mail.mails] == ["bot@x.example"]
        with pytest.raises(Undelivered, match="offers no encryption") as error:
            Channel.of(setting.format(plain.port)).deliver(NOTICE_, 5)
        assert error.value.lasting and plain.logins == plain.mails == []
        monkeypatch.setenv("SMTP_PASSWORD", "密码")
        with pytest.raises(Undelivered, match="must be of ASCII characters") as error:
            Channel.of(setting.format(mail.port)).deliver(NOTICE_, 5)
        monkeypatch.setenv("SMTP_PASSWORD", SECRET)
        assert error.value.lasting and len(mail.mails) == 1
    with mail_server(tls=tls, at_once=True) as mail:
        Channel.of(f"mail=smtps://bot@127.0.0.1:{mail.port}?to=a@x.example").deliver(NOTICE_, 5)
    assert mail.logins == [("bot", SECRET, True)] and mail.mails[0]["From"] == "bot@127.0.0.1"


@pytest.mark.parametrize(
    ("address", "port"),
    [("smtp://h", 25), ("smtp://me@h", 587), ("smtps://me@h", 465), ("smtps://h:7", 7)],
)
def test_mail_goes_to_the_usual_port(address: str, port: int, monkeypatch):
    monkeypatch.setenv("SMTP_PASSWORD", SECRET)
    asked = []

    def connect(self: object, host: str, number: int, timeout: float) -> None:
        asked.append((host, number, timeout))
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr("smtplib.SMTP._get_socket", connect)
    monkeypatch.setattr("smtplib.SMTP_SSL._get_socket", connect)
    with pytest.raises(Undelivered, match="refused"):
        Channel.of(f"mail={address}?to=a@x.example").deliver(NOTICE_, 5)
    assert asked == [("h", port, 5)]


@pytest.mark.parametrize(
    ("refuses", "lasting"),
    [
        ({"RCPT": "550 no such person"}, True),
        ({"RCPT": "450 busy"}, False),
        ({"MAIL": "421 later"}, False),
        ({"DATA": "554 no"}, True),
        ({"QUIT": "500 what"}, None),
    ],
)
def test_mail_that_is_refused(refuses: dict, lasting: bool | None):
    with mail_server(refuses=refuses) as mail:
        channel = Channel.of(f"mail=smtp://127.0.0.1:{mail.port}?to=a@x.example")
        if lasting is None:  # it has been taken
            channel.deliver(NOTICE_, 5)
            assert len(mail.mails) == 1
            return
        with pytest.raises(Undelivered, match=r"SMTP \d{3}") as error:
            channel.deliver(NOTICE_, 5)
    assert error.value.lasting == lasting and mail.mails == []


# ------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "setting",
    [
        f"feishu=https://{TOKEN}",
        f"feishu={TOKEN}",
        f"slack=ftp://host/{TOKEN}",
        f"slack=https://host:port/{TOKEN}",
        f"slack=https://host/{TOKEN} x",
        f"slack=https://host/{TOKEN}\u200b",
        f"slack=env:https://host/{TOKEN}",
        f"wecom=https:///{TOKEN}",
        f"mail=smtp://{TOKEN}@host",
        f"mail=smtp://{TOKEN}@host?to={TOKEN}",
        f"mail=smtp://host?to=a@x.example&from={TOKEN}",
        f"mail=smtp://{TOKEN}%0a%22@host?to=a@x.example",
        f"mail=smtp://me:{TOKEN}@host?to=a@x.example",
        f"mail=https://host/{TOKEN}?to=a@x.example",
        "dingtalk=env:NO_SUCH_VARIABLE",
        "mail=smtp://me@host?to=a@x.example",
    ],
)
def test_an_address_that_can_not_be_right_is_refused_and_not_shown(setting: str, monkeypatch):
    monkeypatch.delenv("SMTP_PASSWORD", raising=False)
    with pytest.raises(UserError) as error:
        read_channels([setting])
    said = str(error.value)
    assert said.startswith(f"notify {setting.partition('=')[0]}: ") and TOKEN not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "setting", [TOKEN, f"https://host/{TOKEN}", f"wechat=https://host/{TOKEN}"]
)
def test_an_unknown_service_is_refused_and_not_shown(setting: str):
    with pytest.raises(
        UserError, match="SERVICE one of feishu, dingtalk, wecom, slack, mail"
    ) as error:
        OutputSettings(notify=(setting,))
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("service", ["feishu", "wecom", "slack"])
def test_the_addresses_of_robots_are_redacted_wherever_they_stand(service: str):
    hidden = redact(f"see 'https://host{PATHS[service]}' there")
    assert TOKEN not in hidden and re.fullmatch("see 'https://host/.*' there", hidden)
