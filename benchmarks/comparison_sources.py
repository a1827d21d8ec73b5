"""What docs/comparison.md says of other programs, looked up in their sources.

    uv run python benchmarks/comparison_sources.py                     # fetches the sources, about a minute
    uv run python benchmarks/comparison_sources.py --sources FOLDER    # keeps them there, or reads yours
    uv run python benchmarks/comparison_sources.py --only nan-filter purge-step

CLAIMS is the evidence: every claim has rows, each a program, files of it, and a regular expression that
must be there or must not be. FOLDER has one folder for each distribution (llamafactory, ms-swift, …); one
that is not there is taken from this environment if it has that very version, and otherwise fetched without
its dependencies by uv. Two claims can't be read off a source and are tried instead. Prints where each row
was found; the exit status is 1 if any does not hold.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


class Source(NamedTuple):
    requirement: str
    package: str  # folder of the distribution that the globs start from; "" for all of it


LF, TRL, SWIFT, UNSLOTH, ZOO, AXOLOTL, HF = (
    *("LLaMA-Factory", "TRL", "ms-swift", "Unsloth", "Unsloth Zoo", "Axolotl", "transformers"),
)
SOURCES = {
    LF: Source("llamafactory==0.9.5", "llamafactory"),
    TRL: Source("trl==1.16.0", "trl"),
    SWIFT: Source("ms-swift==4.6.0", "swift"),
    UNSLOTH: Source("unsloth==2026.10.9", ""),
    ZOO: Source("unsloth_zoo==2026.10.9", ""),
    AXOLOTL: Source("axolotl==0.19.0", "axolotl"),
    HF: Source("transformers==5.23.0", "transformers"),
    "PyTorch": Source("torch==2.14.1", "torch"),
    "TensorBoard": Source("tensorboard==2.21.0", "tensorboard"),
    "tensorboardX": Source("tensorboardX==2.6.5", "tensorboardX"),
    "datatrove": Source("datatrove==0.10.1", "datatrove"),
    "Data-Juicer": Source("py-data-juicer==1.6.1", "data_juicer"),
}
FIVE = (LF, TRL, SWIFT, UNSLOTH, ZOO, AXOLOTL)  # Unsloth is two distributions


class Row(NamedTuple):
    program: str
    files: str  # glob
    pattern: str  # with re.MULTILINE
    present: bool = True


def lacks(program: str, pattern: str, files: str = "**/*.py") -> Row:
    return Row(program, files, pattern, present=False)


def none_of(programs: Iterable[str], pattern: str) -> list[Row]:
    return [lacks(program, pattern) for program in programs]


def without(*names: str) -> list[str]:
    return [program for program in FIVE if program not in names]


# fmt: off
CLAIMS: dict[str, Sequence[Row]] = {
    # --- where they are ahead ---
    "methods": (
        Row(LF, "train/dpo/trainer.py", r"^class CustomDPOTrainer\("),
        Row(LF, "train/rm/trainer.py", r"^class PairwiseTrainer\("),
        Row(TRL, "trainer/grpo_trainer.py", r"^class GRPOTrainer\("),
        Row(TRL, "trainer/reward_trainer.py", r"^class RewardTrainer\("),
        Row(SWIFT, "rlhf_trainers/grpo_trainer.py", r"^class GRPOTrainer\("),
        Row(SWIFT, "rlhf_trainers/orpo_trainer.py", r"^class ORPOTrainer\("),
        Row(UNSLOTH, "unsloth/models/rl.py", r"grpo_trainer"),
        Row(AXOLOTL, "core/trainers/grpo/trainer.py", r"^class AxolotlGRPOTrainer\("),
    ),
    "models": (
        Row(LF, "extras/constants.py", r"(?:register_model_group\([\s\S]+?){100}"),
        Row(LF, "data/mm_plugin.py", r"AudioInput[\s\S]+VideoInput"),
        Row(SWIFT, "model/models/qwen.py", r"(?:register_model\([\s\S]+?){30}"),
    ),
    "interfaces": (
        Row(LF, "webui/interface.py", r"gr\.Blocks\("),
        Row(SWIFT, "ui/app.py", r"gr\.Blocks\("),
        Row(UNSLOTH, "studio/backend/main.py", r"FastAPI\("),
        Row(LF, "api/app.py", r"/v1/chat/completions"),
        Row(SWIFT, "pipelines/infer/deploy.py", r"/v1/chat/completions"),
        Row(UNSLOTH, "unsloth/save.py", r"^def \w*save\w+gguf\("),
        Row(LF, "hparams/model_args.py", r"export_quantization_bit:"),
        Row(SWIFT, "arguments/export_args.py", r"quant_method: Literal\['awq', 'gptq'"),
    ),
    "scale": (
        Row(SWIFT, "megatron/arguments/megatron_args.py", r"^    tensor_model_parallel_size: int"),
        Row(SWIFT, "megatron/arguments/megatron_args.py", r"^    pipeline_model_parallel_size: int"),
        Row(SWIFT, "megatron/arguments/megatron_args.py", r"^    expert_model_parallel_size: int"),
        Row(LF, "hparams/finetuning_args.py", r"Megatron Core Adapter"),
        Row(LF, "hparams/training_args.py", r"self\.use_ray = "),
        Row(AXOLOTL, "utils/schemas/config.py", r"^    tensor_parallel_size: int"),
        Row(AXOLOTL, "utils/schemas/config.py", r"^    context_parallel_size: int"),
        Row(AXOLOTL, "utils/schemas/config.py", r"^    deepspeed: "),
    ),
    "trackers": [
        Row(HF, "integrations/integration_utils.py", rf"^class {name}Callback\(")
        for name in ("Wandb", "SwanLab", "MLflow", "Comet")
    ],
    # --- the curves ---
    "new-run-directory": (
        Row(HF, "integrations/integration_utils.py", r'strftime\("%b%d_%H-%M-%S"\)'),
        Row(HF, "integrations/integration_utils.py", r"_SummaryWriter\(log_dir=self\.logging_dir\)"),
        Row(SWIFT, "arguments/sft_args.py", r"^    add_version: bool = True"),
        Row(SWIFT, "utils/utils.py", r"sub_folder = f'v\{version\}-\{time\}'"),
        *none_of((*FIVE, HF), r"\bpurge_step\b"),
    ),
    "nan-filter": (
        Row(HF, "training_args.py", r"^    logging_nan_inf_filter: bool = field\(\s+default=True"),
        Row(HF, "trainer.py", r"_tr_loss \+= self\._tr_loss / \(1 \+ self\.state\.global_step"),
        Row(LF, "train/sft/trainer.py", r"^class \w+\(Seq2SeqTrainer\):"),
        Row(TRL, "trainer/base_trainer.py", r"^class _BaseTrainer\(Trainer\):"),
        Row(SWIFT, "trainers/seq2seq_trainer.py", r"^class Seq2SeqTrainer\(.+, HfSeq2SeqTrainer\):"),
        Row(AXOLOTL, "core/trainers/base.py", r"^class AxolotlTrainer\([^)]+    Trainer,\n\):"),
        *none_of(without(UNSLOTH, ZOO), r"nan_inf_filter"),
        Row(UNSLOTH, "unsloth/models/rl.py", r'"logging_nan_inf_filter": False'),
    ),
    "one-loss": (
        *none_of(FIVE, r"(?i)\b(?:think|thinking|reasoning|cot|answer)_loss\b"),
        Row(SWIFT, "trainers/arguments.py", r"^    enable_channel_loss: bool = False"),
        Row(SWIFT, "trainers/seq2seq_trainer.py", r"metrics\[f'loss_\{channel\}'\]"),
        Row(TRL, "trainer/sft_trainer.py", r'"mean_token_accuracy"'),
    ),
    "tokens-per-second": (
        Row(HF, "trainer_utils.py", r"runtime = time\.time\(\) - start_time"),
        Row(HF, "trainer.py", r'speed_metrics\("train", start_time, num_tokens=current_session_num_tokens'),
        Row(TRL, "trainer/sft_trainer.py", r"^        self\._total_train_tokens = 0$"),
        lacks(TRL, r"_total_train_tokens = (?!0$)"),
        Row(AXOLOTL, "core/builders/causal.py", r"resume_from_checkpoint=self\.cfg\.resume_from_checkpoint"),
    ),
    "mfu": (
        Row(HF, "trainer.py", r"return 6 \* inputs\[main_input\]\.numel\(\) \* self\.model\.num_parameters"),
        Row(SWIFT, "callbacks/perf_log.py", r"actual_flops = total_flos / self\.elapsed"),
        Row(UNSLOTH, "unsloth/utils/mfu.py", r"Opt-in achieved TFLOPs and MFU logging with LoRA-aware FLOP"),
        Row(UNSLOTH, "unsloth/utils/mfu.py", r"def on_evaluate[\s\S]{0,80}self\._paused = True"),
        lacks(TRL, r"compute_mfu", "trainer/sft_trainer.py"),
        *none_of((LF, AXOLOTL), r"(?i)\bmfu\b"),
    ),
    "full-disk": (
        Row("TensorBoard", "summary/writer/event_file_writer.py", r"if exception[^\n]*\n\s+raise exception"),
        Row("tensorboardX", "event_file_writer.py", r"multiprocessing\.Queue\(max_queue_size\)"),
        Row("tensorboardX", "event_file_writer.py", r"_event_queue\.put\(event\)"),
    ),
    "one-entry-a-tag": (
        Row("PyTorch", "utils/tensorboard/writer.py",
            r"summary = scalar\([^)]+\)\s+self\._get_file_writer\(\)\.add_summary\("),
        Row("TensorBoard", "summary/writer/event_file_writer.py", r"_byte_queue\.put\(bytestring\)"),
        Row("TensorBoard", "summary/writer/record_writer.py", r"masked_crc32c\(data\)"),
        Row("TensorBoard", "compat/tensorflow_stub/pywrap_tensorflow.py",
            r"for b in [^\n]+:\n\s+table_index = \(crc \^ b\) & 0xFF"),
    ),
    # --- what TensorBoard shows ---
    "no-such-call": none_of(
        (*FIVE, HF), r"\badd_histogram\b|\badd_hparams\b|\badd_custom_scalars|\bcustom_scalar\b"
    ),
    "gpu-gauges": (
        *none_of(without(UNSLOTH), r"GetTemperature|GetPowerUsage|GetUtilizationRates|temperature\.gpu"),
        Row(UNSLOTH, "studio/backend/utils/hardware/nvidia.py", r"temperature\.gpu"),
        lacks(UNSLOTH, r"GetTemperature|GetPowerUsage|temperature\.gpu", "unsloth/**/*.py"),
    ),
    "length-statistics": (
        Row(SWIFT, "pipelines/train/sft.py", r"logger\.info\(f'Dataset Token Length"),
        Row(AXOLOTL, "utils/data/utils.py", r'LOG\.info\(f"max_input_len'),
    ),
    "generations": (
        Row(AXOLOTL, "utils/callbacks/generation.py", r"wandb\.Html\("),
        lacks(AXOLOTL, r"(?i)tensorboard|tb_writer", "utils/callbacks/generation.py"),
        Row(TRL, "trainer/callbacks.py", r'wandb\.log\(\{"completions": table\}\)'),
        lacks(TRL, r"(?i)tensorboard|tb_writer", "trainer/callbacks.py"),
        Row(LF, "train/sft/metric.py", r'"rouge-l"'),
    ),
    "adapters": none_of(FIVE, r"effective_rank|stable_rank|lora_[AB][^\n]{0,40}\.norm\("),
    "alerts": (
        Row(AXOLOTL, "utils/callbacks/__init__.py", r'\["loss"\] > self\.threshold'),
        Row(HF, "trainer_callback.py", r"^class EarlyStoppingCallback\("),
        *none_of(without(AXOLOTL), r"(?i)loss_?watchdog|loss_spike"),
        *none_of(FIVE, r"(?:wandb|trackio)\.alert\("),
    ),
    # --- thinking models ---
    "too-long": (
        Row(LF, "data/processor/supervised.py", r"target_ids = target_ids\[:target_len\]"),
        Row(LF, "data/processor/supervised.py", r"Dropped lengthy example"),
        Row(TRL, "trainer/sft_config.py", r'truncation_mode: str = field\(\s+default="keep_start"'),
        Row(TRL, "trainer/sft_trainer.py", r"slice\(None, args\.max_length\)"),
        Row(SWIFT, "arguments/base_args/template_args.py", r"self\.truncation_strategy = 'delete'"),
        Row(SWIFT, "pipelines/utils.py", r"logger\.info\(f'Dataset filtered, origin length"),
        Row(AXOLOTL, "utils/data/utils.py", r'cfg\.excess_length_strategy or "drop"'),
        Row(AXOLOTL, "utils/data/utils.py", r'f"Dropped \{dropped\} sequences'),
    ),
    "prompt-supplies-think": (
        # Of Qwen3's family these open the thinking in the generation prompt, and train it as well.
        *(
            Row(TRL, f"chat_templates/{name}_training.jinja",
                r"generation %\}\s+\{\{- '<think>[\s\S]+add_generation_prompt[\s\S]+\{\{- '<think>\\n' \}\}")
            for name in ("qwen3_5_think", "qwen3_6", "qwen3_8")
        ),
        # Thinking-2507's prompt opens it unconditionally; no template that TRL knows does.
        lacks(TRL, r"assistant\\n<think>", "chat_templates/qwen3*.jinja"),
        lacks(TRL, r"(?i)thinking.2507", "chat_template_utils.py"),
        Row(TRL, "chat_template_utils.py", r'raise ValueError\(\s+"The chat template is not training'),
        Row(SWIFT, "loss_scale/config/ignore_think_prefix.json", r"\^<think>"),
        Row(SWIFT, "arguments/base_args/template_args.py", r"loss_scale: str = 'default'"),
    ),
    "control-tokens": (
        Row(HF, "tokenization_utils_base.py", r'kwargs\.pop\("split_special_tokens", False\)'),
        Row(LF, "hparams/model_args.py", r"split_special_tokens: bool = field\(\s+default=False"),
        *none_of(FIVE, r"split_special_tokens\s*=\s*True"),
    ),
    "thinking-switches": (
        Row(AXOLOTL, "prompt_strategies/chat_template.py", r'"reasoning_training_detail"'),
        Row(LF, "data/template.py", r"self\.enable_thinking is False:  # remove all cot"),
        Row(SWIFT, "loss_scale/mapping.py", r"'ignore_empty_think': "),
        Row(ZOO, "unsloth_zoo/dataset_utils.py", r"^    mask_out_tokens   = None"),
    ),
    # --- data ---
    "unusable-records": (
        Row(LF, "data/processor/supervised.py", r"Dropped invalid example"),
        Row(SWIFT, "arguments/base_args/data_args.py", r"^    strict: bool = False"),
        Row(SWIFT, "dataset/preprocessor/core.py", r"traceback_limit: int = 10"),
    ),
    "random-split": (
        Row(LF, "data/data_utils.py", r"\.train_test_split\(test_size=val_size"),
        Row(SWIFT, "dataset/dataset_meta.py", r"\.train_test_split\("),
        Row(AXOLOTL, "utils/data/shared.py", r"dataset\.train_test_split\("),
        Row(AXOLOTL, "utils/schemas/config.py", r"dataset_exact_deduplication: bool"),
        *none_of(FIVE, r"(?i)minhash|simhash|jaccard"),
    ),
    "chinese-quality": (
        *none_of(FIVE, r"(?i)langdetect|alphanumeric_ratio|special_char\w*_ratio|quality_filter"),
        *none_of(FIVE, r"\bG[BM]/T\b"),
        Row("datatrove", "pipeline/filters/gopher_repetition_filter.py", r"= Languages\.english"),
        Row("datatrove", "pipeline/filters/gopher_quality_filter.py", r"= Languages\.english"),
        Row("Data-Juicer", "ops/filter/words_num_filter.py", r"tokenization: bool = False"),
        Row("Data-Juicer", "ops/common/helper_func.py", r"words = split_on_whitespace\("),
    ),
    # --- interruptions ---
    "highest-number": (
        Row(HF, "trainer_utils.py", r"max\(checkpoints, key=lambda x: int\("),
        Row(LF, "hparams/parser.py", r"= get_last_checkpoint\("),
        Row(AXOLOTL, "utils/train.py", r'key=lambda p: int\(p\.name\.split\("-"\)\[-1\]\)'),
        Row(UNSLOTH, "studio/backend/core/training/resume.py", r"^def is_resume_checkpoint_valid\("),
    ),
    "no-checksum": [
        lacks(HF, r"(?i)sha256|crc32|checksum", files)
        for files in ("trainer.py", "trainer_utils.py", "trainer_pt_utils.py")
    ],
    "sigterm": (
        Row(HF, "training_args.py", r"^    enable_jit_checkpoint: bool = field\(\s+default=False"),
        Row(HF, "trainer_jit_checkpoint.py", r"SIGTERM"),
    ),
    "pickles": (
        Row(HF, "trainer.py", r"torch\.load\(rng_file, weights_only=True\)"),
        Row(AXOLOTL, "core/trainers/mixins/rng_state_loader.py", r"torch\.load\(rng_file\)"),
        Row(LF, "model/model_utils/valuehead.py", r"torch\.load\(.+weights_only=True"),
        Row(LF, "v1/core/utils/checkpoint.py", r"torch\.load\(.+weights_only=False"),
    ),
}
# fmt: on


# --- sources ------------------------------------------------------------------------------------------


def folder_of(source: Source, folder: Path) -> Path:
    """Where the source's globs start; it is fetched if it is neither in the folder nor installed."""
    name, _, version = source.requirement.partition("==")
    if not (folder / name).is_dir():
        installed = [d for d in importlib.metadata.distributions(name=name) if d.version == version]
        if installed:
            return Path(str(installed[0].locate_file(source.package)))
        fetch(source.requirement, folder / name)
    found = [path.name for path in (folder / name).glob("*.dist-info")]
    if found and not found[0].endswith(f"-{version}.dist-info"):
        sys.exit(f"{folder / name} has {found[0]}, but the page is about {source.requirement}")
    return folder / name / source.package


