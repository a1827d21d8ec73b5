"""How far a run has converged, which way its loss is going and where it will end.

A loss curve is squeezed into at most 128 bins (bounded state, the same after an interruption), and
`finetuning/monitoring/curve_fit.py` reads score and forecast off them. The formulas stand in the docstrings
and in docs/convergence.md. By itself:

    uv run python convergence.py RUN_DIR|losses.csv|trainer_state.json [--upto 0.5] [--json]
"""

from finetuning.common import process  # first: Ctrl-C gets an answer while the libraries are loaded

if __name__ == "__main__":
    process.imports_begin()

import json
from dataclasses import dataclass

import tyro
from rich.cells import cell_len

from finetuning.common.arguments import parsed
from finetuning.common.errors import UserError, exit_code
from finetuning.common.formatting import four_digits
from finetuning.common.language import translated
from finetuning.common.paths import expanded
from finetuning.monitoring.convergence import describe
from finetuning.monitoring.loss_curves import read_curve

process.imports_are_done()


def _print_description(result: dict) -> None:
    def shown(value: float | None) -> str:
        return four_digits(value, translated("not known yet"))

    def with_interval(name: str) -> str:
        low, high = result[f"{name}_low"], result[f"{name}_high"]
        interval = "" if low is None else f"  (80%: {shown(low)} … {shown(high)})"
        return shown(result[name]) + interval

    rows = {
        "step": f"{shown(result['step'])}/{result['total_steps']}",
        "convergence score": with_interval("score"),
        "loss trend, per 100 steps": shown(result["trend"]),
        "forecast final loss": with_interval("forecast"),
        "steps to 99% gain": shown(result["steps_to_99_percent"]),
        "alerts": ", ".join(result["alerts"]) or translated("none"),
    }
    names = list(map(translated, rows))
    width = max(map(cell_len, names)) + 1
    for name, text in zip(names, rows.values(), strict=True):
        print(name + " " * (width - cell_len(name)) + text)
    if result["steps_counted"]:
        print(
            translated("The log does not show its steps: each line with a loss is counted as one.")
        )


@dataclass(frozen=True)
class Options:
    """Score, trend and forecast of a recorded run."""

    run: tyro.conf.Positional[str]
    """Run directory of ours, metrics.jsonl, csv (columns step, loss, ...) or trainer_state.json."""
    upto: float = 1.0
    """Use only this first share of the planned steps; the forecast stays one for the last of them."""
    json: bool = False
    """Print one JSON object."""


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit code."""
    return exit_code(lambda: show(parsed("convergence.py", Options, arguments)))


def show(options: Options) -> None:
    """Print what the monitor makes of a run. Raises UserError."""
    if not 0 < options.upto <= 1:
        raise UserError(f"--upto {options.upto:g}: give a share of the run, over 0 and up to 1")
    result = describe(read_curve(expanded(options.run, "run")), options.upto)
    if options.json:
        print(json.dumps(result, allow_nan=False))
    else:
        _print_description(result)


if __name__ == "__main__":
    process.exit_process(main())
