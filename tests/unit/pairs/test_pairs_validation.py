"""Every bad row is named with its place, and all of them at once."""

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dori_lightning.models.protocol import Cut
from dori_lightning.pairs import validation
from dori_lightning.pairs.validation import (
    SHOWN,
    Row,
    check_prompt_lengths,
    default_id,
    mark_duplicates,
    validate_rows,
)
from dori_lightning.types import InputError, Pair
from support.pairs import write_image

GOOD = {"kind": "vm", "prompt": "a caption", "image": "a.png"}


def validate(folder, *rows, **options):
    raw = [Row(f"line {k}", {**GOOD, **row}) for k, row in enumerate(rows, start=2)]
    return validate_rows(raw, root=folder, source="list.csv", **options)


def complaint(folder, *rows, **options):
    with pytest.raises(InputError) as error:
        validate(folder, *rows, **options)
    return str(error.value)


def test_good_row_becomes_a_pair(folder):
    (pair,) = validate(folder, {"subject": "a cat", "repeats": "1.5", "role": "training"})
    assert pair.sha256 == hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    path = (folder / "a.png").resolve()
    assert pair == Pair("a", "vm", "a caption", path, "a cat", 1.5, "training", pair.sha256)


def test_defaults(folder):
    rows = [{"subject": "", "repeats": "", "role": ""}, {"kind": "control", "image": "b.png"}]
    vm, control = validate(folder, *rows)
    assert (vm.id, vm.subject, vm.repeats, vm.role) == ("a", None, 1.0, "audit")
    assert (control.id, control.repeats) == ("b", 0.0)


def test_default_id_is_safe():
    assert default_id("sub/dir\\Ein Bild (1).tar.png") == "Ein_Bild_1_.tar"
    assert default_id("x" * 300 + ".png") == "x" * 128


def test_empty_list(folder):
    assert "no rows" in complaint(folder)


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        ({"id": "a/b"}, "id", "'a/b' is no id"),
        ({"id": ".."}, "id", "'..' is no id"),
        ({"id": "a\n"}, "id", r"'a\n' is no id"),
        ({"id": "x" * 129}, "id", "is no id"),
        ({"id": True}, "id", "True is no id"),
        ({"kind": "VM"}, "kind", "'VM' is no kind"),
        ({"kind": ["vm"]}, "kind", "['vm'] is no kind"),
        ({"prompt": "  "}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "empty"),
        ({"prompt": 3}, "prompt", "3 is not text"),
        ({"subject": 3}, "subject", "3 is not text"),
        ({"repeats": "many"}, "repeats", "'many' is no finite number"),
        ({"repeats": "-1"}, "repeats", "'-1' is no finite number"),
        ({"repeats": float("nan")}, "repeats", "nan is no finite number"),
        ({"repeats": "inf"}, "repeats", "'inf' is no finite number"),
        ({"repeats": 10**400}, "repeats", "is no finite number"),
        ({"role": "test"}, "role", "'test' is no role"),
        ({"image": None}, "file_name", "None is no path"),
        ({"image": 3}, "file_name", "3 is no path"),
        ({"image": "gone.png"}, "file_name", "no such file"),
        ({"image": ".", "id": "x"}, "file_name", "is not a regular file"),
        ({"image": "a\0.png"}, "file_name", "is no usable path"),
        ({"image": "x" * 5000}, "file_name", "is no usable path"),
    ],
)
def test_bad_value_is_named_with_row_and_column(folder, row, column, words):
    text = complaint(folder, row)
    (line,) = [line for line in text.splitlines() if line.startswith("  line 2")]
    assert line.split()[2] == column
    assert words in line
    assert text.startswith("list.csv: 1 problem in 1 rows")


def test_missing_picture_shows_the_resolved_path(folder):
    assert str((folder / "sub/gone.png").resolve()) in complaint(folder, {"image": "sub/gone.png"})


def test_duplicate_id_names_both_rows(folder):
    rows = [{"id": "x"}, {"id": "y", "image": "b.png"}, {"id": "x", "image": "c.png"}]
    text = complaint(folder, *rows)
    assert "line 4" in text
    assert "'x' is already the id of line 2" in text


def test_names_alone_are_checked_without_opening_an_image(folder, caplog, monkeypatch):
    (folder / "damaged.png").write_bytes(b"no image")
    monkeypatch.setattr(validation, "open_image", lambda path: pytest.fail("an image is opened"))
    caplog.set_level(logging.INFO)
    with validation.names_only():
        assert [p.id for p in validate(folder, {"image": "damaged.png"}, {})] == ["damaged", "a"]
        assert "no such file" in complaint(folder, {"image": "gone.png"})
        assert validate(folder, {"image": "gone.png"}, {}, on_missing="skip")
    assert not caplog.records, "remarks come when the list is read for good"


