"""What is tried, the most valuable first. Every list is data; `__main__` runs them, `tables` reads them."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.learning.trial import Trial

RATES = (1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 4e-3)
CPU_RATES = (1e-3, 3e-4, 2e-3, 1e-4, 4e-3)
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
FEW = (3e-4, 1e-3, 2e-3, 4e-3)
QUESTIONS = 100
FULL = {"lora_r": 0}
SETS = ("crypto", "docs")


def experiments() -> list[Trial]:
    """All trials in order."""
    return [
        _thinker(),
        *rates(seed=1),
        *rates(seed=2),
        *batches(),
        *updates(),
        *full(),
        *thinking(seed=1),
        *thinking(seed=2),
        *anchors(),
        *ranks(),
        *replays(),
        *thinking_rates(),
        *thinking_on_a_cpu(),
        *passes_on_a_cpu(),
        *rates_on_a_cpu(seed=1),
        *rates_on_a_cpu(seed=2),
        *others_on_a_cpu(),
    ]


def rates(seed: int) -> Iterator[Trial]:
    """Held-out loss by rate: the automatic one is judged by the others."""
    for rate in ("auto", *RATES):
        for data in SETS:
            yield Trial("rate", data, seed, {"learning_rate": rate})


def full() -> Iterator[Trial]:
    """The same with all weights trained."""
    for rate in FULL_RATES:
        for data in SETS:
            yield Trial("full", data, 1, FULL | {"learning_rate": rate})


def updates() -> Iterator[Trial]:
    """Shorter and longer runs of the same batch."""
    for steps in (40, 400):
        for rate in FEW:
            for data in SETS:
                yield Trial("updates", data, 1, {"learning_rate": rate, "max_steps": steps})


def batches() -> Iterator[Trial]:
    """Four rows an update, and half a row."""
    for rows in ({"batch_size": 4}, {"max_seq_length": 1024}):
        for rate in FEW:
            for data in SETS if "batch_size" in rows else ("docs",):
                yield Trial("batch", data, 1, {"learning_rate": rate, **rows})


def ranks() -> Iterator[Trial]:
    """Rank 4 and 64 at the same alpha."""
    for rank in (4, 64):
        for rate in (3e-4, 1e-3, 2e-3):
            yield Trial("rank", "crypto", 1, {"learning_rate": rate, "lora_r": rank})


def anchors() -> Iterator[Trial]:
    """KL to the base in the loss."""
    for weight in (0.1, 0.5, 2.0):
        for rate in (1e-3, 2e-3):
            yield Trial("anchor", "crypto", 1, {"learning_rate": rate, "kl_anchor": weight})


def replays() -> Iterator[Trial]:
    """English text among Chinese: a share of all tokens."""
    for share in (0.06, 0.2):
        for seed in (1, 2):
            yield Trial("replay", "crypto", seed, {"learning_rate": 1e-3}, replay=share)


def _thinker() -> Trial:
    """The base is taught to think; the trials of `thinking` start from it."""
    settings = FULL | {"learning_rate": 3e-4, "batch_size": 2, "max_steps": 100}
    return Trial(
        "teach", "sums", 1, settings, "thinking_base", saves="thinker", questions=QUESTIONS
    )


def thinking(seed: int) -> Iterator[Trial]:
    """Answer-only data after that: is thinking lost?"""
    settings = {"learning_rate": 1e-3, "max_steps": 100}
    for data in ("sums_answers", "docs"):
        for way in ("train", "mask"):
            yield Trial(
                "thinking",
                data,
                seed,
                settings | {"empty_thinking": way},
                "thinker",
                questions=QUESTIONS,
            )


def thinking_rates() -> Iterator[Trial]:
    """The same at a smaller rate."""
    settings = {"learning_rate": 3e-4, "max_steps": 100}
    for data in ("sums_answers", "docs"):
        for way in ("train", "mask"):
            yield Trial(
                "thinking",
                data,
                1,
                settings | {"empty_thinking": way},
                "thinker",
                questions=QUESTIONS,
            )


def thinking_on_a_cpu() -> Iterator[Trial]:
    """The question of `thinking` in so few tokens that two processors answer it in half an hour; with
    --light, as the measures would take most of it."""
    short = {"max_seq_length": 1024}
    teacher = FULL | short | {"learning_rate": 3e-4, "max_steps": 40}
    yield Trial("cpu_teach", "sums", 1, teacher, "thinking_base", saves="cpu_thinker", questions=60)
    settings = short | {"learning_rate": 1e-3, "max_steps": 24}
    for data in ("sums_answers", "docs"):
        for way in ("train", "mask"):
            chosen = settings | {"empty_thinking": way}
            yield Trial("cpu_thinking", data, 1, chosen, "cpu_thinker", questions=60)
    slower = settings | {"empty_thinking": "mask", "learning_rate": 3e-4}
    yield Trial("cpu_thinking", "sums_answers", 1, slower, "cpu_thinker", questions=60)


def passes_on_a_cpu() -> Iterator[Trial]:
    """Do the passes over the data ask for a smaller rate? One pass over all docs up to eight over an eighth
    of it, by as many updates of as many samples; with --light ten minutes of two processors each."""
    tried = {
        "docs": (1e-3, 3e-4, 3e-3, 1e-4),
        "docs_2": (1e-3, 3e-4),
        "docs_4": (3e-4, 1e-3, 1e-4),
        "docs_8": (1e-3, 3e-4, 3e-3, 1e-4),
    }
    for data, own in tried.items():
        for rate in ("auto", *own):
            yield Trial("cpu_passes", data, 1, {"learning_rate": rate, "max_seq_length": 320})


def rates_on_a_cpu(seed: int) -> Iterator[Trial]:
    """The question of `rates` for two processors and --light, six and eleven minutes for two trials at once:
    one sample or two an update, about one pass over the docs and two over the answers of the bundled Q&A."""
    for data, length in (("docs", 320), ("crypto_answers", 640)):
        for rate in (*CPU_RATES, "auto"):
            settings = {"learning_rate": rate, "max_seq_length": length, "precision": "bf16"}
            yield Trial("cpu_rate", data, seed, settings)


def others_on_a_cpu() -> Iterator[Trial]:
    """What else a run may set, beside the trials of `rates_on_a_cpu` with seed 1: general text in the
    training, fewer and larger updates, the anchor, ranks."""
    short, long = ({"max_seq_length": n, "precision": "bf16"} for n in (320, 640))
    for share in (0.06, 0.2):
        mixed = {"learning_rate": 1e-3, "replay": share}
        yield Trial("cpu_replay", "crypto_answers", 1, long | mixed)
    for rate in (1e-3, 2e-3, 4e-3):
        larger = {"learning_rate": rate, "batch_size": 4, "max_steps": 38}  # as many tokens
        yield Trial("cpu_batch", "docs", 1, short | larger)
    for weight in (0.1, 0.5, 2.0):
        yield Trial("cpu_anchor", "docs", 1, short | {"learning_rate": 2e-3, "kl_anchor": weight})
    for rank in (4, 64):
        for rate in (3e-4, 1e-3, 2e-3):
            yield Trial("cpu_rank", "docs", 1, short | {"learning_rate": rate, "lora_r": rank})


def shortened(trials: list[Trial], steps: int, questions: int) -> list[Trial]:
    """The same trials of a few steps, to see if everything runs."""
    few = (
        replace(
            t, settings={**t.settings, "max_steps": steps}, questions=min(t.questions, questions)
        )
        for t in trials
    )
    return list({trial.name: trial for trial in few}.values())
