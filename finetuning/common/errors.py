"""The two ways to say no, and the exit code of a program that met one of them."""

import sys
from collections.abc import Callable

from finetuning.common import language
from finetuning.common.text import clean_line, redact


class UserError(Exception):
    """Bad input. The message says what is wrong, where (file:line) and what to do.

    `main()` prints it as one line and exits with code 2; nothing else catches it.
    """


class RunStopped(Exception):
    """The run can't go on (disk full, non-finite gradients, out of memory); its last checkpoint is intact.

    `main()` prints the message as one line and exits with code 3.
    """


def exit_code(program: Callable[[], object]) -> int:
    """Run a program: 0 done, 2 bad input, 3 it could not go on, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not be UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    language.use("auto")
    try:
        program()
    except (UserError, RunStopped) as error:
        line = clean_line(redact(str(error)))
        print(language.translated(f"error: {line}"), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3
    except KeyboardInterrupt:
        print(language.translated("interrupted"), file=sys.stderr)
        return 130
    return 0
