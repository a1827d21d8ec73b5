"""Real runs with a fault put into each: does the monitor find it, name it, and stay silent otherwise?

    uv run python -m benchmarks.faults.injected_faults            table; last line JSON
    uv run python -m benchmarks.faults.injected_faults --write    also the last section of docs/monitoring.md
    uv run python -m benchmarks.faults.injected_faults --only healthy

Every run is the real trainer on a tiny model, a process of its own: one healthy, one whose learning rate
is multiplied by 300 at step 150, one whose data reader sleeps, one that keeps 4 MB a step.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from datetime import date
from pathlib import Path

from finetuning.common.formatting import four_digits

ROOT = Path(__file__).resolve().parents[2]

STEPS = 300
FAULTS = {
    "healthy": set(),
    "learning rate × 300 from step 150": {"Gradient_Explosion", "Loss_Spike", "Divergence"},
    "data reader sleeps 0.2 s a batch": {"Data_Starvation"},
    "4 MB kept per step": {"Memory_Leak"},
}
PAGE = ROOT / "docs" / "monitoring.md"
HEADING = "## Injected faults\n"


def train(fault: str, output_dir: str, inputs: dict[str, str]) -> None:
    """One run in this process, with its fault."""
    import direct_finetuning_with_existing_modules as program
    from finetuning.training import optimizer

    kept: list[bytearray] = []
    learning_rate_at, build_batch = program.learning_rate_at, optimizer.build_batch

    def exploding(step: int, *args: object, **kwargs: object) -> float:
        return learning_rate_at(step, *args, **kwargs) * (300 if step >= 150 else 1)

    def waiting(*args: object, **kwargs: object) -> float:
        time.sleep(0.4)
        return learning_rate_at(*args, **kwargs)

    def sleeping(*args: object, **kwargs: object) -> object:
        time.sleep(0.2)
        return build_batch(*args, **kwargs)

    def leaking(*args: object, **kwargs: object) -> object:
        kept.append(bytearray(b"x") * (4 << 20))
        return build_batch(*args, **kwargs)

    if "learning rate" in fault:
        program.learning_rate_at = exploding
    elif "sleeps" in fault:
        optimizer.build_batch = sleeping
    elif "kept" in fault:
        optimizer.build_batch = leaking
        program.learning_rate_at = waiting  # memory is read once a second
    config = program.DirectTrainingConfig(
        model_name=inputs["model"],
        data_path=(inputs["data"],),
        cache_dir=inputs["cache"],
        output_dir=output_dir,
        max_steps=STEPS,
        max_seq_length=512,
        lora_r=0,  # all weights: a run that has learned something, and so has something to lose
        learning_rate=3e-3,
        logging_steps=1,
        eval_steps=0,
        num_probes=0,
        save_steps=0,
        forgetting=False,  # random weights know nothing that could be forgotten
    )
    program.DirectTrainer(config, quiet=True).train()


def run(fault: str, inputs: dict[str, str], folder: Path) -> list[dict]:
    """The alerts of one run, as it recorded them."""
    output = folder / fault.replace(" ", "_").replace("×", "x")
    process = multiprocessing.get_context("spawn").Process(
        target=train, args=(fault, str(output), inputs)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{fault}: the run ended with code {process.exitcode}")
    found = list(output.glob("training_logs/*/alerts.jsonl"))
    text = found[0].read_text(encoding="utf-8") if found else ""
    lines = text.replace(f"{folder}/", "").splitlines()  # samples are named by their file alone
    return [json.loads(line) for line in lines]


def row(fault: str, wanted: set[str], alerts: list[dict]) -> dict:
    """What was injected, what spoke, whether it should have."""
    spoke = list(dict.fromkeys(alert["name"] for alert in alerts))
    found = bool(wanted & set(spoke)) if wanted else not spoke
    false = sorted(set(spoke) - wanted)
    return {"fault": fault, "spoke": spoke, "found": found, "false": false, "alerts": alerts}


def in_words(value: object) -> str:
    """Evidence as it is shown: samples one after the other, numbers with four digits."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return four_digits(value) if isinstance(value, float) else str(value)


def section(rows: list[dict]) -> str:
    """The last section of docs/monitoring.md."""
    parts = [
        f"{HEADING}\n`uv run python -m benchmarks.faults.injected_faults --write`, {date.today()}: "
        f"real runs of {STEPS} steps on a\ntiny model of random weights, one logged point a step. "
        "What is forgotten is not measured, since such a model knows\nnothing.\n\n",
        "| fault | alerts | found | false alarms |\n| --- | --- | --- | --- |\n",
    ]
    for r in rows:
        spoke = ", ".join(r["spoke"]) or "none"
        false = ", ".join(r["false"]) or "none"
        parts.append(f"| {r['fault']} | {spoke} | {'yes' if r['found'] else 'NO'} | {false} |\n")
    for r in rows:
        for alert in {a["name"]: a for a in reversed(r["alerts"])}.values():
            evidence = "; ".join(f"{k}: {in_words(v)}" for k, v in alert["evidence"].items())
            parts.append(
                f"\n**{r['fault']}**: {alert['name']} at step {alert['step']}, value {alert['value']:.4g}, "
                f"threshold {alert['threshold']:.4g}. {evidence}\n\n> {alert['advice']}\n"
            )
    return "".join(parts)


def main() -> None:
    """All runs, the table, the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=PAGE,
        help="a file, whose text before this section stays; docs/monitoring.md if none is said",
    )
    parser.add_argument(
        "--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="these runs"
    )
    options = parser.parse_args()
    if options.write == PAGE and options.only != list(FAULTS):
        parser.error(f"{PAGE.name} shows all runs: give --write another file, or leave --only out")
    from tests.helpers.tiny_model import make_tiny_data, make_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = {
            "model": str(make_tiny_model(folder / "model")),
            "data": str(make_tiny_data(folder / "data.jsonl", 200)),
            "cache": str(folder / "cache"),
        }
        rows = [row(f, FAULTS[f], run(f, inputs, folder)) for f in options.only]
    for r in rows:
        print(
            f"{r['fault']}: {', '.join(r['spoke']) or 'silent'}; found {r['found']}; false {r['false']}"
        )
    if options.write:
        path = options.write
        before = path.read_text(encoding="utf-8").partition(HEADING)[0] if path.exists() else ""
        path.write_text(before + section(rows), encoding="utf-8")
    print(json.dumps({r["fault"]: {"found": r["found"], "false": r["false"]} for r in rows}))


if __name__ == "__main__":
    main()
