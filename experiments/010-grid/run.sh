#!/usr/bin/env bash
set -euo pipefail
python -m dori_lightning -m +experiment=pruning_grid hydra/launcher=cpus trainer=cpu checkpoint.device=cpu
python -m dori_lightning task=report name=010-grid task.runs=outputs/sweeps/pruning_grid task.expected=experiments/010-grid/expected.json
