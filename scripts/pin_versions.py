"""Pin every package that `uv run` installs, directly or not, in pyproject.toml.

    uv run python scripts/pin_versions.py           write the pins
    uv run python scripts/pin_versions.py --check   exit 1 if they are not what uv resolves to

`uv.lock` is not committed, because it would write one index's addresses into every clone. Instead the
whole closure stands as `constraint-dependencies`, with the environment markers under which uv uses each
package, so that every index gives the same versions. After changing a direct dependency: delete
`uv.lock`, run this, and commit pyproject.toml.
"""

import re
import subprocess
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
BLOCK = re.compile(r"constraint-dependencies = \[\n.*?\n\]\n", re.DOTALL)


def resolved() -> list[str]:
    """`name==version ; marker` of everything in uv's resolution, all groups and extras."""
    command = ["uv", "export", "--quiet", "--all-groups", "--all-extras"]
    options = ["--no-hashes", "--no-annotate", "--no-header", "--no-emit-project"]
    text = subprocess.run(
        [*command, *options], check=True, capture_output=True, text=True, cwd=PYPROJECT.parent
    ).stdout
    return sorted(line.strip() for line in text.splitlines() if "==" in line)


def pinned(text: str, requirements: list[str]) -> str:
    """pyproject.toml with these constraints."""
    lines = "".join(f'    "{r.replace(chr(34), chr(39))}",\n' for r in requirements)
    block = f"constraint-dependencies = [\n{lines}]\n"
    if BLOCK.search(text):
        return BLOCK.sub(lambda _: block, text, count=1)
    return text.replace("[tool.uv]\n", "[tool.uv]\n" + block, 1)


def main() -> int:
    """Write or check the pins."""
    text = PYPROJECT.read_text(encoding="utf-8")
    wanted = pinned(text, resolved())
    if "--check" in sys.argv[1:]:
        if wanted != text:
            print(
                "pyproject.toml: the pins are not what uv resolves to; run scripts/pin_versions.py"
            )
            return 1
        return 0
    PYPROJECT.write_text(wanted, encoding="utf-8")
    print(f"{len(resolved())} packages pinned")
    return 0


if __name__ == "__main__":
    sys.exit(main())
