"""The documents say what is true: tags, commands, flags, files, thresholds.

    uv run pytest -m "not long" tests/runs/test_documents.py

Every command of every document is found here and run, a new one too; one that nothing here can run is
a failure. What is changed before it runs: training takes one step of a tiny model, on the CPU; the folder
/models/… is that model; torchrun starts two ranks on this one machine, whatever numbers of nodes and GPUs
are written, and HOST is localhost; servers get a free port; the hub of `hf download` is on this machine.
The flags of benchmarks and of the fault suite are checked here; they run, shortened, in
tests/runs/test_benchmarks.py and test_faults.py, and `docs/screenshots.py` in tests/runs/test_browser.py.
ollama is tried by its parts (`tests/helpers/ollama.py`), and llama.cpp's server answers `chat.py`.
`uv sync` runs dry, ssh does not connect, `pip install uv` must have been done. pytest does not run in
pytest: the files and tests that are named must exist.
"""

import argparse
import ast
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.core.core_plugin import CorePluginLoader
from torch.distributed.run import get_args_parser
from transformers import AutoTokenizer

from direct_finetuning_with_existing_modules import main
from finetuning.analysis import text_quality
from finetuning.command_line import parse_command_line, read_config_file
from finetuning.common import process
from finetuning.events.event_file import event_files
from finetuning.events.metric_table import METRICS, find_metric, is_detail, is_quiet
from finetuning.events.reading import read_metrics, read_run
from finetuning.monitoring import alerts
from finetuning.monitoring.detector_memory import AlertLimits
from finetuning.readers.dataset import read_samples
from tests.helpers import fake_hub, ollama
from tests.helpers.llama_server import serving
from tests.helpers.program import run_program
from tests.helpers.read_events import read_histograms, read_texts
from tests.helpers.tensorboard_server import TensorBoardServer
from tests.helpers.tiny_model import make_tiny_data

ROOT = Path(__file__).parents[2]
README, CHINESE, GUIDE = "README.md", "README.zh-CN.md", "TENSORBOARD_GUIDE.md"
DOCUMENTS = (README, CHINESE, GUIDE)
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
TRAINER = "direct_finetuning_with_existing_modules.py"
MODEL_IN_DOCUMENTS = "/models/Qwen3-4B-Thinking-2507"

# Conditions of the metric table that the tiny run below does not meet: no GPU, one rank, no alert raised,
# counters that a container may lack.
UNMET = (
    "once above 0",
    "GPU",
    "several ranks",
    "alerts",
    "disk counters",
    "network counters",
    "judged probes",
)


def blocks(text: str, language: str = "") -> list[str]:
    """Contents of the code fences of one language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for found, content in fences if found == language]


PROGRAMS = (
    "uv|uvx|pip|pipx|python3?|torchrun|tensorboard|pytest|ssh|hf|git|docker|curl|vllm|ollama|export|"
    r"[A-Z_]+=\S+"
)


def commands(text: str) -> list[str]:
    """Every command of the code blocks, without its remark."""
    shells = [
        b for language in ("", "bash", "sh", "shell", "console") for b in blocks(text, language)
    ]
    lines = [line.partition("  #")[0].strip() for b in shells for line in b.splitlines()]
    return _single(line.removeprefix("$ ") for line in lines)


def inline_commands(text: str) -> list[str]:
    """Every command between backticks, but for those that leave something out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return _single(c for c in re.findall(r"`([^`\n]+)`", prose) if "…" not in c and " " in c)


def _single(lines: Iterable[str]) -> list[str]:
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    return [part for part in parts if re.match(rf"(?:{PROGRAMS})\s", part)]


ALL_DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = list(
    dict.fromkeys(
        command
        for path in ALL_DOCUMENTS
        for find in (commands, inline_commands)
        for command in find(path.read_text(encoding="utf-8"))
    )
)


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
    (folder / "notes").mkdir()
    shutil.copy(ROOT / "data" / "raw" / "02_hash_mac.md", folder / "notes" / "hash.md")
    data = [str(folder / "my_qa.jsonl"), str(folder / "notes")]
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
    losses = read_run(next((folder / OUTPUT / "tensorboard_logs").iterdir()))["Training/Loss"]
    rows = [f"{step},{loss}" for step, loss in losses]
    (folder / "losses.csv").write_text("\n".join(["step,loss", *rows]), encoding="utf-8")
    history = {"log_history": [{"step": step, "loss": loss} for step, loss in losses]}
    (folder / "trainer_state.json").write_text(json.dumps(history), encoding="utf-8")
    shutil.copytree(folder / OUTPUT / "tensorboard_logs", folder / "test_tensorboard_logs")
    return folder


