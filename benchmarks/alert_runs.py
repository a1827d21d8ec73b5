"""Real small runs of many shapes, recorded for the library of the alerts (`alert_quality.py`).

    uv run python -m benchmarks.alert_runs            writes benchmarks/results/alert_runs.json.gz
    uv run python -m benchmarks.alert_runs --only packed --seeds 1 --steps 30 --write FILE

Every run is the real trainer on a tiny model, all of its weights or adapters, each shape with four seeds of
data and training; five more have a fault that is real. Ten minutes of one core.
"""

import argparse
import gzip
import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

RECORDED = Path(__file__).with_name("results") / "alert_runs.json.gz"
KEPT = re.compile(
    r"Training/(Loss|Learning_Rate|Gradient_Norm(_Max)?|Epoch|Token_Accuracy|By_.+)|Eval/Loss|LoRA/.+"
    r"|Throughput/(Step_Seconds.*|Tokens_Seen)|Memory/Host_(RSS_MB|Percent)|Monitoring/NonFinite_Steps"
)
SEEDS = (1, 2, 4, 5)
WORDS = [
    "密钥",
    "分组",
    "杂凑",
    "签名",
    "证书",
    "随机数",
    "协议",
    "曲线",
    "填充",
    "轮函数",
    "模幂",
    "扩域",
]


def one_template(rng: random.Random, i: int) -> dict[str, str]:
    """The same words but for a number."""
    return {
        "question": f"第{i}题：SM4的轮数是多少？",
        "thinking": f"SM4共32轮，见第{i}条。",
        "answer": "32轮。",
    }


def free_text(rng: random.Random, i: int, length: int = 12) -> dict[str, str]:
    """Words in random order, which can hardly be learned."""
    text = "，".join(
        f"{rng.choice(WORDS)}{rng.randrange(1000)}" for _ in range(rng.randrange(3, length))
    )
    return {
        "question": f"第{i}题：{rng.choice(WORDS)}？",
        "thinking": text,
        "answer": f"{text[:9]}{i}",
    }


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def data_of(shape: str, folder: Path, seed: int) -> tuple[str, ...]:
    """The files of a shape."""
    rng = random.Random(seed)
    if shape == "bimodal":  # 45 of 60 of one template
        rows = [one_template(rng, i) if i % 4 else free_text(rng, i, 20) for i in range(60)]
        return (write(folder / "a.jsonl", rows),)
    if shape == "mixed sources":
        makers: dict[str, Callable] = {"a": one_template, "b": free_text}
        files = [
            write(folder / f"{n}.jsonl", [m(rng, i) for i in range(40)]) for n, m in makers.items()
        ]
        long = [free_text(rng, i, 40) for i in range(20)]
        return (*files, write(folder / "c.jsonl", long))
    number = {"tiny data": 8, "short epochs": 24}.get(shape, 150)
    length = 40 if shape == "unequal lengths" else 12
    return (write(folder / "a.jsonl", [free_text(rng, i, length) for i in range(number)]),)


SETTINGS: dict[str, dict] = {
    "packed": {},
    "bimodal": {"packing": False},
    "mixed sources": {"packing": False},
    "short epochs": {"packing": False, "batch_size": 4},
    "tiny data": {"packing": False},
    "long warm-up": {"warmup_ratio": 0.6},
    "unequal lengths": {"packing": False},
    "adapters": {"lora_r": 8, "learning_rate": 1e-2, "eval_steps": 40},
    "constant rate": {"lr_schedule": "constant", "packing": False, "batch_size": 2},
}
FAULTS = {  # real ones: shape, factor of the learning rate from step 150
    "packed": 300.0,
    "bimodal": 300.0,
    "mixed sources": 100.0,
    "unequal lengths": 100.0,
    "constant rate": 300.0,
}


def train(run: dict, folder: Path, model: str, steps: int) -> list[list]:
    """[[step, {tag: value}], ...] of one run: its shape, seed, and the factor of its rate from step 150."""
    import direct_finetuning_with_existing_modules as program

    folder.mkdir(parents=True)
    shape, seed, factor = (run[name] for name in ("shape", "seed", "factor"))
    usual = program.learning_rate_at

    def changed(step: int, *args: object, **kwargs: object) -> float:
        return usual(step, *args, **kwargs) * (factor if step >= 150 else 1)

    settings = {
        "lora_r": 0,
        "learning_rate": 3e-3,
        "eval_steps": 0,
        "eval_fraction": 0.1,
        "max_seq_length": 512,
        **SETTINGS[shape],
    }
    config = program.DirectTrainingConfig(
        model_name=model,
        data_path=data_of(shape, folder, seed),
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        max_steps=steps,
        logging_steps=1,
        num_probes=0,
        save_steps=0,
        seed=seed,
        **settings,
    )
    program.learning_rate_at = changed
    try:
        program.DirectTrainer(config, quiet=True).train()
    finally:
        program.learning_rate_at = usual
    (path,) = (folder / "out").glob("training_logs/*/metrics.jsonl")
    rows: dict[int, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kept = {_named(t): _short(v) for t, v in record["metrics"].items() if KEPT.fullmatch(t)}
        rows.setdefault(record["step"], {}).update(kept)
    return [[step, rows[step]] for step in sorted(rows)]


def _named(tag: str) -> str:
    """A source by its file's name, without the folder of the run."""
    return re.sub(r"(By_Source/).*/", r"\1", tag)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def main() -> None:
    """Record all runs, or some."""
    from tests.helpers.tiny_model import make_tiny_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", type=Path, default=RECORDED)
    options = parser.parse_args()
    todo = [(s, seed, 1.0) for seed in options.seeds for s in SETTINGS]
    todo += [(s, 7, factor) for s, factor in FAULTS.items() if options.steps > 150]
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        model = str(make_tiny_model(Path(name) / "model"))
        for shape, seed, factor in todo:
            if shape in options.only:
                run = {"shape": shape, "seed": seed, "factor": factor}
                folder = Path(name) / f"{shape} {seed} {factor:g}".replace(" ", "_")
                runs.append(run | {"rows": train(run, folder, model, options.steps)})
                print(f"{shape}, seed {seed}, rate x {factor:g}", flush=True)
    options.write.parent.mkdir(exist_ok=True)
    with gzip.open(options.write, "wt", encoding="utf-8") as file:
        json.dump(runs, file, separators=(",", ":"))
    print(json.dumps({"runs": len(runs)}))


if __name__ == "__main__":
    main()
