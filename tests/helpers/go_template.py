"""Go's own text/template, as ollama uses it, renders conversations; the toolchain comes in a wheel."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# The fields of a message by ollama's names; like there, a missing key is empty.
_PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content, Thinking string }

func main() {
	var given struct {
		Template      string
		Conversations [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	rendered := []string{}
	for _, messages := range given.Conversations {
		var text strings.Builder
		if err := parsed.Execute(&text, map[string]any{"Messages": messages}); err != nil {
			panic(err)
		}
		rendered = append(rendered, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil {
		panic(err)
	}
}
"""


def rendered_by_go(template: str, conversations: list[list[dict[str, str]]]) -> list[str]:
    """What Go makes of each. Skips where its toolchain is not installed."""
    messages = [
        [
            {"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning_content", "")}
            for m in conversation
        ]
        for conversation in conversations
    ]
    given = json.dumps({"Template": template, "Conversations": messages})
    done = subprocess.run([_program()], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@functools.cache
def _program() -> Path:
    """Compiled once a session; Go keeps what it has compiled of its library."""
    beside = Path(sys.executable).with_name("go")
    go = str(beside) if beside.is_file() else shutil.which("go")
    if go is None:
        pytest.skip("needs Go: uv run --group serving")
    folder = Path(tempfile.mkdtemp(prefix="go-template-"))
    (folder / "main.go").write_text(_PROGRAM, encoding="utf-8")
    program = folder / "render"
    subprocess.run(
        [go, "build", "-o", program, "main.go"],
        cwd=folder,
        env=os.environ | {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    return program
