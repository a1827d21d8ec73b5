"""What a person sees: TensorBoard in a real browser, on a finished run and on one that goes on.

uv run pytest -m "not long" tests/runs/test_browser.py        skipped where there is no Chromium
"""

import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from direct_finetuning_with_existing_modules import main
from finetuning.events.address import PINNED, pinned_address
from finetuning.events.event_values import FIRST_HPARAMS
from finetuning.events.metric_table import LAYOUT
from tests.helpers.tensorboard_server import TensorBoardServer

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from screenshots import SHOTS, WIDTH, browser_path, open_tab, settle, shrink  # noqa: E402

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "direct_finetuning_with_existing_modules.py"
CURVES = "tf-line-chart-data-loader"
PATIENCE = 60_000  # ms; the machine may be busy
if browser_path() is None:
    pytest.skip("no Chromium on the PATH (apt-get install chromium)", allow_module_level=True)


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, tiny_data: Path, cache_dir: Path) -> list[str]:
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tiny_data)]
    return [*inputs, "--cache-dir", str(cache_dir), "--logging-steps", "1", "--num-probes", "0"]


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium) -> Iterator:
    page = chromium.new_page(viewport={"width": 1500, "height": 900})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


@pytest.fixture(scope="module")
def finished_logs(tmp_path_factory, arguments) -> Path:
    """The log directory of twelve steps that are over."""
    out = tmp_path_factory.mktemp("finished") / "out"
    short = ["--max-steps", "12", "--eval-steps", "4", "--quiet", "--log-weight-histograms"]
    assert main([*arguments, *short, "--output-dir", str(out)]) == 0
    return out / "tensorboard_logs"


@pytest.fixture(scope="module")
def finished(finished_logs: Path) -> Iterator[TensorBoardServer]:
    """TensorBoard on them."""
    with TensorBoardServer(finished_logs, load_fast=True) as server:
        server.wait_for(lambda: any(server.get("plugin/scalars/tags").values()), "scalar tags")
        yield server


@pytest.fixture
def running(tmp_path, arguments) -> Iterator[TensorBoardServer]:
    """TensorBoard on a run that goes on until the test is over."""
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), *arguments, "--output-dir", str(out), "--quiet"]
    log = open(tmp_path / "training.txt", "w")  # noqa: SIM115
    training = subprocess.Popen(
        [*command, "--max-steps", "100000", "--save-steps", "0", "--eval-steps", "10"],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        (out / "tensorboard_logs").mkdir(parents=True)
        with TensorBoardServer(out / "tensorboard_logs", load_fast=True) as server:
            server.wait_for(
                lambda: any(
                    "Training/Loss" in t for t in server.get("plugin/scalars/tags").values()
                ),
                "the first step",
                seconds=180,
            )
            yield server
    finally:
        training.terminate()
        training.wait(timeout=120)
        log.close()


def coloured(element) -> int:
    """Pixels of the element that are neither white, grey nor black: its curves, not its frame."""
    pixels = np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)
    return int(((pixels.max(2) - pixels.min(2)) > 60).sum())


def seen(locator) -> str:
    """All text below the elements, through their shadow roots."""
    return "\n".join(locator.evaluate_all(_TEXT))


_TEXT = """elements => {
  const text = node => node.nodeType === 3 ? node.data :
    ["STYLE", "SCRIPT", "TEMPLATE"].includes(node.tagName) ? "" :
    [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes].map(text).join("");
  return elements.map(text);
}"""