OUTPUT = "qwen3_4b_thinking_output"

# -----------------------------------------------------------------------------
# Tags


def documented_tags() -> list[str]:
    """The first cells of the guide's generated tables."""
    text = (ROOT / "docs" / "tags.md").read_text(encoding="utf-8")
    _, _, generated = text.partition("<!-- tags: begin -->")
    return re.findall(r"^\| `([^`]+)` \|", generated, re.MULTILINE)


def emitted_tags(sandbox: Path) -> set[str]:
    """Every tag of the run's event files, and of metrics.jsonl."""
    (run_dir,) = (sandbox / OUTPUT / "tensorboard_logs").iterdir()
    lines = read_metrics(sandbox / OUTPUT / "training_logs" / run_dir.name / "metrics.jsonl")
    numbers = {tag for line in lines for tag in line["metrics"]}
    images = EventAccumulator(str(run_dir)).Reload().Tags()["images"]
    return {*numbers, *read_run(run_dir), *read_texts(run_dir), *read_histograms(run_dir), *images}


def test_the_guide_is_generated_from_the_metric_table(tmp_path: Path):
    done = run_program(ROOT / "scripts" / "update_guide.py", "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert documented_tags() == [metric.tag for metric in METRICS]


def test_every_chinese_meaning_belongs_to_a_tag():
    lines = (ROOT / "docs" / "metrics_zh.tsv").read_text(encoding="utf-8").splitlines()
    assert {line.partition("\t")[0] for line in lines} <= {metric.tag for metric in METRICS}


@pytest.mark.slow
def test_every_tag_of_a_real_run_is_documented(sandbox: Path):
    documented = set(documented_tags())
    unknown = [
        tag
        for tag in emitted_tags(sandbox)
        if find_metric(tag) is None or find_metric(tag).tag not in documented
    ]
    assert not unknown


@pytest.mark.slow
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


def test_the_guide_names_as_charts_what_has_one():
    section = TEXT[GUIDE].partition("### SCALARS")[2].partition("\n### ")[0]
    charts, details = section.split("没有图")
    patterns = {metric.tag: metric for metric in METRICS}
    for part, kind in ((charts, "scalar"), (details, "detail")):
        tags = re.findall(r"`(\w+/[^`]+)`", part)
        assert len(tags) > 3
        assert not [tag for tag in tags if (patterns.get(tag) or find_metric(tag)).kind != kind]


def test_what_is_counted_in_the_comparison():
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert f"| {len(alerts.NAMES)} detectors;" in text
    assert f"| {len(text_quality.WEIGHTS)} components," in text


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
    "Forgetting": ("forgotten",),
    "Slow_Rank": ("straggler",),
    "Saturation": ("saturated",),
    "Source_Regression": ("source_worse",),
    "Clipping": ("clipped_share", "clipped_times"),
}


def test_every_alert_is_explained_with_its_limits():
    parameters = inspect.signature(AlertLimits).parameters
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


def start_program(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """A Python file of ours as if started from the command line; its exit code."""
    path = ROOT / arguments[0]
    assert path.is_file(), f"{arguments[0]} is documented but not there"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments[1:]])
    monkeypatch.setattr(process, "exit_process", sys.exit)  # this process is not the program's
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def _parameter(flag: str) -> str:
    return flag[2:].replace("-", "_")


