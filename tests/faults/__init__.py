"""Fault injection: real kills, full disks, flipped bits and hostile input against a real training run.

uv run python -m tests.faults --quick
uv run python -m tests.faults --all
uv run python -m tests.faults --only F02,F09 --counts F09=20
"""
