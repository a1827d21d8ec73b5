"""Where the news of a run go: robots of chats, and mail, each by its service's public documentation.

A channel is set as `SERVICE=ADDRESS`, or as `SERVICE=env:NAME` where the variable NAME holds the address.
Whoever knows an address can write there, so none is ever shown: not in an error, and not in a `repr`. The
secret by which 飞书 and 钉钉 sign stands behind `#` at the address's end, which is never sent; mail takes its
password from the variable SMTP_PASSWORD.

    feishu     飞书开放平台, 自定义机器人使用指南
    dingtalk   钉钉开放平台, 自定义机器人接入
    wecom      企业微信开发者中心, 群机器人配置说明
    slack      Slack API, Sending messages using incoming webhooks
    mail       RFC 5321 and 5322, with TLS from the start (smtps) or where the server offers it (RFC 3207)
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import re
import smtplib
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any
from urllib.parse import SplitResult, quote_plus, unquote, urlsplit

from finetuning.common.bounds import NOTICE, NOTICE_ANSWER, NOTICE_WAIT
from finetuning.common.errors import UserError
from finetuning.common.text import PIECE_OF_SECRET, redact, without

FROM_ENVIRONMENT = "env:"
PASSWORD = "SMTP_PASSWORD"
LATER = (408, 425, 429)  # HTTP: the same may pass later, as may all from 500 on
BUSY = (11232, 130101, 45009, -1)  # codes of 飞书, 钉钉 and 企业微信: too many at once, or busy


@dataclass(frozen=True)
class Notice:
    """What is told: a title and lines of text."""

    title: str
    lines: tuple[str, ...]

    def text(self) -> str:
        """All of it, cut to what every service takes."""
        return _cut(redact("\n".join((self.title, *self.lines))))


class Undelivered(Exception):
    """A notice did not arrive; the message says why. `lasting`: it would be the same later."""

    def __init__(self, reason: str, *, lasting: bool) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class Channel:
    """A service, and the address at which it is reached."""

    service: str
    address: SplitResult = field(repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def of(cls, setting: str, environment: Mapping[str, str] = os.environ) -> "Channel":
        """The channel that a setting names. Raises UserError, which shows no address."""
        service, _, address = setting.partition("=")
        if address.startswith(FROM_ENVIRONMENT):
            address = _variable(
                service, address.removeprefix(FROM_ENVIRONMENT), environment
            ).strip()
        kind = _Mail if service == "mail" else _Chat
        parts = _parts(address)
        if parts is None or parts.scheme not in kind.schemes or kind.lacks(parts):
            raise UserError(
                f"notify {service}: not an address of this service; it has the form {kind.form}"
            )
        if service != "mail" or not parts.username:
            return cls(service, parts)
        if parts.password is not None:
            raise UserError(
                f"notify {service}: the password does not belong into the address; export it as {PASSWORD}"
            )
        return cls(service, parts, _variable(service, PASSWORD, environment))

    def deliver(self, notice: Notice, timeout: float = NOTICE_WAIT.limit) -> None:
        """Send it. Raises Undelivered. timeout: seconds that the other side may be silent."""
        try:
            if self.service == "mail":
                _Mail.send(self, notice, timeout)
            else:
                _Chat.send(self, notice, timeout)
        except Undelivered as fault:
            reason = self._harmless(str(fault))
            raise Undelivered(reason, lasting=fault.lasting) from None
        # What libraries raise for a connection, for an answer, and for a host that is no name.
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            said = getattr(cause, "strerror", None) or type(cause).__name__
            raise Undelivered(self._harmless(said), lasting=False) from None

    def _harmless(self, text: str) -> str:
        """What others say, on one line, without anything of the address."""
        text = without(text, self.address.fragment, self.password, piece=PIECE_OF_SECRET)
        return without(text, self.address.geturl())


def read_channels(settings: Sequence[str]) -> list[Channel]:
    """The channels that settings name. Raises UserError for one that can't be right."""
    return [Channel.of(setting) for setting in settings]


def service_of(setting: str) -> str:
    """What records show of a channel."""
    return setting.partition("=")[0]


def _variable(service: str, variable: str, environment: Mapping[str, str]) -> str:
    """Its value. What is no name of a variable may be an address, and is not shown."""
    if not re.fullmatch(r"[A-Za-z_]\w{0,99}", variable):
        raise UserError(
            f"notify {service}: behind {FROM_ENVIRONMENT} stands the name of a variable"
        )
    if not environment.get(variable, "").strip():
        raise UserError(f"notify {service}: the environment has no variable {variable}; export it")
    return environment[variable]