class Runner:
    """Runs documented commands in a folder as the documents have it."""

    def __init__(self, folder: Path, tiny: list[str], model: Path, monkeypatch, capfd) -> None:
        self.folder, self.tiny, self.model = folder, tiny, model
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def run(self, command: str) -> None:
        """Raises AssertionError for a command that does not work or that nothing here can run."""
        words = shlex.split(command.partition(" > ")[0])
        while re.fullmatch(r"[A-Z_]+=\w+", words[0]):  # of the environment
            words = words[1:]
        if words[:2] == ["uv", "run"]:
            words = words[2:]
            while words[0] in ("--group", "--extra", "--with"):
                words = words[2:]
        name, *arguments = words
        if name.endswith(".py"):
            name, arguments = "python", words
        method = getattr(self, name, None)
        assert method, f"{name}: say in tests/runs/test_documents.py how to run it"
        method(arguments)

    def python(self, arguments: list[str]) -> None:
        """A program of ours, in this process."""
        if arguments[0] == "-m":
            module = arguments[1].replace(".", "/")
            file = f"{module}/__main__.py" if (ROOT / module).is_dir() else f"{module}.py"
            if file.startswith(SLOW):
                return self.knows(file, arguments[2:])
            arguments = [file, *arguments[2:]]
        if arguments == ["chat.py"]:
            return self.chat()
        if arguments[0] == "docs/screenshots.py":
            return self.pytest(["tests/runs/test_browser.py"])  # which takes all pictures with it
        arguments = self.placed(arguments)
        if arguments[0] == TRAINER:
            arguments += [*self.tiny, "--output-dir", str(self.folder / "other_output")]
        if arguments[0] == "export.py":
            self.exported(arguments)
        if arguments[0] == "sweep.py":
            arguments = self.swept(arguments)
        if arguments[0] == "ask.py":
            arguments += ["--max-new-tokens", "4"]
        if arguments[0] == "scripts/gpu_check.py":  # all phases: test_gpu_check, which is long
            arguments += ["--small", "--device", "cpu", "--only", "facts", "model"]
        if arguments == ["tests/helpers/lowered_layer.py"]:  # all ways: test_lowered_layer
            arguments += ["joined"]
        if arguments == ["scripts/pin_versions.py"]:
            return self.pin_versions()
        if arguments[0] == "scripts/update_guide.py":
            arguments += ["--check"]  # it must not change the guide while it is tested
        code = start_program(arguments, self.monkeypatch)
        assert code == 0, self.capfd.readouterr().err[-2000:]

    def placed(self, arguments: list[str]) -> list[str]:
        """With the tiny model and the name of the sandbox's run in place of the documents' names."""
        run = next((self.folder / OUTPUT / "tensorboard_logs").iterdir()).name
        arguments = [a.replace(MODEL_IN_DOCUMENTS, str(self.model)) for a in arguments]
        return [re.sub(r"/RUN$", f"/{run}", a) for a in arguments]

    def exported(self, arguments: list[str]) -> None:
        """It is made anew; needs the package gguf for what is none of Hugging Face's."""
        if "--format" in arguments:
            pytest.importorskip("gguf", reason="needs the package gguf: uv run --extra gguf")
        output = self.folder / arguments[arguments.index("--output") + 1]
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)

    def ollama(self, arguments: list[str]) -> None:
        """By its parts, Go's template and llama.cpp: the program itself comes from no package index."""
        modelfile = self.folder / "crypto" / "Modelfile"
        if not modelfile.is_file():
            self.run(EXPORT_FOR_OLLAMA)
        created = ollama.create(modelfile)
        if arguments[0] == "create":
            assert arguments[1:] == ["crypto", "-f", "crypto/Modelfile"]
            return
        name, question = arguments[1:]
        tokenizer = AutoTokenizer.from_pretrained(self.folder / OUTPUT / "final_model")
        asked = [{"role": "user", "content": question}]
        expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert name == "crypto" and created.prompt(question) == expected
        assert created.stop == (tokenizer.eos_token,) and created.run(question)

    def chat(self) -> None:
        """The lines of the documents, which ask llama.cpp's server in ollama's place."""
        pytest.importorskip("openai", reason="needs OpenAI's client: uv run --group serving")
        (code,) = blocks(TEXT[CHINESE], "python")
        assert code.split("#")[0] == blocks(TEXT[README], "python")[0].split("#")[0]
        if not (self.folder / "crypto" / "Modelfile").is_file():
            self.run(EXPORT_FOR_OLLAMA)
        with serving(self.folder / "crypto" / "model.gguf") as server:
            local = code.replace("http://localhost:11434", server.address)
            assert local != code
            done = subprocess.run(
                [sys.executable, "-c", local], capture_output=True, text=True, timeout=240
            )
        assert done.returncode == 0, done.stderr[-2000:]
        said = ast.literal_eval(done.stdout)
        assert said["role"] == "assistant" and said["content"] + said.get("reasoning_content", "")

    def swept(self, arguments: list[str]) -> list[str]:
        """A sweep of one run: of each list the first value, of the seeds one, on the tiny model."""
        cut = arguments.index("--") if "--" in arguments else len(arguments)
        parse_command_line(arguments[cut + 1 :])  # what stands there is right
        chosen = [a.partition(",")[0] for a in arguments[:cut] if "=" in a]
        place = ["--output-dir", str(self.folder / "sweep")]
        return [arguments[0], *chosen, *place, "--", *self.tiny]

    def knows(self, file: str, arguments: list[str]) -> None:
        """A program that takes too long here: it must compile and define the flags it is given."""
        assert (ROOT / file).is_file(), f"{file} is documented but not there"
        text = (ROOT / file).read_text(encoding="utf-8")
        compile(text, file, "exec")
        flags = [
            a for a in arguments if a.startswith("--")
        ]  # by argparse, or by tyro from a signature
        assert not [f for f in flags if f'"{f}"' not in text and f" {_parameter(f)}: " not in text]

    def pin_versions(self) -> None:
        """On a copy, because it writes: there the pins are then what they are here."""
        copy = self.folder / "pins"
        shutil.copytree(ROOT / "scripts", copy / "scripts")
        for name in ("pyproject.toml", "uv.lock"):  # no lock: uv asks the network
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, copy)
        self.tool("uv", "--version")
        self.tool(sys.executable, str(copy / "scripts" / "pin_versions.py"))
        pins = [
            re.findall(r'^    "([\w.-]+==[\w.+-]+)', (folder / "pyproject.toml").read_text(), re.M)
            for folder in (copy, ROOT)
        ]
        assert pins[0] == pins[1] and pins[0]

    def torchrun(self, arguments: list[str]) -> None:
        """Really, on two ranks of this machine: the numbers and the host are put in their place."""
        options = get_args_parser().parse_args(arguments)
        assert options.training_script == TRAINER
        launch = arguments[: arguments.index(TRAINER)]
        here = {"--nnodes": "1", "--nproc-per-node": "2", "--rdzv-endpoint": "localhost:0"}
        for flag, value in here.items():
            if flag in launch:
                launch[launch.index(flag) + 1] = value
        out = self.folder / f"ranks_{len(arguments)}"
        launch = [sys.executable, "-m", "torch.distributed.run", *launch]
        script = [str(ROOT / TRAINER), *options.training_script_args, *self.tiny]
        done = subprocess.run(
            [*launch, *script, "--device", "cpu", "--output-dir", str(out)],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(r"\b2 rank", done.stdout), done.stdout
        (run,) = (out / "tensorboard_logs").iterdir()
        assert read_run(run)["Training/Loss"]

    def tensorboard(self, arguments: list[str]) -> None:
        """The server starts with the flags, on this machine only, and shows the run."""
        assert "bind_all" not in " ".join(arguments)
        if "--inspect" in arguments:
            done = subprocess.run(
                [sys.executable, "-m", "tensorboard.main", *arguments],
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0 and "Training/Loss" in done.stdout, done.stderr[-2000:]
            return
        (logdir,) = [a.partition("=")[2] for a in arguments if a.startswith("--logdir=")]
        with TensorBoardServer(self.folder / logdir, arguments=arguments) as server:
            runs = server.wait_for(lambda: server.get("runs"), "the run")
            server.wait_for(lambda: "Training/Loss" in server.scalar_tags(runs[0]), "the loss")
            assert len(server.scalars(runs[0], "Training/Loss")) > 1

    def pytest(self, arguments: list[str]) -> None:
        """What runs now is the command itself; the files that it names exist."""
        files = [a for a in arguments if a.endswith(".py")]
        assert all((ROOT / file).is_file() for file in files)
        options = shlex.join(a for a in arguments if a not in files)
        chosen = r"(-n 0 )?-m (long|'not long')( -k (NAME|'damaged or traceback'))?"
        assert not options or re.fullmatch(chosen, options), options

    def ruff(self, arguments: list[str]) -> None:
        """On a copy of one file, because it may change what it finds."""
        copy = self.folder / "ruff"
        copy.mkdir(exist_ok=True)
        for name in ("pyproject.toml", "export.py"):
            shutil.copy(ROOT / name, copy)
        program = [sys.executable, "-m", "ruff", *arguments]
        done = subprocess.run(program, cwd=copy, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def hf(self, arguments: list[str]) -> None:
        """The hub's own program, from a hub on this machine that has the model by this name."""
        program = Path(sys.executable).with_name("hf")
        with fake_hub.serve(arguments[1], self.model) as endpoint:
            home = self.folder / "hub"
            env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
            done = subprocess.run([program, *arguments], env=env, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert list(home.rglob("model.safetensors"))

    def pip(self, arguments: list[str]) -> None:
        """Its result: there is a uv."""
        assert arguments == ["install", "uv"]
        assert self.tool("uv", "--version").startswith("uv ")

    pipx = pip

    def uv(self, arguments: list[str]) -> None:
        """What `uv run` has installed before this test; nothing is changed under its feet."""
        if arguments[0] == "pip":  # from the lock: there is a file, and uv has the options
            *options, lock = arguments[2:]
            assert "--hash=sha256:" in (ROOT / lock).read_text(encoding="utf-8")
            said = self.tool("uv", "pip", arguments[1], "--help")
            assert all(option in said for option in options)
            return
        self.tool("uv", *arguments, "--dry-run", "--offline", "--project", str(ROOT))

    def ssh(self, arguments: list[str]) -> None:
        """As ssh understands it: the port of TensorBoard, to the reader's own machine only."""
        understood = self.tool("ssh", "-G", *arguments)
        assert "localforward 6006 [localhost]:6006" in understood

    def tool(self, *command: str) -> str:
        """Output of a program that is not Python's; a machine without it skips."""
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


SLOW = ("benchmarks/", "tests/mutation/")  # minutes to hours
EXPORT_FOR_OLLAMA = "uv run --extra gguf python export.py --format ollama --output crypto"


@pytest.fixture
def runner(sandbox: Path, tiny, tiny_model, monkeypatch, capfd) -> Runner:
    monkeypatch.chdir(sandbox)
    return Runner(sandbox, tiny, tiny_model, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, runner: Runner):
    runner.run(command)


@pytest.mark.slow
def test_the_quick_start_goes_to_an_answer_in_other_tools(
    tmp_path, cache_dir, tiny_data, tiny_model, monkeypatch, capfd
):
    """The last commands of the Chinese quick start, one after the other, on the demonstration model."""
    settings = ["--max-steps", "2", "--num-probes", "0", "--save-steps", "0", "--quiet"]
    places = ["--output-dir", str(tmp_path / OUTPUT), "--cache-dir", str(cache_dir)]
    assert (
        main(["--model-name", "embedded", "--data-path", str(tiny_data), *settings, *places]) == 0
    )
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    runner = Runner(tmp_path, [], tiny_model, monkeypatch, capfd)
    section = TEXT[CHINESE].partition("## 在别的工具里回答")[2].partition("\n## ")[0]
    found = commands(section)
    assert found[0] == EXPORT_FOR_OLLAMA and [c.split()[:2] for c in found[1:]] == [
        ["ollama", "create"],
        ["ollama", "run"],
        ["uv", "run"],
    ]
    for command in found:
        runner.run(command)


@pytest.mark.slow
def test_a_new_command_is_found_and_a_wrong_one_fails(runner: Runner):
    """The control: what the test above would do with commands that nobody has thought of."""
    text = "Say `uv run python absent.py`.\n\n```bash\n$ uv run frobnicate --all  # new\n```\n"
    assert commands(text) == ["uv run frobnicate --all"]
    assert inline_commands(text) == ["uv run python absent.py"]
    for wrong in (
        *commands(text),
        *inline_commands(text),
        f"uv run python {TRAINER} --no-such-flag",
        "uv run python -m benchmarks.memory --no-such-flag",
        f"uv run tensorboard --inspect --logdir={OUTPUT}/nothing",
        "uv run pytest tests/test_nothing.py",
    ):
        with pytest.raises(AssertionError):
            runner.run(wrong)


@pytest.mark.parametrize("document", [README, CHINESE])
def test_the_two_commands_come_first(document: str):
    first = commands(TEXT[document])
    assert first[:2] == ["pip install uv", f"uv run python {TRAINER}"]
    assert first[2] == f"uv run tensorboard --logdir={OUTPUT}/tensorboard_logs"
    assert "uv run pytest" in first


@pytest.mark.parametrize("document", [README, CHINESE])
def test_the_example_of_data_is_read_as_it_is_meant(document: str, tmp_path: Path):
    (line,) = blocks(TEXT[document], "json")
    (tmp_path / "my_qa.jsonl").write_text(line, encoding="utf-8")
    (sample,) = read_samples([str(tmp_path / "my_qa.jsonl")]).samples
    assert (sample.question, sample.thinking, sample.answer) == tuple(json.loads(line).values())


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


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_exists(document: str, monkeypatch, capsys):
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", TEXT[document]))
    flags -= {"--help", "--extra", "--with"}  # of every program; of uv
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
            start_program([name, "--help"], monkeypatch)
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
    names -= {"chat.py"}  # which the reader writes
    assert not [name for name in sorted(names) if not (ROOT / name).is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_run_leaves_what_is_documented(document: str, sandbox: Path):
    (tree,) = [b for b in blocks(TEXT[document]) if b.startswith(f"{OUTPUT}/")]
    named = set(
        re.findall(
            r"[a-z_]+(?:\.jsonl?|\.log|\.html|/)",
            tree.replace(OUTPUT, "").replace("<step>", "").replace("<run>", ""),
        )
    )
    named -= {"alerts.jsonl", "earlier_models/"}  # where something was wrong; in a second run
    left = {p.name + ("/" if p.is_dir() else "") for p in (sandbox / OUTPUT).rglob("*")}
    assert not [name for name in sorted(named) if name not in left]


@pytest.mark.slow
def test_metrics_jsonl_holds_the_charts_numbers(sandbox: Path):
    (run_dir,) = (sandbox / OUTPUT / "tensorboard_logs").iterdir()
    records = read_metrics(sandbox / OUTPUT / "training_logs" / run_dir.name / "metrics.jsonl")
    written = {(r["step"], tag): x for r in records for tag, x in r["metrics"].items()}
    shown = {(step, t): x for t, points in read_run(run_dir).items() for step, x in points}
    charts = {key: np.float32(x) for key, x in written.items() if not is_detail(key[1])}
    quiet = {key for key in charts if is_quiet(key[1])}
    assert quiet and not any(charts[key] for key in quiet), "nothing went wrong in this run"
    assert shown == {key: x for key, x in charts.items() if key not in quiet}
    assert len(written) > 1.3 * len(shown) and (20, "Training/Loss") in shown


@pytest.mark.slow
def test_a_logged_step_takes_the_space_that_the_guide_says(sandbox: Path):
    (run_dir,) = (sandbox / OUTPUT / "tensorboard_logs").iterdir()
    path = sandbox / OUTPUT / "training_logs" / run_dir.name / "metrics.jsonl"
    events = [raw for file in event_files(run_dir) for raw in RawEventFileLoader(str(file)).Load()]
    of_numbers = [
        len(raw) + 16  # length and two checksums
        for raw in events
        if {v.WhichOneof("value") for v in Event.FromString(raw).summary.value} == {"simple_value"}
    ]
    line, event = median(map(len, path.read_bytes().splitlines())), median(of_numbers)
    said = re.search(
        r"约 ([\d.]+) KB（`metrics.jsonl` ([\d.]+) KB，事件文件 ([\d.]+) KB）", TEXT[GUIDE]
    )
    assert [float(x) for x in said.groups()] == pytest.approx(
        [(line + event) / 1000, line / 1000, event / 1000], rel=0.3
    )


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
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20
    assert not [name for name in sorted(named) if f"def {name}(" not in tests]
    files = re.findall(r"((?:tests|benchmarks)/[\w/]+\.py)", text)
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_no_path_of_a_machine_in_the_documents():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 6
    for path in documents:
        found = re.findall(
            r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt)/\S*", path.read_text("utf-8")
        )
        assert not found, f"{path.name}: {found}"
