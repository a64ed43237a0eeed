"""Each format is read, and each way of getting it wrong is named with its mend."""

import json
import logging
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from dori_lightning.pairs.readers import (
    ConcatPairs,
    FolderPairs,
    NemoCsvPairs,
    ParquetPairs,
    WenJsonlPairs,
)
from dori_lightning.types import InputError
from support.pairs import write_csv, write_image, write_jsonl

ROWS = [
    {"file_name": "a.png", "prompt": 'one, "quoted"\nin two lines'},
    {"file_name": "b.png", "prompt": "zwei Bäume; drei"},
]


def complaint(reader):
    with pytest.raises(InputError) as error:
        reader.read()
    return str(error.value)


class TestFolder:
    def test_csv(self, folder):
        write_csv(folder / "metadata.csv", ROWS)
        pairs = FolderPairs(folder).read()
        assert [p.prompt for p in pairs] == [row["prompt"] for row in ROWS]
        assert [p.id for p in pairs] == ["a", "b"]
        assert {p.kind for p in pairs} == {"vm"}
        assert FolderPairs(str(folder)).read() == pairs  # as Hydra gives it

    def test_every_column(self, folder):
        row = {"file_name": "a.png", "caption": "x", "id": "i", "kind": "tm", "subject": "s"}
        row |= {"repeats": "0.5", "role": "training", "url": "u"}
        write_csv(folder / "metadata.csv", [row])
        (pair,) = FolderPairs(folder, kind="control").read()
        assert (pair.id, pair.kind, pair.prompt, pair.subject) == ("i", "tm", "x", "s")
        assert (pair.repeats, pair.role) == (0.5, "training")

    def test_kind_of_rows_that_name_none(self, folder):
        rows = [{**ROWS[0], "kind": ""}, {**ROWS[1], "kind": "tm"}]
        write_csv(folder / "metadata.csv", rows)
        assert [p.kind for p in FolderPairs(folder, kind="control").read()] == ["control", "tm"]

    def test_jsonl(self, folder):
        write_jsonl(folder / "metadata.jsonl", [{"file_name": "a.png", "text": "x", "repeats": 2}])
        (pair,) = FolderPairs(folder).read()
        assert (pair.id, pair.prompt, pair.repeats) == ("a", "x", 2.0)

    def test_a_caption_may_hold_unicode_line_separators(self, folder):
        row = {"file_name": "a.png", "prompt": "one\u2028two\x85three"}
        write_csv(folder / "metadata.csv", [row])
        assert FolderPairs(folder).read()[0].prompt == row["prompt"]
        (folder / "metadata.csv").unlink()
        text = json.dumps(row, ensure_ascii=False)
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
        assert FolderPairs(folder).read()[0].prompt == row["prompt"]

    def test_windows_line_ends_and_byte_order_mark(self, folder):
        data = "\ufefffile_name,prompt\r\na.png,x\r\n".encode()
        (folder / "metadata.csv").write_bytes(data)
        assert FolderPairs(folder).read()[0].prompt == "x"

    def test_utf16_is_refused(self, folder):
        (folder / "metadata.csv").write_text("file_name,prompt\na.png,x\n", encoding="utf-16")
        assert "is UTF-16; save it as UTF-8" in complaint(FolderPairs(folder))

    def test_latin1_is_refused_with_the_line(self, folder):
        rows = [{"file_name": "a.png", "prompt": "x"}, *ROWS[1:]]
        write_csv(folder / "metadata.csv", rows, encoding="latin-1")
        text = complaint(FolderPairs(folder))
        assert "is not UTF-8: byte 0xe4 in line 3" in text
        assert "iconv" in text

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", ["is empty"]),
            ("file_name,prompt\n", ["no rows"]),
            ("file_name,prompt\na.png,\0\0\n", ["NUL bytes"]),
            ("file_name,text,caption\na.png,x,y\n", ["columns text and caption"]),
            ("file_name,prompt,,\na.png,x,,\n", ["columns 3, 4", "have no name"]),
            ("sep=;\nfile_name;prompt\na.png;x\n", ["note to Excel", "pairs.delimiter=';'"]),
            ("sep=,\nfile_name,prompt\na.png,x\n", ["note to Excel (sep=,)"]),
            ("file_name,prompt,prompt\na.png,x,y\n", ["more than one column named 'prompt'"]),
            ('file_name,prompt\na.png,"x\nb.png,y\n', ["begins in line 2 is badly quoted"]),
            (
                "file_name,prompt\na.png,x, y\nb.png,\nc.png,z\n",
                ["2 problems in 3 rows", "line 2  (all)", "3 fields, but the header has 2",
                 "line 3  prompt"],
            ),
        ],
    )  # fmt: skip
    def test_a_list_that_cannot_be_read_says_why(self, folder, content, words):
        (folder / "metadata.csv").write_text(content)
        text = complaint(FolderPairs(folder))
        assert all(word in text for word in words)

    @pytest.mark.parametrize(("delimiter", "name"), [(";", ";"), ("\t", "tab"), ("|", "|")])
    def test_wrong_delimiter_is_detected_and_its_mend_works(self, folder, delimiter, name):
        write_csv(folder / "metadata.csv", ROWS, delimiter=delimiter)
        text = complaint(FolderPairs(folder))
        fix = f"\"pairs.delimiter='{name}'\""
        assert fix in text
        assert repr(f"file_name{delimiter}prompt") in text
        value = OverridesParser.create().parse_override(fix.strip('"')).value()
        assert len(FolderPairs(folder, delimiter=str(value)).read()) == 2

    def test_missing_column_shows_the_header(self, folder):
        write_csv(folder / "metadata.csv", [{"file": "a.png", "title": "x"}])
        text = complaint(FolderPairs(folder))
        assert "no column file_name, prompt or text or caption" in text
        assert "It has: 'file', 'title'" in text
        assert "pairs.delimiter" not in text

    def test_missing_key_of_a_jsonl_shows_the_keys(self, folder):
        write_jsonl(folder / "metadata.jsonl", [{"image": "a.png", "text": "x"}])
        assert "no column file_name. It has: 'image', 'text'" in complaint(FolderPairs(folder))

    def test_prompt_goes_before_its_aliases(self, folder):
        row = {"file_name": "a.png", "text": "x", "caption": "y", "prompt": "z"}
        write_csv(folder / "metadata.csv", [row])
        assert FolderPairs(folder).read()[0].prompt == "z"

    def test_lines_count_from_the_header_also_after_a_caption_of_two_lines(self, folder):
        write_csv(folder / "metadata.csv", [ROWS[0], {"file_name": "gone.png", "prompt": "x"}])
        assert "line 4  file_name" in complaint(FolderPairs(folder))

    def test_broken_json_lines_are_all_named(self, folder):
        text = '{"file_name": "a.png", "text": "x"}\n{"file_name"\n\n[1]\n' + "[" * 100_000
        (folder / "metadata.jsonl").write_text(text)
        found = complaint(FolderPairs(folder))
        assert "3 problems in 4 rows" in found
        assert all(f"line {number}  (all)" in found for number in (2, 4, 5))

    def test_no_list(self, folder):
        text = complaint(FolderPairs(folder))
        assert "neither a metadata.csv nor a metadata.jsonl" in text
        assert "file_name,prompt[,id,kind" in text

    def test_two_lists(self, folder):
        write_csv(folder / "metadata.csv", ROWS)
        write_jsonl(folder / "metadata.jsonl", ROWS)
        assert "both a metadata.csv and a metadata.jsonl" in complaint(FolderPairs(folder))

    def test_no_folder(self, folder):
        assert "does not exist" in complaint(FolderPairs(folder / "gone"))
        assert "is a file" in complaint(FolderPairs(folder / "a.png"))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"kinds": ["VM"]}, "pairs.kinds must be some of"),
            ({"kinds": []}, "pairs.kinds must be some of"),
            ({"limit": 0}, "pairs.limit must be at least 1"),
            ({"on_missing": "ignore"}, "pairs.on_missing must be error or skip"),
            ({"kind": "memorized"}, "pairs.kind must be one of"),
            ({"same_prompt": "one"}, "pairs.same_prompt must be pairs or references"),
            ({"delimiter": ";;"}, "pairs.delimiter must be one character"),
        ],
    )
    def test_impossible_options(self, folder, options, words):
        write_csv(folder / "metadata.csv", ROWS)
        assert words in complaint(FolderPairs(folder, **options))

    def test_options_reach_the_validation(self, folder, caplog):
        kinds = {"a": "vm", "x": "vm", "b": "vm", "c": "control"}
        rows = [{"file_name": f"{n}.png", "prompt": n, "kind": kind} for n, kind in kinds.items()]
        write_csv(folder / "metadata.csv", rows)
        assert [p.id for p in FolderPairs(folder, on_missing="skip").read()] == ["a", "b", "c"]
        assert [p.id for p in FolderPairs(folder, on_missing="skip", limit=1).read()] == ["a", "c"]
        assert [p.id for p in FolderPairs(folder, kinds=["control"]).read()] == ["c"]
        assert "x (line 3: no such file" in caplog.text

    def test_references_in_a_jsonl_and_in_rows_of_the_same_prompt(self, folder):
        rows = [
            {"file_name": ["a.png", "b.png"], "text": "x"},
            {"file_name": "c.png", "text": "x"},
        ]
        write_jsonl(folder / "metadata.jsonl", rows)
        names = [[r.image.name for r in p.references] for p in FolderPairs(folder).read()]
        assert names == [["a.png", "b.png"], ["c.png"]]
        (pair,) = FolderPairs(folder, same_prompt="references").read()
        assert [r.image.name for r in pair.references] == ["a.png", "b.png", "c.png"]
        assert pair.id == "a"

    def test_overfit_types_are_kinds(self, folder):
        rows = [{**ROWS[0], "overfit_type": "RV"}, {**ROWS[1], "overfit_type": "TV"}]
        rows += [{"file_name": "c.png", "prompt": "z", "overfit_type": "N"}]
        write_csv(folder / "metadata.csv", rows)
        assert [p.kind for p in FolderPairs(folder).read()] == ["vm", "tm", "control"]
        write_csv(folder / "metadata.csv", [{**ROWS[0], "overfit_type": "XX"}])
        assert "line 2  overfit_type  'XX' is no kind" in complaint(FolderPairs(folder))

    def test_columns_that_are_not_used_are_logged(self, folder, caplog):
        caplog.set_level(logging.INFO)
        write_csv(folder / "metadata.csv", [{**ROWS[0], "repeat": "3"}])
        FolderPairs(folder).read()
        assert "not used: 'repeat'" in caplog.text


