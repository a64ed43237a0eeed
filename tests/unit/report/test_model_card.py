import json
import math
from dataclasses import replace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from dori_lightning.report.model_card import Changed, Exported, model_card
from dori_lightning.report.record import read_edit_record, read_record, write_report
from dori_lightning.report.words import escape
from dori_lightning.types import InputError, ReplacedPart
from support import fake_reports as fakes
from support.fake_audits import loss_cost

EXPORT = Exported(
    checkpoint="sd14",
    source="CompVis/stable-diffusion-v1-4",
    revision="133a221b",
    fingerprint="0123456789abcdef",
    exported="fedcba9876543210",
    dtypes={"unet": "fp32", "vae": "fp16", "text_encoder": "fp16"},
    exact=True,
    mitigation="nemo_union",
    settings={"kind": "Nemo", "threshold": 0.4, "statistics": "/home/someone/stats.safetensors"},
    cost={"unet_evaluations": 12345.0, "seconds": 3.5},
    edit="a" * 24,
    changed={"down_blocks": Changed(6, 1200, 90000), "mid_block": Changed(1, 34, 5000)},
    pairs={"vm": 12, "tm": 3},
    seed=7,
    git_sha="b" * 40,
    packages={"torch": "2.14.1"},
)
UNCHANGED = replace(
    EXPORT, mitigation="none", settings={}, cost={}, edit="none", changed={}, exported="0" * 16
)


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    block = yaml.safe_load(card[4:].partition("\n---\n")[0])
    assert isinstance(block, dict)
    return block


