"""How a model draws its tokens where nobody says how: by generation_config.json, as transformers reads it.

llama.cpp and ollama have defaults of their own, other ones; so each value is written down for them.
"""

from dataclasses import dataclass
from typing import Self

import transformers

UNSET = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What transformers takes for a value that the file does not give."""


@dataclass(frozen=True)
class SamplingDefaults:
    """By the names of llama.cpp and ollama."""

    temperature: float
    """0: always the most probable token, and what follows is of no meaning, but for the penalty."""
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    """1: none. A token that was there before is less probable by this factor."""
    repeat_last_n: int
    """How far back "before" goes, tokens; -1: over all the text, as in transformers."""

    @classmethod
    def of(cls, generation: transformers.GenerationConfig | None) -> Self:
        """generation: None where the model has no such file, and so takes the most probable token."""
        given = {name: getattr(generation, name, None) for name in UNSET}
        values = {name: UNSET[name] if value is None else value for name, value in given.items()}
        return cls(
            temperature=values["temperature"] if getattr(generation, "do_sample", None) else 0.0,
            top_k=values["top_k"],
            top_p=values["top_p"],
            min_p=values["min_p"],
            repeat_penalty=values["repetition_penalty"],
            repeat_last_n=-1,
        )
