"""Units of memory, in bytes."""

GIB, KIB = 2**30, 2**10
