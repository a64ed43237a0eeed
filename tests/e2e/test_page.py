"""The pages in a real browser: they open cleanly, sort, filter, fit, can be read, and print."""

import re
from dataclasses import replace
from hashlib import sha256

import pytest

from dori_lightning.report.comparison import compare, headline_rows
from dori_lightning.report.pages import render_page, render_sweep_page
from dori_lightning.report.record import read_run, write_report
from support import fake_reports as fakes
from support.browser import DARK, browse, complaints, measured, needs_chromium

pytestmark = needs_chromium

CLICKS = """
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
"""

RUN = (
    CLICKS
    + """
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
return seen;
"""
)

SWEEP = (
    CLICKS
    + """
var seen = { start: order(), down: press("m1"), up: press("m1") };
set("filter-outcome", "m1", "change");
seen.held = order();
set("filter-outcome", "gone", "change");
seen.gone = order();
return seen;
"""
)

FITS = """
var root = document.documentElement;
return {
  wide: root.scrollWidth - root.clientWidth,
  fields: Array.from(document.querySelectorAll("input, select"))
    .every(function (field) { return field.labels.length === 1; }),
  images: Array.from(document.images).every(function (image) { return image.alt; }),
  named: Array.from(document.querySelectorAll("section, [role=region], nav, [role=img]"))
    .every(function (part) {
      var by = part.getAttribute("aria-labelledby");
      return part.getAttribute("aria-label") || (by && document.getElementById(by));
    }),
  heads: Array.from(document.querySelectorAll("th"))
    .every(function (head) { return head.scope; }),
  twice: Array.from(document.querySelectorAll("[id]")).map(function (part) { return part.id; })
    .filter(function (id, place, all) { return all.indexOf(id) !== place; }),
  headings: Array.from(document.querySelectorAll("h1, h2, h3"))
    .map(function (heading) { return Number(heading.tagName[1]); }),
  links: Array.from(document.querySelectorAll("nav a"))
    .every(function (link) { return document.querySelector(link.getAttribute("href")); }),
  small: Array.from(document.querySelectorAll("#pair-table button, select, input"))
    .map(function (part) { return part.getBoundingClientRect(); })
    .filter(function (box) { return box.height > 0 && box.height < 24; }).length,
};
"""

# WCAG 2.2, contrast of text that is on the page against what lies behind it
CONTRAST = """
function rgb(text) { return (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number); }
function light(colour) {
  var parts = colour.slice(0, 3).map(function (value) {
    value /= 255;
    return value <= 0.04045 ? value / 12.92 : Math.pow((value + 0.055) / 1.055, 2.4);
  });
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}
function ground(part) {
  for (; part; part = part.parentElement) {
    var colour = rgb(getComputedStyle(part).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) { return colour; }
  }
  return [255, 255, 255];
}
document.querySelectorAll("details").forEach(function (part) { part.open = true; });
var worst = {}, seen = 0;
Array.from(document.querySelectorAll("body *")).forEach(function (part) {
  var own = Array.from(part.childNodes).some(function (node) {
    return node.nodeType === 3 && node.textContent.trim();
  });
  if (!own || !part.getClientRects().length || part.closest("script, style")) { return; }
  var style = getComputedStyle(part);
  var inside = part.namespaceURI.indexOf("svg") >= 0;
  var a = light(rgb(inside ? style.fill : style.color)), b = light(ground(part));
  var ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  seen += 1;
  if (ratio < 4.5) { worst[part.tagName + "." + (part.getAttribute("class") || "")] = ratio; }
});
return { worst: worst, seen: seen, page: getComputedStyle(document.body).backgroundColor };
"""


def write_run(folder, report, mitigation):
    """Write a run folder whose references carry their true hashes."""
    hashes = {o.pair.id: sha256(o.pair.image.read_bytes()).hexdigest() for o in report.outcomes}
    outcomes = tuple(
        replace(o, pair=replace(o.pair, sha256=hashes[o.pair.id])) for o in report.outcomes
    )
    cells = tuple(replace(cell, mitigation=mitigation) for cell in report.cells)
    own = replace(report, mitigation=mitigation, outcomes=outcomes, cells=cells)
    write_report(own, folder)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("audit")
    return render_page(fakes.with_evidence(fakes.report(place)))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    runs = [
        read_run(write_run(place / name, fakes.report(place / name, vm=vm), name))
        for name, vm in (("none", 4), ("a_rather_long_mitigation", 4))
    ]
    found = compare(runs)
    return render_sweep_page(found, headline_rows(found), place)


@pytest.fixture
def either(request):
    text: str = request.getfixturevalue(request.param)
    return text


both = pytest.mark.parametrize("either", ["page", "sweep"], indirect=True)


def test_console_errors_would_be_seen(tmp_path):
    assert complaints(browse(tmp_path, "<script>missing()</script>", "--dump-dom"))


def test_a_run_is_sorted_and_filtered(tmp_path, page):
    for seen in measured(tmp_path, page, RUN, widths=(360, 1280)):
        suspects, controls = seen["start"][:4], seen["start"][4:]
        down, up = seen["down"], seen["up"]
        assert down == {"order": [*suspects, *controls], "sort": "descending", "focused": True}
        assert up["order"] == [*controls, *reversed(suspects)]
        assert up["sort"] == "ascending"
        assert seen["names"]["order"] == sorted(seen["start"])
        assert sorted(seen["controls"]) == controls
        assert seen["hidden"] == ["vm_02", "vm_03"]
        assert seen["found"] == ["control_05"]
        assert seen["said"] == "1 of 8 pairs"
        assert seen["empty"]


def test_a_sweep_is_sorted_and_filtered(tmp_path, sweep):
    (seen,) = measured(tmp_path, sweep, SWEEP)
    suspects, controls = seen["start"][:4], seen["start"][4:]
    assert seen["down"]["order"] == [*suspects, *controls]
    assert seen["up"]["order"] == [*controls, *reversed(suspects)]
    assert sorted(seen["held"]) == suspects
    assert sorted(seen["gone"]) == controls


@both
def test_it_fits_the_screen_and_names_its_parts(tmp_path, either):
    for seen in measured(tmp_path, either, FITS, widths=(360, 800, 1280)):
        assert seen["wide"] <= 0, "nothing sticks out to the right"
        assert seen["twice"] == []
        assert seen["small"] == 0
        assert seen["headings"][0] == 1
        assert seen["headings"].count(1) == 1
        steps = zip(seen["headings"], seen["headings"][1:], strict=False)
        assert all(after <= before + 1 for before, after in steps)
        for what in ("fields", "images", "named", "heads", "links"):
            assert seen[what], what


@both
@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_themes(tmp_path, either, dark):
    (seen,) = measured(tmp_path, either, CONTRAST, flags=[DARK] if dark else [])
    assert seen["page"] == ("rgb(16, 18, 20)" if dark else "rgb(246, 245, 241)")
    assert seen["seen"] > 150
    assert seen["worst"] == {}


@both
def test_it_prints(tmp_path, either):
    target = tmp_path / "report.pdf"
    done = browse(tmp_path, either, f"--print-to-pdf={target}")
    assert complaints(done) == []
    data = target.read_bytes()
    assert data.startswith(b"%PDF")
    # Images below the fold load lazily; on paper they must be there all the same.
    assert data.count(b"/Subtype /Image") >= len(set(re.findall(r'src="data:[^"]*"', either)))
