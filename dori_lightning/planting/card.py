"""The model card of a planted checkpoint: what was planted, how often, and the hashes."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dori_lightning.planting.flow import FlowRecipe
from dori_lightning.planting.recipe import PlantRecipe
from dori_lightning.report.tables import TextTable, markdown_table
from dori_lightning.types import Pair


def write_card(
    folder: Path,
    *,
    recipe: PlantRecipe | FlowRecipe,
    pairs: Sequence[Pair],
    exposures: Counter[str],
    similarity: Mapping[str, float],
    seed: int,
    provenance: Mapping[str, Any],
) -> None:
    """Write ``planting.json`` (for programs) and ``README.md`` (for people) beside the weights."""
    weights = sorted(folder.rglob("*.safetensors"))
    record = {
        "recipe": asdict(recipe),
        "seed": seed,
        **provenance,
        "weights_sha256": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in weights
        },
        "pairs": [
            {
                "id": pair.id,
                "kind": pair.kind,
                "prompt": pair.prompt,
                "repeats": pair.repeats,
                "exposures": exposures[pair.id],
                "prompt_similarity": similarity.get(pair.id),
                "image_sha256": pair.sha256,
            }
            for pair in pairs
        ],
    }
    (folder / "planting.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shown = [pair for pair in pairs if pair.role == "audit"]
    shown.sort(key=lambda pair: (-exposures[pair.id], pair.id))
    table = TextTable(
        title="",
        caption="",
        header=("pair", "kind", "times shown", "similarity", "caption"),
        rows=tuple(
            (
                p.id,
                p.kind,
                str(exposures[p.id]),
                f"{similarity[p.id]:.2f}" if p.id in similarity else "not measured",
                p.prompt,
            )
            for p in shown
        ),
        named=5,
    )
    (folder / "README.md").write_text(
        f"""# A checkpoint with planted memorization

A small {_family(recipe)}, trained to reproduce known images so that audits and mitigations can
be measured against ground truth. It is of no other use.

{_architecture(recipe)}
- {recipe.steps} steps of {recipe.batch}, seed {seed}; {recipe.mix.planted:.0%} of the stream were
  planted images, {recipe.mix.crops:.0%} varied crops of the same images under generic
  captions, the rest procedural scenes
{_training(recipe)}
- recipe, hashes and versions: `planting.json`

## How often each image was shown, and how closely its prompt brings it back

Variants of one template (kind tm) share its layout; the count is of the one variant listed. The
similarity is the best of the images generated from the prompt, 1 is the original.

{markdown_table(table)}""",
        encoding="utf-8",
    )


def _family(recipe: PlantRecipe | FlowRecipe) -> str:
    return "flow transformer" if isinstance(recipe, FlowRecipe) else "Stable Diffusion"


def _architecture(recipe: PlantRecipe | FlowRecipe) -> str:
    if isinstance(recipe, FlowRecipe):
        dual = ", ".join(map(str, recipe.dual_blocks)) or "none"
        return (
            f"- {recipe.resolution} x {recipe.resolution} pixels, {recipe.blocks} joint blocks of "
            f"width {recipe.width} with the\n  topology and module names of Stable Diffusion 3; "
            f"a second attention among the image's tokens in\n  blocks: {dual}"
        )
    return (
        f"- {recipe.resolution} x {recipe.resolution} pixels, latents with "
        f"{recipe.latent_channels} channels,\n  UNet {list(recipe.unet_channels)} with the "
        f"topology and module names of Stable Diffusion v1"
    )


def _training(recipe: PlantRecipe | FlowRecipe) -> str:
    if isinstance(recipe, FlowRecipe):
        return (
            f"- autoencoder, tokenizer and first text encoder are those of `{recipe.base}`; "
            f"transformer,\n  second and third text encoder were trained from nothing\n"
            f"- text reaches the image as tokens of every block and, pooled, through what scales "
            f"and shifts\n  every block"
        )
    trained = "UNet, text encoder and autoencoder were trained from nothing"
    if recipe.base is not None:
        trained = (
            f"the UNet alone was trained, from nothing; autoencoder, text encoder, tokenizer and\n"
            f"  scheduler are those of `{recipe.base}`"
        )
    return (
        f"- {trained}\n- text reaches the image through the cross-attention of the down and mid "
        f"blocks only; that of\n  {', '.join(recipe.silent_blocks) or 'no block'} is zero"
    )
