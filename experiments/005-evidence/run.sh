#!/usr/bin/env bash
set -euo pipefail
here=experiments/005-evidence
# every control, the twin beside it, and how often the verdicts of lists drawn from them are wrong
python -m dori_lightning +experiment=audit pairs.controls=all reference=dori_tiny_twin name=005-evidence
python "$here/draws.py" outputs/005-evidence
# checkpoints that hold the same and on which a search in fixed numbers goes wrong
python "$here/rescale.py" outputs/005-rescaled
for folder in outputs/005-rescaled/*/; do
  case=$(basename "$folder")
  python -m dori_lightning +experiment=audit pairs=dori_tiny_sweep checkpoint.source="$folder" checkpoint.name="$case" name="005-$case"
done
