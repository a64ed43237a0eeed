#!/usr/bin/env bash
set -euo pipefail
python -m dori_lightning -m +experiment=headline_table hydra/launcher=cpus trainer=cpu checkpoint.device=cpu
python -m dori_lightning task=report name=001-headline-table task.runs=outputs/sweeps/headline_table-dori_tiny task.expected=experiments/001-headline-table/expected.json
