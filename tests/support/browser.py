"""A page in a headless Chromium: what it complains about, what it measures, what it prints."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
]  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: install it to test the page in a browser"
)


def browse(folder: Path, text: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Open a page; the DOM is on standard output with ``--dump-dom``."""
    page = folder / "opened.html"
    page.write_text(text, encoding="utf-8")
    assert CHROMIUM is not None
    return subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def complaints(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """What the page wrote to the console."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(
    folder: Path,
    text: str,
    script: str,
    *,
    flags: Sequence[str] = (),
    widths: Sequence[int] = (1280,),
) -> list[Any]:
    """What a script finds on the page in frames of several widths.

    A window cannot be narrower than 500 pixels; a frame can.

    Args:
        folder: For the browser's files.
        text: The page.
        script: Body of a function that returns plain values.
        flags: Of the browser.
        widths: Pixels.
    """
    frames = "".join(_frame(text, script, width, f"seen{k}") for k, width in enumerate(widths))
    opened = f'<!doctype html><body style="margin:0">{frames}</body>'
    done = browse(folder, opened, "--dump-dom", "--window-size=1400,1000", *flags)
    assert complaints(done) == []
    seen = []
    for k in range(len(widths)):
        found = re.search(rf'<pre id="seen{k}">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found is not None, done.stdout[-500:]
        seen.append(json.loads(html.unescape(found[1])))
        assert not str(seen[-1]).startswith("failed: "), seen[-1]
    return seen


def _frame(text: str, script: str, width: int, name: str) -> str:
    """A frame with the page, and what a script in it finds in an element of the page outside."""
    own = (
        "<script>window.addEventListener('load', function () {"
        "var found; try { found = (function () {" + script + "})(); }"
        "catch (error) { found = 'failed: ' + error; }"
        f"var result = parent.document.createElement('pre'); result.id = '{name}';"
        "result.textContent = JSON.stringify(found); parent.document.body.appendChild(result);"
        "});</script>"
    )
    inner = html.escape(text.replace("</body>", f"{own}</body>"), quote=True)
    return f'<iframe srcdoc="{inner}" style="border:0;width:{width}px;height:900px"></iframe>'
