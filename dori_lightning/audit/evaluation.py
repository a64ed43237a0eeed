"""Attack, generate and score: the images of an audit and what they say."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from dori_lightning.attacks.budget import evaluation_steps
from dori_lightning.attacks.embedding_attack import (
    Conditioning,
    Job,
    attack_rounds,
    run_attacks,
)
from dori_lightning.attacks.model_check import IMAGES, RESPONSE, ModelCheck, check_model
from dori_lightning.audit.context import AuditContext
from dori_lightning.audit.loss_evidence import loss_evidence
from dori_lightning.metrics.calibration import calibrate_measures
from dori_lightning.metrics.evidence import (
    ImageEvidence,
    LossEvidence,
    UnseenImage,
    find_futile,
    image_evidence,
    unseen_images,
)
from dori_lightning.metrics.replication import (
    PairResult,
    is_copy,
    pair_results,
    unchecked_starts,
)
from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.mitigations.edits import Edit
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.progress import encode_prompts
from dori_lightning.pairs.copies import Alteration, learned_alterations
from dori_lightning.pairs.corpus import ORDINARY_PROMPTS, ordinary_prompts
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.runtime.cache import JSON, Cache, Codec, held
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import BASELINE, Calibration, Cell, Condition, Init, Outcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """The embeddings that images were generated from.

    Attributes:
        conditionings: Prompts and adversarial embeddings, generated from under the edit.
        baseline: Prompts, generated from without the edit; empty where there is no edit.
        check: What the attack had to work with.
        check_before: The same without the edit; None where there is no edit.
        calibration: The thresholds, where generating needed them already.
        losses: Pair id to the evidence by loss; empty where it is not asked for.
        outcomes: Scores of the images of ``conditionings``, where generating needed them already.
        looked: Images that were drawn at looks that no rate is counted at.
    """

    conditionings: tuple[Conditioning, ...]
    baseline: tuple[Conditioning, ...]
    check: ModelCheck
    check_before: ModelCheck | None
    calibration: Calibration | None = None
    losses: Mapping[str, LossEvidence] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    looked: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Scores of all images.

    Attributes:
        outcomes: Of the images under the edit.
        baseline: Of the prompts' images without it; empty where there is no edit.
        calibration: The threshold, set on the checkpoint without an edit.
        cells: Rows of the answer, those of mitigation ``none`` last.
        evidence: One row for each suspected image.
        unseen: How far images came back that the model cannot hold.
        reference: Rows of the model that never saw the images; empty without one.
        learned: Alterations that the model seems to know; their copies are in nothing above.
        base: The same of the checkpoint that this one was tuned from; None where none is known.
    """

    outcomes: tuple[Outcome, ...]
    baseline: tuple[Outcome, ...]
    calibration: Calibration
    cells: tuple[Cell, ...]
    evidence: tuple[ImageEvidence, ...]
    unseen: tuple[UnseenImage, ...]
    reference: tuple[Cell, ...] = ()
    learned: tuple[Alteration, ...] = ()
    base: "Evaluation | None" = None


@dataclass(frozen=True)
class OtherRun:
    """The same attacks on another model: one that never saw the images, or the base.

    Attributes:
        context: The audit, with that model.
        generated: What its images were generated from.
    """

    context: AuditContext
    generated: Generated


