"""Measures by known networks: left out, not replaced, where no local weights are given."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lpips
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from dori_lightning.metrics.descriptors import check_images, in_fixed_batches
from dori_lightning.metrics.sscd import parse_weights, read_weights
from dori_lightning.types import InputError

BATCH = 8
"""Images per forward pass on an accelerator."""

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class LPIPSDistance:
    """LPIPS distance of each generated image to its original, lower is closer.

    The linear heads come with the ``lpips`` package; the ImageNet backbone has to be a local file.
    Without one, do not build this: distances of a random backbone mean nothing, so none are
    offered.

    Reference: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
        Metric", CVPR 2018, https://arxiv.org/abs/1801.03924.
    """

    def __init__(
        self,
        backbone: str | Path,
        *,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        sha256: str | None = None,
    ) -> None:
        """Load the backbone.

        Args:
            backbone: Local torchvision weights of AlexNet, VGG-16 or SqueezeNet 1.1, ``.pth`` or
                ``.safetensors``.
            net: Which of them.
            sha256: Expected hash of the file.

        Raises:
            InputError: Missing or wrong file, or unknown net.
        """
        if net not in ("alex", "vgg", "squeeze"):
            raise InputError(f"LPIPS: net must be alex, vgg or squeeze, got {net!r}")
        path = Path(backbone)
        state = parse_weights(read_weights(path, sha256, what="LPIPS"), path, what="LPIPS")
        layers = {
            k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")
        }
        with warnings.catch_warnings():
            # lpips still says pretrained=False to torchvision, which warns.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            self.network = (
                lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
            )
        # lpips cuts the backbone into slices but keeps the layers' numbers: slice2.3.weight is
        # features.3.weight.
        target = self.network.net.state_dict()
        renamed = {key: layers.get(re.sub(r"^slice\d+\.", "", key)) for key in target}
        wrong = [k for k, v in renamed.items() if v is None or v.shape != target[k].shape]
        if wrong:
            raise InputError(
                f"LPIPS: {path} does not hold a {net} backbone: {len(wrong)} of {len(target)} "
                f"tensors are missing or differ in shape; give torchvision's ImageNet weights"
            )
        self.network.net.load_state_dict(renamed)

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare images one to one.

        Args:
            a: Generated images, (N, 3, H, W), in [0, 1].
            b: Originals, (N, 3, H, W) or (1, 3, H, W), in [0, 1].

        Returns:
            (N,) fp32 on the CPU, >= 0.

        Raises:
            ValueError: Wrong shape, type or range.
        """
        check_images(a)
        check_images(b)
        self.network.to(a.device)
        couples = torch.stack([a.float(), b.float().expand_as(a)], 1)
        return in_fixed_batches(
            lambda batch: self.network(*batch.unbind(1), normalize=True).flatten(),
            couples,
            BATCH,
        )


class ClipAlignment:
    """Cosine of CLIP's image and text embeddings: does an image still show what was asked for?

    Reference: Radford et al., "Learning Transferable Visual Models From Natural Language
        Supervision", 2021, https://arxiv.org/abs/2103.00020; A_CLIP of Finding NeMo uses ViT-B/32.
    """

    def __init__(self, model_path: str | Path) -> None:
        """Load the model.

        Args:
            model_path: Local transformers folder of a CLIP model with safetensors weights and a
                tokenizer.

        Raises:
            InputError: Not such a folder.
        """
        path = Path(model_path)
        if not path.is_dir():
            raise InputError(
                f"CLIP: {path} is no folder; give a local CLIP model, nothing is downloaded"
            )
        try:
            self.model = CLIPModel.from_pretrained(
                path, local_files_only=True, use_safetensors=True
            )
            self.model.train(False)
            self.tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"CLIP: {path} does not hold a CLIP model with model.safetensors and a "
                f"tokenizer: {error}"
            ) from error
        config: Any = self.model.config
        self.side: int = config.vision_config.image_size
        self.length: int = config.text_config.max_position_embeddings

    @torch.no_grad()
    def alignment(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images against their prompts, one to one.

        Args:
            images: (N, 3, H, W), in [0, 1]; scaled to the model's size without keeping the aspect
                ratio, as generated images are square.
            prompts: N captions, cut at the model's length.

        Returns:
            (N,) fp32 cosines on the CPU, in [-1, 1].

        Raises:
            ValueError: Wrong shape, type, range or number of prompts.
        """
        check_images(images)
        if len(prompts) != len(images):
            raise ValueError(f"need one prompt per image, got {len(prompts)} for {len(images)}")
        torch.nn.Module.to(self.model, images.device)
        mean, std = (
            torch.tensor(x, device=images.device).view(3, 1, 1) for x in (_CLIP_MEAN, _CLIP_STD)
        )
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(images.device)

        def shown(batch: Tensor) -> Any:
            pixels = F.interpolate(
                batch.float(), (self.side, self.side), mode="bicubic", antialias=True
            ).clamp(0, 1)
            found: Any = self.model.get_image_features(pixel_values=(pixels - mean) / std)
            return found.pooler_output

        def described(batch: Tensor) -> Any:
            ids, mask = batch.unbind(1)
            found: Any = self.model.get_text_features(input_ids=ids, attention_mask=mask)
            return found.pooler_output

        texts = torch.stack([tokens["input_ids"], tokens["attention_mask"]], 1)
        similarity = F.cosine_similarity(
            in_fixed_batches(shown, images, BATCH), in_fixed_batches(described, texts, BATCH)
        )
        return similarity.float().clamp(-1, 1)
