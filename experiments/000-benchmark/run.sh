#!/usr/bin/env bash
set -euo pipefail
python -m dori_lightning +experiment=audit name=000-audit
python -m dori_lightning +experiment=budget_control name=000-budget 'pairs.kinds=[control]' pairs.limit=8
