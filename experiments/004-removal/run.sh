#!/usr/bin/env bash
set -euo pipefail
python -m dori_lightning +experiment=removal_audit
