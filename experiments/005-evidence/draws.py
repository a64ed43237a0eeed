"""How often is a verdict wrong? Random lists drawn from an audit whose truth is known.

Takes the run folder of an audit of the embedded benchmark with
``reference=dori_tiny_twin``. Each list mixes suspects that the model holds with images that it
cannot hold (controls, and any image on the twin), which nobody tells apart, and takes other images
that it cannot hold as controls. Prints the table of this experiment; exit code 1 where a claim of
``draws.json`` does not hold.
"""

import json
import sys
from pathlib import Path

import numpy as np

from dori_lightning.metrics.evidence import UnseenImage, judge

LISTS, RATE = 200, 0.05
CONTROLS = (10, 20, 39)


def main(folder: Path) -> int:
    """Draw the lists and count wrong answers."""
    report = json.loads((folder / "report.json").read_text())
    held = [(row["score"], row["loss_ratio"]) for row in report["images"]]
    unseen = [(row["score"], row["loss_ratio"]) for row in report["unseen"]]
    print(f"{len(held)} held, {len(unseen)} never seen, {LISTS} lists each")
    print(
        "| controls | called held, held not (share of those called held) | called absent, held |"
    )
    print("|---|---|---|")
    found = {}
    for controls in CONTROLS:
        rng = np.random.default_rng(0)
        shares, missed, asked = [], 0, 0
        for _ in range(LISTS):
            true = rng.choice(len(held), rng.integers(0, len(held) + 1), replace=False)
            other = rng.permutation(len(unseen))
            false, nulls = other[: rng.integers(1, 21)], other[21 : 21 + controls]
            suspects = [held[k] for k in true] + [unseen[k] for k in false]
            rows = judge(
                [score for score, _ in suspects],
                [ratio for _, ratio in suspects],
                [UnseenImage("", "control", *unseen[k]) for k in nulls],
                rate=RATE,
            )
            called = [row.answer in ("yes", "dormant") for row in rows]
            shares.append(sum(called[len(true) :]) / max(1, sum(called)))
            missed += sum(row.answer == "no" for row in rows[: len(true)])
            asked += len(true)
        found[str(controls)] = {"false_discovery_rate": np.mean(shares), "missed": missed / asked}
        print(f"| {controls} | {np.mean(shares):.3f} | {missed} of {asked} |")
    claims = json.loads((Path(__file__).parent / "draws.json").read_text())
    wrong = [
        f"{controls} controls, {name}: {found[controls][name]:.3f}, at most {limit}"
        for controls, limits in claims.items()
        for name, limit in limits.items()
        if not found[controls][name] <= limit
    ]
    print("\n".join(wrong) or "all claims hold")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
