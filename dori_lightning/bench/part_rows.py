"""Finding edits: two ways of pruning, and one epoch of adversarial fine-tuning."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning.attacks.draws import keyed_generator
from dori_lightning.bench.counters import counted
from dori_lightning.bench.record import Row, row_of
from dori_lightning.bench.timing import timed_in_turn
from dori_lightning.mitigations.activations import activation_statistics
from dori_lightning.mitigations.adversarial_finetuning import AdversarialTraining
from dori_lightning.mitigations.finetuning import finetune

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dori_lightning.bench.counters import Counts
    from dori_lightning.bench.settings import BenchSettings
    from dori_lightning.bench.subjects import Subject
    from dori_lightning.mitigations.adversarial_finetuning import AdversarialFinetuning
    from dori_lightning.mitigations.nemo import NeMo
    from dori_lightning.mitigations.wanda import Wanda
    from dori_lightning.types import Pair

__all__ = ["finetuning_rows", "nemo_rows", "wanda_rows"]


def nemo_rows(subject: Subject, settings: BenchSettings, method: NeMo) -> tuple[Row, ...]:
    """Search neurons with one question a pass, pair after pair, and as the package does."""
    pairs = subject.pairs[: settings.nemo_pairs]
    encoded = {pair.id: subject.workshop.data.encoded(pair) for pair in pairs}
    prompts = subject.workshop.corpus.prompts("calibration", method.statistics_prompts)
    statistics = activation_statistics(subject.model, prompts)
    path = statistics.save(subject.scratch("nemo") / "statistics.safetensors")
    # computed once and read by both: the search is what differs
    method = replace(method, statistics=str(path))
    single = replace(method, rows=method.samples, candidates=1)

    def one_at_a_time() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, own in encoded.items():
            found |= single.find(subject.model, {name: own}, subject.workshop).masks
        return found

    def ours() -> dict[str, Any]:
        return method.find(subject.model, encoded, subject.workshop).masks

    counts: dict[str, Counts] = {}
    ways: dict[str, Callable[[], Any]] = {"B1": one_at_a_time, "ours": ours}
    timed = timed_in_turn(
        {name: _counting(subject, run, counts, name) for name, run in ways.items()},
        repeats=settings.nemo_repeats, device=subject.model.device, title="NeMo",
    )  # fmt: skip
    same = _equal(timed["B1"].result, timed["ours"].result)
    words = {
        "B1": "one candidate set a pass, one pair after the other, as released",
        "ours": f"{method.candidates} likely questions of every pair side by side, "
        f"{method.rows} rows a pass at most",
    }
    blocked = sum(int(m.sum()) for own in timed["ours"].result.values() for m in own.values())
    return tuple(
        row_of(
            name, words[name], own, pairs=len(pairs), samples=counts[name].unet,
            values={
                "unet_passes": counts[name].unet_passes, "same_neurons": same, "blocked": blocked,
                "criterion": method.criterion,
            },
        )
        for name, own in timed.items()
    )  # fmt: skip


def _counting(
    subject: Subject, run: Callable[[], Any], counts: dict[str, Counts], name: str
) -> Callable[[], Any]:
    """Count each run by hooks, which cost nothing beside a pass; the last run's counts stay."""

    def counting() -> Any:
        with counted(subject.model) as counts[name]:
            return run()

    return counting


def _equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[pair][name], right[pair][name]) for pair in left for name in left[pair]
    )


def wanda_rows(subject: Subject, settings: BenchSettings, method: Wanda) -> tuple[Row, ...]:
    """Make masks pair after pair, and for all pairs at once."""
    pairs = subject.pairs[: settings.wanda_pairs]
    embeddings = subject.workshop.data.batch(pairs).embeddings
    find = partial(method.find, subject.model, workshop=subject.workshop)
    counts: dict[str, Counts] = {}
    ways: dict[str, Callable[[], Any]] = {
        "B1": lambda: [mask for row in embeddings for mask in find(row[None])],
        "ours": lambda: list(find(embeddings)),
    }
    timed = timed_in_turn(
        {name: _counting(subject, run, counts, name) for name, run in ways.items()},
        repeats=settings.repeats, device=subject.model.device, title="Wanda",
    )  # fmt: skip
    # masks of weights whose scores tie up to rounding may differ
    differing = [
        float(torch.cat([(a[n] != b[n]).flatten() for n in a]).float().mean())
        for a, b in zip(timed["B1"].result, timed["ours"].result, strict=True)
    ]
    words = {"B1": "a pair at a time", "ours": "the package's way: all pairs together"}
    return tuple(
        row_of(
            name, words[name], own, pairs=len(pairs), samples=counts[name].unet,
            values={"unet_passes": counts[name].unet_passes, "weights_differ": max(differing)},
        )
        for name, own in timed.items()
    )  # fmt: skip


def finetuning_rows(
    subject: Subject, settings: BenchSettings, methods: Mapping[str, AdversarialFinetuning]
) -> tuple[Row, ...]:
    """One epoch of adversarial fine-tuning by each method: its search in full, some updates.

    Surrogates are noise: their making is not part of an epoch, and the time does not depend on
    them.
    """
    pairs = subject.pairs[: settings.finetuning_pairs]
    rows = []
    for name, method in methods.items():
        times, whole = _epoch(subject, pairs, method, updates=settings.finetuning_updates)
        updates, epoch = times["updates"], method.updates
        per_update = (whole - times["search_seconds"]) / updates
        search_samples = times["search_samples"]
        per_step = method.adversarial_batch + method.ordinary_batch
        rows.append(
            Row(
                name,
                f"one epoch of {method.name}: {len(pairs)} pairs searched, {epoch} updates",
                pairs=1,
                unit="epoch",
                seconds=(times["search_seconds"] + epoch * per_update,),
                samples=search_samples + epoch * per_step,
                values={
                    "search_seconds": times["search_seconds"],
                    "seconds_per_update": per_update,
                    "updates_timed": updates,
                    "updates_of_an_epoch": epoch,
                    "search_evaluations": search_samples,
                    "update_evaluations": epoch * per_step,
                    "epochs_of_the_recipe": method.epochs,
                },
            )
        )
    return tuple(rows)


def _epoch(
    subject: Subject, pairs: Sequence[Pair], method: AdversarialFinetuning, *, updates: int
) -> tuple[dict[str, Any], float]:
    """Search once, train a few updates; times of the search, and seconds of the whole."""
    model, workshop = subject.model, subject.workshop
    updates = min(updates, method.updates)
    generator = keyed_generator("bench surrogates", subject.seed)
    shape = (method.surrogates.per_pair, *model.latent_shape)
    surrogates = {pair.id: torch.randn(shape, generator=generator) for pair in pairs}
    ordinary = workshop.encodings(
        model, "calibration", min(method.ordinary_examples, 4 * method.ordinary_batch)
    )
    times: dict[str, Any] = {"updates": updates}

    def make() -> AdversarialTraining:
        module = AdversarialTraining(
            model, method, pairs, workshop, surrogates=surrogates, ordinary=ordinary
        )
        search = module.pool.search

        def timed_search(number: int) -> None:
            before, started = model.unet_evaluations, time.perf_counter()
            search(number)
            times["search_seconds"] = time.perf_counter() - started
            times["search_samples"] = model.unet_evaluations - before

        module.pool.search = timed_search  # type: ignore[method-assign]
        return module

    started = time.perf_counter()
    finetune(make, model, workshop, steps=updates, key=f"bench-{method.name}", title=method.name)
    return times, time.perf_counter() - started
