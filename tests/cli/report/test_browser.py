"""A report in a real browser: it draws without an error, answers hover, zoom, log axis and hiding, and cuts nothing.

    MEGATRON_FP4_SCREENSHOTS=docs pytest tests/cli/report/test_browser.py

makes the pictures of the docs, of two runs that it trains: 60 steps in BF16, and in NVFP4 with statistics, a resume and
a switch.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_fp4.cli.report import main
from megatron_fp4.pretrain import main as pretrain
from tests.helpers.tiny_run import tiny_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page is checked without a browser only")
SIZES = {"wide": (1300, 5200), "narrow": (480, 9000)}
PICTURES = {
    "wide": (1300, 1500, "", False),
    "wide_dark": (1300, 1500, "", True),
    "narrow": (480, 1200, "curves", False),
    "narrow_dark": (480, 1200, "curves", True),
    "quantization": (1300, 960, "quantization", False),
}
"""Width, height, the headline from which on ("" = the beginning), dark."""
MAX_BYTES = 150_000
FROM = """<script>for (let one = document.getElementById("%s")?.previousElementSibling; one;) {
  const before = one.previousElementSibling; one.remove(); one = before; }</script>"""
ASK = f"<script>{(Path(__file__).parent / 'ask.js').read_text()}</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    sets = f"[{{name: toy, paths: ['{folder}/shards/toy'], max_tokens: 640, may_overlap: true}}, {{name: start, paths:"
    sets += f" ['{folder}/shards/toy'], max_tokens: 160, may_overlap: true}}]"
    run = tiny_run(
        folder, f"data.evaluation={sets}", "train.eval_interval_steps=8", f"train.total_tokens={60 * 4 * 32}",
        "optim.decay_fraction=0.3", "logging.wandb=disabled",
    )  # fmt: skip
    bf16 = run.with_overrides("precision=bf16", run_dir=folder / "bf16")
    switch = "precision.switch=[{at_fraction: 0.7, use: bf16}]"
    nvfp4 = run.with_overrides(
        "precision=nvfp4", switch, "train.statistics_interval_steps=4", "train.save_interval_steps=20",
        run_dir=folder / "nvfp4",
    )  # fmt: skip
    for one in (bf16, nvfp4.with_overrides("train.stop_after_steps=25"), nvfp4):
        assert pretrain(list(one.overrides)) == 0
    path = folder / "report.html"
    assert main([str(folder / "bf16"), str(folder / "nvfp4"), "--html", str(path)]) == 0
    return path


def browse(page: Path, size: tuple[int, int], *options: str, dark: bool = False) -> str:
    """What the browser prints."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={size[0]},{size[1]}",
        f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("size", SIZES)
def test_the_page_answers(size: str, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    listen = "<script>window.errors=[];addEventListener('error',e=>errors.push(String(e.message)))</script>"
    asked = page.with_name(f"asked_{size}.html")
    asked.write_text(text.replace("</head>", f"{listen}</head>").replace("</body>", f"{ASK}</body>"), encoding="utf-8")
    dom = browse(asked, SIZES[size], "--dump-dom")
    answers = re.findall(r'<pre id="answer">(.*?)</pre>', dom)
    assert answers, "the script of the page failed"
    answer = json.loads(html.unescape(answers[0]))
    assert answer["errors"] == []
    assert answer["drawn"] == text.count("data-chart="), "a chart was not drawn"
    assert answer["overflow"] <= 0, "the page is wider than the screen"
    assert answer["cut"] == []
    assert answer["hover"] > 0, "no number where the mouse is"
    (first, last), (left, right) = answer["whole"], answer["zoomed"]
    assert (left - first) / (last - first) == pytest.approx(0.25, abs=0.05), "a drag zooms"
    assert (last - right) / (last - first) == pytest.approx(0.25, abs=0.05)
    assert answer["together"] == 0, "other plots show other tokens"
    assert answer["log"] == 3
    assert answer["shown"] == [True, False], "the second run is hidden in all plots, and no other"
    assert answer["added"] >= 1, "a click on an operand draws its line"


@pytest.mark.parametrize("name", PICTURES)
def test_screenshots(name: str, page: Path, tmp_path: Path) -> None:
    """Dark is dark and light is light; both show lines, in the colours of the page."""
    image = pytest.importorskip("PIL.Image")
    out = Path(os.environ.get("MEGATRON_FP4_SCREENSHOTS") or tmp_path)
    width, height, headline, dark = PICTURES[name]
    picture = out / f"report_{name}.png"
    shown = page.with_name(f"{name}.html")
    shown.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{FROM % headline}</body>"), encoding="utf-8")
    browse(shown, (width, height), f"--screenshot={picture}", dark=dark)
    pixels = image.open(picture).convert("RGB")
    assert pixels.size == (width, height)
    assert (sum(pixels.getpixel((3, 3))) < 200) == dark
    colors = {color for _, color in pixels.getcolors(1 << 24)}
    lines = [(109, 179, 248), (255, 157, 87)] if dark else [(22, 103, 183), (200, 80, 10)]
    assert all(line in colors for line in lines), "a run has no line"
    pixels.quantize(256, dither=0).save(picture, optimize=True)
    assert picture.stat().st_size < MAX_BYTES