def _parts(address: str) -> SplitResult | None:
    try:
        parts = urlsplit(address)
        usable = parts.hostname and address.isascii() and address.isprintable()
        return parts if usable and " " not in address and parts.port != 0 else None
    except ValueError:  # a port that is no number
        return None


def _cut(text: str) -> str:
    data = text.encode()
    if len(data) <= NOTICE.limit:
        return text
    return data[: NOTICE.limit - 3].decode(errors="ignore") + "…"


# -----------------------------------------------------------------------------
# Robots of chats


def _signature(key: str, message: str) -> str:
    digest = hmac.new(key.encode(), message.encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


def _feishu(notice: Notice, secret: str, now: float) -> tuple[dict[str, Any], str]:
    """A rich text ("post"), in which nothing of a text is a mention. Signed in the body, in seconds: the key
    is time and secret, the message is empty."""
    title, *lines = notice.text().split("\n")
    content = [[{"tag": "text", "text": line}] for line in lines]
    post = {"zh_cn": {"title": title, "content": content}}
    body: dict[str, Any] = {"msg_type": "post", "content": {"post": post}}
    if secret:
        at = str(int(now))
        body = {"timestamp": at, "sign": _signature(f"{at}\n{secret}", ""), **body}
    return body, ""


def _dingtalk(notice: Notice, secret: str, now: float) -> tuple[dict[str, Any], str]:
    """A text. Signed in the address, in milliseconds: the key is the secret, the message time and secret."""
    query = ""
    if secret:
        at = str(int(now * 1000))
        query = f"timestamp={at}&sign=" + quote_plus(_signature(secret, f"{at}\n{secret}"))
    return {"msgtype": "text", "text": {"content": notice.text()}}, query


def _wecom(notice: Notice, secret: str, now: float) -> tuple[dict[str, Any], str]:
    """A text of 2,048 bytes at most, in which `<@` would be a mention."""
    text = _cut(notice.text().replace("<@", "< @"))
    return {"msgtype": "text", "text": {"content": text}}, ""


def _slack(notice: Notice, secret: str, now: float) -> tuple[dict[str, Any], str]:
    """A text in which &, < and > are written as Slack asks for it, so that nothing is a link or a mention."""
    text = notice.text().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {"text": text}, ""


class _Chat:
    """A JSON body by HTTP, and an answer that says whether it was taken."""

    form = "https://HOST/PATH, with #SECRET behind it where the robot signs"
    schemes = ("https", "http")
    bodies: Mapping[str, Callable[[Notice, str, float], tuple[dict[str, Any], str]]] = {
        "feishu": _feishu,
        "dingtalk": _dingtalk,
        "wecom": _wecom,
        "slack": _slack,
    }

    @staticmethod
    def lacks(parts: SplitResult) -> bool:
        """Whether the address is too short to be one."""
        return parts.path.strip("/") == ""

    @classmethod
    def send(cls, channel: Channel, notice: Notice, timeout: float) -> None:
        body, query = cls.bodies[channel.service](notice, channel.address.fragment, time.time())
        parts = channel.address
        url = parts._replace(query="&".join(filter(None, (parts.query, query))), fragment="")
        request = urllib.request.Request(
            url.geturl(),
            data=json.dumps(body, ensure_ascii=False).encode(),
            headers={"Content-Type": "application/json; charset=utf-8"},
        )
        opener = urllib.request.build_opener(_StayHere)
        try:
            with opener.open(request, timeout=timeout) as answer:
                status, said = answer.status, _read(answer, timeout)
        except urllib.error.HTTPError as error:
            with error:
                status, said = error.code, _read(error, timeout)
        _judge(channel.service, status, said)


class _StayHere(urllib.request.HTTPRedirectHandler):
    """What is told to one address is told to no other."""

    def redirect_request(self, *_: Any) -> None:
        """There is no next address."""


def _read(answer: Any, timeout: float) -> str:
    """The beginning of an answer, from a server that may send a byte now and then."""
    deadline, data = time.monotonic() + timeout, b""
    while len(data) < NOTICE_ANSWER.limit and time.monotonic() < deadline:
        piece = answer.read1(NOTICE_ANSWER.limit - len(data))
        if not piece:
            break
        data += piece
    return data.decode(errors="replace")


def _judge(service: str, status: int, said: str) -> None:
    """Raise Undelivered for an answer that is not that of a service that has taken the notice."""
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    code = answer.get("code", answer.get("errcode"))
    taken = said.strip() == "ok" if service == "slack" else code == 0
    if status == 200 and taken:
        return
    word = answer.get("msg") or answer.get("errmsg") or said
    told = f"HTTP {status}" + (f", code {code}" if code is not None else "")
    later = status in LATER or status >= 500 or code in BUSY
    raise Undelivered(f"{told}: {word}" if word else told, lasting=not later)


# -----------------------------------------------------------------------------
# Mail


_A_PERSON = re.compile(r"[^\s@,;:<>()\[\]\"\\]+@[\w.-]+")


class _Mail:
    """A message by SMTP. A password goes over an encrypted connection only."""

    form = "smtp://USER@HOST:PORT?to=WHOM (smtps:// for TLS from the start)"
    schemes = ("smtp", "smtps")

    @staticmethod
    def lacks(parts: SplitResult) -> bool:
        """Whether nobody would get it."""
        whom = _asked(parts, "to")
        return not whom or not all(map(_A_PERSON.fullmatch, (*whom, _sender(parts))))

    @staticmethod
    def send(channel: Channel, notice: Notice, timeout: float) -> None:
        parts = channel.address
        user, text = unquote(parts.username or ""), notice.text()
        message = EmailMessage()
        message["Subject"] = text.split("\n")[0]
        message["From"], message["To"] = _sender(parts), ", ".join(_asked(parts, "to"))
        message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain=parts.hostname)
        message.set_content(text + "\n")
        try:
            with closing(_connected(parts, bool(user), timeout)) as server:
                if user:
                    _log_in(server, user, channel.password)
                _Mail._hand_over(server, message)
                with suppress(OSError):  # it has been taken
                    server.quit()
        except smtplib.SMTPRecipientsRefused as error:
            code, words = next(iter(error.recipients.values()))
            raise _refused(code, words) from None
        except smtplib.SMTPResponseException as error:
            raise _refused(error.smtp_code, error.smtp_error) from None

    @staticmethod
    def _hand_over(server: smtplib.SMTP, message: EmailMessage) -> None:
        """By RFC 6531 (SMTPUTF8) where an address is not ASCII."""
        try:
            server.send_message(message)
        except smtplib.SMTPNotSupportedError:
            text = "the server takes no address with letters beyond ASCII (SMTPUTF8)"
            raise Undelivered(text, lasting=True) from None


