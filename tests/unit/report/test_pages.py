import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dori_lightning.report.findings import audit_verdict
from dori_lightning.report.pages import render_page, write_page
from dori_lightning.types import InputError
from support import fake_reports as fakes

pytestmark = pytest.mark.usefixtures("no_figures")
EVIL = '<script>alert("x")</script> & <img src=http://evil.example/a.png>'


class Page(HTMLParser):
    """Collects the tags of a page and what they would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.loads += [named[k] or "" for k in ("src", "srcset", "data", "poster") if k in named]
        if tag in ("a", "link"):
            self.loads.append(named.get("href") or "")
        if tag == "img":
            self.images.append(named)


def test_page_loads_nothing(tmp_path):
    text = render_page(fakes.report(tmp_path))
    page = Page(text)
    assert page.loads
    assert all(url.startswith(("data:image/", "#")) for url in page.loads)
    assert not re.search(r"url\((?!#)|@import|https?:", text)
    assert "default-src 'none'" in text
    assert "<html lang=" in text


def test_pictures_are_lazy_small_and_described(tmp_path):
    page = Page(render_page(fakes.report(tmp_path)))
    assert all(image.get("alt") for image in page.images)
    assert all(image.get("loading") == "lazy" for image in page.images)
    photographs = [i for i in page.images if (i["src"] or "").startswith("data:image/jpeg")]
    assert len(photographs) == 8 * 3


def test_prompts_are_text_not_markup(tmp_path):
    text = render_page(fakes.report(tmp_path, prompts=[EVIL]))
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "alert(&#34;x&#34;)" in text
    assert not any("evil" in url for url in page.loads)


@pytest.mark.parametrize("images", ["full", "blurred", "none"])
def test_disclosure(tmp_path, images):
    text = render_page(fakes.report(tmp_path), images=images)
    assert ("data:image/jpeg" in text) == (images != "none")
    assert ("(blurred)" in text) == (images == "blurred")


def test_none_needs_no_picture_files(tmp_path):
    report = fakes.report(tmp_path)
    for path in (tmp_path / "references").iterdir():
        path.unlink()
    render_page(report, images="none")
    with pytest.raises(InputError, match="restore the file"):
        render_page(report)


def test_capped_pages_say_how_many_are_missing(tmp_path):
    report = fakes.report(tmp_path, vm=6, control=3)
    text = render_page(report, max_pairs=4)
    assert "Shown are 4 of 9 pairs" in text
    assert "the other 5 are in" in text
    assert text.count('data-kind="vm"') == 2
    assert text.count('data-kind="control"') == 2
    assert "Shown are" not in render_page(report)


def test_baseline_adds_a_picture(tmp_path):
    report = fakes.report(tmp_path)
    before = tuple(o for o in report.outcomes if o.condition.attack == "prompt")
    text = render_page(replace(report, mitigation="none", baseline=before))
    assert "Prompt, before mitigation" in text
    assert text.count("data:image/jpeg") == 8 * 4


def test_page_of_an_empty_audit(tmp_path):
    report = replace(fakes.report(tmp_path), cells=(), outcomes=(), recommended_budget=None)
    text = render_page(report)
    assert "No suspected image was measured." in text


def test_diverged_pairs_are_named(tmp_path):
    report = fakes.report(tmp_path, vm=1, control=1)
    nan = (float("nan"),) * 3
    outcomes = tuple(
        fakes.outcome(o.pair, o.condition, nan, status="diverged")
        if o.condition.attack == "dori" and o.pair.kind == "control"
        else o
        for o in report.outcomes
    )
    text = render_page(replace(report, outcomes=outcomes))
    assert "diverged: no result" in text
    assert 'data-outcome="failed"' in text


def test_forty_pairs_stay_small(tmp_path):
    path = write_page(fakes.report(tmp_path, vm=20, control=20), tmp_path)
    assert path.name == "report.html"
    assert path.stat().st_size < 3_000_000
    assert not list(tmp_path.glob(".*.tmp"))


def test_where_each_image_is_from_is_said(tmp_path):
    report = fakes.with_evidence(fakes.report(tmp_path))
    assert "from where" not in render_page(report)
    report = fakes.with_base(report, ("yes", "no", "cannot_tell", "no"))
    text = render_page(report)
    said = ["held by the base already", "came with the fine-tuning", "cannot tell", "neither"]
    assert re.findall("<td>(" + "|".join(said) + ')</td><td class="num">0.25</td>', text) == said
    assert (
        "sd14, which it was tuned from, was tested in the same way: it holds 1 of 4 images "
        "already, and 1 came with the fine-tuning; of 1 this cannot be told."
    ) in audit_verdict(report).plain
