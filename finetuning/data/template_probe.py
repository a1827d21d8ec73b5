"""A model's chat template, rendered once in a child process with limits on time and memory.

Jinja's sandbox keeps a template away from Python; it does not keep it from computing for ever or from
filling the memory. So a template of a stranger is tried here first.
"""

import contextlib
import functools
import json
import sys

from finetuning.common.bounds import PROBE_WALL, TEMPLATE_CPU, TEMPLATE_MEMORY
from finetuning.common.errors import UserError
from finetuning.common.limited import Limits, run_limited

LIMITS = Limits(TEMPLATE_MEMORY, TEMPLATE_CPU, PROBE_WALL)
_TURNS = [
    {"role": "user", "content": "Q0q"},
    {"role": "assistant", "content": "A0a", "reasoning_content": "R0r"},
]


@functools.cache
def check_template(template: str) -> None:
    """UserError if a short conversation takes the template more than the limits; else nothing.

    What else is wrong with it shows when it is rendered.
    """
    if run_limited(__name__, (), LIMITS, given=json.dumps(template).encode()).code:
        raise UserError(
            "the model's chat template does not render a short conversation within "
            f"{TEMPLATE_CPU} and {TEMPLATE_MEMORY}; use the model's original template, and don't trust "
            "this one"
        )


def _render(template: str) -> None:
    """As transformers renders it: same sandbox, same options."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; here it only has to be understood."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = json.dumps
    environment.globals |= {"raise_exception": str, "strftime_now": str}
    faults = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
    with contextlib.suppress(*faults, AttributeError, RecursionError):
        compiled = environment.from_string(template)
        for turns, prompt in ((_TURNS[:1], True), (_TURNS, False)):
            compiled.render(messages=turns, tools=None, add_generation_prompt=prompt)


if __name__ == "__main__":
    _render(json.load(sys.stdin))