def fetch(requirement: str, target: Path) -> None:
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
    subprocess.run([*command, "--target", str(target), requirement], check=True)


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def look_up(row: Row, root: Path) -> tuple[bool, str]:
    """Whether the row holds, and where: file:line, or in how many files it is absent."""
    files = sorted(path for path in root.glob(row.files) if path.is_file())
    if not files:
        return False, f"no file {row.files}"
    for path in files:
        if match := re.search(row.pattern, read(path), re.MULTILINE):
            line = read(path).count("\n", 0, match.start()) + 1
            return row.present, f"{path.relative_to(root).as_posix()}:{line}"
    return not row.present, f"absent in {len(files)} files of {row.files}"


# --- what has to be tried -----------------------------------------------------------------------------


def purge_step(folder: Path) -> Iterable[tuple[bool, str]]:
    """Steps 1 to 100, resumed from 80 with purge_step; a rare tag has steps 90 and 95 of the lost part."""
    from torch.utils.tensorboard import SummaryWriter

    from tests.helpers.tensorboard_server import TensorBoardServer

    for first, last, purge in ((1, 100, None), (81, 120, 81)):
        with SummaryWriter(str(folder / "logs" / "run"), purge_step=purge) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("loss", step, step)
                if first == 1 and step in (90, 95):
                    writer.add_scalar("rare", step, step)
    for reader, load_fast, twice in (("default", True, 0), ("Python", False, 20)):
        with TensorBoardServer(folder / "logs", load_fast=load_fast) as server:
            server.wait_for(
                lambda s=server: s.scalars("run", "loss")[-1][0] == 120, "the last step"
            )
            steps = [step for step, _ in server.scalars("run", "loss")]
            stale = len(server.scalars("run", "rare"))
        repeated = len(steps) - len(set(steps))
        told = f"{reader} loader: {repeated} steps twice, {stale} stale values of the rare tag"
        yield (repeated, stale) == (twice, 2), told


