"""Runs a command for a process, and ends it with all that it started when that process is gone (Linux).

    python -I -S supervisor.py PARENT COMMAND ARGUMENTS...

It ends as the command did, once nothing that the command started is left; at once after SIGTERM, which the
kernel sends when PARENT ends, however that ends. Whoever loses its parent in between becomes a child of this
process (PR_SET_CHILD_SUBREAPER), so none is lost, whatever session or group it has put itself into. It
imports nothing of ours: it has to start quickly.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time

_POLL_SECONDS = 0.01
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    """The command above."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, _end_all)
    control = ctypes.CDLL(None).prctl
    control(_PR_SET_CHILD_SUBREAPER, 1)
    control(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it has ended meanwhile
        return
    usual = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM]  # Python's own ways are none of its
    try:
        child = os.posix_spawnp(command[0], command, os.environ, setsigdef=usual)
    except OSError as error:
        sys.exit(error.strerror)
    os.close(0)  # what comes is for the command alone
    _end_as(_status_of(child))


def _status_of(child: int) -> int:
    """How the command ended, when there is no other process left."""
    status = 0
    while True:
        try:
            ended, how = os.wait()
        except ChildProcessError:
            return status
        if ended == child:
            status = how


def _end_as(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):  # these have no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _end_all(*_: object) -> None:
    """End all children; theirs become ours, until there is none."""
    while True:
        for child in _children():
            with contextlib.suppress(PermissionError):  # another user's, through sudo: wait for it
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            os._exit(128 + signal.SIGTERM)
        time.sleep(_POLL_SECONDS)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


if __name__ == "__main__":
    main()