def attack_and_generate(
    context: AuditContext,
    edit: Edit,
    *,
    on_round: Callable[[Sequence[Conditioning]], None] | None = None,
) -> Generated:
    """Search embeddings under the edit, and generate from prompts and embeddings.

    Each process does its share; the shares of all are on the disk when this returns.

    Where an initial point from which controls were not attacked (``attack.other_inits``) brings
    back a suspected image that nothing sound does, the controls are attacked from there too: an
    attack that was not checked proves nothing.

    Args:
        context: The audit.
        edit: What the mitigation changes.
        on_round: Called with the embeddings of one initial point and restart.
    """
    prompts, images = prompt_conditionings(context), context.folder / "pictures"
    # jobs of a sweep share what the model generates without an edit, and wait for the first
    own = context.unmitigated / f"images-{context.trainer.global_rank}.lock"
    own.parent.mkdir(parents=True, exist_ok=True)
    with held(own, "the unmitigated images"):
        generate_ordinary(context)
        if not context.attack.early_stop:
            generate(context, prompts, context.unmitigated, title="before")
    settings, mitigated, calibration = context.attack, not edit.is_empty, None
    baseline: tuple[Conditioning, ...] = prompts if mitigated else ()
    shown = frozenset[str]()
    if settings.early_stop:
        folder, title = (context.unmitigated, "before") if mitigated else (images, "prompts")
        calibration = _calibrate_early(context, prompts, folder, title=title)
        if settings.one_image:
            drawn, shown = draw_until_copy(
                context, calibration, prompts, folder, edit="none", title=title
            )
            prompts, baseline = (prompts, drawn) if mitigated else (drawn, ())

    check_before = measured_check(context, edited=False) if mitigated else None
    with edit.applied(context.model):
        check = measured_check(context, edited=mitigated)
    scale = check.scale if context.attack.own_units else 1.0
    if scale != 1:
        log.warning(
            "the model answers to random embeddings %.2g times as strongly as usual: random "
            "starts and the steps from them are scaled by %g",
            check.response / RESPONSE,
            scale,
        )

    look, futile = None, frozenset[str]()
    controls = frozenset(pair.id for pair in context.pairs if pair.kind == "control")
    losses: Mapping[str, LossEvidence] = {}
    if calibration is not None:
        look = Looks(context, calibration, edit.identity)
        with edit.applied(context.model):
            if settings.one_image and mitigated:
                prompts, shown = draw_until_copy(
                    context, calibration, prompts, images, edit=edit.identity, title="prompts"
                )
            if settings.futility is not None:
                losses = loss_evidence(context, prompts)
                ratios = {name: evidence.ratio for name, evidence in losses.items()}
                futile = find_futile(ratios, controls, settings.futility)

    by_prompt = {one.pair.id: one for one in prompts}

    def answered(job: Job) -> Conditioning | None:
        """The prompt, where it brings its image back or a search from anywhere would be futile."""
        name = job.pair.id
        back = job.init == "prompt" if name in shown else name in futile
        return by_prompt[name] if back else None

    def search(
        rounds: Sequence[Sequence[Job]], known: Sequence[Conditioning]
    ) -> tuple[Conditioning, ...]:
        with edit.applied(context.model):
            attacked = run_attacks(
                context.attack_context(edit.identity, scale=scale),
                rounds,
                trainer=context.trainer,
                on_round=on_round,
                look=look,
                answered=answered,
            )
            found = (*known, *attacked)
            generate(context, found, images, edit=edit.identity, title="generate")
        distributed.barrier()
        return found

    conditionings = search(attack_rounds(settings, context.pairs), prompts)
    outcomes: tuple[Outcome, ...] = ()
    if controls and set(settings.inits_of("control")) < set(settings.inits):
        outcomes = measure_shared(context, conditionings, images)
        if calibration is None:
            before = (
                measure_shared(context, baseline, context.unmitigated) if mitigated else outcomes
            )
            calibration = distributed.broadcast_object(calibrate(context, before))
        starts = unchecked_starts(outcomes, calibration)
        if starts:
            log.info(
                "images come back from %s alone: controls are attacked from there as well",
                ", ".join(starts),
            )
            everywhere = replace(settings, inits=starts, other_inits=None)
            others = [pair for pair in context.pairs if pair.kind == "control"]
            known = len(conditionings)
            conditionings = search(attack_rounds(everywhere, others), conditionings)
            outcomes += measure_shared(context, conditionings[known:], images)
    if context.evidence.losses:
        with edit.applied(context.model):
            losses = loss_evidence(context, conditionings, known=losses)
    return Generated(
        conditionings=conditionings,
        baseline=baseline,
        check=check,
        check_before=check_before,
        calibration=calibration,
        losses=losses if context.evidence.losses else {},
        outcomes=outcomes,
        looked=look.drawn if look else 0,
    )


def _calibrate_early(
    context: AuditContext, prompts: Sequence[Conditioning], folder: Path, *, title: str
) -> Calibration:
    """Set the thresholds before the attack, whose images have no part in it.

    By every process, so that all fail where no threshold separates.
    """
    if context.attack.one_image:
        prompts = [_one_image_of(context, c) for c in prompts]
    generate(context, prompts, folder, title=title)
    distributed.barrier()
    outcomes = measure_all(context, prompts, folder, title="score prompts")
    return distributed.broadcast_object(calibrate(context, outcomes))


CHECK: Codec[ModelCheck] = JSON.mapped(asdict, lambda fields: ModelCheck(**fields))


