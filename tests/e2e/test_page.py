"""The page in a real browser: it opens cleanly, sorts, filters and prints."""

from __future__ import annotations

import html
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from dori_lightning.report.page import render_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FAKES = Path(__file__).parents[1] / "unit" / "report" / "fakes.py"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on PATH: install it to test the page in a browser"
    ),
]

CLICKS = """
<script>
(function () {
  function order() {
    return Array.from(document.querySelectorAll("#pair-table tbody tr"))
      .filter(function (row) { return !row.hidden; })
      .map(function (row) { return row.dataset.id; });
  }
  function press(key) {
    var button = document.querySelector('#pair-table button[data-key="' + key + '"]');
    button.focus();
    button.click();
    return { order: order(), sort: button.parentElement.getAttribute("aria-sort"),
             focused: document.activeElement === button };
  }
  function set(id, value, event) {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event(event));
  }
  var seen = { start: order(), down: press("attack"), up: press("attack"), names: press("id") };
  set("filter-kind", "control", "change");
  seen.controls = order();
  set("filter-kind", "", "change");
  set("filter-outcome", "attack", "change");
  seen.hidden = order();
  set("filter-outcome", "", "change");
  set("filter-text", "CAPTION number 5", "input");
  seen.found = order();
  seen.said = document.getElementById("shown").textContent;
  set("filter-text", "nothing of the kind", "input");
  seen.empty = !document.getElementById("nothing").hidden;
  seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
  seen.fields = Array.from(document.querySelectorAll("input, select"))
    .every(function (field) { return field.labels.length === 1; });
  var result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.appendChild(result);
})();
</script>
"""


def browse(tmp_path: Path, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    page = tmp_path / "report.html"
    page.write_text(text, encoding="utf-8")
    assert CHROMIUM is not None
    return subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_page(runpy.run_path(str(FAKES))["report"](tmp_path_factory.mktemp("audit")))


def test_console_errors_would_be_seen(tmp_path: Path) -> None:
    assert complaints(browse(tmp_path, "<script>missing()</script>", "--dump-dom"))


@pytest.mark.parametrize("width", [390, 1280])
def test_page_sorts_and_filters_without_complaint(tmp_path: Path, page: str, width: int) -> None:
    busy = page.replace("</body>", f"{CLICKS}</body>")
    done = browse(tmp_path, busy, "--dump-dom", f"--window-size={width},1000")
    assert complaints(done) == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    suspects, controls = seen["start"][:4], seen["start"][4:]
    assert seen["down"] == {
        "order": [*suspects, *controls], "sort": "descending", "focused": True
    }  # fmt: skip
    assert seen["up"]["order"] == [*controls, *reversed(suspects)]
    assert seen["up"]["sort"] == "ascending"
    assert seen["names"]["order"] == sorted(seen["start"])
    assert sorted(seen["controls"]) == controls
    assert seen["hidden"] == ["vm_02", "vm_03"]
    assert seen["found"] == ["control_05"]
    assert seen["said"] == "1 of 8 pairs"
    assert seen["empty"]
    assert seen["wide"]
    assert seen["fields"]


def test_page_prints(tmp_path: Path, page: str) -> None:
    target = tmp_path / "report.pdf"
    done = browse(tmp_path, page, f"--print-to-pdf={target}")
    assert complaints(done) == []
    data = target.read_bytes()
    assert data.startswith(b"%PDF")
    assert len(data) > 20_000
    # Pictures below the fold load lazily; on paper they must be there all the same.
    assert data.count(b"/Subtype /Image") >= 8 * 3
