"""What does it cost to search more images, and whose answer does it change? Replays whole attacks.

Takes the run folder of an audit with ``attack.snapshots=[1,2,4,8,16,32]`` and that of the same
audit with ``attack=dori_sequential``: the images of the first say where each search would have
ended, the losses of the second which would have begun. Prints the curve of this record.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from dori_lightning.audit.loss_evidence import LOSS_ROWS
from dori_lightning.metrics.evidence import find_futile
from dori_lightning.pairs.corpus import ORDINARY_PROMPTS

LEVELS = (0.05, 0.1, 0.2, 0.5, 0.99)
LOOKS, STEPS, NOISES, DRAWN = (8, 16, 32), 50, 8, 4
IMAGE = 20
"""Evaluations of an image: ten steps, guided."""

Copies = dict[tuple[str | None, int, str], list[bool]]


def read_copies(folder: Path) -> Copies:
    """Start (None: the prompt), steps and pair id to which images are copies."""
    report = json.loads((folder / "report.json").read_text())
    rule, rows = report["calibration"], pd.read_parquet(folder / "pairs.parquet")
    rows = rows[rows.mitigation == report["mitigation"]]
    found = {}
    for (init, steps, name), own in rows.groupby(["init", "steps", "pair_id"], dropna=False):
        scale = rule["scales"][name]
        threshold = (scale["null"] + scale["ceiling"]) / 2
        copies = own.sort_values("seed")[f"similarity_{rule['descriptor']}"] > threshold
        found[None if pd.isna(init) else init, steps, name] = [bool(copy) for copy in copies]
    return found


def replay(
    copies: Copies, ratios: dict[str, float], controls: set[str], level: float
) -> tuple[set[tuple[str | None, str]], int, int]:
    """Search again at one level.

    Returns:
        Start and pair id of what came back, how many controls are searched, and evaluations.
    """
    names, starts = set(ratios), {start for start, _, _ in copies if start is not None}
    chosen = names - find_futile(ratios, controls, level)
    back, cost = set[tuple[str | None, str]](), 2 * LOSS_ROWS * len(names)
    cost += IMAGE * DRAWN * ORDINARY_PROMPTS

    def draw_all(start: str | None, steps: int, name: str) -> int:
        if any(copies[start, steps, name]):
            back.add((start, name))
        return IMAGE * (1 if copies[start, steps, name][0] else DRAWN)

    cost += sum(draw_all(None, 0, name) for name in names)
    shown = {name for _, name in back}
    for start in starts:
        if start == "prompt":
            back |= {(start, name) for name in shown}
        for name in chosen - (shown if start == "prompt" else set()):
            for place, look in enumerate(LOOKS):
                cost += IMAGE
                if copies[start, look, name][place % DRAWN]:
                    back.add((start, name))
                    cost += NOISES * look
                    break
            else:
                cost += NOISES * STEPS + LOSS_ROWS + draw_all(start, STEPS, name)
    return back, len(chosen & controls), cost


def main(whole: Path, sequential: Path) -> None:
    """Print the curve."""
    copies = read_copies(whole)
    report = json.loads((sequential / "report.json").read_text())
    ratios = {row["id"]: row["loss_ratio"] for row in (*report["images"], *report["unseen"])}
    controls = {row["id"] for row in report["unseen"]}
    names, searches = len(ratios), len({(s, n) for s, _, n in copies if s is not None})
    full = searches * (STEPS * NOISES + 4 * IMAGE * DRAWN + LOSS_ROWS)
    full += names * (IMAGE * DRAWN + 2 * LOSS_ROWS) + IMAGE * DRAWN * ORDINARY_PROMPTS
    before = {(s, n) for (s, at, n), found in copies.items() if any(found) and at in (0, STEPS)}
    print(f"whole: {full:,} evaluations, images after 1, 10, 25 and 50 steps")
    print("| futility | rows | times fewer | controls searched | lost | gained |")
    print("|---|---|---|---|---|---|")
    for level in LEVELS:
        back, searched, cost = replay(copies, ratios, controls, level)
        lost, gained = len(before - back), len(back - before)
        print(f"| {level} | {cost:,} | {full / cost:.1f} | {searched} | {lost} | {gained} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