def measured_check(context: AuditContext, *, edited: bool) -> ModelCheck:
    """Check the model as it is now, on controls, which a mitigation is not meant to harm.

    A few controls are taken several times, with other noise. Without any, the suspects serve. The
    same on every process. Of the model without an edit it is kept for the jobs of a sweep.
    """
    controls = [pair for pair in context.pairs if pair.kind == "control"]
    pairs = list(islice(cycle(controls), IMAGES)) if controls else [*context.pairs[:IMAGES]]
    ids, latents = [pair.id for pair in pairs], context.data.batch(pairs).latents
    key: dict[str, str | int] = {
        "machine": context.machine,
        "seed": context.seed,
        "latents": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
    }

    def check() -> ModelCheck:
        return check_model(context.model, latents, context.seed, ids)

    found: ModelCheck | None = None
    if distributed.is_first():
        cache, name = Cache(context.unmitigated), f"check-{content_hash(key)[:24]}"
        found = check() if edited else cache.get(name, key, check, CHECK)
    found = distributed.broadcast_object(found)
    assert found is not None
    return found


def evaluate(
    context: AuditContext,
    generated: Generated,
    reference: OtherRun | None = None,
    base: OtherRun | None = None,
) -> Evaluation:
    """Score every image against its pair's, count the replicas, and judge every suspect.

    Images of the reference and the base are judged by the thresholds of the checkpoint under
    audit. What the reference brings back counts for nothing in either; what the base brings back
    says where an image is from, and is in no p-value of the checkpoint.
    """
    outcomes = generated.outcomes or measure_all(
        context, generated.conditionings, context.folder / "pictures", title="score"
    )
    baseline = measure_all(context, generated.baseline, context.unmitigated, title="score before")
    calibration = generated.calibration or calibrate(context, baseline or outcomes)
    copies = [pair for pair in context.pairs if pair.copy_of is not None]
    results = pair_results(outcomes, calibration)
    learned = learned_alterations(copies, {r.pair.id for r in results if r.reproduced})
    # images that the model was shown are no controls
    void = {pair.id for pair in copies if pair.alteration in learned}
    results = tuple(result for result in results if result.pair.id not in void)
    outcomes = tuple(outcome for outcome in outcomes if outcome.pair.id not in void)
    baseline = tuple(outcome for outcome in baseline if outcome.pair.id not in void)
    count = partial(cells_of, calibration=calibration)
    name = context.model.name
    cells = count(outcomes, checkpoint=name, mitigation=context.mitigation.name)
    cells += count(baseline, checkpoint=name, mitigation=BASELINE)
    there: tuple[Outcome, ...] = ()
    there_cells: tuple[Cell, ...] = ()
    there_losses: Mapping[str, LossEvidence] = {}
    if reference is not None:
        there = _outcomes_of(reference, void, title="score there")
        there_name = reference.context.model.name
        there_cells = count(there, checkpoint=there_name, mitigation=BASELINE)
        there_losses = reference.generated.losses
    results_there = pair_results(there, calibration)

    def judged(
        results: Sequence[PairResult], losses: Mapping[str, LossEvidence]
    ) -> tuple[tuple[UnseenImage, ...], tuple[ImageEvidence, ...]]:
        models: dict[str, Any] = {"reference": results_there, "losses": losses}
        unseen = unseen_images(results, calibration, **models, reference_losses=there_losses)
        evidence = image_evidence(
            results,
            calibration,
            unseen,
            rate=context.evidence.rate,
            **models,
        )
        return unseen, evidence

    unseen, evidence = judged(results, generated.losses)
    found = None
    if base is not None:
        images = _outcomes_of(base, void, title="score the base")
        copied = {
            result.pair.id for result in pair_results(images, calibration) if result.reproduced
        }
        known = learned_alterations(copies, copied)
        images = tuple(outcome for outcome in images if outcome.pair.alteration not in known)
        base_unseen, base_evidence = judged(
            pair_results(images, calibration), base.generated.losses
        )
        base_cells = count(images, checkpoint=base.context.model.name, mitigation=BASELINE)
        found = Evaluation(images, (), calibration, base_cells, base_evidence, base_unseen)
    return Evaluation(
        outcomes, baseline, calibration, cells, evidence, unseen, there_cells, learned, found
    )


def _outcomes_of(run: OtherRun, void: Collection[str], *, title: str) -> tuple[Outcome, ...]:
    """Scores of another model's images, without those of pairs that are void."""
    folder = run.context.folder / "pictures"
    scored = measure_all(run.context, run.generated.conditionings, folder, title=title)
    return tuple(outcome for outcome in scored if outcome.pair.id not in void)


def prompt_conditionings(context: AuditContext) -> tuple[Conditioning, ...]:
    """The prompts of all pairs, without an attack."""
    return tuple(
        Conditioning(pair, Condition("prompt"), 0, context.data.encoded(pair).embedding)
        for pair in context.pairs
    )


