"""While a model is tried, nobody else notices: random states stay, and nothing is printed."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers.utils import logging as transformers_logging


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within it, all that is drawn and all that libraries say is without effect."""
    with _random_state_kept(), _silent():
        yield


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Weights are drawn by three libraries while a model is built."""
    states = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _silent() -> Iterator[None]:
    """What transformers says of a small model is said again of the real one, once."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.warning_once.cache_clear()