class TestNemo:
    HEADER = ";Caption;URL;type;mean_sscd;max_sscd;Index\n"

    @pytest.fixture
    def images(self, tmp_path):
        folder = tmp_path / "images"
        write_image(folder / "0000_first.jpg", seed=1)
        write_image(folder / "0000_second.jpg", seed=2)
        write_image(folder / "77.PNG", seed=3)
        (folder / "0001_note.txt").write_text("no picture")
        return folder

    @pytest.fixture
    def reader(self, tmp_path, images):
        """Write a list, and read it with options."""

        def made(text, **options):
            (tmp_path / "x.csv").write_text(text)
            return NemoCsvPairs(tmp_path / "x.csv", images, **options)

        return made

    def test_memorized_list(self, reader):
        text = self.HEADER + '0;"a ""b""; c";https://x.invalid/;VM;0.8;0.9;5\n1;d;;TM;;;77\n'
        first, second = reader(text).read()
        assert (first.id, first.kind, first.prompt) == ("vm_0000", "vm", 'a "b"; c')
        assert [r.image.name for r in first.references] == ["0000_first.jpg", "0000_second.jpg"]
        assert (second.id, second.kind, second.image.name) == ("tm_0001", "tm", "77.PNG")
        assert [p.id for p in reader(text, kinds=["tm"]).read()] == ["tm_0001"]

    def test_references_as_nemos_own_scripts_name_them(self, images, reader):
        for name in ("img_0001_00.jpg", "img_0001_01.jpg"):
            write_image(images / name, seed=len(name) + int(name[-5]))
        (pair,) = reader(self.HEADER + "1;a;u;VM;;;5\n").read()
        assert [r.image.name for r in pair.references] == ["img_0001_00.jpg", "img_0001_01.jpg"]

    def test_row_number_goes_before_the_index(self, images, reader):
        write_image(images / "5.png", seed=9)
        (pair,) = reader(self.HEADER + "0;a;u;VM;;;5\n").read()
        assert pair.image.name == "0000_first.jpg"

    def test_list_without_types(self, reader):
        text = ";Caption;URL;Index\n0;a;u;396\n"
        (pair,) = reader(text, id_prefix="laion_").read()
        assert (pair.id, pair.kind, pair.repeats) == ("laion_control_0000", "control", 0.0)
        assert reader(text, kind="tm").read()[0].kind == "tm"
        assert "no column sort" in complaint(reader(text, kind_column="sort"))

    def test_missing_image_says_what_was_looked_for(self, reader, caplog):
        text = self.HEADER + "0;a;u;VM;;;5\n1;b;u;VM;;;6\n"
        assert "found no 0001_* nor 6.* in" in complaint(reader(text))
        assert [p.id for p in reader(text, on_missing="skip").read()] == ["vm_0000"]
        assert "vm_0001 (line 3: found no" in caplog.text

    def test_a_value_that_cannot_be(self, reader):
        assert "'xx' is no kind" in complaint(reader(self.HEADER + "0;a;u;XX;;;5\n"))
        assert "'../0' is no row" in complaint(reader(self.HEADER + "../0;a;u;VM;;;5\n"))

    def numbered(self, folder, numbers):
        for old in folder.iterdir():
            old.unlink()
        for number in numbers:
            write_image(folder / f"{number:04d}_x.jpg", seed=number)

    ROWS = HEADER + "0;a;u;VM;;;50\n1;b;u;VM;;;51\n2;c;u;VM;;;52\n"

    @pytest.mark.parametrize("numbers", [(1, 2, 3), (1, 3)])
    def test_images_counted_from_one_are_refused_with_the_mend(self, images, reader, numbers):
        self.numbered(images, numbers)
        text = complaint(reader(self.ROWS, on_missing="skip"))
        assert "0003_* belongs to no row" in text
        assert "Set pairs.first_image=1" in text
        pairs = reader(self.ROWS, on_missing="skip", first_image=1).read()
        assert {p.id: p.image.name for p in pairs} == {
            f"vm_{n - 1:04d}": f"{n:04d}_x.jpg" for n in numbers
        }

    def test_images_counted_from_zero_are_not_read_from_one(self, images, reader):
        self.numbered(images, (0, 1, 2))
        assert len(reader(self.ROWS).read()) == 3
        assert "Set pairs.first_image=0" in complaint(reader(self.ROWS, first_image=1))
        assert "must be 0 or 1" in complaint(reader(self.ROWS, first_image=2))

    @pytest.mark.parametrize(
        ("numbers", "words"),
        [((0, 1, 2, 7), "1 images of"), ((1, 2), "pairs.first_image=1")],
    )
    def test_images_without_a_row_are_named(self, images, reader, numbers, words, caplog):
        self.numbered(images, numbers)
        reader(self.ROWS, on_missing="skip").read()
        assert words in caplog.text
        assert ("0007_*" in caplog.text) == (7 in numbers)

    def test_comma_instead_of_semicolon(self, reader):
        text = self.HEADER.replace(";", ",") + "0,a,u,VM,,,5\n"
        assert "\"pairs.delimiter=','\"" in complaint(reader(text))
        assert len(reader(text, delimiter=",").read()) == 1

    def test_no_file(self, tmp_path, images):
        assert "cannot read the list of pairs" in complaint(
            NemoCsvPairs(tmp_path / "no.csv", images)
        )


