"""What logging costs and survives: torch's SummaryWriter, tensorboardX, TensorBoard's EventFileWriter, ours.

    python -m benchmarks.logger_cost            # about 6 minutes; --quick: about 1.5
    python -m benchmarks.logger_cost --quick --tables scalars histogram

Four tables from one run, the writers interleaved, medians with their range:
  1. 60 scalars a step: microseconds a step in the caller, CPU, bytes
  2. a histogram of 10 M weights, in the caller
  3. a training loop of about 40 ms a step: what logging adds
  4. faults: full disk, deleted directory, fork, kill -9, slow disk, each in a process of its own

The last line on stdout is one JSON object.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TAGS = 60
NAMES = {
    "torch": "torch SummaryWriter",
    "tensorboardx": "tensorboardX",
    "eventfile": "TensorBoard EventFileWriter, 1 event a step",
    "ours": "tb_logger",
}


def scalars_at(step: int) -> dict[str, float]:
    return {f"Group_{i % 6}/Metric_{i}": step + i / 7 for i in range(TAGS)}


# --- the writers under one interface: log(step, scalars), close() ------------------------------------


def open_writer(name: str, run_dir: str) -> tuple[Callable, Callable]:
    """(log, close) of writer `name`, each with its defaults."""
    if name == "torch":
        from torch.utils.tensorboard import SummaryWriter

        return _one_by_one(SummaryWriter(run_dir))
    if name == "tensorboardx":
        from tensorboardX import SummaryWriter

        return _one_by_one(SummaryWriter(run_dir))
    if name == "eventfile":
        return _event_file_writer(run_dir)
    from tb_logger import TensorBoardLogger

    logger = TensorBoardLogger(run_dir, metrics_path=Path(run_dir) / "metrics.jsonl")
    return logger.log, logger.close


def _one_by_one(writer) -> tuple[Callable, Callable]:
    def log(step: int, scalars: dict[str, float]) -> None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)

    return log, writer.close


def _event_file_writer(run_dir: str) -> tuple[Callable, Callable]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(run_dir)

    def log(step: int, scalars: dict[str, float]) -> None:
        event = Event(wall_time=time.time(), step=step)
        for tag, value in scalars.items():
            event.summary.value.add(tag=tag, simple_value=value)
        writer.add_event(event)

    return log, writer.close


def event_bytes(run_dir: str) -> int:
    return sum(path.stat().st_size for path in Path(run_dir).glob("*tfevents*"))


# --- 1. cost of scalars ----------------------------------------------------------------------------


def measure_scalars(name: str, steps: int, pause: float = 0.0) -> dict[str, float]:
    """Microseconds a step in the caller and of CPU in the process, bytes a step in the event file."""
    run_dir = tempfile.mkdtemp(prefix="logger_cost_")
    log, close = open_writer(name, run_dir)
    log(0, scalars_at(0))
    values = [scalars_at(step) for step in range(1, steps + 1)]
    cpu, in_caller = time.process_time(), 0.0
    for step, scalars in enumerate(values, start=1):
        began = time.perf_counter()
        log(step, scalars)
        in_caller += time.perf_counter() - began
        if pause:
            time.sleep(pause)
    close()
    cpu = time.process_time() - cpu
    result = {
        "caller": in_caller / steps * 1e6,
        "cpu": cpu / steps * 1e6,
        "bytes": event_bytes(run_dir) / (steps + 1),
    }
    shutil.rmtree(run_dir, ignore_errors=True)
    return result


def interleaved(names, repeats: int, measure: Callable) -> dict[str, list]:
    """`measure(name)` for every name in turn, `repeats` times, so that drift hits all alike."""
    results = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            results[name].append(measure(name))
    return results


def spread(values: list[float], digits: int = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table_of_scalars(steps: int, repeats: int, pause: float) -> dict[str, dict[str, float]]:
    results = interleaved(NAMES, repeats, lambda name: measure_scalars(name, steps, pause))
    pace = f", one every {pause * 1e3:.0f} ms" if pause else ", no pause"
    print(f"\n{TAGS} scalars x {steps} steps{pace}; median (min to max) of {repeats} runs")
    print(f"{'':45}{'us/step in caller':>26}{'CPU us/step':>26}{'bytes/step':>12}")
    medians = {}
    for name, runs in results.items():
        columns = {key: [run[key] for run in runs] for key in runs[0]}
        medians[name] = {key: statistics.median(column) for key, column in columns.items()}
        size = f"{medians[name]['bytes']:.0f}"
        print(
            f"{NAMES[name]:45}{spread(columns['caller']):>26}{spread(columns['cpu']):>26}{size:>12}"
        )
    return medians


# --- 2. a large histogram -------------------------------------------------------------------------


def table_of_histograms(repeats: int) -> dict[str, float]:
    """10 M float32 weights; ours copies in the caller and counts in the thread, on a GPU it counts there."""
    import torch
    from tensorboardX import SummaryWriter as OtherWriter
    from torch.utils.tensorboard import SummaryWriter

    from tb_logger import TensorBoardLogger

    weights = torch.randn(10_000_000)
    run_dir = tempfile.mkdtemp(prefix="logger_cost_")
    ours = TensorBoardLogger(f"{run_dir}/ours")
    writers = {
        "torch": SummaryWriter(f"{run_dir}/torch"),
        "tensorboardx": OtherWriter(f"{run_dir}/x"),
    }
    counts, edges = torch.histc(weights, 64, -6, 6), torch.linspace(-6, 6, 65)
    step = 0

    def measure(name: str) -> float:
        nonlocal step
        step += 1
        began = time.perf_counter()
        if name == "counts":
            ours.log_histogram_counts("counts", counts, edges, step)
        else:
            writers.get(name, ours).add_histogram("weights", weights, step)
        elapsed = time.perf_counter() - began
        ours.flush(wait=30)
        return elapsed * 1e3

    rows = {**NAMES, "counts": "tb_logger, counts from torch.histc"}
    names = ("torch", "tensorboardx", "ours", "counts")
    results = interleaved(names, repeats, measure)
    print("\nhistogram of 10 M float32 on the CPU, ms in the caller")
    for name in names:
        print(f"{rows[name]:45}{spread(results[name], 2):>26}")
    for writer in (ours, *writers.values()):
        writer.close()
    shutil.rmtree(run_dir, ignore_errors=True)
    return {name: statistics.median(times) for name, times in results.items()}


# --- 3. overhead on a training loop ------------------------------------------------------------------


def training_step(width: int) -> Callable[[], float]:
    """A small causal transformer with AdamW; one call is one update and returns the loss."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    data = torch.randn(4, 64, width)

    def step() -> float:
        loss = (model(data) - data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def calibrated_step(milliseconds: float) -> Callable[[], float]:
    for width in (64, 96, 128, 160, 192, 256, 320, 384, 448, 512):
        step = training_step(width)
        step()
        began = time.perf_counter()
        for _ in range(3):
            step()
        if (time.perf_counter() - began) / 3 >= milliseconds / 1e3:
            break
    return step


def log_everything(logger, step: int, loss: float, weights) -> None:
    """What a run logs: 60 scalars a step, text and a histogram of counts now and then."""
    import torch

    logger.log(step, {**scalars_at(step), "Training/Loss": loss})
    logger.add_scalar("Custom/My_Metric", loss, step)
    if step % 10 == 0:
        counts = torch.histc(weights, 64, -1, 1)
        logger.log_histogram_counts("Model/Weights", counts, torch.linspace(-1, 1, 65), step)
    if step % 50 == 0:
        logger.add_text("Eval/Samples", "a line of text\n" * 40, step)


def table_of_loop(pairs: int, writers: tuple[str, ...]) -> dict[str, dict]:
    """Blocks of steps with logging at every step against blocks without, in % of a step's time.

    "in the caller" is the mean time inside of the logging calls. The paired differences are of the wall
    time, which other programs disturb, and of the CPU time of the training thread.
    """
    import torch

    step_fn, weights, results = calibrated_step(40.0), torch.randn(10_000), {}
    for name in writers:
        run_dir = tempfile.mkdtemp(prefix="logger_cost_")
        results[name] = _paired_blocks(name, run_dir, step_fn, weights, pairs)
        shutil.rmtree(run_dir, ignore_errors=True)
    step_ms = statistics.median(row["step_ms"] for row in results.values())
    print(f"\ntraining loop, {step_ms:.1f} ms a step; {pairs} pairs of blocks; % of a step")
    columns = ("in the caller", "paired, wall (95%)", "paired, CPU (95%)", "other threads")
    print(f"{'':45}{columns[0]:>14}{columns[1]:>28}{columns[2]:>28}{columns[3]:>17}")
    for name, row in results.items():
        wall, cpu = (
            f"{m:+.2f} ({lo:+.2f} to {hi:+.2f})" for lo, m, hi in (row["wall"], row["cpu"])
        )
        print(f"{NAMES[name]:45}{row['caller']:>14.3f}{wall:>28}{cpu:>28}{row['others']:>17.2f}")
    return results


def _loop_writer(name: str, run_dir: str, weights) -> tuple[Callable, Callable]:
    """(log(step, loss), close): everything a run logs for ours, the scalars alone for the others."""
    if name != "ours":
        log, close = open_writer(name, run_dir)
        return lambda step, loss: log(step, {**scalars_at(step), "Training/Loss": loss}), close
    from tb_logger import TensorBoardLogger

    logger = TensorBoardLogger(run_dir, metrics_path=Path(run_dir) / "metrics.jsonl")
    return lambda step, loss: log_everything(logger, step, loss, weights), logger.close


class Block:
    """One block of 10 steps. The first three are not timed: a thread still works for the block before."""

    def __init__(self, step_fn: Callable, first: int, log: Callable | None):
        self.wall, self.cpu, self.caller = [], [], []
        others = time.process_time() - time.thread_time()
        for step in range(first, first + 10):
            began, began_cpu = time.perf_counter(), time.thread_time()
            loss = step_fn()
            if log is not None:
                called = time.perf_counter()
                log(step, loss)
                self.caller.append(time.perf_counter() - called)
            self.wall.append(time.perf_counter() - began)
            self.cpu.append(time.thread_time() - began_cpu)
        self.others = (time.process_time() - time.thread_time() - others) / 10
        del self.wall[:3], self.cpu[:3]


def _paired_blocks(name: str, run_dir: str, step_fn: Callable, weights, pairs: int) -> dict:
    log, close = _loop_writer(name, run_dir, weights)
    log(0, 0.0)
    on, off = [], []
    for i in range(2 * pairs):  # on off off on ..., so that a trend cancels
        logged = i % 4 in (0, 3)
        block = Block(step_fn, 10 * i + 1, log if logged else None)
        (on if logged else off).append(block)
    close()
    median, mean = statistics.median, statistics.fmean
    step_seconds = median(median(block.wall) for block in off)

    def percent(kind: str) -> list[float]:
        times = [[median(getattr(block, kind)) for block in blocks] for blocks in (on, off)]
        return [100 * (a - b) / step_seconds for a, b in zip(*times, strict=True)]

    return {
        "step_ms": step_seconds * 1e3,
        "caller": 100 * mean(mean(block.caller) for block in on) / step_seconds,
        "wall": _interval(percent("wall")),
        "cpu": _interval(percent("cpu")),
        "others": 100 * (mean(b.others for b in on) - mean(b.others for b in off)) / step_seconds,
    }


def _interval(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median with its 95% bootstrap interval."""
    import numpy as np

    draws = np.random.default_rng(0).choice(values, (draws, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), statistics.median(values), float(high)


# --- 4. faults, each in a process of its own -----------------------------------------------------------


def trial(fault: str, name: str, run_dir: str) -> None:
    """The child's part: log through a fault; print one JSON line a step."""
    state = {"raised": 0, "slowest_ms": 0.0, "steps": 0, "pid": os.getpid()}
    log, close = open_writer(name, run_dir)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            began = time.perf_counter()
            try:
                log(step, scalars_at(step))
            except Exception:
                state["raised"] += 1
            state["slowest_ms"] = max(state["slowest_ms"], (time.perf_counter() - began) * 1e3)
            state["steps"] = step
            if state["pid"] == os.getpid():  # not in the forked child
                print(json.dumps(state), flush=True)
            time.sleep(0.005)

    if fault == "slow disk":
        slow_down_writes(name)
    steps(1, 31)
    if fault == "deleted directory":
        time.sleep(0.5)
        shutil.rmtree(run_dir)
    if fault == "fork":
        child = os.fork()
        steps(31, 61)
        if child == 0:
            os._exit(0)
        state["child_ended"] = wait_for_child(child)
    steps(61, 121)
    if fault == "full disk":
        (Path(run_dir).parent / "ballast").unlink()
        time.sleep(1.2)
        steps(121, 131)
    if fault == "kill -9":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        close()
    except Exception:
        state["raised_in_close"] = 1
    print(json.dumps({**state, "closed": 1}), flush=True)


def wait_for_child(child: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def slow_down_writes(name: str) -> None:
    """Every record takes 5 ms longer on its way to the disk, as on a busy network disk."""
    if name == "ours":
        from finetuning.events import event_file

        owner, attribute = event_file.AppendFile, "append"
    elif name == "tensorboardx":
        from tensorboardX.record_writer import RecordWriter as owner

        attribute = "write"
    else:
        from tensorboard.summary.writer.record_writer import RecordWriter as owner

        attribute = "write"
    original = getattr(owner, attribute)

    def slow(self, data):
        time.sleep(0.005)
        return original(self, data)

    setattr(owner, attribute, slow)


@contextlib.contextmanager
def disk_for(fault: str):
    """A directory; for the full disk one of 2 MiB, all but 48 KiB of it taken by a file called ballast."""
    directory = tempfile.mkdtemp(prefix="logger_cost_")
    is_small = fault == "full disk" and _mount(directory)
    if is_small:
        (Path(directory) / "ballast").write_bytes(bytes((2 << 20) - (48 << 10)))
    try:
        yield directory if fault != "full disk" or is_small else None
    finally:
        if is_small:
            subprocess.run(["umount", "--lazy", directory], check=True)
        shutil.rmtree(directory, ignore_errors=True)


def _mount(directory: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def outcome(fault: str, name: str, timeout: float) -> dict:
    """Run one trial; what became of training, of the points, and whether the user was told."""
    with disk_for(fault) as directory:
        if directory is None:
            return {"skipped": "mounting a small disk is not permitted"}
        run_dir = f"{directory}/run"
        os.mkdir(run_dir)
        command = [sys.executable, "-m", "benchmarks.logger_cost", "--trial", fault, name, run_dir]
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = child.communicate(timeout=timeout)
            hung = False
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, err = child.communicate()
            hung = True
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return {
            **(lines[-1] if lines else {}),
            "hung": hung,
            "told": bool(err.strip()),
            **points_on_disk(run_dir),
        }


def points_on_disk(run_dir: str) -> dict:
    """Steps that a reader finds, how often it finds one twice, and torn bytes at the end of files."""
    from finetuning.events.event_file import event_files, read_records, surviving_events

    tag, files = next(iter(scalars_at(0))), event_files(Path(run_dir))
    found = [e.step for e in surviving_events(files) for v in e.summary.value if v.tag == tag]
    ends = [max((end for end, _ in read_records(path)), default=0) for path in files]
    torn = sum(path.stat().st_size - end for path, end in zip(files, ends, strict=True))
    return {"points": len(set(found)), "doubles": len(found) - len(set(found)), "torn": torn}


STEPS_OF = {"full disk": 100, "deleted directory": 60, "fork": 120, "kill -9": 90, "slow disk": 90}


def verdict(fault: str, result: dict) -> tuple[str, bool]:
    """One line of the table, and whether training was unharmed and losses were told."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}", True
    expected = STEPS_OF[fault]
    harm, blocks = [], result.get("slowest_ms", 0) > 100
    if result["hung"]:
        harm.append("not done in time" if blocks else "HANGS")
    if result.get("child_ended") is False:
        harm.append("CHILD HANGS")
    if result.get("raised"):
        harm.append(f"RAISES x{result['raised']}")
    if result.get("raised_in_close"):
        harm.append("close() RAISES")
    if blocks:
        harm.append(f"BLOCKS a step {result['slowest_ms']:.0f} ms")
    training = ", ".join(harm) or "unharmed"
    text = f"{training}; {result['points']} of {expected} points"
    lost_silently = result["points"] < expected and not result["told"] and fault != "kill -9"
    text += ", doubles" if result["doubles"] else ""
    text += f", {result['torn']} torn bytes" if result["torn"] else ""
    text += ", NOT TOLD" if lost_silently else ", told" if result["told"] else ""
    return text, not harm and not lost_silently and not result["doubles"] and not result["torn"]


def table_of_faults(timeout: float) -> dict[str, bool]:
    print(f"\nfaults: what became of training (limit {timeout:.0f} s) and of the points")
    unharmed = dict.fromkeys(NAMES, True)
    for fault in STEPS_OF:
        print(f"{fault}:")
        for name in NAMES:
            text, good = verdict(fault, outcome(fault, name, timeout))
            unharmed[name] &= good
            print(f"    {NAMES[name]:45}{text}", flush=True)
    return unharmed


# -----------------------------------------------------------------------------
# The figures of each table


def scalar_figures(quick: bool) -> dict[str, float]:
    """Unpaced, and with 20 ms between the steps, as the caller of a real run meets them."""
    fast = table_of_scalars(500 if quick else 2000, 3 if quick else 7, 0.0)
    paced = table_of_scalars(50 if quick else 200, 2 if quick else 5, 0.02)
    return {
        "caller_speedup_vs_torch": fast["torch"]["caller"] / fast["ours"]["caller"],
        "caller_us_per_step": fast["ours"]["caller"],
        "caller_us_per_step_paced": paced["ours"]["caller"],
        "caller_speedup_vs_torch_paced": paced["torch"]["caller"] / paced["ours"]["caller"],
        "cpu_us_per_step": fast["ours"]["cpu"],
        "bytes_saved_percent": 100 * (1 - fast["ours"]["bytes"] / fast["torch"]["bytes"]),
    }


def histogram_figures(quick: bool) -> dict[str, float]:
    """Milliseconds in the caller."""
    found = table_of_histograms(3 if quick else 9)
    return {
        "histogram_10m_caller_ms": found["ours"],
        "histogram_counts_caller_ms": found["counts"],
    }


def loop_figures(quick: bool) -> dict[str, object]:
    """What logging adds to a training loop, in percent."""
    found = table_of_loop(12 if quick else 60, ("ours", "torch"))
    return {
        "loop_overhead_percent": found["ours"]["caller"],
        "loop_overhead_paired_wall_percent": found["ours"]["wall"],
        "loop_overhead_paired_cpu_percent": found["ours"]["cpu"],
        "loop_overhead_torch_percent": found["torch"]["caller"],
    }


def fault_figures(quick: bool) -> dict[str, bool]:
    """Whether training went on and no point was lost in silence."""
    return {"faults_unharmed": table_of_faults(12.0 if quick else 20.0)["ours"]}


TABLES = {
    "scalars": scalar_figures,
    "histogram": histogram_figures,
    "loop": loop_figures,
    "faults": fault_figures,
}


def rounded(value):
    """Numbers of the last line, to three digits after the point."""
    if isinstance(value, tuple):
        return [rounded(part) for part in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--trial", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        return trial(*args.trial)
    import torch

    torch.set_num_threads(1)
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    figures: dict[str, object] = {}
    for name in args.tables:
        figures |= TABLES[name](args.quick)
    print(json.dumps({key: rounded(value) for key, value in figures.items()}))
    return None


if __name__ == "__main__":
    main()
