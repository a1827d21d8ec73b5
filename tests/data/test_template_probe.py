"""A chat template that computes for ever or fills the memory is refused; any other passes the probe.

uv run pytest -m "not long" tests/data/test_template_probe.py
"""

import dataclasses
import json
import sys
import time
from types import SimpleNamespace

import pytest

from finetuning.common.bounds import PROBE_WALL, TEMPLATE_CPU
from finetuning.common.errors import UserError
from finetuning.common.limited import STOPPED, run_limited
from finetuning.data import template_probe
from finetuning.data.chat_template import chat_format
from finetuning.data.template_probe import check_template
from finetuning.model.demo_model import CHAT_TEMPLATE
from tests.helpers.qwen3_tokenizer import QWEN3_TEMPLATE

pytestmark = pytest.mark.slow

ENDLESS = (
    "{% for i in range(90000) %}{% for j in range(90000) %}{{ i * j }}{% endfor %}{% endfor %}"
)
needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="no resource limits on Windows")


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        QWEN3_TEMPLATE,
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ messages[7].content }}",  # wrong, but not dangerous: said when it is rendered
        "{{ ''.__class__.__mro__ }}",
        "{% if %}",
    ],
)
def test_templates_that_come_to_an_end_pass(template: str):
    check_template(template)


@needs_limits
def test_one_that_fills_the_memory_is_refused():
    with pytest.raises(UserError, match="does not render a short conversation"):
        check_template("{{ 'x' * 3000000000 }}")


@needs_limits
def test_one_that_never_ends_is_refused(monkeypatch):
    # The parent's clock, before the limit.
    hurried = dataclasses.replace(
        template_probe.LIMITS, wall=dataclasses.replace(PROBE_WALL, limit=2)
    )
    monkeypatch.setattr(template_probe, "LIMITS", hurried)
    began = time.monotonic()
    with pytest.raises(UserError, match="does not render a short conversation"):
        check_template(ENDLESS)
    assert time.monotonic() - began < 15


@needs_limits
def test_the_limit_on_time_works_without_the_parent():
    cpu = dataclasses.replace(TEMPLATE_CPU, limit=1)
    limits = dataclasses.replace(template_probe.LIMITS, cpu=cpu)
    given = json.dumps(ENDLESS).encode()
    ended = run_limited("finetuning.data.template_probe", (), limits, given=given)
    assert ended.code < 0 and ended.code != STOPPED


def test_a_template_that_breaks_out_is_a_clear_refusal():
    def render(*_: object, **__: object) -> str:
        import jinja2

        raise jinja2.exceptions.SecurityError("access to attribute '__init__' is unsafe")

    tokenizer = SimpleNamespace(chat_template="{{ x.__init__ }}", apply_chat_template=render)
    with pytest.raises(UserError, match=r"chat template.*__init__"):
        chat_format(tokenizer)
