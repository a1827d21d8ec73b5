"""A chat template that computes for ever or fills the memory is refused; any other passes the probe.

uv run pytest -m "not long" tests/data/test_template_probe.py
"""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetuning.common.errors import UserError
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
    monkeypatch.setattr(template_probe, "WALL_SECONDS", 2)  # the parent's clock, before the limit
    began = time.monotonic()
    with pytest.raises(UserError, match="does not render a short conversation"):
        check_template(ENDLESS)
    assert time.monotonic() - began < 15


@needs_limits
def test_the_limit_on_time_works_without_the_parent():
    code = "from finetuning.data import template_probe as t; "
    code += "t.CPU_SECONDS = 1; t._limit(); t._render(t.sys.argv[1])"
    folder = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", code, ENDLESS], cwd=folder, timeout=60)
    assert child.returncode < 0


def test_a_template_that_breaks_out_is_a_clear_refusal():
    def render(*_: object, **__: object) -> str:
        import jinja2

        raise jinja2.exceptions.SecurityError("access to attribute '__init__' is unsafe")

    tokenizer = SimpleNamespace(chat_template="{{ x.__init__ }}", apply_chat_template=render)
    with pytest.raises(UserError, match=r"chat template.*__init__"):
        chat_format(tokenizer)
