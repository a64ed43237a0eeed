"""Files of strangers: nothing in them is executed, whatever they pretend to be."""

import hashlib
import json
import pickle
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import PngImagePlugin

from dori_lightning.attacks.embedding_attack import RESULT
from dori_lightning.mitigations.activations import ActivationStatistics
from dori_lightning.mitigations.edits import read_edit
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.pairs.readers import FolderPairs
from dori_lightning.pairs.validation import open_image
from dori_lightning.report.images import thumbnail, thumbnail_uri
from dori_lightning.runtime.cache import TENSORS, Cache
from dori_lightning.runtime.checkpoints import FitCheckpoints, last_checkpoint
from dori_lightning.types import InputError
from support.runs import write_pairs
from support.tiny import write_tiny, write_tiny_single


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def in_a_weight_file(folder, data):
    weights = write_tiny(folder / "model") / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(data)
    load_checkpoint(name="x", source=str(folder / "model"), device="cpu")


def as_one_file(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    load_checkpoint(name="x", source=str(folder / "model.safetensors"), device="cpu", config="x")


def as_a_ckpt(folder, data):
    (folder / "model.ckpt").write_bytes(data)
    load_checkpoint(name="x", source=str(folder / "model.ckpt"), device="cpu")


def as_an_edit(folder, data):
    (folder / "edit.safetensors").write_bytes(data)
    read_edit(folder / "edit.safetensors")


def as_statistics(folder, data):
    (folder / "statistics.safetensors").write_bytes(data)
    ActivationStatistics.load(folder / "statistics.safetensors", None)


def as_a_fits_checkpoint(folder, data):
    path = folder / f"step-00000003-{hashlib.sha256(data).hexdigest()}.ckpt"
    path.write_bytes(data)
    assert last_checkpoint(folder, "fit") == path, "its checksum is right"
    FitCheckpoints().load_checkpoint(path, weights_only=False)


@pytest.mark.parametrize("packed", ["a pickle", "in a torch file"])
@pytest.mark.parametrize(
    "offered",
    [
        in_a_weight_file, as_one_file, as_a_ckpt, as_an_edit, as_statistics, as_a_fits_checkpoint,
    ],
)  # fmt: skip
def test_a_pickle_is_refused_and_not_loaded(tmp_path, offered, packed):
    mark, evil = tmp_path / "mark", Evil(tmp_path / "mark")
    data = pickle.dumps(evil)
    if packed != "a pickle":
        torch.save({"state_dict": {}, "global_step": evil}, tmp_path / "evil")
        data = (tmp_path / "evil").read_bytes()
    with pytest.raises(InputError):
        offered(tmp_path, data)
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil))
    assert mark.exists(), "it would have been"


def test_a_pickle_among_attacks_or_latents_is_not_loaded(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "a.r0.safetensors").write_bytes(pickle.dumps(Evil(mark)))
    assert Cache(tmp_path).read("a.r0", {}, RESULT) is None
    # such as the encoded stream of a planting
    (tmp_path / "stream.safetensors").write_bytes(pickle.dumps(Evil(mark)))
    assert Cache(tmp_path).read("stream", {}, TENSORS) is None
    assert not mark.exists()


def test_an_attack_without_its_tensors_counts_as_damaged(tmp_path):
    Cache(tmp_path).write("a.r0", {"snapshots": torch.ones(2, 2)}, {"seed": "0"}, TENSORS)
    assert Cache(tmp_path).read("a.r0", {"seed": "0"}, RESULT) is None


CODE = "from pathlib import Path\nPath('mark').touch()\nraise SystemExit('executed')\n"


def test_code_and_classes_in_a_checkpoints_folder_are_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_tiny(tmp_path / "model")
    expected = load_checkpoint(name="x", source=str(folder), device="cpu").fingerprint
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": ["pipeline", "Evil"], "unet": ["evil", "Evil"]})
    )
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "."):
        for name in ("evil.py", "pipeline.py", "modeling_evil.py", "my_own.py"):
            (folder / part / name).write_text(CODE)
    names = {"AutoModel": "modeling_evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    hostile = {
        "auto_map": names,
        "custom_pipelines": {"x": {"impl": "pipeline"}},
        "_attn_implementation": "stranger/kernel",
        "attn_implementation": "stranger/kernel",
    }
    for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json",
                 "tokenizer/tokenizer_config.json"):  # fmt: skip
        held = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**held, **hostile}))
    model = load_checkpoint(name="x", source=str(folder), device="cpu")
    assert model.fingerprint == expected
    assert not (tmp_path / "mark").exists()


def test_a_kernel_named_by_the_configuration_of_a_single_file_is_not_used(tmp_path):
    folder = write_tiny(tmp_path / "model")
    file = write_tiny_single(tmp_path / "one.safetensors")
    config = folder / "text_encoder" / "config.json"
    held = json.loads(config.read_text())
    config.write_text(json.dumps({**held, "attn_implementation": "stranger/kernel"}))
    model = load_checkpoint(name="x", source=str(file), device="cpu", config=str(folder))
    assert model.text_encoder.config._attn_implementation == "sdpa"


# --- images


def png(width, height, *chunks):
    """A PNG whose header says how large it is, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def complaint(folder, content):
    """What is said of a list whose one image is this."""
    folder.mkdir(exist_ok=True)
    (folder / "x.png").write_bytes(content)
    (folder / "metadata.csv").write_text("file_name,prompt\nx.png,a boat\n")
    with pytest.raises(InputError) as refused:
        FolderPairs(folder).read()
    return str(refused.value)


TEXT_BOMB = (b"zTXt", b"x\0\0" + zlib.compress(b"\0" * 20_000_000, 9))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(65_500, 65_500), "decompression bomb"),
        (png(2**31 - 1, 2**31 - 1), "decompression bomb"),
        (png(32, 32, TEXT_BOMB), "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(mark) (w) file\n", "PostScript"),
        (b"%PDF-1.7\n1 0 obj\n", "PDF"),
        (f"{'SIMPLE  =                    T':<80}".encode() * 36, "unknown content"),
        (b"PK\x03\x04" + b"\0" * 60, "zip archive"),
        (b"\x89PNG\r\n\x1a\n%PDF-1.7\n", "damaged or truncated PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>x</script></svg>", "unknown content"),
        (b"GIF89a" + b"\1" * 60, "GIF"),
    ],
)
def test_what_only_looks_like_a_image_is_refused(tmp_path, content, words):
    assert words in complaint(tmp_path / "pictures", content)


def test_what_is_behind_a_image_is_not_handed_on(tmp_path):
    folder = write_pairs(tmp_path / "pairs", vm=1, control=0)
    path = folder / "0.png"
    plain = open_image(path)
    note = PngImagePlugin.PngInfo()
    note.add_text("comment", "<script>hidden words</script>")
    plain.save(path, pnginfo=note)
    path.write_bytes(path.read_bytes() + b"PK\x03\x04 an archive of hidden words")
    (pair,) = FolderPairs(folder).read()
    assert open_image(pair.image).tobytes() == plain.tobytes()
    shown = thumbnail(pair.image, "full")
    assert shown is not None
    assert not shown.info
    shown.save(tmp_path / "shown.jpg")
    assert b"hidden words" not in (tmp_path / "shown.jpg").read_bytes()
    assert str(thumbnail_uri(pair.image, "full")).startswith("data:image/jpeg")
