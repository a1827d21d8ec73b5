"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where (file:line) and what to do.

    `main()` prints it as one line and exits with code 2; nothing else catches it.
    """