def test_all_problems_come_at_once(folder):
    rows = [{"id": "a b", "prompt": ""}, {}, {"id": "z", "kind": "wm", "image": "no"}]
    text = complaint(folder, *rows)
    assert text.startswith("list.csv: 4 problems in 3 rows")
    places = [line.split()[:3] for line in text.splitlines()[2:]]
    found = [f"{line} {column}" for _, line, column in places]
    assert found == ["2 id", "2 prompt", "4 kind", "4 file_name"]


def test_long_table_is_cut_and_counted(folder):
    rows = [{"id": f"i{k}", "kind": "?"} for k in range(SHOWN + 7)]
    lines = complaint(folder, *rows).splitlines()
    assert len(lines) == SHOWN + 3
    assert lines[-1].strip() == "and 7 more"


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png"])
def test_traversal_is_refused(folder, name):
    (folder / "sub").mkdir()
    (folder / "a.png").rename(folder.parent / "secret.png")
    assert "leads outside" in complaint(folder, {"image": name, "id": "x"})


def test_absolute_path_is_refused_even_inside(folder):
    assert "absolute path" in complaint(folder, {"image": str(folder / "a.png")})


def test_symbolic_link_out_is_refused_and_within_is_followed(folder):
    (folder / "c.png").rename(folder.parent / "outside.png")
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "in.png").symlink_to(folder / "a.png")
    (pair,) = validate(folder, {"image": "in.png"})
    assert pair.image == (folder / "a.png").resolve()
    assert "leads outside" in complaint(folder, {"image": "out.png"})


def test_root_itself_may_be_a_link(folder):
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert validate(link, {})[0].id == "a"


def test_loop_of_links_is_refused(folder):
    (folder / "x.png").symlink_to(folder / "y.png")
    (folder / "y.png").symlink_to(folder / "x.png")
    assert "line 2  file_name" in complaint(folder, {"image": "x.png"})


def test_pipe_is_refused_without_waiting_for_it(folder):
    os.mkfifo(folder / "pipe.png")
    assert "not a regular file" in complaint(folder, {"image": "pipe.png"})