def flipped_bit(folder: Path) -> Iterable[tuple[bool, str]]:
    """One bit of a weight turned on the disk: does the reader say anything?"""
    import torch
    from safetensors.torch import load_file, save_file

    weights = torch.arange(1000.0)
    for name, save, load in (
        ("safetensors", save_file, load_file),
        ("torch.load", torch.save, torch.load),
    ):
        path = folder / name
        save({"weights": weights}, path)
        content = bytearray(path.read_bytes())
        content[content.find(weights.numpy().tobytes()) + 2003] ^= 4
        path.write_bytes(content)
        wrong = int((load(path)["weights"] != weights).sum())
        yield wrong == 1, f"{name}: read without an error, {wrong} wrong weight"


TRIALS: dict[str, Callable[[Path], Iterable[tuple[bool, str]]]] = {
    "purge-step": purge_step,
    "flipped-bit": flipped_bit,
}


# --- report -------------------------------------------------------------------------------------------


def check_rows(claims: Mapping[str, Sequence[Row]], roots: Mapping[str, Path]) -> int:
    """Prints every row and where it was found; how many do not hold."""
    failed = 0
    for claim, rows in claims.items():
        print(f"\n{claim}")
        for row in rows:
            holds, where = look_up(row, roots[row.program])
            wanted = (
                "" if holds else f"  {'expected' if row.present else 'not expected'}: {row.pattern}"
            )
            print(f"  {'ok  ' if holds else 'FAIL'} {row.program:14} {where}{wanted}")
            failed += not holds
    return failed


def check_trials(names: Iterable[str]) -> int:
    """Runs what has to be tried; how many results are not as the page says."""
    failed = 0
    for name in names:
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            for holds, told in TRIALS[name](Path(folder)):
                print(f"  {'ok  ' if holds else 'FAIL'} {told}")
                failed += not holds
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, help="folder with a folder for each distribution")
    parser.add_argument("--only", nargs="+", choices=[*CLAIMS, *TRIALS], metavar="CLAIM")
    options = parser.parse_args()
    names = options.only or [*CLAIMS, *TRIALS]
    claims = {name: CLAIMS[name] for name in names if name in CLAIMS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.sources or Path(temporary)
        used = {row.program for rows in claims.values() for row in rows}
        roots = {name: folder_of(SOURCES[name], folder) for name in SOURCES if name in used}
        failed = check_rows(claims, roots) + check_trials(name for name in names if name in TRIALS)
    rows = sum(map(len, claims.values()))
    print(f"\n{len(names)} claims, {rows} rows in {len(roots)} sources, {failed} do not hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