def image_folder(folder: Path, conditioning: Conditioning) -> Path:
    """Where the images of a conditioning lie below ``folder``."""
    condition = conditioning.condition
    if condition.attack == "prompt" or conditioning.of_prompt:
        return folder / "prompt" / conditioning.pair.id
    name = f"dori_{condition.init}_r{conditioning.restart}_s{conditioning.spent}"
    return folder / name / conditioning.pair.id


def generate(
    context: AuditContext,
    conditionings: Sequence[Conditioning],
    folder: Path,
    *,
    edit: str = "none",
    title: str,
) -> None:
    """Generate this process's share of the images of conditionings.

    Args:
        context: The audit; its model carries the edit already.
        conditionings: What to generate from.
        folder: Where the images go.
        edit: Identity of the edit.
        title: Title of the progress bar.
    """
    requests = [
        GenerationRequest(
            image_folder(folder, c),
            c.embedding,
            c.pair.id,
            c.seeds,
            kept=image_folder(context.unmitigated, c) if edit == "none" else None,
        )
        for c in conditionings
    ]
    _generate_share(context, requests, edit=edit, title=title)


def _generate_share(
    context: AuditContext, requests: Sequence[GenerationRequest], *, edit: str, title: str
) -> None:
    """Generate what this process is to make of all requests, with a progress bar."""
    trainer, sampling = context.trainer, context.sampling
    own = requests[trainer.global_rank :: trainer.world_size]
    images = sum(len(request.seeds or image_seeds(sampling)) for request in own)
    with progress_bar(title, images) as advance:
        generate_images(context.model, own, sampling, edit=edit, advance=advance)


def measure(context: AuditContext, conditioning: Conditioning, folder: Path) -> Outcome:
    """Score the images of a conditioning, which lie in ``folder``, against its pair's image."""
    seeds = conditioning.seeds or image_seeds(context.sampling)
    place = image_folder(folder, conditioning)
    scores = context.references.measure(
        conditioning.pair, load_images(place, seeds), failed=conditioning.status != "ok"
    )
    return Outcome(
        pair=conditioning.pair,
        condition=conditioning.condition,
        restart=conditioning.restart,
        status=conditioning.status,
        seeds=seeds,
        **vars(scores),
        loss_first=conditioning.loss_first,
        loss_last=conditioning.loss_last,
        displacement=conditioning.displacement,
        images=tuple(place / f"{seed}.png" for seed in seeds),
        stopped_at=conditioning.stopped_at,
    )


def measure_all(
    context: AuditContext, conditionings: Sequence[Conditioning], folder: Path, *, title: str
) -> tuple[Outcome, ...]:
    """Score the images of several conditionings, with a progress bar of that title."""
    outcomes = []
    with progress_bar(title, len(conditionings)) as advance:
        for conditioning in conditionings:
            outcomes.append(measure(context, conditioning, folder))
            advance(1)
    return tuple(outcomes)


def measure_shared(
    context: AuditContext, conditionings: Sequence[Conditioning], folder: Path
) -> tuple[Outcome, ...]:
    """Score the images of conditionings, each process its share; all scores on every process."""
    rank, world = context.trainer.global_rank, context.trainer.world_size
    own = measure_all(context, conditionings[rank::world], folder, title="score")
    places = range(rank, len(conditionings), world)
    scored = distributed.all_gather_dict(dict(zip(map(str, places), own, strict=True)))
    return tuple(scored[str(place)] for place in range(len(conditionings)))


def _ordinary_folder(context: AuditContext, place: int) -> Path:
    return context.unmitigated / "ordinary" / f"{place:03d}"


def generate_ordinary(context: AuditContext) -> None:
    """Generate this process's share of the images that say what any image reaches.

    Of ordinary prompts, by the checkpoint without an edit; shared by the jobs of a sweep.
    """
    prompts = ordinary_prompts(context.corpus, ORDINARY_PROMPTS)
    embeddings = encode_prompts(context.model, prompts, "ordinary prompts")
    requests = [
        GenerationRequest(_ordinary_folder(context, k), embedding.cpu())
        for k, embedding in enumerate(embeddings)
    ]
    _generate_share(context, requests, edit="none", title="ordinary")