def wait_until(page, condition: Callable[[], bool], what: str) -> None:
    """Look again each half second; a click on reload each time, as a person would."""
    for _ in range(PATIENCE // 500):
        if condition():
            return
        page.locator("app-header-reload button").click()
        page.wait_for_timeout(500)
    raise AssertionError(what)


# -----------------------------------------------------------------------------
# A finished run


def test_the_first_screen_shows_what_matters(finished, page):
    """By the address that a run prints: the losses on top, curves in them, and no line that is flat at 0."""
    page.goto(pinned_address(finished.url))
    page.wait_for_load_state("networkidle")
    page.locator("card-view", has_text=PINNED[0]).first.wait_for()
    settle(page)
    height = page.viewport_size["height"]
    cards = [c for c in page.locator("card-view").all() if c.bounding_box()["y"] < height - 200]
    titles = ["".join(card.inner_text().split()) for card in cards]
    names = [next(tag for tag in PINNED if title.startswith(tag)) for title in titles]
    assert names[:4] == list(PINNED[:4])
    (run,) = finished.get("runs")
    for name, card in zip(names, cards, strict=True):
        assert any(value for _, value in finished.scalars(run, name)), f"{name} is flat at 0"
        assert card.locator("line-chart").count() == 1, name
    assert (
        "smoothing=0" in page.url or page.locator("input[type=number]").first.input_value() == "0"
    )
    assert not [tag for tag in finished.scalar_tags(run) if tag.startswith("Alerts/")]


def test_charts_with_their_curves(finished, page):
    tags = ["Training/Loss", "Thinking/Loss", "Eval/Loss", "Monitoring/Alerts_Active"]
    open_tab(page, finished.url, "scalars", "tf-scalar-card")
    page.locator("tf-tag-filterer input").fill(f"^({'|'.join(tags)})$")
    page.locator("tf-scalar-card:visible", has_text=f"tag: {tags[0]}").first.wait_for()
    settle(page)
    for tag in tags:
        card = page.locator("tf-scalar-card:visible", has_text=f"tag: {tag}").first
        assert coloured(card.locator(CURVES)) > 100, tag
    page.get_by_text("Toggle all runs").click()  # without the run nothing is left to count
    settle(page)
    charts = page.locator(f"{CURVES}:visible")
    assert not any(coloured(chart) > 100 for chart in charts.all())


def test_the_text_of_the_dataset_and_of_the_settings(finished, page):
    open_tab(page, finished.url, "text", "tf-text-loader")
    shown = seen(page.locator("tf-text-loader"))
    assert "Dataset/Summary" in shown and "Config/Training_Settings" in shown
    assert "learning_rate" in shown and "Samples" in shown
    assert page.locator("tf-text-loader table").count() >= 2, "Markdown tables are tables"


def test_the_dashboard_is_ready_and_draws_losses_together(finished, page):
    open_tab(page, finished.url, "custom_scalars", "tf-custom-scalar-multi-line-chart-card")
    shown = seen(page.locator("tf-custom-scalar-dashboard"))
    places = [shown.find(category) for category in LAYOUT]
    assert -1 not in places, shown
    card = page.locator("tf-custom-scalar-multi-line-chart-card").first
    assert next(iter(LAYOUT["Loss"])) in seen(card)
    assert re.search(r"Matches\s*\(\s*3", seen(card)), "training, evaluation, epoch"
    assert coloured(card.locator(CURVES)) > 300


def test_histograms_pictures_and_hyperparameters(finished, page):
    open_tab(page, finished.url, "histograms", "vz-histogram-timeseries")
    assert coloured(page.locator("vz-histogram-timeseries").first) > 100
    open_tab(page, finished.url, "images", "tf-image-loader")
    loaded = "img => img.complete && img.naturalWidth > 100"
    pictures = page.locator("tf-image-loader img")
    assert pictures.count() >= 2
    assert all(picture.evaluate(loaded) for picture in pictures.all())
    open_tab(page, finished.url, "hparams", "tf-hparams-table-view")
    table = seen(page.locator("tf-hparams-table-view"))
    assert "Training/Final_Loss" in table
    assert "steps=12" in table, "a trial is called by what was set"
    assert all(name in table.partition("adam_beta1")[0] for name in FIRST_HPARAMS)


def test_time_series_card_with_its_last_value(finished, page):
    open_tab(page, finished.url, "timeseries", "card-view")
    page.locator("metrics-tag-filter input").fill("^Training/Loss$")
    page.keyboard.press("Escape")
    settle(page)
    card = page.locator("card-view", has_text="Training/Loss").last
    assert card.locator("line-chart").count() == 1
    (run,) = finished.get("runs")
    last = finished.scalars(run, "Training/Loss")[-1][1]
    assert f"{last:.2f}"[:3] in card.inner_text()


# -----------------------------------------------------------------------------
# A run that goes on


def test_a_running_run_moves_before_ones_eyes(running, page):
    open_tab(page, running.url, "timeseries", "card-view")
    page.locator("metrics-tag-filter input").fill("^Training/Loss$")
    page.keyboard.press("Escape")
    settle(page)
    card = page.locator("card-view", has_text="Training/Loss").last
    row = card.locator("tb-data-table-content-row").first
    first = row.inner_text()
    wait_until(page, lambda: row.inner_text() != first, f"the last value stays {first!r}")

    open_tab(page, running.url, "text", "tf-text-loader")
    assert "Dataset/Summary" in seen(page.locator("tf-text-loader"))

    open_tab(page, running.url, "custom_scalars", "tf-custom-scalar-multi-line-chart-card")
    card = page.locator("tf-custom-scalar-multi-line-chart-card").first
    before = card.screenshot()
    wait_until(page, lambda: card.screenshot() != before, "the dashboard does not move")
    assert coloured(card.locator(CURVES)) > 100


# -----------------------------------------------------------------------------
# The pictures of the documents


def test_a_large_picture_shrinks():
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    small = shrink(out.getvalue())
    assert len(small) < 500_000 < len(out.getvalue())
    assert Image.open(io.BytesIO(small)).size == (900, 700)


ELSEWHERE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import screenshots
screenshots.IMAGES = Path(sys.argv[2])
sys.exit(screenshots.main(sys.argv[3:]))
"""


@pytest.mark.long
def test_the_script_takes_every_picture(finished_logs: Path, tmp_path: Path):
    """`uv run python docs/screenshots.py LOGDIR`, into another folder than the documents'."""
    where = [str(ROOT / "docs"), str(tmp_path / "images"), str(finished_logs)]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *where], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    taken = {path.stem: Image.open(path) for path in (tmp_path / "images").iterdir()}
    assert taken.keys() == {shot.name for shot in SHOTS}
    for shot in SHOTS:
        assert taken[shot.name].size == (WIDTH, shot.height)
        assert np.asarray(taken[shot.name].convert("L")).std() > 10, f"{shot.name} is empty"


@pytest.mark.parametrize("shot", SHOTS, ids=lambda shot: shot.name)
def test_every_picture_is_there_and_small(shot):
    path = ROOT / "docs" / "images" / f"{shot.name}.png"
    assert 10_000 < path.stat().st_size < 500_000
