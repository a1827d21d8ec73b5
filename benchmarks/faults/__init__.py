"""Fault injection: real kills, full disks, flipped bits and hostile input against a real training run.

uv run python -m benchmarks.faults --quick
uv run python -m benchmarks.faults --all
uv run python -m benchmarks.faults --only F02,F09 --counts F09=20
"""
