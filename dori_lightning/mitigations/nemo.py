"""Block the value neurons of cross-attention that a memorized prompt needs.

Reference: Finding NeMo (Hintersdorf et al., 2024), https://arxiv.org/abs/2406.02366.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from dori_lightning.mitigations.activations import (
    NOISES,
    ActivationStatistics,
    kept_statistics,
    read_statistics,
    value_activations,
)
from dori_lightning.mitigations.base import (
    Context,
    CostEstimate,
    Evaluations,
    layers_of,
    require,
    require_at_least_one,
    require_choices,
    require_pairs,
    require_stages,
    require_value_neurons,
)
from dori_lightning.mitigations.edits import MaskEdit, Origin, PairMaskEdit
from dori_lightning.mitigations.nemo_criteria import (
    BlockedModel,
    Criterion,
    Embeddings,
    MemorizationProbe,
    NoiseDifference,
    Question,
)
from dori_lightning.mitigations.nemo_search import (
    Levels,
    SearchResult,
    run_searches,
    search_neurons,
)
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime.cache import Cache
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import InputError, Pair

Scope = Literal["pair", "union"]


@dataclass(frozen=True)
class NeMoFindings:
    """What NeMo found.

    Attributes:
        masks: Pair id to parameter name to blocked output rows (C,), bool.
        notes: Pair id to how it went; plain values.
        threshold: Similarity above which a prompt counts as memorized.
        statistics: Hash of the activation statistics.
    """

    masks: dict[str, dict[str, torch.Tensor]]
    notes: dict[str, dict[str, Any]]
    threshold: float
    statistics: str


@dataclass(frozen=True)
class NeMo:
    """Find, for each pair, few value neurons without which its prompt is not memorized.

    The defaults are the published ones but for the criterion's ``threshold``, which holds for one
    checkpoint.

    Attributes:
        name: How reports call it.
        scope: ``pair`` blocks for each pair its own neurons, as published; ``union`` blocks all of
            them for everybody.
        stages: Where value layers are blocked; None for the usual ones, of Stable Diffusion
            ``down`` and ``mid``, the published seven. Which layers carry the conditioning depends
            on the checkpoint; ``task=statistics`` measures.
        layers: Of those, only the value layers in these modules, such as ``down_blocks.1``; None
            takes all, as published. Blocking layers that the image does not hang on costs the
            rest of the model and hides nothing.
        criterion: What shows memorization.
        samples: Noises per question.
        statistics: File with activation statistics (``task=statistics``); None computes them from
            the corpus.
        statistics_prompts: Ordinary prompts for that. Published: 50,000.
        levels: How the initial selection grows.
        refine: Whether to unblock what is not needed.
        refine_group: Neurons of a layer that refinement tries to unblock together; published: 1.
            More asks fewer questions and leaves more neurons blocked.
    """

    of_text_stream: ClassVar[bool] = False  # see `base.check_family`
    name: str = "nemo"
    scope: Scope = "pair"
    stages: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    criterion: Criterion = field(default_factory=NoiseDifference)
    samples: int = 10
    statistics: str | None = None
    statistics_prompts: int = 1000
    levels: Levels = field(default_factory=Levels)
    refine: bool = True
    refine_group: int = 1

    def __post_init__(self) -> None:
        if self.stages is not None:
            object.__setattr__(self, "stages", tuple(self.stages))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        criterion: object = self.criterion  # on a command line it may be a name
        if not isinstance(criterion, Criterion):
            raise InputError(
                f"mitigation.criterion must be a criterion with its settings, got {criterion!r}\n"
                f"  fix:   mitigation/criterion=noise_difference or replication"
            )
        fewest, prompts = self.criterion.min_samples, self.statistics_prompts
        require_choices(self, scope=Scope)
        require_stages(self.stages)
        require(
            self.samples >= fewest, f"samples must be >= {fewest} for this criterion", self.samples
        )
        require(prompts >= 2, "statistics_prompts must be >= 2", prompts)
        require_at_least_one(self, "refine_group")

    def file_hashes(self) -> dict[str, str]:
        """Hash of the statistics file, where there is one; see ``base.settings_fingerprint``."""
        if self.statistics is None:
            return {}
        return {"statistics": hashlib.sha256(read_statistics(Path(self.statistics))).hexdigest()}

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate the first pass over a number of pairs to forget, the only known part."""
        return CostEstimate(
            self.criterion.work_of_probes(sampling, pairs=pairs, samples=self.samples),
            "only the first look at each prompt is counted; the search depends on what it finds "
            "(published: 15.7 s a vm prompt and 45.9 s a tm prompt on a V100 or A100)",
        )

    def apply(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> MaskEdit | PairMaskEdit:
        """Find the neurons of every pair and return their masks."""
        require_pairs(pairs, self.name)
        rows = context.data.batch(pairs).embeddings
        embeddings = {pair.id: row for pair, row in zip(pairs, rows, strict=True)}
        found = self.find(model, embeddings, context)
        origin = Origin(
            model.fingerprint,
            notes={
                "threshold": found.threshold,
                "statistics": found.statistics,
                "pairs": found.notes,
            },
        )
        if self.scope == "pair":
            return PairMaskEdit(origin, found.masks)
        union = {
            name: torch.stack([masks[name] for masks in found.masks.values()]).any(0)
            for name in next(iter(found.masks.values()))
        }
        return MaskEdit(origin, union)

    def find(self, model: TextToImage, pairs: Embeddings, context: Context) -> NeMoFindings:
        """Find neurons for embeddings, whether they are those of prompts or not.

        Args:
            model: Checkpoint; left as it was.
            pairs: Name to embedding; `Replication` takes names for those of reference images.
            context: Gives ordinary prompts, sampler and reference images.

        Raises:
            InputError: The model has no such layers, the statistics belong to another checkpoint,
                or the corpus has too few prompts.
        """
        require_value_neurons(model.name, model.text_stream, in_stream=self.of_text_stream)
        layers = self._value_layers(model)
        statistics = (
            kept_statistics(
                model,
                context.corpus.prompts("calibration", self.statistics_prompts),
                Cache(context.folder / "statistics"),
            )
            if self.statistics is None
            else ActivationStatistics.load(Path(self.statistics), model)
        )
        widths = {name: layer.get_parameter("weight").shape[0] for name, layer in layers.items()}
        blocked_model = BlockedModel(model, widths, self.criterion.forward(model, context))
        with model.frozen(), torch.no_grad():
            work = self.criterion.work_of_probes(
                context.sampling, pairs=len(pairs), samples=self.samples
            )
            rows = work.decoded or work.forward  # a row of images takes many evaluations
            with progress_bar(f"mitigate: {self.name}, unblocked", rows) as advance:
                probes, threshold = self.criterion.probes(
                    partial(blocked_model.run, advance=advance), model,
                    pairs=pairs, context=context, samples=self.samples,
                )  # fmt: skip
            searches = {}
            for pair, probe in probes.items():
                if probe.memorized or self.criterion.searches_all:
                    active = value_activations(model, layers, pairs[pair][None])
                    own = {name: values[0] for name, values in active.items()}
                    levels = self.levels.of(own, statistics)
                    searches[pair] = search_neurons(
                        levels, threshold, refine=self.refine, group=self.refine_group
                    )

            def measure(blocked: Mapping[str, torch.Tensor]) -> dict[str, float]:
                outputs = blocked_model.run(
                    [Question(pair, probes[pair].inputs, mask) for pair, mask in blocked.items()]
                )
                return {
                    pair: probes[pair].similarity(output)
                    for pair, output in zip(blocked, outputs, strict=True)
                }

            with progress_bar(f"mitigate: {self.name}", len(searches)) as advance:
                found = run_searches(searches, measure, finished=lambda: advance(1))
        # no neuron of a pair that was left alone is blocked
        nothing = torch.zeros(sum(widths.values()), dtype=torch.bool)
        blocked = {pair: found[pair].blocked if pair in found else nothing for pair in pairs}
        return NeMoFindings(
            masks={pair: blocked_model.masks(neurons) for pair, neurons in blocked.items()},
            notes={pair: _note(probe, found.get(pair)) for pair, probe in probes.items()},
            threshold=threshold,
            statistics=statistics.identity,
        )

    def _value_layers(self, model: TextToImage) -> dict[str, nn.Module]:
        """Value layers by name, as the settings choose them."""
        found: dict[str, nn.Module] = {**layers_of(model, "text.value", self.stages)}
        if self.layers is None:
            return found
        starts = tuple(f"{start}." for start in self.layers)
        strangers = [start for start in starts if not any(n.startswith(start) for n in found)]
        if strangers or not self.layers:
            raise InputError(
                f"no value layer of {model.name} is below {', '.join(strangers) or 'nothing'}\n"
                f"  where: mitigation.layers\n"
                f"  fix:   modules that hold some of {', '.join(found)}; null takes all of them"
            )
        return {name: module for name, module in found.items() if name.startswith(starts)}


@dataclass(frozen=True)
class NeMoTextStream(NeMo):
    """NeMo for transformers with joint attention: the value neurons of the stream of text.

    What these neurons are given has passed the image, noise and time of earlier blocks, so a
    prompt's activations are means over passes of the denoiser (``value_activations``); selection
    and refinement are NeMo's. Nobody published NeMo for such models: an extension, whose results
    are no reproduction.
    """

    of_text_stream: ClassVar[bool] = True
    name: str = "nemo_text_stream"

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate as NeMo does, with the passes in which activations are heard."""
        seen, texts = super().estimate_cost(sampling, pairs), pairs
        if self.statistics is None:
            texts += self.statistics_prompts
        return replace(seen, work=seen.work + Evaluations(forward=texts * NOISES))


def _note(probe: MemorizationProbe, result: SearchResult | None) -> dict[str, Any]:
    """How one pair's search went; ``unet_evaluations`` leaves out copies that fill up passes."""
    note: dict[str, Any] = {"memorized": probe.memorized, **probe.notes}
    if result is None:
        return note
    return {
        **note,
        "suppressed": result.suppressed,
        "z": result.level.z,
        "k": result.level.k,
        "selected": int(result.level.blocked.sum()),
        "similarity_selected": result.selected,
        "refined": int(result.blocked.sum()),
        "similarity_refined": result.similarity,
        "target": result.target,
        "tests": result.questions,
        "unet_evaluations": result.questions * len(probe.inputs[0]) * probe.evaluations,
    }
