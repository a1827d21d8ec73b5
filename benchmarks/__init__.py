"""Measurements and fault injection: one file for each claim, run as `python -m benchmarks.<name>`."""
