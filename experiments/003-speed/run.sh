#!/usr/bin/env bash
set -euo pipefail
# on a machine that does nothing else; a GPU measures the second line
python -m dori_lightning +experiment=bench
# python -m dori_lightning +experiment=bench_gpu
