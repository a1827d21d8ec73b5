"""Pin every package that `uv run` installs: versions in pyproject.toml, bytes in requirements.lock.

    uv run python scripts/pin_versions.py           write both
    uv run python scripts/pin_versions.py --check   exit 1 if they are not what uv resolves to

`uv.lock` is not committed, because it would write one index's addresses into every clone. Instead the
whole closure stands as `constraint-dependencies`, with the environment markers under which uv uses each
package, so that every index gives the same versions; and requirements.lock names the SHA-256 of every
file of theirs, without any address, so that no index can give other bytes. After changing a direct
dependency: delete `uv.lock`, run this, and commit both files.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT, LOCK = ROOT / "pyproject.toml", ROOT / "requirements.lock"
BLOCK = re.compile(r"constraint-dependencies = \[\n.*?\n\]\n", re.DOTALL)
PACKAGE = re.compile(r"^([\w.-]+==[^ ;\\]+)")
HEADER = """# Every package of every group with the SHA-256 of its files; made by scripts/pin_versions.py.
# uv pip install --require-hashes -r requirements.lock
"""


def exported(*options: str) -> str:
    """uv's resolution of all groups and extras, as requirements."""
    command = [
        "uv",
        "export",
        "--quiet",
        "--all-groups",
        "--all-extras",
        "--format",
        "requirements.txt",
    ]
    plain = ["--no-annotate", "--no-header", "--no-emit-project"]
    done = subprocess.run(
        [*command, *plain, *options], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout


def resolved() -> list[str]:
    """`name==version ; marker` of everything in it."""
    return sorted(line.strip() for line in exported("--no-hashes").splitlines() if "==" in line)


def hashes(text: str) -> dict[str, set[str]]:
    """Package with version -> the digests that a lock allows for it."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if package := PACKAGE.match(line):
            current = found.setdefault(package[1], set())
        elif "--hash=" in line:
            current.add(line.strip().rstrip("\\").strip().removeprefix("--hash="))
    return found


def differences(committed: str, fresh: str) -> tuple[list[str], list[str]]:
    """Faults and remarks: why what an index offers is not what was tested.

    An index may lack files of other systems, and have files that came later; none may offer a version
    without a single file that the lock knows.
    """
    known, offered = hashes(committed), hashes(fresh)
    faults = [f"{name} is not in requirements.lock" for name in offered.keys() - known.keys()]
    faults += [f"{name} is not needed any more" for name in known.keys() - offered.keys()]
    remarks = []
    for name in offered.keys() & known.keys():
        if not offered[name]:
            remarks.append(f"{name}: the index tells no SHA-256, nothing was compared")
        elif not offered[name] & known[name]:
            faults.append(f"{name}: the index has other bytes than requirements.lock knows")
        elif offered[name] - known[name]:
            remarks.append(f"{name}: the index has files that requirements.lock does not know")
    return sorted(faults), sorted(remarks)


def pinned(text: str, requirements: list[str]) -> str:
    """pyproject.toml with these constraints."""
    lines = "".join(f'    "{r.replace(chr(34), chr(39))}",\n' for r in requirements)
    block = f"constraint-dependencies = [\n{lines}]\n"
    if BLOCK.search(text):
        return BLOCK.sub(lambda _: block, text, count=1)
    return text.replace("[tool.uv]\n", "[tool.uv]\n" + block, 1)


def main() -> int:
    """Write or check the pins."""
    text, fresh = PYPROJECT.read_text(encoding="utf-8"), exported()
    wanted = pinned(text, resolved())
    if "--check" in sys.argv[1:]:
        committed = LOCK.read_text(encoding="utf-8") if LOCK.is_file() else ""
        faults, remarks = differences(committed, fresh)
        if wanted != text:
            faults.insert(0, "pyproject.toml: the pins are not what uv resolves to")
        print("\n".join([*faults, *(f"note: {remark}" for remark in remarks)]))
        if faults:
            print(
                "run scripts/pin_versions.py if you have changed a dependency; else don't install these"
            )
        return bool(faults)
    PYPROJECT.write_text(wanted, encoding="utf-8")
    LOCK.write_text(HEADER + fresh, encoding="utf-8", newline="\n")
    print(f"{len(hashes(fresh))} packages pinned")
    return 0


if __name__ == "__main__":
    sys.exit(main())