def test_truncated_images_are_refused(folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    assert "damaged or truncated PNG" in complaint(folder, {})
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "x.jpg")
    whole = (folder / "x.jpg").read_bytes()
    assert validate(folder, {"image": "x.jpg"})[0].id == "x"
    (folder / "x.jpg").write_bytes(whole[: len(whole) // 2])
    text = complaint(folder, {"image": "x.jpg"})
    assert "damaged or truncated JPEG" in text
    assert r"starts with b'\xff\xd8\xff" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page saved as an image"),
        (b"\n <HTML><head></head></HTML>", "web page saved as an image"),
        (b"", "the file is empty"),
        (b"%PDF-1.7 ...", "known format: PDF (starts with b'%PDF-1.7 ...')"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\0\0\0\x1cftypavif", "AVIF, HEIC or a video"),
        (b"hello", "unknown content"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(folder, content, words):
    (folder / "x.jpg").write_bytes(content)
    assert words in complaint(folder, {"image": "x.jpg"})


# 576 pixels: Pillow warns over the limit, refuses over twice it
@pytest.mark.parametrize("limit", [400, 200])
def test_decompression_bomb_is_refused_with_the_limit(folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    text = complaint(folder, {})
    assert f"more than {limit} pixels" in text
    assert "576 pixels" in text


def test_thumbnail_is_refused(folder):
    Image.new("RGB", (200, 15)).save(folder / "x.png")
    Image.new("RGB", (16, 16)).save(folder / "y.png")
    assert "200 x 15 pixels" in complaint(folder, {"image": "x.png"})
    assert validate(folder, {"image": "y.png"})[0].id == "y"


def test_same_image_twice_is_marked_and_warned_of(folder, caplog):
    validate(folder, {}, {"image": "b.png"})
    assert not caplog.records, "nothing to warn of"
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    pairs = validate(folder, {}, {"image": "b.png"}, {"image": "c.png"})
    assert [pair.duplicate_of for pair in pairs] == [None, "a", None]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "b = a" in record.getMessage()


def test_duplicates_are_marked_afresh():
    old = Pair("x", "vm", "p", Path("x"), sha256="1", duplicate_of="gone")
    assert mark_duplicates([old])[0].duplicate_of is None
    assert [p.duplicate_of for p in mark_duplicates([old, replace(old, id="y")])] == [None, "x"]
    unhashed = replace(old, sha256="")
    marked = mark_duplicates([unhashed, replace(unhashed, id="y")])
    assert [p.duplicate_of for p in marked] == [None, None]


def test_skipping_drops_the_row_and_says_which(folder, caplog):
    pairs = validate(folder, {"id": "x", "image": "no.png"}, {}, on_missing="skip")
    assert [pair.id for pair in pairs] == ["a"]
    (skipped,) = pairs.skipped
    assert (skipped.id, skipped.where, skipped.what) == ("x", "list.csv, line 2", "pair")
    assert "no such file" in skipped.why
    assert pairs.skipped_ids == ("x",)
    (record,) = caplog.records
    assert "skipped 1 rows without an image, of 2 rows" in record.getMessage()
    assert "x (line 2: no such file" in record.getMessage()


@pytest.mark.parametrize(
    "content", [b"", b"<html>gone", b"GIF89a", b"\x89PNG\r\n\x1a\n cut", b"hello"]
)
def test_dead_downloads_can_be_skipped(folder, content):
    (folder / "b.png").write_bytes(content)
    pairs = validate(folder, {}, {"image": "b.png"}, on_missing="skip")
    assert ([p.id for p in pairs], pairs.skipped_ids) == (["a"], ("b",))
    assert "pairs.on_missing=skip" in complaint(folder, {"image": "b.png"})


def test_skipping_forgives_only_unusable_images(folder):
    rows = [{"image": "no.png", "kind": "?"}, {"image": "../x.png", "id": "x"}]
    text = complaint(folder, *rows, on_missing="skip")
    assert text.startswith("list.csv: 2 problems")
    assert "no such file" not in text
    assert "leads outside" in text


def test_skipping_everything_is_an_error(folder):
    assert "all 1 rows were skipped" in complaint(folder, {"image": "no.png"}, on_missing="skip")


def test_kinds_leave_rows_out_before_their_pictures_are_looked_at(folder):
    rows = [{"kind": "tm", "image": "gone.png"}, {}]
    assert [pair.id for pair in validate(folder, *rows, kinds=["vm"])] == ["a"]
    assert "none of kinds ['control']" in complaint(folder, *rows, kinds=["control"])
    assert "'?' is no kind" in complaint(folder, {"kind": "?"}, kinds=["vm"])


def test_limit_counts_audit_pairs_of_each_kind(folder):
    rows = [
        {"id": "v1", "image": "a.png"},
        {"id": "v2", "image": "b.png"},
        {"id": "t1", "image": "c.png", "role": "training"},
        {"id": "c1", "image": "a.png", "kind": "control"},
    ]
    pairs = validate(folder, *rows, limit=1)
    assert [pair.id for pair in pairs] == ["v1", "t1", "c1"]


def test_a_limit_decodes_what_it_takes_and_no_more(folder, monkeypatch):
    decoded = []
    real = validation.open_image
    monkeypatch.setattr(validation, "open_image", lambda p: decoded.append(p.name) or real(p))
    for name in ("b.png", "c.png"):
        (folder / name).write_bytes(b"broken")
    rows = [{}, {"image": "b.png"}, {"image": "c.png", "kind": "tm"}, {"image": "no.png"}]
    assert [p.id for p in validate(folder, *rows, kinds=["vm"], limit=1)] == ["a"]
    assert decoded == ["a.png"]
    assert "line 5  prompt" in complaint(folder, *rows[:3], {"prompt": ""}, limit=1)


def test_duplicate_of_never_names_a_pair_that_the_limit_cut(folder):
    rows = [
        {"id": "v1", "image": "a.png"},
        {"id": "v2", "image": "b.png"},
        {"id": "c1", "image": "b.png", "kind": "control"},
    ]
    assert [pair.duplicate_of for pair in validate(folder, *rows)] == [None, None, "v2"]
    assert [pair.duplicate_of for pair in validate(folder, *rows, limit=1)] == [None, None]


def takes(**limits):
    """A model whose tokens are words, with a start and an end."""

    def cuts(prompt):
        count = 2 + len(prompt.split())
        return tuple(
            Cut(name, count, limit, prompt[-1]) for name, limit in limits.items() if count > limit
        )

    return SimpleNamespace(cuts=cuts)


PAIRS = [
    Pair(name, "vm", prompt, Path("x")) for name, prompt in [("s", "one two"), ("l", "1 2 3 4")]
]


def test_long_prompt_is_warned_of_once(caplog):
    found = check_prompt_lengths(PAIRS, takes(CLIP=3, T5=5), strict=False)
    assert [pair.cut_by for pair in found] == [("CLIP",), ("CLIP", "T5")]
    assert [replace(pair, cut_by=()) for pair in found] == PAIRS
    (record,) = caplog.records
    said = record.getMessage()
    assert "CLIP takes 3 tokens of s (4), l (6)" in said
    assert "T5 takes 5 tokens of l (6)" in said


def test_long_prompt_is_refused_when_strict():
    with pytest.raises(InputError, match=r"CLIP takes 5 tokens of l \(6\)"):
        check_prompt_lengths(PAIRS, takes(CLIP=5), strict=True)


def test_prompts_that_just_fit_pass(caplog):
    assert check_prompt_lengths(PAIRS, takes(CLIP=6), strict=True) == tuple(PAIRS)
    assert not caplog.records


class TestSeveralReferenceImages:
    def test_a_folder_and_a_list(self, folder):
        write_image(folder / "leak/2.png", seed=7)
        write_image(folder / "leak/1.png", seed=8)
        (folder / "leak/._1.png").write_bytes(b"macOS")
        (folder / "leak/note.txt").write_text("no image")
        listed, whole = validate(
            folder, {"image": ["a.png", "b.png"]}, {"image": "leak/", "kind": "tm"}
        )
        assert [r.image.name for r in listed.references] == ["a.png", "b.png"]
        assert [r.image.name for r in whole.references] == ["1.png", "2.png"]
        assert (listed.id, whole.id) == ("a", "leak")
        for pair in (listed, whole):
            assert [r.sha256 for r in pair.references] == [
                hashlib.sha256(r.image.read_bytes()).hexdigest() for r in pair.references
            ]

    def test_the_same_file_twice_is_one(self, folder):
        (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
        (pair,) = validate(folder, {"image": ["a.png", "b.png", "a.png"]})
        assert len(pair.references) == 1

    def test_any_shared_file_makes_a_duplicate(self, folder):
        rows = [{"image": ["a.png", "b.png"]}, {"id": "x", "image": ["c.png", "b.png"]}]
        assert [p.duplicate_of for p in validate(folder, *rows)] == [None, "a"]

    def test_damaged_ones_are_named_or_left_out(self, folder):
        write_image(folder / "leak/1.png", seed=7)
        (folder / "leak/2.png").write_bytes(b"<html>")
        assert "leak/2.png: a web page" in complaint(folder, {"image": "leak"})
        pairs = validate(folder, {"image": "leak"}, on_missing="skip")
        assert [r.image.name for r in pairs[0].references] == ["1.png"]
        assert pairs.skipped_ids == ()
        assert [(own.id, own.what) for own in pairs.skipped] == [("leak", "image")]

    def test_a_folder_without_images_and_the_root(self, folder):
        (folder / "leak").mkdir()
        text = complaint(folder, {"image": "leak"}, {"image": ".", "id": "x"})
        assert text.count("nor a folder with reference images") == 2

    def test_aimed_at_another(self, folder):
        (pair,) = validate(folder, {"image": ["a.png", "b.png", "c.png"]})
        aimed = pair.aimed_at(pair.references[1])
        assert [r.image.name for r in aimed.references] == ["b.png", "a.png", "c.png"]
        assert pair.aimed_at(pair.references[0]) == pair


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("sub\\d.png", "the list has \\ where paths have /"),
        ("Sub/D.PNG", "case"),
        ("sub/cafe\u0301.png", "two Unicode forms"),
    ],
)
def test_a_name_that_is_spelled_otherwise_is_said_and_not_skipped(folder, listed, words):
    write_image(folder / "sub/d.png", seed=5)
    write_image(folder / "sub/caf\u00e9.png", seed=6)
    for how in ("error", "skip"):
        text = complaint(folder, {"image": listed, "id": "x"}, on_missing=how)
        assert words in text
        assert "but there is" in text


def test_conversions_are_said_once_for_each_kind(folder, caplog):
    for name, colour in {"wide": "red", "wider": "blue"}.items():
        Image.new("RGB", (60, 30), colour).save(folder / f"{name}.png")
    with caplog.at_level(logging.WARNING):
        validate(folder, {"image": "wide.png"}, {"image": "wider.png"}, {})
    told = [r.getMessage() for r in caplog.records if "converted" in r.getMessage()]
    assert len(told) == 1
    assert told[0].endswith("2 cut to the centred square")
