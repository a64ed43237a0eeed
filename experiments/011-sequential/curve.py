"""What would a sequential search have found, and for how much? Replays whole attacks.

Takes run folders of audits with ``attack=dori attack.snapshots=[1,2,4,8,16,32]``: their images say
at which look a search would have ended at a copy, their losses where it would have been given up.
Losses under the empty prompt are computed where they are missing. Prints the curve of this
record: evaluations and changed answers for each ``attack.futility``.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dori_lightning.attacks.budget import FAR
from dori_lightning.attacks.embedding_attack import Conditioning, attack_rounds, run_attacks
from dori_lightning.attacks.futility import FutilityTest, judged_steps, log_ratios
from dori_lightning.audit.context import AuditContext, with_self_controls
from dori_lightning.audit.loss_evidence import LOSS_ROWS
from dori_lightning.audit.targets import aim
from dori_lightning.pairs.corpus import ORDINARY_PROMPTS
from dori_lightning.tasks.audit import audit_context

LEVELS = (0.5, 0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Whole:
    """A finished audit with whole attacks.

    Attributes:
        context: The audit.
        searches: Initial point to steps to the searches that were on their way.
        ratios: Initial point and steps to pair id to the log ratio.
        copies: Initial point (None: the prompt), steps and pair id to which images are copies.
    """

    context: AuditContext
    searches: dict[str, dict[int, list[Conditioning]]]
    ratios: dict[tuple[str, int], dict[str, float]]
    copies: dict[tuple[str | None, int, str], list[bool]]


def read(folder: Path) -> Whole:
    """Read a run folder, and compute the losses under the empty prompt that it lacks."""
    report = json.loads((folder / "report.json").read_text())
    cfg = OmegaConf.create(report["provenance"]["config"])
    cache = Path(cfg.paths.cache)
    pairs = with_self_controls(
        instantiate(cfg.pairs).read(), cfg.pairs.self_controls, cache / "copies"
    )
    context = aim(audit_context(cfg, folder, pairs))
    edit = context.find_edit().edit
    attack = context.attack_context(edit.identity, scale=report["check"]["scale"])
    searches: dict[str, dict[int, list[Conditioning]]] = {}
    with edit.applied(context.model):
        for one in run_attacks(attack, attack_rounds(context.attack, context.pairs)):
            by_steps = searches.setdefault(str(one.condition.init), {})
            by_steps.setdefault(one.spent, []).append(one)
        ratios = {
            (init, steps): log_ratios(attack, found)
            for init, by_steps in searches.items()
            for steps, found in by_steps.items()
        }
    return Whole(context, searches, ratios, _copies(folder, report))


def _copies(folder: Path, report: dict[str, Any]) -> dict[tuple[str | None, int, str], list[bool]]:
    rule, rows = report["calibration"], pd.read_parquet(folder / "pairs.parquet")
    rows = rows[rows.mitigation == report["mitigation"]]
    found = {}
    for (init, steps, name), own in rows.groupby(["init", "steps", "pair_id"], dropna=False):
        scale = rule["scales"][name]
        threshold = (scale["null"] + scale["ceiling"]) / 2
        copies = own.sort_values("seed")[f"similarity_{rule['descriptor']}"] > threshold
        start = None if pd.isna(init) else str(init)
        found[start, int(steps), str(name)] = [bool(copy) for copy in copies]
    return found


def replay(run: Whole, level: float) -> tuple[set[tuple[str | None, str]], Counter[str]]:
    """Search again under the stopping rule.

    Returns:
        Initial point (None: the prompt) and pair id of what came back, and evaluations by what
        they were for.
    """
    context, copies = run.context, run.copies
    image = context.sampling.steps * context.sampling.rows_per_step
    noises, drawn = context.attack.noise_batch, context.sampling.images_per_pair
    controls = {pair.id for pair in context.pairs if pair.kind == "control"}
    suspects = {pair.id for pair in context.suspected}
    cost, back, judged = Counter[str](), set[tuple[str | None, str]](), set[tuple[str, int, int]]()

    def draw_until_copy(start: str | None, steps: int, names: set[str]) -> set[str]:
        for name in names:
            cost["images"] += image * (1 if copies[start, steps, name][0] else drawn)
        return {name for name in names if any(copies[start, steps, name])}

    prompted = draw_until_copy(None, 0, controls | suspects)
    back |= {(None, name) for name in prompted}
    for init, by_steps in run.searches.items():
        *looks, end = sorted(by_steps)
        looks = [look for look in looks if init == "prompt" or look >= FAR]
        test = FutilityTest(
            level,
            controls,
            looks[-1],
            lambda asked, init=init: {
                c.pair.id: run.ratios[init, c.spent][c.pair.id] for c in asked
            },
        )
        known = prompted if init == "prompt" else set()
        back |= {(init, name) for name in known}
        left = {c.pair.id for c in by_steps[end]} - known
        left = left if left & suspects else set()
        before = 0
        for place, steps in enumerate((*looks, end)):
            cost["attack"] += noises * (steps - before) * len(left)
            before = steps
            if steps == end:
                back |= {(init, name) for name in draw_until_copy(init, steps, left)}
            elif left:
                cost["images"] += image * len(left)
                came = {name for name in left if copies[init, steps, name][place % drawn]}
                back |= {(init, name) for name in came}
                left -= came | test.futile([c for c in by_steps[steps] if c.pair.id in left], came)
        judged |= test.judged
        cost["evidence by loss"] += LOSS_ROWS * len(left)
    cost["futility"] += noises * len(judged)
    cost["evidence by loss"] += 2 * LOSS_ROWS * len(context.pairs)
    cost["ordinary images"] += image * drawn * ORDINARY_PROMPTS
    return back, cost


def whole(run: Whole) -> tuple[set[tuple[str | None, str]], int]:
    """What came back after all steps, and what the audit with whole attacks takes.

    Counted with images of the usual snapshots, after 1, 10, 25 and 50 steps.
    """
    context = run.context
    image = context.sampling.steps * context.sampling.rows_per_step
    drawn, pairs = context.sampling.images_per_pair, len(context.pairs)
    searches = sum(len(by_steps[max(by_steps)]) for by_steps in run.searches.values())
    steps = max(max(by_steps) for by_steps in run.searches.values())
    cost = searches * steps * context.attack.noise_batch
    cost += image * drawn * (4 * searches + pairs + ORDINARY_PROMPTS)
    cost += LOSS_ROWS * (2 * pairs + searches)
    back = {(init, name) for (init, at, name), found in run.copies.items()
            if any(found) and at in (0, steps)}  # fmt: skip
    return back, cost


def answers(back: set[tuple[str | None, str]]) -> set[str]:
    """Pairs that came back anyhow."""
    return {name for _, name in back}


def main(folders: list[str]) -> None:
    """Print the curve of each run."""
    assert judged_steps(8) == range(6, 8), "the record is about the last two steps"
    for folder in folders:
        run = read(Path(folder))
        kinds = {pair.id: pair.kind for pair in run.context.pairs}
        back, full = whole(run)
        count = Counter(kinds[name] for name in answers(back))
        print(f"\n{Path(folder).name}: {full:,} evaluations, back {dict(count)}")
        print("| futility | evaluations | times fewer | lost | gained | of searches | what for |")
        print("|---|---|---|---|---|---|---|")
        for level in LEVELS:
            found, cost = replay(run, level)
            lost, gained = answers(back) - answers(found), answers(found) - answers(back)
            apart = {x for x in back - found if x[0] is not None}
            total = sum(cost.values())
            print(
                f"| {level} | {total:,} | {full / total:.1f} | {', '.join(sorted(lost)) or 0} | "
                f"{', '.join(sorted(gained)) or 0} | {len(apart)} | {dict(cost)} |"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
