"""Pairs are encoded once, kept safely, and shared out without padding."""

import logging
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch.utils.data import IterableDataset

from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.readers import FolderPairs
from support.pairs import write_csv, write_image


class FakeModel:
    """Encodes to numbers that tell which picture and which prompt they came from."""

    name = "fake"
    resolution = 16
    latent_shape = (4, 2, 2)
    embedding_shape = (3, 5)
    device = torch.device("cpu")

    def __init__(self, fingerprint="f"):
        self.fingerprint = fingerprint
        self.calls = []
        self.bad = None

    def encode_images(self, images):
        assert images.shape[1:] == (3, 16, 16)
        assert not torch.is_grad_enabled()
        return images.mean((1, 2, 3))[:, None, None, None].expand(-1, *self.latent_shape)

    def encode_prompts(self, prompts):
        self.calls.append(list(prompts))
        values = torch.tensor([float(sum(p.encode())) for p in prompts])
        values = values[:, None, None].expand(-1, *self.embedding_shape)
        return values if self.bad is None else self.bad(values)


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "seven"
    names = [f"p{k}" for k in range(7)]
    for seed, name in enumerate(names):
        write_image(folder / f"{name}.png", seed=seed)
    rows = [{"file_name": f"{name}.png", "prompt": f"prompt of {name}"} for name in names]
    write_csv(folder / "metadata.csv", rows)
    return FolderPairs(folder).read()


class Batches(IterableDataset):
    def __init__(self, module, *groups):
        self.module, self.groups = module, groups

    def __iter__(self):
        yield from (self.module.batch(group).latents for group in self.groups)


def test_batches_hold_their_pairs_tensors_in_order(pairs):
    module = PairsDataModule(pairs, FakeModel())
    batch = module.batch(pairs[:3])
    assert batch.latents.shape == (3, 4, 2, 2)
    assert batch.embeddings.shape == (3, 3, 5)
    for pair, latent, embedding in zip(batch.pairs, batch.latents, batch.embeddings, strict=True):
        assert embedding[0, 0] == sum(pair.prompt.encode())
        assert torch.equal(latent, module.encoded(pair).latent)
    latents = module.batch(pairs).latents
    assert len(latents.flatten(1)[:, 0].unique()) == 7


def test_each_pair_is_encoded_once(pairs):
    model = FakeModel()
    module = PairsDataModule(pairs, model)
    module.prepare()
    module.batch(pairs)
    assert model.calls == [[pair.prompt] for pair in pairs]


def test_prepare_takes_a_selection(pairs):
    model = FakeModel()
    module = PairsDataModule(pairs, model)
    module.prepare(pairs[2:4])
    assert model.calls == [["prompt of p2"], ["prompt of p3"]]


def test_cache_serves_a_later_run_bit_for_bit(pairs, tmp_path):
    cache = tmp_path / "cache"
    first = PairsDataModule(pairs, FakeModel(), cache=cache)
    first.prepare()
    assert len(list(cache.iterdir())) == 7  # and nothing half-written
    model = FakeModel()
    second = PairsDataModule(pairs, model, cache=str(cache))
    second.prepare()
    assert model.calls == []
    for pair in pairs:
        assert torch.equal(first.encoded(pair).latent, second.encoded(pair).latent)
        assert torch.equal(first.encoded(pair).embedding, second.encoded(pair).embedding)


def test_cache_is_not_shared_across_models_prompts_or_pictures(pairs, tmp_path):
    PairsDataModule(pairs[:1], FakeModel(), cache=tmp_path / "cache").prepare()
    other_prompt = replace(pairs[0], prompt="other")
    other_picture = replace(pairs[0], image=pairs[1].image, sha256=pairs[1].sha256)
    unhashed = replace(other_picture, image=pairs[2].image, sha256="")
    others = [("g", pairs[0]), ("f", other_prompt), ("f", other_picture), ("f", unhashed)]
    for fingerprint, pair in others:
        model = FakeModel(fingerprint)
        PairsDataModule([pair], model, cache=tmp_path / "cache").prepare()
        assert model.calls == [[pair.prompt]]
    model = FakeModel()
    PairsDataModule([replace(pairs[0], id="renamed")], model, cache=tmp_path / "cache").prepare()
    assert model.calls == []  # the id is not what the tensors depend on


