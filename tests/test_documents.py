"""The documents say what is true: tags, commands, flags, files, thresholds.

uv run pytest tests/test_documents.py
"""

import argparse
import inspect
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard import default, program
from tensorboard.plugins.core.core_plugin import CorePluginLoader
from tiny_model import make_tiny_data
from torch.distributed.run import get_args_parser

import alerts
from direct_finetuning_with_existing_modules import main
from metric_table import METRICS, find_metric
from tb_logger import read_histograms, read_metrics, read_run, read_texts
from training_config import parse_command_line, read_config_file

ROOT = Path(__file__).parents[1]
README, CHINESE, GUIDE = "README.md", "README.zh-CN.md", "TENSORBOARD_GUIDE.md"
DOCUMENTS = (README, CHINESE, GUIDE)
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
TRAINER = "direct_finetuning_with_existing_modules.py"
MODEL_IN_DOCUMENTS = "/models/Qwen3-4B-Thinking-2507"

# Conditions of the metric table that the tiny run below does not meet: no GPU, one rank, no alert raised,
# counters that a container may lack.
UNMET = ("GPU", "several ranks", "alerts", "disk counters", "network counters")


def blocks(text: str, language: str = "") -> list[str]:
    """Contents of the code fences of one language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for found, content in fences if found == language]


def commands(text: str) -> list[str]:
    """Every command of the unlabelled code blocks, without its remark."""
    lines = [line.partition("  #")[0].strip() for b in blocks(text) for line in b.splitlines()]
    lines = [line.removeprefix("pip install uv && ") for line in lines]
    return [line for line in lines if line.startswith(("uv ", "ssh "))]


COMMANDS = list(dict.fromkeys(c for name in DOCUMENTS for c in commands(TEXT[name])))


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, cache_dir: Path) -> list[str]:
    """Settings that make any training command of the documents short."""
    steps = [
        "--max-steps",
        "1",
        "--max-seq-length",
        "4096",
        "--num-probes",
        "0",
        "--save-steps",
        "0",
    ]
    return [*steps, "--model-name", str(tiny_model), "--cache-dir", str(cache_dir)]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory, tiny_model: Path, cache_dir: Path) -> Path:
    """A working directory as the documents have it, with a finished run of twenty steps."""
    folder = tmp_path_factory.mktemp("sandbox")
    shutil.copytree(ROOT / "data", folder / "data")
    make_tiny_data(folder / "my_qa.jsonl")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "data" / "raw" / "02_hash_mac.md", folder / "docs" / "notes.md")
    data = [str(folder / "my_qa.jsonl"), str(folder / "docs")]
    settings = [
        *("--max-steps", "20", "--logging-steps", "1", "--eval-steps", "10", "--save-steps", "10"),
        *(
            "--max-seq-length",
            "2048",
            "--num-probes",
            "8",
            "--probe-max-new-tokens",
            "8",
            "--quiet",
        ),
        *("--log-weight-histograms", "--learning-rate", "1e-2", "--cache-dir", str(cache_dir)),
        *("--model-name", str(tiny_model), "--output-dir", str(folder / OUTPUT)),
    ]
    assert main(["--data-path", *data, *settings]) == 0
    return folder


OUTPUT = "qwen3_4b_thinking_output"

# -----------------------------------------------------------------------------
# Tags


def documented_tags() -> list[str]:
    """The first cells of the guide's generated tables."""
    _, _, generated = TEXT[GUIDE].partition("<!-- tags: begin -->")
    return re.findall(r"^\| `([^`]+)` \|", generated, re.MULTILINE)


def emitted_tags(sandbox: Path) -> set[str]:
    """Every tag of the run's event files."""
    (run_dir,) = (sandbox / OUTPUT / "tensorboard_logs").iterdir()
    images = subprocess.run(
        [sys.executable, "-c", _IMAGE_TAGS, str(run_dir)],
        capture_output=True,
        text=True,
        check=True,
    )
    tags = {*read_run(run_dir), *read_texts(run_dir), *read_histograms(run_dir)}
    return tags | set(images.stdout.split())


