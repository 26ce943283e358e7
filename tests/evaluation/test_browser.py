"""The report in a real browser: every picture loads, tables sort on a click, nothing sticks out sideways, and what is
printed bears its stamp."""

import json
import re
import shutil
import subprocess

import pytest
from pypdf import PdfReader

from imgshared.config import EvaluateConfig
from imgshared.evaluation.evaluate import evaluate

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
)
PROBE = """
<script>
const table = [...document.querySelectorAll("table")].find(t => t.tBodies[0].rows.length > 3);
const values = () => [...table.tBodies[0].rows].map(r => r.cells[r.cells.length - 1].dataset.sort);
const before = values(), head = table.tHead.rows[0].lastElementChild;
head.querySelector("button").click();
const falling = values();
head.querySelector("button").click();
const found = {
  broken: [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length,
  pictures: document.images.length,
  sticksOut: document.documentElement.scrollWidth - window.innerWidth,
  mouseAlone: [...document.querySelectorAll("th")].filter(e => e.querySelector("button")?.tabIndex !== 0).length,
  before, falling, rising: values(), said: head.getAttribute("aria-sort"),
};
parent.postMessage(JSON.stringify(found), "*");
</script></body>"""
# A frame, for it can be as narrow as a phone: a window cannot.
FRAME = """<iframe src="probed.html" width="WIDTH" height="900" style="border: 0"></iframe>
<script>addEventListener("message", e => { document.title = "probe" + e.data; });</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 375])
def test_report_in_a_browser(world, run, tmp_path, width):
    store = world.store(tmp_path / "cells.zarr")
    config = EvaluateConfig(labels=("drug",), factors=("size",))
    done = evaluate(run, store, tmp_path / "out", config, predict=world.predict)
    (tmp_path / "probed.html").write_text(done.report.read_text().replace("</body>", PROBE))
    page = tmp_path / "page.html"
    page.write_text(FRAME.replace("WIDTH", str(width)))
    command = [
        BROWSER,
        *QUIET.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1300,1000",
        "--virtual-time-budget=10000",
        "--dump-dom",
    ]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search(r"<title>probe(.*?)</title>", dom, re.DOTALL).group(1).replace("&lt;", "<"))
    assert found["pictures"] > 3
    assert found["broken"] == 0
    assert found["sticksOut"] <= 0
    assert found["mouseAlone"] == 0  # every heading that sorts is reached by the tab key
    falling = [float(v) for v in found["falling"] if v]
    assert falling == sorted(falling, reverse=True)
    assert [float(v) for v in found["rising"] if v] == falling[::-1]
    assert found["said"] == "ascending"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_every_printed_page_bears_the_stamp_above_its_text(world, run, tmp_path):
    store = world.store(tmp_path / "cells.zarr")
    done = evaluate(run, store, tmp_path / "out", EvaluateConfig(allow_seen_groups=True), predict=world.predict)
    paper = tmp_path / "report.pdf"
    command = [BROWSER, *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer"]
    subprocess.run(
        [*command, f"--print-to-pdf={paper}", done.report.as_uri()], capture_output=True, timeout=120, check=True
    )
    pages = PdfReader(paper).pages
    assert len(pages) > 3
    for page in pages:
        lines: list[tuple[float, str]] = []  # height on the page in points, from its foot

        def keep(text, cm, tm, *_, kept=lines):
            if text.strip():
                kept.append((cm[5] + cm[3] * tm[5], text))

        page.extract_text(visitor_text=keep)
        (stamp,) = [height for height, text in lines if "do not cite: see the" in text]
        others = [height for height, text in lines if "do not cite: see the" not in text]
        assert stamp > max(others, default=0) + 8  # in a space of its own