def _log_in(server: smtplib.SMTP, user: str, password: str) -> None:
    try:
        server.login(user, password)
    except smtplib.SMTPNotSupportedError:
        raise Undelivered("the server takes no password", lasting=True) from None
    except UnicodeEncodeError:  # smtplib sends none
        text = "user and password must be of ASCII characters"
        raise Undelivered(text, lasting=True) from None


def _asked(parts: SplitResult, name: str) -> list[str]:
    """The values of a name in an address's query, which may be several, with commas. A `+` is one (RFC 6068):
    it is of those that stand in the names of people."""
    pairs = (pair.partition("=") for pair in parts.query.split("&"))
    values = (unquote(value) for key, _, value in pairs if key == name)
    return [one for value in values for one in value.split(",") if one]


def _sender(parts: SplitResult) -> str:
    """Who is named as such: `from`, the user, or whom it is for."""
    user = unquote(parts.username or "")
    named = _asked(parts, "from") or (
        [user if "@" in user else f"{user}@{parts.hostname}"] if user else []
    )
    return (named or _asked(parts, "to"))[0]


def _connected(parts: SplitResult, needs_tls: bool, timeout: float) -> smtplib.SMTP:
    context = ssl.create_default_context()
    if parts.scheme == "smtps":
        port = parts.port or smtplib.SMTP_SSL_PORT
        return smtplib.SMTP_SSL(parts.hostname, port, timeout=timeout, context=context)
    server = smtplib.SMTP(parts.hostname, parts.port or (587 if needs_tls else 25), timeout=timeout)
    try:
        server.ehlo_or_helo_if_needed()
        if server.has_extn("starttls"):
            server.starttls(context=context)
        elif needs_tls:
            text = "the server offers no encryption, so the password was not sent"
            raise Undelivered(text, lasting=True)
    except BaseException:
        server.close()
        raise
    return server


def _refused(code: int, words: bytes | str) -> Undelivered:
    said = words.decode(errors="replace") if isinstance(words, bytes) else words
    return Undelivered(f"SMTP {code}: {said}", lasting=code >= 500)


SERVICES = (*_Chat.bodies, "mail")
