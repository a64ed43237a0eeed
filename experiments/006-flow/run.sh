#!/usr/bin/env bash
set -euo pipefail
python -m dori_lightning +experiment=audit checkpoint=dori_tiny_flow name=006-flow
python -m dori_lightning task=report name=006-flow-claims task.runs=outputs/006-flow task.expected=experiments/006-flow/expected.json
