"""What every program of this project has around its work: an exit code, and one line where it ends early."""

import sys
from collections.abc import Callable

from errors import RunStopped, UserError
from safe_text import clean_line, redact


def exit_code(program: Callable[[], object]) -> int:
    """Run a program: 0 done, 2 bad input, 3 it could not go on, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not be UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        program()
    except (UserError, RunStopped) as error:
        print(f"error: {clean_line(redact(str(error)))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3
    except KeyboardInterrupt:
        return 130
    return 0
