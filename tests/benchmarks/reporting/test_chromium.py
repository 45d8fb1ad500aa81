"""The page in a real browser, without a display."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.reporting.build import build
from benchmarks.reporting.document import Cell, Document, Part, Table
from benchmarks.reporting.html import html as page_of
from benchmarks.reporting.left import left_by_others
from benchmarks.reporting.looks import Picture
from benchmarks.reporting.svg import embed
from tests.benchmarks.reporting.records import SEVEN, failed, many

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
MEASURE = (Path(__file__).parent / "measure.js").read_text()

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="needs Chromium: apt-get install --no-install-recommends chromium fonts-dejavu-core, "
    "or its path in $CHROMIUM",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of two and of fourteen tasks with 15 methods, and what others left."""
    folder = tmp_path_factory.mktemp("left")
    (folder / "trajectories.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="90pt" height="60pt">'
        '<text x="5" y="30" id="text">start</text></svg>'
    )
    (folder / "toy.csv").write_text("method,start,x\nmgda,0,1.23456789\n")
    sets = {name: SEVEN[name] for name in ("census", "yeast")}
    records = [*many(sets), failed(sets["census"], "db_mtl", 0, "ValueError: <b> & " + "x" * 200)]
    return page_of(build(records, sets, left=left_by_others(folder)))


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(page, width, tmp_path):
    found, log = _measure(page, width, tmp_path)
    assert found["window"] == width
    assert found["width"] <= width, "the page is wider than the window"
    assert found["errors"] == []
    assert "CONSOLE" not in log
    assert found["tables"] == page.count("<table") > 8
    assert found["pictures"] == page.count("<svg") > 15
    assert found["texts"] == page.count("<text") > 500
    assert found["overlaps"] == []
    assert found["outside"] == []
    # A click on a heading sorts by numbers.
    ranks = [float(value) for value in found["sorted"]]
    assert ranks == sorted(ranks)
    assert len(ranks) == 15


def test_what_is_wrong_would_be_seen(tmp_path):
    texts = "".join(f'<text x="{x}" y="20">overlapping</text>' for x in (10, 30, 500))
    svg = embed(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="300" height="40">{texts}</svg>'.encode(),
        *("name", "wrong"),
    )
    table = Table("t", "", ("a",), ((Cell("x" * 4000),),), note="y" * 4000)
    part = Part("p", "p", tables=(table,), pictures=(Picture("p", "", svg),))
    page = page_of(Document("wrong", part, (), ()))
    page = page.replace("overflow-wrap: break-word", "").replace(
        "</body>", "<script>console.error('told'); missing();</script></body>"
    )
    found, log = _measure(page, 400, tmp_path)
    assert found["width"] > 400
    assert found["overlaps"] == ["wrong: overlapping and overlapping"]
    assert found["outside"] == ["wrong: overlapping"]
    assert [error for error in found["errors"] if "missing is not defined" in error]
    assert "told" in log


def _measure(page, width, folder):
    """What measure.js finds in a window of that width, and the browser's log."""
    catch = "<script>window.errors = []; onerror = (message) => errors.push(message);</script>"
    copy = page.replace("<head>", f"<head>{catch}", 1)
    copy = copy.replace("</body>", f"<script>{MEASURE}</script></body>")
    frame = folder / "frame.html"
    frame.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><body>'
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(copy)}">'
        "</iframe></body>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom"),
            *(f"--user-data-dir={folder / 'profile'}", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    measured = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert measured is not None, done.stderr
    return json.loads(html.unescape(measured[1])), done.stderr
