"""DoRI: a search for text embeddings, as an audit runs it, in the order of a cascade."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings, evaluation_steps
from dori_lightning.attacks.embedding_attack import Job
from dori_lightning.attacks.solver import AttackProblem, AttackResult, concat, solve
from dori_lightning.certify.base import AttackBase, Attempt, Holds, Plan, Subject
from dori_lightning.models.memory import estimate_batch_size
from dori_lightning.types import Init, Pair


@dataclass(frozen=True)
class EmbeddingSearch(AttackBase):
    """Search the embedding that makes the model predict an image's noise.

    Attributes:
        settings: The search, ``conf/attack/dori.yaml``; images are looked at after its snapshots
            and looks, and ``early_stop`` is how a cascade always goes on.
    """

    name: str = "dori"
    settings: AttackSettings = field(default_factory=AttackSettings)
    holds: Holds = field(default="embedding", init=False)

    def rows(self, plan: Plan) -> int:
        """All steps from every start, and the images of every look."""
        settings = self.settings
        looks = len(evaluation_steps(settings.stops, settings.budget.steps))
        each = settings.budget.steps * settings.noise_batch + looks * plan.drawing
        return len(settings.inits) * settings.restarts * each

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Search from each start in turn."""
        del pairs
        for restart in range(self.settings.restarts):
            for init in self.settings.inits:
                self._search(subject, attempt, init, restart)

    def _search(self, subject: Subject, attempt: Attempt, init: Init, restart: int) -> None:
        """One start: from look to look, with those whose images are no copies yet."""
        settings = self.settings
        found: dict[str, AttackResult] = {}
        begin = 0
        for steps in evaluation_steps(settings.stops, settings.budget.steps):
            level = search_level(steps, init, restart)
            left = attempt.left(level)
            if not left:
                return
            found = search(subject, settings, left, init, restart, before=found, stop_at=steps)
            with subject.carried():
                images = subject.draw({name: own.embeddings[0, -1] for name, own in found.items()})
            rows = (steps - begin) * settings.noise_batch + subject.drawing
            attempt.add(level, images, rows=rows)
            begin = steps


def whole_search(
    settings: AttackSettings, init: Init, *, steps: int, noise_batch: int, lr: float
) -> AttackSettings:
    """Settings of one search without bounds that nothing looks at on its way.

    Args:
        settings: Those of ``attack=``, whose memory, parts and units are kept.
        init: Where it begins.
        steps: Its steps.
        noise_batch: Noise samples of a step.
        lr: Learning rate.
    """
    return replace(
        settings,
        inits=(init,),
        other_inits=None,
        budget=BudgetSettings(steps=steps),
        lr=lr,
        noise_batch=noise_batch,
        restarts=1,
        snapshots=(),
        looks=(),
        early_stop=False,
        one_image=False,
        futility=None,
    )


def search(
    subject: Subject,
    settings: AttackSettings,
    pairs: Sequence[Pair],
    init: Init,
    restart: int,
    *,
    initial: Mapping[str, torch.Tensor] | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    spread: float = 1.0,
    before: Mapping[str, AttackResult] | None = None,
    stop_at: int | None = None,
) -> dict[str, AttackResult]:
    """Search embeddings of pairs under the subject's edit.

    Args:
        subject: The model.
        settings: The search.
        pairs: Whose images are looked for.
        init: Where searches begin.
        restart: Which random start and noise.
        initial: Pair id to an embedding (T, D) that the search goes on from; None for ``init``
            itself.
        ranges: Ranges of timesteps (first, last + 1) that have an embedding each; None for one
            over all timesteps.
        spread: Factor of random starts, and of the steps from them, besides the subject's own.
        before: Pair id to searches on their way, which go on.
        stop_at: Step to stop at; None takes all of the budget's.

    Returns:
        Pair id to its results, a row for each range.
    """
    model = subject.model
    absolute = model.spread().absolute
    controls = subject.context.control_prompts.embeddings
    budget = settings.budget.resolve(controls, own_units=not absolute)
    context = replace(subject.context, attack=settings, budget=budget)
    measured = settings.own_units and init == "random"
    scale = spread * (subject.scale if measured else 1.0)
    attack = context.attack_context(subject.edit.identity, scale=scale)
    width = 1 if ranges is None else len(ranges)
    size = estimate_batch_size(
        model,
        noise_batch=settings.samples_at_once,
        wanted=settings.pairs_per_forward,
        pair_id=pairs[0].id,
    )
    size = max(1, size // width)
    found: dict[str, AttackResult] = {}
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        jobs = [Job(pair, init, restart) for pair in part for _ in range(width)]
        known = [before[pair.id] for pair in part if pair.id in before] if before else []
        problem = AttackProblem(
            ids=tuple(job.pair.id for job in jobs),
            # ranges draw noise of their own
            restarts=tuple(restart * width + k for _ in part for k in range(width)),
            latents=subject.latents(part).repeat_interleave(width, 0),
            initial=torch.stack(
                [initial[job.pair.id] if initial else attack.initial(job) for job in jobs]
            ),
            scales=tuple(map(attack.scale_of, jobs)),
            ranges=None if ranges is None else tuple(ranges) * len(part),
        )
        with subject.carried():
            result = solve(
                model,
                problem,
                budget=budget,
                settings=settings,
                seed=context.seed,
                density=attack.density,
                resume_from=concat(known) if known else None,
                stop_at=stop_at,
            )
        found |= {
            pair.id: result.rows(slice(k * width, (k + 1) * width)) for k, pair in enumerate(part)
        }
    return found


def search_level(steps: int, init: Init = "prompt", restart: int = 0) -> str:
    """What a report calls the images after some steps of a search."""
    more = f", restart {restart}" if restart else ""
    return f"{steps} steps from {init.replace('_', ' ')}{more}"


def search_from_prompt(steps: int) -> EmbeddingSearch:
    """A short search from each prompt, for a model that something was done to."""
    # a search from a prompt takes no scale of random starts, so none is measured
    settings = AttackSettings(
        inits=("prompt",), budget=BudgetSettings(steps=steps), own_units=False
    )
    return EmbeddingSearch(settings=settings)