_IMAGE_TAGS = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
print(*EventAccumulator(sys.argv[1]).Reload().Tags()["images"])
"""


def test_the_guide_is_generated_from_the_metric_table():
    script = [sys.executable, str(ROOT / "scripts" / "update_guide.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert documented_tags() == [metric.tag for metric in METRICS]


def test_every_chinese_meaning_belongs_to_a_tag():
    lines = (ROOT / "docs" / "metrics_zh.tsv").read_text(encoding="utf-8").splitlines()
    assert {line.partition("\t")[0] for line in lines} <= {metric.tag for metric in METRICS}


def test_every_tag_of_a_real_run_is_documented(sandbox: Path):
    documented = set(documented_tags())
    unknown = [
        tag
        for tag in emitted_tags(sandbox)
        if find_metric(tag) is None or find_metric(tag).tag not in documented
    ]
    assert not unknown


def test_every_documented_tag_is_in_a_real_run(sandbox: Path):
    seen = {find_metric(tag).tag for tag in emitted_tags(sandbox) if find_metric(tag)}
    missing = [m.tag for m in METRICS if m.tag not in seen and not any(u in m.when for u in UNMET)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tags_in_the_prose_exist(document: str):
    groups = "|".join(sorted({re.escape(m.tag.partition("/")[0]) for m in METRICS}))
    tags = re.findall(rf"`((?:{groups})/[^`…*\s]+)`", TEXT[document])
    unknown = [tag for tag in tags if tag not in documented_tags() and find_metric(tag) is None]
    assert not [tag for tag in unknown if tag != "Alerts/<名称>"]


LIMITS = {
    "Gradient_Explosion": ("gradient_z", "gradient_ratio"),
    "Loss_Spike": ("spike_z", "spike_ratio"),
    "Divergence": ("divergence",),
    "Stagnation": ("stuck", "patience"),
    "Memory_Leak": ("leak_share", "leak_mb"),
    "GPU_Overheat": ("overheat_c", "cooled_c"),
    "Low_GPU_Utilization": ("low_utilization",),
    "OOM_Risk": ("oom",),
    "Data_Starvation": ("starvation",),
    "Thinking_Collapse": ("collapse", "format_drop"),
    "Overfitting": ("overfit",),
    "Slow_Rank": ("straggler",),
}


def test_every_alert_is_explained_with_its_limits():
    parameters = inspect.signature(alerts.AlertMonitor).parameters
    for name in alerts.NAMES:
        (row,) = re.findall(
            rf"^\| `Alerts/{name}` \|(.*\|.*)\|$", TEXT[GUIDE].split("## 公式")[0], re.M
        )
        numbers = set(re.findall(r"[\d.]+", row))
        for limit in LIMITS.get(name, ()):
            value = parameters[limit].default
            assert {f"{value:g}", f"{100 * value:g}"} & numbers, f"{name}: {limit} {value}"


# -----------------------------------------------------------------------------
# Commands


def run_program(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """A Python file of ours as if started from the command line; its exit code."""
    path = ROOT / arguments[0]
    assert path.is_file(), f"{arguments[0]} is documented but not there"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments[1:]])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def check_tensorboard(arguments: list[str]) -> None:
    """TensorBoard itself accepts the flags, and the directory is one that a run writes."""
    server = program.TensorBoard(default.get_plugins())
    server.configure(["tensorboard", *arguments])
    assert server.flags.logdir in (f"{OUTPUT}/tensorboard_logs", "test_tensorboard_logs")
    assert "bind_all" not in " ".join(arguments)


def check_torchrun(arguments: list[str]) -> None:
    """torchrun and the script accept the flags; tests/test_distributed.py runs it."""
    options = get_args_parser().parse_args(arguments)
    assert options.training_script == TRAINER
    parse_command_line(options.training_script_args)


def check_pytest(arguments: list[str]) -> None:
    """The named tests exist. What runs now is the command itself."""
    assert all((ROOT / argument).exists() for argument in arguments)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "tensorboard": check_tensorboard,
    "torchrun": check_torchrun,
    "pytest": check_pytest,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, sandbox: Path, tiny, tiny_model, monkeypatch, capfd):
    words = shlex.split(command)
    if words[0] == "ssh":
        assert words[1:3] == ["-L", "6006:localhost:6006"]
        return
    name, *arguments = words[1:]  # after "uv"
    assert name == "run"
    if arguments[0] in CHECKS:
        return CHECKS[arguments[0]](arguments[1:])
    arguments = [a.replace(MODEL_IN_DOCUMENTS, str(tiny_model)) for a in arguments if a != "python"]
    if arguments[0] in ("test_tensorboard_integration.py", "docs/screenshots.py"):
        assert (ROOT / arguments[0]).is_file()  # the former is a test itself, the latter is slow
        return
    monkeypatch.chdir(sandbox)
    if arguments[0] == TRAINER:
        arguments += [*tiny, "--output-dir", str(sandbox / "other_output")]
    if arguments[0] == "ask.py":
        arguments += ["--max-new-tokens", "4"]
    code = run_program(arguments, monkeypatch)
    assert code == 0, capfd.readouterr().err[-2000:]


@pytest.mark.parametrize("document", [README, CHINESE])
def test_the_two_commands_come_first(document: str):
    first = commands(TEXT[document])
    assert first[0] == f"uv run python {TRAINER}"
    assert first[1] == f"uv run tensorboard --logdir={OUTPUT}/tensorboard_logs"
    assert "uv run pytest" in first


@pytest.mark.parametrize("document", [README, CHINESE])
def test_the_configuration_file_is_accepted(document: str, tmp_path: Path):
    (toml,) = blocks(TEXT[document], "toml")
    (tmp_path / "run.toml").write_text(toml, encoding="utf-8")
    config = read_config_file(tmp_path / "run.toml")
    assert config.model_name == MODEL_IN_DOCUMENTS and config.max_seq_length == 4096


@pytest.mark.parametrize("document", [README, CHINESE])
def test_the_ways_to_resume_are_accepted(document: str):
    lines = [line for b in blocks(TEXT[document]) for line in b.splitlines()]
    ways = [line.split()[1] for line in lines if line.startswith("--resume ")]
    assert ways == ["latest", "auto", "DIR"]
    assert [parse_command_line(["--resume", way]).resume for way in ways] == ways


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_exists(document: str, monkeypatch, capsys):
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", TEXT[document]))
    flags -= {"--help", "--extra"}  # of every program; of uv
    tensorboard = argparse.ArgumentParser()
    CorePluginLoader().define_flags(tensorboard)
    known = (
        tensorboard.format_help() + get_args_parser().format_help() + _all_help(monkeypatch, capsys)
    )
    known += "--samples_per_plugin"
    assert not [flag for flag in sorted(flags) if not re.search(rf"{flag}(?![\w-])", known)]


def _all_help(monkeypatch, capsys) -> str:
    named = set(re.findall(r"\b(\w+\.py) ", "\n".join(COMMANDS))) - {
        "test_tensorboard_integration.py"
    }
    for name in sorted(named):
        if (ROOT / name).is_file():
            run_program([name, "--help"], monkeypatch)
    return capsys.readouterr().out


# -----------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str):
    links = re.findall(r"\]\(([^)#\s]+)\)", TEXT[document])
    assert links
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_anchor_leads_somewhere(document: str):
    heads = re.findall(r"^#+ (.+)$", TEXT[document], re.MULTILINE)
    anchors = {re.sub(r"[^\w\s-]", "", head).strip().lower().replace(" ", "-") for head in heads}
    assert {a for a in re.findall(r"\]\(#([^)]+)\)", TEXT[document])} <= anchors


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_exists(document: str):
    names = set(re.findall(r"(?<![\w.])((?:\w+/)*\w+\.py)\b", TEXT[document]))
    assert not [name for name in sorted(names) if not (ROOT / name).is_file()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_run_leaves_what_is_documented(document: str, sandbox: Path):
    (tree,) = [b for b in blocks(TEXT[document]) if b.startswith(f"{OUTPUT}/")]
    named = set(
        re.findall(
            r"[a-z_]+(?:\.jsonl?|\.log|\.html|/)",
            tree.replace(OUTPUT, "").replace("<step>", "").replace("<run>", ""),
        )
    )
    named -= {"alerts.jsonl"}  # the latter only where something was wrong
    left = {p.name + ("/" if p.is_dir() else "") for p in (sandbox / OUTPUT).rglob("*")}
    assert not [name for name in sorted(named) if name not in left]


def test_metrics_jsonl_holds_the_charts_numbers(sandbox: Path):
    (run_dir,) = (sandbox / OUTPUT / "tensorboard_logs").iterdir()
    records = read_metrics(sandbox / OUTPUT / "training_logs" / run_dir.name / "metrics.jsonl")
    points = [(r["step"], r["metrics"].get("Training/Loss")) for r in records]
    written = {step: loss for step, loss in points if loss is not None}
    shown = dict(read_run(run_dir)["Training/Loss"])
    assert len(shown) == 20 and shown == pytest.approx(written)


def test_both_readmes_say_the_same():
    def skeleton(text: str) -> tuple:
        rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        return len(re.findall(r"^## ", text, re.M)), commands(text), rows, blocks(text, "toml")

    assert skeleton(TEXT[CHINESE]) == skeleton(TEXT[README])
    code = {name: set(re.findall(r"`([^`\n]+)`", TEXT[name])) for name in (README, CHINESE)}
    ascii_only = {name: {c for c in code[name] if c.isascii() and " " not in c} for name in code}
    assert ascii_only[README] - ascii_only[CHINESE] == set()


def test_the_evidence_of_the_comparison_exists():
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20
    assert not [name for name in sorted(named) if f"def {name}(" not in tests]
    files = re.findall(r"((?:tests|benchmarks)/\w+\.py)", text)
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_no_path_of_a_machine_in_the_documents():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 6
    for path in documents:
        found = re.findall(
            r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt)/\S*", path.read_text("utf-8")
        )
        assert not found, f"{path.name}: {found}"
