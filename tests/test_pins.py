"""What is installed is what was tested: versions in pyproject.toml, bytes in requirements.lock.

uv run pytest tests/test_pins.py
"""

import re
from pathlib import Path

from scripts.pin_versions import BLOCK, differences, hashes

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
A, B, C = ("sha256:" + letter * 64 for letter in "abc")


def lock(*packages: tuple[str, list[str]]) -> str:
    return "".join(
        f"{name} ; python_version > '3' \\\n"
        + " \\\n".join(f"    --hash={h}" for h in found)
        + "\n"
        for name, found in packages
    )


def test_every_pinned_version_has_its_digests_and_no_address():
    block = BLOCK.search((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[0]
    pinned = set(re.findall(r'"([\w.-]+==[^ ";]+)', block))
    found = hashes(LOCK)
    assert found.keys() == pinned and len(pinned) > 100
    assert all(found.values())
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", h) for every in found.values() for h in every)
    assert "://" not in LOCK and "--index" not in LOCK and "@ " not in LOCK


def test_other_bytes_are_a_fault():
    committed = lock(("one==1.0", [A, B]), ("two==2", [C]))
    assert differences(committed, committed) == ([], [])
    faults, remarks = differences(committed, lock(("one==1.0", [A]), ("two==2", [A])))
    assert faults == ["two==2: the index has other bytes than requirements.lock knows"]
    assert remarks == []


def test_another_version_is_a_fault_and_a_later_file_a_remark():
    committed = lock(("one==1.0", [A]), ("two==2", [B]))
    faults, remarks = differences(committed, lock(("one==1.0", [A, C]), ("two==2.1", [B])))
    assert faults == ["two==2 is not needed any more", "two==2.1 is not in requirements.lock"]
    assert remarks == ["one==1.0: the index has files that requirements.lock does not know"]
    _, remarks = differences(committed, "one==1.0\ntwo==2\n")
    assert len(remarks) == 2 and "nothing was compared" in remarks[0]
