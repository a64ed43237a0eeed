"""Captions beside images, shards of a downloader, and folders that say how to become a list."""

import io
import json
import shutil
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dori_lightning.pairs.captioned import CaptionFilePairs, Img2datasetPairs
from dori_lightning.pairs.readers import FolderPairs, ParquetPairs
from dori_lightning.types import InputError
from support.pairs import write_image


def complaint(reader):
    with pytest.raises(InputError) as error:
        reader.read()
    return str(error.value)


class TestCaptionFiles:
    def test_captions_beside_images(self, folder):
        (folder / "a.txt").write_text("one\n", encoding="utf-8")
        (folder / "b.caption").write_text("zwei Bäume", encoding="utf-8")
        (folder / "c.txt").write_text("three", encoding="utf-8")
        write_image(folder / "c.jpg", seed=9)
        write_image(folder / "c/more.png", seed=10)
        (folder / "._a.png").write_bytes(b"macOS")
        pairs = CaptionFilePairs(folder).read()
        assert [(p.id, p.prompt) for p in pairs] == [
            ("a", "one"), ("b", "zwei Bäume"), ("c", "three"),
        ]  # fmt: skip
        assert {r.image.name for r in pairs[2].references} == {"c.jpg", "c.png", "more.png"}

    def test_folders_of_repeats(self, folder):
        write_image(folder / "10_sks dog/1.png", seed=4)
        write_image(folder / "10_sks dog/2.png", seed=5)
        (folder / "10_sks dog/2.txt").write_text("a dog runs")
        for name in "abc":
            (folder / f"{name}.png").unlink()
        pairs = CaptionFilePairs(folder, kind="tm").read()
        assert [(p.id, p.prompt, p.repeats, p.kind) for p in pairs] == [
            ("10_sks_dog_1", "sks dog", 10.0, "tm"), ("10_sks_dog_2", "a dog runs", 10.0, "tm"),
        ]  # fmt: skip

    def test_what_is_missing_is_named(self, folder):
        (folder / "a.txt").write_text("one")
        (folder / "b.txt").write_text("two")
        (folder / "b.caption").write_text("three")
        (folder / "d.txt").write_text("four")
        text = complaint(CaptionFilePairs(folder))
        assert "3 problems" in text
        assert "there are b.caption and b.txt" in text
        assert "c      (caption)  empty" in text
        assert "found no d.jpg, .png or .webp" in text

    def test_nothing_of_that_kind(self, tmp_path):
        assert "neither images with captions" in complaint(CaptionFilePairs(tmp_path))


class TestImg2dataset:
    RECORDS = (
        {"key": "000000000", "caption": "one", "overfit_type": "TV", "status": "success"},
        {"key": "000000001", "caption": "two", "status": "success"},
        {"key": "000000002", "caption": "dead", "status": "failed_to_download",
         "error_message": "HTTP Error 404"},
    )  # fmt: skip

    @pytest.fixture(params=["folders", "tar"])
    def source(self, tmp_path, request):
        """Two images and a dead link, as either format has them."""
        shard = tmp_path / "data/00000"
        for seed, record in enumerate(self.RECORDS[:2]):
            write_image(shard / f"{record['key']}.jpg", seed=seed)
            (shard / f"{record['key']}.txt").write_text(record["caption"])
            (shard / f"{record['key']}.json").write_text(json.dumps(record))
        pq.write_table(pa.Table.from_pylist([*self.RECORDS[::-1]]), shard.with_suffix(".parquet"))
        if request.param == "tar":
            with tarfile.open(shard.with_suffix(".tar"), "w") as archive:
                for path in sorted(shard.iterdir()):
                    archive.add(path, path.name)
            shutil.rmtree(shard)
        return shard.parent

    def reader(self, source, **options):
        return Img2datasetPairs(source, cache=source.parent / "cache", **options)

    def test_samples_and_dead_links(self, source):
        pairs = self.reader(source, on_missing="skip").read()
        assert [(p.id, p.kind, p.prompt) for p in pairs] == [
            ("000000000", "tm", "one"), ("000000001", "vm", "two"),
        ]  # fmt: skip
        (skipped,) = pairs.skipped
        assert skipped.id == "000000002"
        assert "HTTP Error 404" in skipped.why
        assert "HTTP Error 404" in complaint(self.reader(source))

    def test_limit_leaves_other_images_where_they_are(self, source):
        assert len(self.reader(source, limit=1, kinds=["vm"]).read()) == 1
        cache = source.parent / "cache"
        assert len(list(cache.iterdir())) == 1 if cache.is_dir() else True

    def test_urls_of_one_prompt_are_its_references(self, source, tmp_path):
        again = tmp_path / "data/00001"
        again.mkdir()
        write_image(again / "000010000.jpg", seed=9)
        (again / "000010000.json").write_text(json.dumps({"caption": "two"}))
        if not (source / "00000").is_dir():
            with tarfile.open(again.with_suffix(".tar"), "w") as archive:
                for path in sorted(again.iterdir()):
                    archive.add(path, path.name)
            shutil.rmtree(again)
        dead = {"key": "000010001", "caption": "two", "status": "failed_to_download"}
        pq.write_table(pa.Table.from_pylist([dead]), again.with_suffix(".parquet"))
        pairs = self.reader(source, on_missing="skip", same_prompt="references").read()
        assert {p.prompt: len(p.references) for p in pairs} == {"one": 1, "two": 2}
        assert {(own.id, own.what) for own in pairs.skipped} == {
            ("000000001", "image"), ("000000002", "pair"),
        }  # fmt: skip