class TestWen:
    @pytest.fixture
    def path(self, tmp_path):
        url = "https://x.invalid/"
        rows = [{"caption": f"c{k}", "index": k, "url": url} for k in (11, 12, 13)]
        return write_jsonl(tmp_path / "list.jsonl", rows)

    @pytest.mark.parametrize("below", ["gt_images/", ""])
    def test_pictures_in_folders_and_files(self, tmp_path, path, below):
        images = tmp_path / "images"
        write_image(images / f"{below}11/1.png", seed=1)
        write_image(images / f"{below}11/0.png", seed=2)
        write_image(images / f"{below}12/x.jpg", seed=3)
        write_image(images / "13.webp", seed=4)
        pairs = WenJsonlPairs(path, images, kind="vm").read()
        assert [(p.id, p.prompt) for p in pairs] == [("11", "c11"), ("12", "c12"), ("13", "c13")]
        names = [[r.image.name for r in p.references] for p in pairs]
        assert names == [["0.png", "1.png"], ["x.jpg"], ["13.webp"]]

    def test_kind_of_the_rows_and_folders_without_one(self, tmp_path, path, caplog):
        rows = [{"caption": "x", "index": 11, "overfit_type": "TV"}, {"caption": "y", "index": 12}]
        path = write_jsonl(path, rows)
        for name in ("11/0.png", "12/0.png", "99/0.png"):
            write_image(tmp_path / "images" / name, seed=len(name))
        pairs = WenJsonlPairs(path, tmp_path / "images", kind="vm").read()
        assert [p.kind for p in pairs] == ["tm", "vm"]
        assert "belong to no row" in caplog.text
        assert "99/*" in caplog.text

    def test_missing_picture(self, tmp_path, path):
        images = tmp_path / "images"
        write_image(images / "11/0.png")
        (images / "12").mkdir()
        text = complaint(WenJsonlPairs(path, images, kind="tm"))
        assert "2 problems" in text
        assert "found no gt_images/12/*, 12/* or 12.* in" in text
        reader = WenJsonlPairs(path, images, kind="tm", on_missing="skip", id_prefix="sd1_")
        assert [(p.id, p.kind) for p in reader.read()] == [("sd1_11", "tm")]

    @pytest.mark.parametrize("index", ["../../x", "..", None, 1.5, True, [1]])
    def test_index_must_be_a_number(self, folder, index):
        path = write_jsonl(folder / "list.jsonl", [{"caption": "x", "index": index}])
        assert "is no row number" in complaint(WenJsonlPairs(path, folder, kind="vm"))


