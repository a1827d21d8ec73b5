"""What ollama does with a Modelfile, by its parts: Go renders the template, llama.cpp runs the weights."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.go_template import rendered_by_go
from tests.helpers.llama_server import serving


@dataclass(frozen=True)
class Created:
    """A model as `ollama create` knows it."""

    weights: Path
    template: str
    system: str
    stop: tuple[str, ...]

    def prompt(self, question: str) -> str:
        """The text that the model is given for a first question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*system, {"role": "user", "content": question}]
        return rendered_by_go(self.template, [asked])[0]

    def run(self, question: str, most: int = 64) -> str:
        """Its greedy reply, up to the stop text."""
        options = {"n_predict": most, "temperature": 0, "stop": list(self.stop)}
        with serving(self.weights) as server:
            return server.post("/completion", prompt=self.prompt(question), **options)["content"]


def create(modelfile: Path) -> Created:
    """Read a Modelfile; its weights must be there."""
    text = modelfile.read_text(encoding="utf-8")
    quoted = dict(re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', text, re.MULTILINE | re.DOTALL))
    (weights,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    path = modelfile.parent / weights
    assert path.is_file()
    stop = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
    return Created(path, quoted["TEMPLATE"], quoted.get("SYSTEM", ""), tuple(stop))
