#!/usr/bin/env bash
set -euo pipefail
python -m dori_lightning +experiment=audit name=005-evidence
