#!/usr/bin/env bash
set -euo pipefail
# every control, and the twin beside the model
python -m dori_lightning +experiment=audit pairs.controls=all reference=dori_tiny_twin name=005-evidence
python -m dori_lightning task=report name=005-evidence-claims task.runs=outputs/005-evidence task.expected=experiments/005-evidence/expected.json