class TestArchives:
    def tar(self, path, members):
        with tarfile.open(path, "w") as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    def test_names_do_not_reach_the_disk(self, folder, tmp_path):
        image = (folder / "a.png").read_bytes()
        members = {"../../evil.png": image, "../../evil.txt": b"x", "/abs/._evil.png": b"no"}
        (tmp_path / "in").mkdir()
        path = self.tar(tmp_path / "in/00000.tar", members)
        (pair,) = Img2datasetPairs(path, cache=tmp_path / "in/cache").read()
        assert (pair.id, pair.image.parent.name) == ("evil", "cache")
        assert not list(tmp_path.glob("**/evil*"))

    def test_a_bad_archive_or_record_is_named(self, folder, tmp_path):
        (tmp_path / "00000.tar").write_bytes(b"no archive")
        reader = Img2datasetPairs(tmp_path / "00000.tar", cache=tmp_path / "cache")
        assert "cannot be read as a tar file" in complaint(reader)
        self.tar(tmp_path / "00000.tar", {"1.png": b"x", "1.json": b"[", "2.png": b"x"})
        text = complaint(reader)
        assert "unreadable caption or record" in text
        assert "00000.tar/2  caption  empty" in text
        assert "pairs.cache=" in complaint(Img2datasetPairs(tmp_path / "00000.tar"))

    def test_no_shards(self, folder):
        assert "has no shards of img2dataset" in complaint(Img2datasetPairs(folder))


def converted(text):
    """Run the line that a message gives."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith("python -c")]
    line = line.strip().replace("python", sys.executable, 1)
    subprocess.run(line, shell=True, check=True)


class TestFoldersWithoutAList:
    @pytest.mark.parametrize(
        "content",
        [
            "image,caption\na.png,\"one, two\"\nb.png,three\n",
            "a.png#0\tone, two\nb.png#0\tthree\n",
            "one, two\nthree\nfour\n",
        ],
        ids=["table", "flickr", "lines"],
    )  # fmt: skip
    def test_captions_txt_is_told_the_line_that_converts_it(self, folder, content):
        (folder / "captions.txt").write_text(content)
        text = complaint(FolderPairs(folder))
        converted(text)
        pairs = FolderPairs(folder).read()
        assert [(p.id, p.prompt) for p in pairs][:2] == [("a", "one, two"), ("b", "three")]

    @pytest.mark.parametrize("split", ["", "train"])
    def test_a_saved_data_set_is_told_the_line_that_converts_it(self, folder, tmp_path, split):
        place = tmp_path / "saved it" / split
        place.mkdir(parents=True)
        images = [{"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}]
        table = pa.table({"image": images, "text": ["one"]})
        with pa.ipc.new_stream(place / "data-00000-of-00001.arrow", table.schema) as sink:
            sink.write_table(table)
        name = "dataset_dict.json" if split else "state.json"
        (tmp_path / "saved it" / name).write_text("{}")
        text = complaint(FolderPairs(tmp_path / "saved it"))
        assert "pairs=parquet" in text
        converted(text)
        pairs = ParquetPairs(tmp_path / "saved it.parquet", cache=tmp_path / "cache").read()
        assert [(p.id, p.prompt) for p in pairs] == [("a", "one")]

    def test_layouts_with_a_reader_are_told_its_name(self, folder):
        (folder / "a.txt").write_text("one")
        assert "pairs=caption_files" in complaint(FolderPairs(folder))
        (folder / "00000").mkdir()
        assert "pairs=img2dataset" in complaint(FolderPairs(folder))
        assert "begins with the line" in complaint(FolderPairs(folder / "00000"))


def test_reading_lists_imports_no_torch():
    code = (
        "import sys, dori_lightning.pairs.captioned as c; "
        "sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