class TestParquet:
    def test_paths(self, folder):
        columns = {"file_name": ["a.png", "b.png"], "text": ["x", "y"], "kind": ["tm", None]}
        pq.write_table(pa.table(columns), folder / "list.parquet")
        pairs = ParquetPairs(folder / "list.parquet").read()
        assert [(p.id, p.kind, p.prompt) for p in pairs] == [("a", "tm", "x"), ("b", "vm", "y")]

    def test_root(self, folder):
        path = folder.parent / "l.parquet"
        pq.write_table(pa.table({"file_name": ["a.png"], "prompt": ["x"]}), path)
        assert ParquetPairs(path, folder).read()[0].image == (folder / "a.png").resolve()
        assert "row 1  file_name" in complaint(ParquetPairs(path))

    def embedded(self, folder, images):
        path = folder.parent / "l.parquet"
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        prompts = [f"p{k}" for k in range(len(images))]
        pq.write_table(pa.table({"image": pa.array(images, kind), "prompt": prompts}), path)
        return path

    def test_bytes_are_written_under_their_hash(self, folder, tmp_path):
        data = [(folder / f"{name}.png").read_bytes() for name in "ab"]
        images = [{"bytes": data[0], "path": "sub/The cat.png"}, {"bytes": data[1], "path": None}]
        reader = ParquetPairs(self.embedded(folder, images), cache=tmp_path / "cache")
        pairs = reader.read()
        assert [p.id for p in pairs] == ["The_cat", "row_000002"]
        assert [p.image.read_bytes() for p in pairs] == data
        assert [p.image.name for p in pairs] == [f"{p.sha256}.png" for p in pairs]
        assert len(list((tmp_path / "cache").iterdir())) == 2
        assert reader.read() == pairs

    def test_limit_writes_what_it_takes(self, folder, tmp_path):
        images = [{"bytes": (folder / "a.png").read_bytes(), "path": None}]
        images += [{"bytes": b"broken", "path": None}] * 3
        reader = ParquetPairs(self.embedded(folder, images), cache=tmp_path / "cache", limit=1)
        assert [p.id for p in reader.read()] == ["row_000001"]
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_lists_of_images_and_of_files(self, folder, tmp_path):
        images = [{"bytes": (folder / f"{n}.png").read_bytes(), "path": f"{n}.png"} for n in "ab"]
        pq.write_table(pa.table({"image": [images], "text": ["p"]}), tmp_path / "l")
        (pair,) = ParquetPairs(tmp_path / "l", cache=tmp_path / "c").read()
        assert (pair.id, len(pair.references)) == ("a", 2)
        table = pa.table({"file_name": [["a.png", "b.png"]], "text": ["p"]})
        pq.write_table(table, folder / "l")
        assert len(ParquetPairs(folder / "l").read()[0].references) == 2

    def test_given_id_goes_before_the_path(self, folder, tmp_path):
        image = {"bytes": (folder / "a.png").read_bytes(), "path": "x.png"}
        pq.write_table(pa.table({"image": [image], "text": ["p"], "id": ["mine"]}), tmp_path / "l")
        assert ParquetPairs(tmp_path / "l", cache=tmp_path / "c").read()[0].id == "mine"

    def test_many_rows_come_in_order(self, folder, tmp_path):
        data = [(folder / f"{name}.png").read_bytes() for name in "abc"]
        images = [{"bytes": data[k % 3], "path": None} for k in range(150)]
        pairs = ParquetPairs(self.embedded(folder, images), cache=tmp_path / "cache").read()
        assert [p.prompt for p in pairs] == [f"p{k}" for k in range(150)]
        assert pairs[149].image.read_bytes() == data[149 % 3]

    def test_rows_without_bytes_and_with_bad_bytes(self, folder, tmp_path):
        web_page = {"bytes": b"<html>", "path": "x.jpg"}
        images = [{"bytes": None, "path": "../../a.png"}, None, web_page]
        text = complaint(ParquetPairs(self.embedded(folder, images), cache=tmp_path / "cache"))
        assert "3 problems in 3 rows" in text
        assert text.count("found no image bytes in this row") == 2
        assert "web page saved as an image" in text

    def test_bytes_need_a_cache(self, folder):
        path = self.embedded(folder, [{"bytes": b"x", "path": None}])
        assert "pairs.cache=" in complaint(ParquetPairs(path))

    def test_image_column_of_another_type(self, folder):
        pq.write_table(pa.table({"image": ["a.png"], "prompt": ["x"]}), folder / "l.parquet")
        text = complaint(ParquetPairs(folder / "l.parquet", cache=folder))
        assert "must be a struct of bytes" in text

    def test_missing_columns(self, folder):
        pq.write_table(pa.table({"file_name": ["a.png"], "title": ["x"]}), folder / "l.parquet")
        text = complaint(ParquetPairs(folder / "l.parquet"))
        assert "It has: 'file_name', 'title'" in text

    def test_not_parquet(self, folder):
        assert "cannot be read as parquet" in complaint(ParquetPairs(folder / "a.png"))
        assert "there is no file" in complaint(ParquetPairs(folder / "no.parquet"))


