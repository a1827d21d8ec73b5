"""The table of bounds in SECURITY.md, written from `finetuning/common/bounds.py`.

uv run python scripts/update_bounds.py            rewrites what stands between the two marks
uv run python scripts/update_bounds.py --check    exit code 1 where it is not up to date
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetuning.common.bounds import table  # noqa: E402

PAGE = ROOT / "SECURITY.md"
BEGIN, END = "<!-- bounds: begin -->", "<!-- bounds: end -->"


def page() -> str:
    """SECURITY.md with the table as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8", newline="\n")
    elif PAGE.read_text(encoding="utf-8") != text:
        print("SECURITY.md is not up to date; run scripts/update_bounds.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
