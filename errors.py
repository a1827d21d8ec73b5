"""The two ways in which a run says no: the input is bad, or it can't go on."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where (file:line) and what to do.

    `main()` prints it as one line and exits with code 2; nothing else catches it.
    """


class RunStopped(Exception):
    """The run can't go on (disk full, non-finite gradients, out of memory); its last checkpoint is intact.

    `main()` prints the message as one line and exits with code 3.
    """
