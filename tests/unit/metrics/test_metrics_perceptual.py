"""LPIPS and CLIP with random weights made here: plumbing, not values."""

import json

import pytest
import torch
import torchvision
from transformers import CLIPConfig, CLIPModel

from dori_lightning.metrics.perceptual import ClipAlignment, LPIPSDistance
from dori_lightning.types import InputError


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    state = torchvision.models.alexnet(weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if k.startswith("features.")}, path)
    return path


def test_lpips_of_a_copy_is_zero_and_of_others_is_not(backbone, photographs):
    lpips = LPIPSDistance(backbone)
    assert torch.equal(lpips.distance(photographs, photographs), torch.zeros(8))
    distances = lpips.distance(photographs[1:], photographs[:1])
    assert distances.shape == (7,)
    assert (distances > 0).all()
    alone = torch.cat([lpips.distance(x[None], photographs[:1]) for x in photographs[1:]])
    assert torch.equal(alone, distances)


def test_lpips_uses_the_given_backbone(backbone, photographs, tmp_path):
    state = {k: 0.5 * v for k, v in torch.load(backbone, weights_only=True).items()}
    torch.save(state, tmp_path / "other.pth")
    files = (backbone, tmp_path / "other.pth")
    a, b = (LPIPSDistance(f).distance(photographs[:1], photographs[1:2]) for f in files)
    assert a != b


def test_lpips_refuses(backbone, tmp_path):
    with pytest.raises(InputError, match="nothing is downloaded"):
        LPIPSDistance(tmp_path / "none.pth")
    with pytest.raises(InputError, match="sha256"):
        LPIPSDistance(backbone, sha256="0" * 64)
    with pytest.raises(InputError, match="does not hold a vgg backbone"):
        LPIPSDistance(backbone, net="vgg")
    with pytest.raises(InputError, match="net must be"):
        LPIPSDistance(backbone, net="resnet")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    pieces = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: k for k, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={
            **small, "vocab_size": len(words), "max_position_embeddings": 12,
            "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
            "pad_token_id": len(words) - 1,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_scores_each_picture_with_its_prompt(clip_folder, photographs):
    clip = ClipAlignment(clip_folder)
    long = "a dog on a very long walk through town"
    prompts = ["a cat", long, "", "boat", "tree", "car", "sun", "moon"]
    scores = clip.alignment(photographs, prompts)
    assert scores.shape == (8,)
    assert scores.abs().max() <= 1
    one = torch.cat(
        [clip.alignment(x[None], [p]) for x, p in zip(photographs, prompts, strict=True)]
    )
    assert torch.equal(one, scores)
    assert not torch.equal(clip.alignment(photographs, prompts[::-1]), scores)


def test_clip_refuses(clip_folder, photographs, tmp_path):
    with pytest.raises(InputError, match="no folder"):
        ClipAlignment(tmp_path / "none")
    with pytest.raises(InputError, match="does not hold a CLIP"):
        ClipAlignment(tmp_path)
    with pytest.raises(ValueError, match="one prompt per image"):
        ClipAlignment(clip_folder).alignment(photographs, ["a"])