def rendered(text: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    write_report(fakes.report(folder), folder)
    return folder


@pytest.fixture(scope="module")
def audit(record):
    return read_record(record)


def test_the_front_matter_is_what_the_hub_reads():
    block = front_matter(model_card(EXPORT, None))
    assert block["library_name"] == "diffusers"
    assert block["pipeline_tag"] == "text-to-image"
    assert block["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert "memorization" in block["tags"]
    assert "license" not in block, "that of the original applies, and it is not known here"


@pytest.mark.parametrize("source", [None, "package:dori_tiny", "a/b\nlicense: mit", "x/y/z"])
def test_only_hub_ids_become_base_models(source):
    assert set(front_matter(model_card(replace(EXPORT, source=source), None))) == {
        "library_name",
        "pipeline_tag",
        "tags",
    }


def test_the_card_says_what_was_changed_where_and_at_what_cost():
    card = model_card(EXPORT, None)
    assert "# sd14, after nemo_union" in card
    assert "0123456789abcdef" in card
    assert "fedcba9876543210" in card
    assert "changed 1,234 weights in 7 tensors" in card
    assert "| down_blocks | 6 | 1,200 | 90,000 |" in card
    assert "12 of kind vm, 3 of kind tm" in card
    assert "unet_evaluations 12,345, seconds 3.5" in card
    assert "unet fp32, vae fp16, text_encoder fp16; every weight has exactly the value" in card
    assert "that of the original applies" in card
    settings = json.loads(card.partition("```json\n")[2].partition("\n```")[0])
    assert settings["threshold"] == 0.4
    assert "seed 7" in card
    assert "checkpoint.source=CompVis/stable-diffusion-v1-4 checkpoint.revision=133a221b" in card


def test_one_dtype_for_all_is_named_once():
    card = model_card(replace(EXPORT, dtypes=dict.fromkeys(EXPORT.dtypes, "fp16")), None)
    assert "- written in fp16; every weight" in card


def test_a_card_without_an_audit_says_so():
    assert "**This checkpoint was not audited.**" in model_card(EXPORT, None)


def test_an_export_without_an_edit_says_that_nothing_changed():
    card = model_card(UNCHANGED, None)
    assert "Nothing: no weight differs from the original's." in card
    assert "task.edit" not in card
    assert "mitigation=none" in card
    assert "forget" not in card.partition("## Audit")[0]


def test_the_card_says_which_of_the_originals_parts_came_from_other_files():
    part = ReplacedPart(
        "unet", "esd-cat.safetensors", {"esd-cat.safetensors": "c" * 64}, 32, 30, 686
    )
    card = model_card(replace(EXPORT, replaced=(part,)), None)
    assert "32 of 686 tensors of the UNet came from other files (30 differed)" in card
    assert "c" * 64 in card
    assert "checkpoint.unet=FILE" in card
    assert "esd-cat" not in card, "a name may tell whose image it is"


def test_places_of_this_machine_are_not_told():
    card = model_card(replace(EXPORT, source=None), None)
    assert "/home/someone" not in card
    assert '"stats.safetensors"' in card
    assert "checkpoint.source=ORIGINAL" in card


def test_rounded_weights_are_told_beside_the_audit(audit):
    rounded = model_card(replace(EXPORT, exact=False), audit)
    assert "weights were rounded to this" in rounded
    assert "before they were rounded" in rounded
    assert "rounded" not in model_card(EXPORT, audit)


def test_one_pairs_masks_are_told_to_be_that(audit):
    card = model_card(replace(EXPORT, pair="cat_1"), audit)
    assert "those of cat_1 are in this checkpoint" in card


def test_the_card_carries_every_cell_flag_and_rule_of_the_audit(audit):
    card = model_card(EXPORT, audit)
    assert "| vm | prompt | - | - | 2/4 | 50 % (15 to 85 %) | 0.50 ± 0.04 | 0.70 |" in card
    assert "| control | dori | prompt | 50 steps | 0/4 |" in card
    assert card.count("| vm |") == card.count("| control |") == 3
    assert "above 0.70 by ncc (threshold calibrated)" in card
    assert "The largest attack that left the controls alone: 50 steps, no radius limit." in card
    assert audit.flags
    for flag in audit.flags:
        assert f"- **{flag.severity}**: " in card
        assert escape(flag.text) in card
    assert escape(audit.verdict) in card
    assert "not audited" not in card
    assert "was not measured" in card


def test_the_price_in_denoising_loss_is_told_where_it_was_measured(audit):
    card = model_card(EXPORT, replace(audit, utility=loss_cost(1.031, 1.02, 1.05)))
    assert "times that of the original: 1.031 (1.020 to 1.050)" in card
    broken = model_card(EXPORT, replace(audit, utility=loss_cost(math.nan, math.nan, math.nan)))
    assert "no longer finite" in broken


def test_an_attack_that_paints_controls_is_told(audit):
    assert "No attack of this audit left the controls alone." in model_card(
        EXPORT, replace(audit, recommended_budget=None)
    )


def test_prompts_and_pairs_of_the_audit_stay_out(tmp_path):
    secret = [f"canary caption {k}" for k in range(8)]
    write_report(fakes.report(tmp_path, prompts=secret), tmp_path)
    card = model_card(EXPORT, read_record(tmp_path))
    assert "canary" not in card
    assert "vm_00" not in card
    assert "![" not in card


NASTY = (
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "https://evil.example www.evil.example me@evil.example",
    "a | b | c",
    "**bold** _emph_ `code` ~~gone~~ $x$",
    "line\n\n# heading\n---\n- list",
    "- list",
    "1. list",
    "=== \\| & &lt;",
    ":tada: #1 @user",
)


@pytest.mark.parametrize("text", NASTY)
def test_escaped_text_renders_as_itself_and_nothing_else(text):
    shown = rendered(escape(text)).strip()
    line = " ".join(text.split())
    for mark, code in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        line = line.replace(mark, code)
    assert shown == f"<p>{line}</p>"
    cell = rendered(f"| a | b |\n|---|---|\n| {escape(text)} | last |\n")
    assert f"<td>{line}</td>" in cell.replace("\n", "")
    assert "<td>last</td>" in cell


def test_ordinary_names_are_left_as_they_are():
    for name in (
        "nemo_union", "dori_tiny", "cat.1-b", "12 of 15 (80 %), x", "2.14.1", "hold: none",
        "2026-11-24T12:19:30+00:00",
    ):  # fmt: skip
        assert escape(name) == name


@pytest.mark.parametrize("text", NASTY)
def test_nothing_that_a_user_names_becomes_markup(audit, text):
    plain = rendered(model_card(EXPORT, audit))
    card = model_card(
        replace(
            EXPORT, checkpoint=text, source=text, revision=text, mitigation=text, pair=text,
            settings={"x": text, text: 1}, cost={text: 1.0}, edit=text, packages={text: text},
            pairs={text: 2}, dtypes={text: text}, changed={text: Changed(1, 1, 1)},
        ),
        replace(
            audit,
            verdict=text,
            flags=tuple(replace(flag, text=text) for flag in audit.flags),
            cells=tuple(replace(cell, mitigation=text) for cell in audit.cells),
            calibration=replace(audit.calibration, descriptor=text),
            provenance=replace(audit.provenance, git_sha=text),
        ),
    )  # fmt: skip
    assert set(front_matter(card)) <= {"library_name", "pipeline_tag", "tags", "base_model"}
    # the first heading is of the front matter, which Markdown reads as one
    html = rendered(card)
    for tag in ("<script", "<a ", "<img", "<em", "<s>", "<ol", "<blockquote"):
        assert tag not in html
    for tag in ("<h1", "<h2", "<pre", "<table"):
        assert html.count(tag) == plain.count(tag)
    assert html.count("<code") == plain.count("<code")


def test_the_edit_of_an_audit_is_read(tmp_path):
    assert read_edit_record(tmp_path) is None
    (tmp_path / "edit.json").write_text(json.dumps({"identity": "e", "cost": {"seconds": 1.5}}))
    edit = read_edit_record(tmp_path)
    assert (edit.identity, edit.made, edit.cost) == ("e", False, {"seconds": 1.5})


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"identity": "e", "made": "perhaps"}'])
def test_a_damaged_record_of_an_edit_is_refused(tmp_path, content):
    (tmp_path / "edit.json").write_text(content)
    with pytest.raises(InputError, match=r"edit\.json"):
        read_edit_record(tmp_path)
