"""A model's chat template, rendered once in a child process with limits on time and memory.

Jinja's sandbox keeps a template away from Python; it does not keep it from computing for ever or from
filling the memory. So a template of a stranger is tried here first.
"""

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path

from finetuning.common.errors import UserError

CPU_SECONDS, WALL_SECONDS = 5, 30  # the second is for a machine that is busy
MEMORY_BYTES = 1 << 30
_TURNS = [
    {"role": "user", "content": "Q0q"},
    {"role": "assistant", "content": "A0a", "reasoning_content": "R0r"},
]


@functools.cache
def check_template(template: str) -> None:
    """UserError if a short conversation takes the template more than 5 s or 1 GiB; else nothing.

    What else is wrong with it shows when it is rendered.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[2],  # where this package is found
            input=json.dumps(template).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
        )
        ended_well = child.returncode == 0
    except subprocess.TimeoutExpired:
        ended_well = False
    if not ended_well:
        raise UserError(
            f"the model's chat template does not render a short conversation within {CPU_SECONDS} s and "
            f"{MEMORY_BYTES >> 30} GiB; use the model's original template, and don't trust this one"
        )


def _limit() -> None:
    """Limits on this process, where the system has them."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock remains
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    with contextlib.suppress(ValueError, OSError):  # macOS may refuse
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


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
    _limit()
    _render(json.load(sys.stdin))