def rewrite(path, metadata=None, **tensors):
    with safe_open(path, framework="pt") as file:
        metadata = metadata or file.metadata()
    whole = {**load(path.read_bytes()), **tensors}
    held = {name: tensor for name, tensor in whole.items() if tensor is not None}
    path.write_bytes(save(held, metadata=metadata))


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "wrong_shape": lambda path: rewrite(path, latent=torch.zeros(4, 2, 3)),
    "wrong_dtype": lambda path: rewrite(path, embedding=torch.zeros(3, 5, dtype=torch.float16)),
    "not_finite": lambda path: rewrite(path, latent=torch.full((4, 2, 2), float("nan"))),
    "other_pair": lambda path: rewrite(path, {"image": "another"}),
    "no_embedding": lambda path: rewrite(path, embedding=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_encoded_again_with_a_warning(pairs, tmp_path, caplog, damage):
    cache = tmp_path / "cache"
    PairsDataModule(pairs[:1], FakeModel(), cache=cache).prepare()
    (path,) = cache.iterdir()
    whole = load(path.read_bytes())
    damage(path)
    model = FakeModel()
    module = PairsDataModule(pairs[:1], model, cache=cache)
    module.prepare()
    assert model.calls == [["prompt of p0"]]
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "computed anew" in record.getMessage()
    assert torch.equal(module.encoded(pairs[0]).latent, whole["latent"])
    assert torch.equal(load(path.read_bytes())["embedding"], whole["embedding"])


def test_tensors_outlive_their_file(pairs, tmp_path):
    cache = tmp_path / "cache"
    PairsDataModule(pairs[:1], FakeModel(), cache=cache).prepare()
    module = PairsDataModule(pairs[:1], FakeModel(), cache=cache)
    module.prepare()
    (path,) = cache.iterdir()
    path.write_bytes(b"")  # a mapped file would now end the process with SIGBUS
    assert module.encoded(pairs[0]).embedding[0, 0] == sum(pairs[0].prompt.encode())


def test_failed_write_leaves_neither_file_nor_remains(pairs, tmp_path, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)  # the bytes are written by then
    with pytest.raises(OSError, match="No space"):
        PairsDataModule(pairs, FakeModel(), cache=tmp_path / "cache").prepare()
    assert list((tmp_path / "cache").iterdir()) == []


def test_model_that_breaks_its_promise_is_refused(pairs):
    model = FakeModel()
    model.bad = lambda values: values[:, :2]
    with pytest.raises(
        ValueError, match=r"promises embeddings of shape \(1, 3, 5\) but gives \(1, 2, 5\)"
    ):
        PairsDataModule(pairs, model).prepare()


def test_values_that_are_not_finite_are_refused_by_id(pairs):
    model = FakeModel()
    model.bad = lambda values: values / (values != sum(pairs[1].prompt.encode()))
    with pytest.raises(ValueError, match="encodes p1 to embeddings that are not finite"):
        PairsDataModule(pairs, model).prepare()


def test_ids_must_be_unique(pairs):
    with pytest.raises(ValueError, match="unique ids"):
        PairsDataModule([pairs[0], replace(pairs[1], id=pairs[0].id)], FakeModel())


class Recorder(pl.LightningModule):
    def predict_step(self, batch, *_):
        return batch


@pytest.fixture
def trainer(tmp_path):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def test_a_trainer_is_served_this_processs_batches_in_order(pairs, trainer):
    module = PairsDataModule(pairs, FakeModel())
    batches = Batches(module, pairs[:4], pairs[4:])
    found = trainer.predict(Recorder(), datamodule=module.serve(batches))
    assert [len(batch) for batch in found] == [4, 3]
    assert torch.equal(torch.cat(found), module.batch(pairs).latents)
    # attacks need gradients, also of pairs that were encoded in inference mode
    assert not module.encoded(pairs[0]).latent.is_inference()
