"""What workers begin with under a mutant of F28 and F31; alone in a file, as each of them imports it anew."""

from collections.abc import Callable


def begin_worker(parent: int, initializer: Callable | None, initargs: tuple) -> None:
    """As the program's, but without a word on whose the worker is: it does not end with its parent."""
    if initializer is not None:
        initializer(*initargs)
