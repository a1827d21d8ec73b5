"""Services of chats and mail on this machine, which take what their public documentation describes and refuse
all else, as the real ones do."""

import base64
import hashlib
import hmac
import json
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN, SECRET = "Qx7pl41nHook", "SECb4rW0rd5sign"
HANGS, DRIPS = (0, ""), (0, "a letter now and then")  # instead of an answer


def hmac_sha256(key: str, message: str) -> str:
    digest = hmac.new(key.encode(), message.encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


# -----------------------------------------------------------------------------
# What each service takes: (text, fault)


def feishu(query: dict, body: dict, secret: str) -> tuple[str, str]:
    """https://open.feishu.cn/open-apis/bot/v2/hook/…, 自定义机器人使用指南."""
    signed = {"timestamp", "sign"} if secret else set()
    if body.keys() != {"msg_type", "content"} | signed or query:
        return "", "Bad Request"
    if secret:
        at = body["timestamp"]
        fresh = isinstance(at, str) and abs(time.time() - int(at)) < 3600
        if not fresh or body["sign"] != hmac_sha256(f"{at}\n{secret}", ""):
            return "", "sign match fail or timestamp is not within one hour from current time"
    post = body["content"]["post"]["zh_cn"]
    assert body["msg_type"] == "post" and post.keys() == {"title", "content"}
    elements = [element for line in post["content"] for element in line]
    assert all(e.keys() == {"tag", "text"} and e["tag"] == "text" for e in elements)
    return "\n".join([post["title"], *(element["text"] for element in elements)]), ""


def dingtalk(query: dict, body: dict, secret: str) -> tuple[str, str]:
    """https://oapi.dingtalk.com/robot/send?access_token=…, 自定义机器人接入."""
    if secret:
        at = query.get("timestamp", "0")
        if abs(time.time() * 1000 - int(at)) > 3_600_000:
            return "", "invalid timestamp"
        if query.get("sign") != hmac_sha256(secret, f"{at}\n{secret}"):
            return "", "sign not match"
    assert query.keys() == {"access_token", *(("timestamp", "sign") if secret else ())}
    assert body.keys() == {"msgtype", "text"} and body["msgtype"] == "text"
    assert body["text"].keys() == {"content"}
    return body["text"]["content"], ""


def wecom(query: dict, body: dict, secret: str) -> tuple[str, str]:
    """https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=…, 群机器人配置说明."""
    assert query.keys() == {"key"} and body.keys() == {"msgtype", "text"}
    content = body["text"]["content"]
    return content, "" if len(content.encode()) <= 2048 else "content exceed max length"


def slack(query: dict, body: dict, secret: str) -> tuple[str, str]:
    """https://hooks.slack.com/services/T…/B…/…, Sending messages using incoming webhooks."""
    assert not query and body.keys() == {"text"}
    text = body["text"].replace("&lt;", "‹").replace("&gt;", "›").replace("&amp;", "⅋")
    assert not set("<>&") & set(text), "not escaped"
    return text.replace("‹", "<").replace("›", ">").replace("⅋", "&"), ""


TAKES = {"feishu": feishu, "dingtalk": dingtalk, "wecom": wecom, "slack": slack}
PATHS = {
    "feishu": f"/open-apis/bot/v2/hook/{TOKEN}",
    "dingtalk": f"/robot/send?access_token={TOKEN}",
    "wecom": f"/cgi-bin/webhook/send?key={TOKEN}",
    "slack": f"/services/T0/B0/{TOKEN}",
}
FAULT_CODES = {"feishu": 19021, "dingtalk": 310000, "wecom": 40058}


def taken(service: str) -> tuple[int, str]:
    """The answer of a service that has taken a message."""
    if service == "slack":
        return 200, "ok"
    if service == "feishu":
        answer = {
            "StatusCode": 0,
            "StatusMessage": "success",
            "code": 0,
            "data": {},
            "msg": "success",
        }
        return 200, json.dumps(answer)
    return 200, json.dumps({"errcode": 0, "errmsg": "ok"})


def refused(service: str, fault: str) -> tuple[int, str]:
    """The answer of one that has not: those of China say so with status 200."""
    if service == "slack":
        return 400, "invalid_payload"
    names = ("code", "msg") if service == "feishu" else ("errcode", "errmsg")
    return 200, json.dumps(dict(zip(names, (FAULT_CODES[service], fault), strict=True)))


# -----------------------------------------------------------------------------
# Chats


@dataclass
class ChatServer:
    """A service. first: answers (status, text) to the first requests, instead of its own."""

    service: str
    secret: str = ""
    first: list[tuple[int, str]] = field(default_factory=list)
    always: tuple[int, str] | None = None
    texts: list[str] = field(default_factory=list)  # that were taken
    times: list[float] = field(default_factory=list)  # of all requests, time.monotonic()
    address: str = ""
    let_go: threading.Event = field(default_factory=threading.Event)

    @property
    def setting(self) -> str:
        return f"{self.service}={self.address}"

    def answer(self, target: str, headers: Any, data: bytes) -> tuple[int, str]:
        self.times.append(time.monotonic())
        answer = self.first.pop(0) if self.first else self.always
        if answer is not None:
            return answer
        parts, expected = urlsplit(target), urlsplit(PATHS[self.service])
        assert parts.path == expected.path and headers["Content-Type"].startswith(
            "application/json"
        )
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        assert TOKEN in (*query.values(), *parts.path.split("/"))
        text, fault = TAKES[self.service](query, json.loads(data.decode()), self.secret)
        if fault:
            return refused(self.service, fault)
        self.texts.append(text)
        return taken(self.service)


def _handler(chat: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                status, text = chat.answer(self.path, self.headers, data)
            except (AssertionError, KeyError, ValueError) as error:
                status, text = 400, f"not of the documented form: {error!r}"
            if (status, text) == HANGS:
                chat.let_go.wait(30)
                return
            if (status, text) == DRIPS:
                return self.drip()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", text)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def drip(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while not chat.let_go.wait(0.02):
                    self.wfile.write(b".")

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    return Handler


@contextmanager
def chat_server(service: str, *, secret: str = "", **options: Any) -> Iterator[ChatServer]:
    """A service at an address of its own."""
    chat = ChatServer(service, secret, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(chat))
    chat.address = f"http://127.0.0.1:{server.server_port}{PATHS[service]}"
    chat.address += f"#{secret}" * bool(secret)
    with _served(server):
        try:
            yield chat
        finally:
            chat.let_go.set()


@contextmanager
def _served(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# -----------------------------------------------------------------------------
# Mail


@dataclass
class MailServer:
    """What a server of mail was given. tls: it offers STARTTLS, or speaks TLS `at_once`."""

    port: int = 0
    tls: ssl.SSLContext | None = None
    at_once: bool = False
    takes_utf8: bool = False
    refuses: dict[str, str] = field(default_factory=dict)  # command -> answer
    mails: list[EmailMessage] = field(default_factory=list)
    whom: list[str] = field(default_factory=list)
    logins: list[tuple[str, str, bool]] = field(default_factory=list)  # user, password, encrypted


def _smtp(mail: MailServer) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        encrypted = False

        def say(self, line: str) -> None:
            self.wfile.write(f"{line}\r\n".encode())

        def encrypt(self) -> None:
            self.request = mail.tls.wrap_socket(self.request, server_side=True)
            self.encrypted = True
            self.setup()

        def handle(self) -> None:
            with suppress(OSError):
                if mail.at_once:
                    self.encrypt()
                self.say("220 here")
                while line := self.rfile.readline().decode().strip():
                    word, _, rest = line.partition(" ")
                    if word.upper() in mail.refuses:
                        self.say(mail.refuses[word.upper()])
                    elif not (line.isascii() or mail.takes_utf8):
                        self.say("553 not a mailbox")
                    elif self.command(word.upper(), rest):
                        return

        def command(self, word: str, rest: str) -> bool:
            if word == "EHLO":
                extensions = ["here", *["STARTTLS"] * bool(mail.tls and not self.encrypted)]
                extensions += ["8BITMIME", "SMTPUTF8"] * mail.takes_utf8
                for name in extensions:
                    self.say(f"250-{name}")
                self.say("250 AUTH PLAIN")
            elif word == "STARTTLS":
                self.say("220 go on")
                self.encrypt()
            elif word == "AUTH":
                _, user, password = base64.b64decode(rest.split()[1]).decode().split("\0")
                mail.logins.append((user, password, self.encrypted))
                self.say("235 welcome")
            elif word == "DATA":
                self.say("354 go on")
                self.take()
                self.say("250 taken")
            elif word == "QUIT":
                self.say("221 bye")
                return True
            else:
                if word == "RCPT":
                    mail.whom.append(rest.partition("<")[2].partition(">")[0])
                self.say("250 ok")
            return False

        def take(self) -> None:
            lines = []
            while (line := self.rfile.readline()) not in (b".\r\n", b""):
                lines.append(line.removeprefix(b".") if line.startswith(b"..") else line)
            mail.mails.append(message_from_bytes(b"".join(lines), policy=policy.default))

    return Handler


@contextmanager
def mail_server(**options: Any) -> Iterator[MailServer]:
    """A server of mail at a port of its own."""
    mail = MailServer(**options)
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _smtp(mail))
    server.daemon_threads = True
    mail.port = server.server_address[1]
    with _served(server):
        yield mail


def certificate(folder: Path, run: Callable = subprocess.run) -> tuple[ssl.SSLContext, Path]:
    """The context of a server with a new certificate for 127.0.0.1, and the file that trusts it."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-addext", "keyUsage=digitalSignature,keyCertSign"]
    command += ["-keyout", str(key), "-out", str(cert)]
    run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, cert


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
