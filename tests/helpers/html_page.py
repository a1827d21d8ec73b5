"""A page as a browser would read it: which tags and addresses it has, and whether it is harmless."""

import html.parser

from finetuning.events.address import pinned_address

VOID = {"meta", "br", "hr", "img", "circle", "line", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """Tags and addresses of a page; complains of tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag, tag


def assert_harmless(text: str) -> Page:
    parsed = Page(text)
    assert not parsed.tags & {"script", "img", "iframe", "object", "link", "form"}
    own = {pinned_address()}  # TensorBoard on this machine: nothing of the data is in it
    outside = [address for address in parsed.addresses if not address.startswith("#")]
    assert own.issuperset(outside), outside
    assert not parsed.handlers
    assert "default-src 'none'" in text
    return parsed
