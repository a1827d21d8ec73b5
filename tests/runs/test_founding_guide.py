"""The sentences that the project was founded on, each with what keeps it: a tag, a command or a file.

uv run pytest -m "not long" tests/runs/test_founding_guide.py
"""

import re
from pathlib import Path

import pytest

from finetuning.config import DirectTrainingConfig
from finetuning.events.metric_table import find_metric
from finetuning.events.reading import read_run
from tests.helpers.read_events import read_texts

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "TENSORBOARD_GUIDE.md").read_text(encoding="utf-8")

# What is promised -> tags that keep it, all of them in TensorBoard.
TAGS = {
    "the loss, the learning rate and the gradient are watched": (
        *("Training/Loss", "Training/Learning_Rate", "Training/Gradient_Norm", "Training/Epoch"),
    ),
    "the memory of the GPU and how tight it is": (
        *("Memory/GPU_Allocated_MB", "Memory/GPU_Utilization_Percent", "Memory/Pressure_Level"),
    ),
    "every GPU: load, memory, heat": (
        *("GPU_0/Utilization_Percent", "GPU_0/Memory_Usage_Percent", "GPU_0/Temperature_C"),
    ),
    "sizes and lengths of the data": (
        *("Dataset/Total_Samples", "Dataset/Avg_Instruction_Length", "Dataset/Avg_Output_Length"),
    ),
    "how many samples think": ("Dataset/Thinking_Samples_Percent",),
    "the quality of the data": (
        *("Dataset/Avg_Instruction_Quality", "Dataset/Avg_Output_Quality"),
        *(f"Dataset/Quality_Level_{k}_{of}" for k in range(1, 5) for of in ("Count", "Percent")),
    ),
    "how difficult and how professional the data are": (
        "Dataset/Avg_Crypto_Complexity",
        *(f"Dataset/Difficulty_{k}_{of}" for k in range(1, 5) for of in ("Count", "Percent")),
        *(f"Dataset/Crypto_Terms_{k}_Count" for k in range(11)),
    ),
    "has it converged, and where is it going": (
        *("Monitoring/Convergence_Score", "Monitoring/Loss_Trend"),
    ),
    "the configuration": (
        *("Config/Batch_Size", "Config/Sequence_Length", "Config/Gradient_Accumulation_Steps"),
    ),
    "every epoch": (*("Epoch/Average_Loss", "Epoch/Duration_Seconds", "Epoch/Steps_Per_Second"),),
    "the end": (
        *("Training/Final_Loss", "Final_Config/learning_rate", "Final_Dataset/Training_Samples"),
        *("Final_Model/Total_Parameters", "Final_Monitoring/Convergence_Score"),
        "Final_GPU_0/Utilization_Percent",
    ),
}
TEXTS = {
    "the data set in words": "Dataset/Summary",
    "an epoch in words": "Training/Epoch_Summary",
    "the run in words": "Training/Final_Summary",
    "all settings": "Config/Training_Settings",
}
# What is promised -> words of the guide.
SECTIONS = {
    "start it": "uv run python direct_finetuning_with_existing_modules.py",
    "watch it": "uv run tensorboard --logdir=qwen3_4b_thinking_output/tensorboard_logs",
    "test it": "uv run test_tensorboard_integration.py",
    "log more often or less": "### 自定义日志频率",
    "TensorBoard does not start": "TensorBoard 无法启动",
    "a firewall is in the way": "防火墙",
    "logs become large": "日志文件过大",
    "a metric of one's own": "self.tensorboard_writer.add_scalar('Custom/My_Metric', value, step)",
    "a subclass with it": "class MyTrainer(DirectTrainer):",
    "no GPU tags": "找不到 GPU 标签",
    "another port": "--port 6007",
    "from another computer": "ssh -L 6006:localhost:6006",
}
LEFT = (
    "tensorboard_logs",
    "training_logs",
    "checkpoints",
    "final_model",
    "training_statistics.json",
)


@pytest.mark.parametrize("promise", TAGS)
def test_a_promised_tag_is_in_tensorboard(promise: str):
    rows = {tag: find_metric(tag) for tag in TAGS[promise]}
    assert not [tag for tag, row in rows.items() if row is None or row.kind != "scalar"]


@pytest.mark.slow
def test_a_run_keeps_what_needs_no_gpu(finished: Path):
    (run,) = (finished / "tensorboard_logs").iterdir()
    found = read_run(run).keys()
    promised = [tag for tags in TAGS.values() for tag in tags]
    here = [tag for tag in promised if find_metric(tag).when in ("always", "at the end")]
    few = ("Monitoring/Loss_Trend",)  # three losses have none
    assert len(here) > 40 and not [tag for tag in here if tag not in found and tag not in few]
    assert set(TEXTS.values()) <= read_texts(run).keys()
    assert re.fullmatch(r"qwen3_4b_thinking_\d{8}_\d{6}", run.name)


@pytest.mark.slow
def test_a_run_leaves_what_was_promised(finished: Path):
    assert not [name for name in LEFT if not (finished / name).exists()]
    (logs,) = (finished / "training_logs").iterdir()
    assert (logs / "metrics.jsonl").is_file()


@pytest.mark.parametrize("promise", SECTIONS)
def test_the_guide_says_it(promise: str):
    assert SECTIONS[promise] in GUIDE


def test_the_subclass_of_the_guide_has_six_lines_and_works_as_written():
    (code,) = re.findall(r"```python\n(class MyTrainer.*?)```", GUIDE, re.DOTALL)
    assert len(code.strip().splitlines()) == 6
    import direct_finetuning_with_existing_modules as program

    space = {"DirectTrainer": program.DirectTrainer}
    exec(code, space)
    assert space["MyTrainer"].training_metrics is not program.DirectTrainer.training_metrics


def test_the_guides_configuration_is_one():
    (code,) = re.findall(r"```python\n(config = DirectTrainingConfig\(.*?)```", GUIDE, re.DOTALL)
    space = {"DirectTrainingConfig": DirectTrainingConfig}
    exec(code, space)
    assert space["config"].logging_steps == 1 and space["config"].save_steps == 50


def test_the_readme_is_one_path():
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 120
        assert text.count("![") == 1, "one picture"