class TestConcat:
    @pytest.fixture
    def parts(self, tmp_path):
        for seed, name in enumerate(("memorized", "others")):
            write_image(tmp_path / name / f"{name}.png", seed=seed)
            row = {"file_name": f"{name}.png", "prompt": name}
            write_csv(tmp_path / name / "metadata.csv", [row])
        others = FolderPairs(tmp_path / "others", kind="control")
        return FolderPairs(tmp_path / "memorized"), others

    def test_lists_follow_each_other(self, parts):
        pairs = ConcatPairs(parts).read()
        assert [(p.id, p.kind) for p in pairs] == [("memorized", "vm"), ("others", "control")]
        assert [p.id for p in ConcatPairs(parts, kinds=["control"]).read()] == ["others"]
        assert "no pairs of kinds ['tm']" in complaint(ConcatPairs(parts, kinds=["tm"]))

    def test_same_id_in_two_lists_is_refused_for_both_pictures(self, parts):
        text = complaint(ConcatPairs([parts[0], parts[0]]))
        assert "id 'memorized' is in more than one list" in text
        assert text.count("memorized.png") == 2

    def test_problems_of_all_lists_come_together(self, parts):
        for part in parts:
            next(part.path.glob("*.png")).unlink()
        text = complaint(ConcatPairs(parts))
        assert text.count("no such file") == 2

    def test_same_picture_in_two_lists_is_marked(self, parts):
        (parts[1].path / "others.png").write_bytes((parts[0].path / "memorized.png").read_bytes())
        assert [p.duplicate_of for p in ConcatPairs(parts).read()] == [None, "memorized"]

    def test_rows_that_a_list_skipped_stay_known(self, parts):
        rows = [{"file_name": "others.png", "prompt": "x"}, {"file_name": "no.png", "prompt": "y"}]
        write_csv(parts[1].path / "metadata.csv", rows)
        pairs = ConcatPairs([parts[0], replace(parts[1], on_missing="skip")]).read()
        assert ([p.id for p in pairs], pairs.skipped_ids) == (["memorized", "others"], ("no",))

    def test_limit_and_kinds_reach_the_lists(self, parts):
        for part in parts:
            rows = [{"file_name": f"{part.path.name}.png", "prompt": "x"}]
            rows += [{"file_name": "no.png", "prompt": "y"}]
            write_csv(part.path / "metadata.csv", rows)
        assert len(ConcatPairs(parts, limit=1).read()) == 2
        next(parts[0].path.glob("*.png")).unlink()
        assert [p.id for p in ConcatPairs(parts, kinds=["control"], limit=1).read()] == ["others"]
        empty = replace(parts[1], kinds=["tm"])
        assert "has only control pairs" in complaint(ConcatPairs([parts[0], empty]))

    def test_no_lists(self):
        assert "pairs.parts is empty" in complaint(ConcatPairs([]))


def test_webp_is_read(folder):
    Image.new("RGB", (20, 20), "red").save(folder / "w.webp", lossless=True)
    write_csv(folder / "metadata.csv", [{"file_name": "w.webp", "prompt": "x"}])
    assert FolderPairs(folder).read()[0].id == "w"