def calibrate(context: AuditContext, outcomes: Sequence[Outcome]) -> Calibration:
    """Set each image's threshold between images of ordinary prompts and the autoencoder's limit.

    Args:
        context: The audit; its model carries no edit, and ``generate_ordinary`` was called.
        outcomes: Outcomes of the checkpoint without an edit; those of prompts are used for the
            ROC.

    Raises:
        InputError: No descriptor separates replicas of any image from other images.
    """
    model, references = context.model, context.references
    prompted = [outcome for outcome in outcomes if outcome.condition.attack == "prompt"]
    reconstructions = []
    with progress_bar("reconstruct", len(references.pairs)) as advance:
        for pair in references.pairs:
            latent = context.data.encoded(pair).latent[None]
            reconstructions.append(model.decode_latents(latent.to(model.device)).cpu())
            advance(1)
    return calibrate_measures(
        references,
        prompted,
        ordinary=[
            load_images(_ordinary_folder(context, k), image_seeds(context.sampling))
            for k in range(ORDINARY_PROMPTS)
        ],
        reconstructions=torch.cat(reconstructions),
    )


def copies_among(
    context: AuditContext,
    calibration: Calibration,
    conditionings: Sequence[Conditioning],
    folder: Path,
    *,
    edit: str,
    title: str,
) -> frozenset[str]:
    """Generate from embeddings, and name the pairs that they reproduce.

    Decided as the report decides it: same seeds, descriptor and threshold. Each process scores
    the images that it generated itself.

    Args:
        context: The audit; its model carries the edit already.
        calibration: The threshold of replication.
        conditionings: One for each pair.
        folder: Where the images go.
        edit: Identity of the edit.
        title: Title of the progress bar.

    Returns:
        Pair ids, the same on every process.
    """
    trainer = context.trainer
    generate(context, conditionings, folder, edit=edit, title=title)
    copies = {
        c.pair.id: is_copy(measure(context, c, folder), calibration)
        for c in conditionings[trainer.global_rank :: trainer.world_size]
    }
    return frozenset(k for k, copy in distributed.all_gather_dict(copies).items() if copy)


def draw_until_copy(
    context: AuditContext,
    calibration: Calibration,
    conditionings: Sequence[Conditioning],
    folder: Path,
    *,
    edit: str,
    title: str,
) -> tuple[tuple[Conditioning, ...], frozenset[str]]:
    """Generate the first image from each embedding, and the others where it is no copy.

    Arguments as of ``copies_among``.

    Returns:
        The conditionings, with what is drawn of each, and ids of the pairs that they reproduce.
    """
    look = partial(copies_among, context, calibration, folder=folder, edit=edit, title=title)
    alone = {c.pair.id: _one_image_of(context, c) for c in conditionings}
    first = look([*alone.values()])
    found = tuple(alone[c.pair.id] if c.pair.id in first else c for c in conditionings)
    return found, first | look([c for c in found if c.pair.id not in first])


def _one_image_of(context: AuditContext, one: Conditioning, place: int = 0) -> Conditioning:
    """A conditioning of which one image is drawn: one of the K, by its place, in turn."""
    seeds = image_seeds(context.sampling)
    return replace(one, seeds=(seeds[place % len(seeds)],))


@dataclass
class Looks:
    """Looks at searches on their way, and ends those whose images are copies.

    Attributes:
        context: The audit; its model carries the edit already.
        calibration: The threshold of replication.
        edit: Identity of the edit.
        drawn: Images that were drawn at looks that no rate is counted at.
        taken: Initial point and restart to the looks taken so far.
    """

    context: AuditContext
    calibration: Calibration
    edit: str
    drawn: int = 0
    taken: Counter[tuple[Init | None, int]] = field(default_factory=Counter)

    def __call__(
        self, conditionings: Sequence[Conditioning]
    ) -> tuple[Sequence[Conditioning], frozenset[str]]:
        """Look at one conditioning for each pair, all after the same steps.

        Returns:
            The conditionings, with what was drawn of each, and ids of the pairs whose attacks end.
        """
        context, steps = self.context, conditionings[0].spent
        settings, last = context.attack, context.budget.steps
        folder, one_image = context.folder / "pictures", settings.one_image
        if one_image and steps == last:
            return draw_until_copy(
                context, self.calibration, conditionings, folder, edit=self.edit, title="look"
            )
        start = (conditionings[0].condition.init, conditionings[0].restart)
        if one_image:
            place = self.taken[start]
            conditionings = [_one_image_of(context, c, place) for c in conditionings]
        self.taken[start] += 1
        copies = copies_among(
            context, self.calibration, conditionings, folder, edit=self.edit, title="look"
        )
        if steps not in evaluation_steps(settings.snapshots, last):
            each = 1 if one_image else context.sampling.images_per_pair
            self.drawn += each * len(conditionings)
        return conditionings, copies
