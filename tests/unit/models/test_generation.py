from dataclasses import replace
from pathlib import Path

import torch

from dori_lightning.models.generation import GenerationRequest, generate_images, load_images
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion

SAMPLING = Sampling("ddim", 3, 2.0, images_per_pair=2, seed=5)


def requests(model: StableDiffusion, folder: Path) -> list[GenerationRequest]:
    prompts = ("a cat", "a boat", "a red house")
    return [
        GenerationRequest(folder / str(k), row)
        for k, row in enumerate(model.encode_prompts(prompts))
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_call_draws_nothing_and_a_lost_image_comes_back_the_same(model, tmp_path):
    assert generate_images(model, requests(model, tmp_path), SAMPLING) == 6
    first = contents(tmp_path)
    assert sorted(first) == [f"{k}/{seed}.png" for k in range(3) for seed in (5, 6)]
    assert generate_images(model, requests(model, tmp_path), SAMPLING) == 0
    (tmp_path / "1" / "6.png").unlink()
    (tmp_path / "2" / "5.png").write_bytes(first["2/5.png"][:40])
    assert generate_images(model, requests(model, tmp_path), SAMPLING) == 2
    assert contents(tmp_path) == first


def test_the_order_and_company_of_requests_change_no_bit(model, tmp_path):
    generate_images(model, requests(model, tmp_path / "a"), SAMPLING)
    for request in reversed(requests(model, tmp_path / "b")):
        generate_images(model, [request], replace(SAMPLING, batch=3))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_image_alone_has_the_bits_that_it_has_among_the_others(model, tmp_path):
    generate_images(model, requests(model, tmp_path / "together"), SAMPLING)
    for seeds in ((5,), (6,)):
        alone = [replace(r, seeds=seeds) for r in requests(model, tmp_path / "alone")]
        assert generate_images(model, alone, SAMPLING) == 3
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_images_made_otherwise_are_drawn_again(model, tmp_path):
    generate_images(model, requests(model, tmp_path), SAMPLING)
    assert generate_images(model, requests(model, tmp_path), replace(SAMPLING, guidance=3.0)) == 6
    assert (
        generate_images(
            model, requests(model, tmp_path), replace(SAMPLING, guidance=3.0), edit="other"
        )
        == 6
    )


def test_they_are_read_back_as_written(model, tmp_path):
    request = requests(model, tmp_path)[0]
    generate_images(model, [request], SAMPLING)
    images = load_images(request.folder, (5, 6))
    assert images.shape == (2, 3, 32, 32)
    assert not torch.equal(images[0], images[1])


def test_out_of_memory_takes_fewer_images_a_batch(model, tmp_path, monkeypatch):
    generate_images(model, requests(model, tmp_path / "whole"), SAMPLING)
    real, widths = model.denoise, []

    def small_memory(embeddings, *rest):
        widths.append(len(embeddings))
        if len(embeddings) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(embeddings, *rest)

    monkeypatch.setattr(model, "denoise", small_memory)
    monkeypatch.setattr(model, "max_batch_sizes", {})
    generate_images(model, requests(model, tmp_path / "small"), SAMPLING)
    assert widths[:3] == [16, 8, 4]
    assert set(widths[2:]) == {4}
    for k in range(3):
        whole, small = (load_images(tmp_path / n / str(k), (5, 6)) for n in ("whole", "small"))
        # eight bits a colour: rounding of kernels may tip one
        assert float((whole - small).abs().max()) <= 1.01 / 255
