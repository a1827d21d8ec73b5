"""Pictures of every TensorBoard tab for the documents, taken from a real run.

    uv run python docs/screenshots.py [LOGDIR]      writes docs/images/*.png

Needs Chromium on the PATH (`apt-get install chromium fonts-noto-cjk`). Each picture is kept below
500 kB by fewer colours.
"""

import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from finetuning.events.address import pinned_address  # noqa: E402
from tests.helpers.tensorboard_server import TensorBoardServer  # noqa: E402

IMAGES = Path(__file__).parent / "images"
LOGDIR = ROOT / "qwen3_4b_thinking_output" / "tensorboard_logs"
LARGEST = 500_000  # bytes
WIDTH = 1500
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOSSES = "^(Training|Thinking|Answer|Eval)/(Loss|Token_Accuracy|Gradient_Norm)$"


@dataclass(frozen=True)
class Shot:
    """One picture: the tab's address, what must be there, and what a person would click first."""

    name: str
    tab: str
    wait_for: str
    prepare: Callable[[Page], None] = lambda page: None
    height: int = 900


def browser_path() -> str | None:
    """The Chromium of this machine, None without one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def open_tab(page: Page, url: str, tab: str, wait_for: str) -> None:
    """Load a tab for itself: one that is only switched to keeps what the former one had loaded."""
    page.goto(f"{url}/#{tab}")
    page.reload()
    page.wait_for_selector(wait_for, state="attached", timeout=60_000)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1500)


def settle(page: Page) -> None:
    """Until the answers to the last click are drawn."""
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(2000)


def _filter(expression: str, box: str) -> Callable[[Page], None]:
    def fill(page: Page) -> None:
        page.locator(box).first.fill(expression)
        page.keyboard.press("Escape")  # closes the list of suggestions
        settle(page)

    return fill


def _histograms(page: Page) -> None:
    """Adapters that begin to move, and lengths of the data; the newest run only."""
    page.locator("tf-runs-selector input").first.fill(_newest_run(page))
    _filter("LoRA/[AB]|Model|Tokens_H", "tf-tag-filterer input")(page)


def _images(page: Page) -> None:
    """The newest run's pictures in their own size."""
    page.locator("tf-runs-selector input").first.fill(_newest_run(page))
    page.get_by_text("Show actual image size").click()
    settle(page)


def _text(page: Page) -> None:
    """The summary of the dataset, with its tables."""
    page.locator("tf-runs-selector input").first.fill(_newest_run(page))
    _filter("Dataset/Summary|Eval/Samples", "tf-tag-filterer input")(page)


def _first_screen(page: Page) -> None:
    """As the address that a run prints opens it."""
    page.goto(pinned_address(page.url.partition("/#")[0]))
    page.reload()
    page.wait_for_selector("card-view", state="attached", timeout=60_000)
    settle(page)


def _custom_scalars(page: Page) -> None:
    """The newest run only: a chart holds several curves of a run already."""
    page.locator("tf-runs-selector input").first.fill(_newest_run(page))
    settle(page)


def _newest_run(page: Page) -> str:
    return max(page.evaluate("fetch('data/runs').then(answer => answer.json())"))


def _hparams(page: Page) -> None:
    """The columns that come first, with the held-out loss."""
    pane = page.locator("tf-hparams-query-pane")
    pane.get_by_text("Eval/Loss", exact=True).first.click()
    pane.evaluate("pane => pane.scrollIntoView()")
    settle(page)


SHOTS = (
    Shot("first_screen", "timeseries", "card-view", _first_screen),
    Shot("time_series", "timeseries", "card-view", _filter(LOSSES, "metrics-tag-filter input")),
    Shot("scalars", "scalars", "tf-scalar-card", _filter(LOSSES, "tf-tag-filterer input")),
    Shot("text", "text", "tf-text-loader", _text),
    Shot("histograms", "histograms", "tf-histogram-loader", _histograms),
    Shot("images", "images", "tf-image-loader", _images, height=1500),
    Shot("hparams", "hparams", "tf-hparams-table-view", _hparams, height=500),
    Shot(
        "custom_scalars",
        "custom_scalars",
        "tf-custom-scalar-multi-line-chart-card",
        _custom_scalars,
    ),
)


def shrink(png: bytes) -> bytes:
    """The picture below `LARGEST` bytes, with as many colours as that allows."""
    for colours in (256, 128, 64, 32):
        if len(png) <= LARGEST:
            break
        out = io.BytesIO()
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image.quantize(colours).save(out, "PNG", optimize=True)
        png = out.getvalue()
    return png


def take(logdir: Path, browser: str, only: set[str]) -> None:
    """Serve the run and take the pictures named in `only`, or all."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with (
        TensorBoardServer(logdir, load_fast=True) as server,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]) as chromium,
    ):
        server.wait_for(lambda: server.get("plugin/scalars/tags"), "scalar tags")
        for shot in SHOTS:
            if only and shot.name not in only:
                continue
            page = chromium.new_page(viewport={"width": WIDTH, "height": shot.height})
            open_tab(page, server.url, shot.tab, shot.wait_for)
            shot.prepare(page)
            path = IMAGES / f"{shot.name}.png"
            path.write_bytes(shrink(page.screenshot()))
            page.close()
            print(f"{path.name}  {path.stat().st_size / 1000:.0f} kB")


def main(arguments: list[str]) -> int:
    """`[LOGDIR] [picture names]`; the exit code."""
    browser = browser_path()
    if browser is None:
        print(f"no browser: none of {', '.join(BROWSERS)} is on the PATH", file=sys.stderr)
        return 2
    logdir = Path(arguments[0]) if arguments else LOGDIR
    if not logdir.is_dir():
        print(f"{logdir}: no such directory; train first or name a log directory", file=sys.stderr)
        return 2
    take(logdir, browser, set(arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
