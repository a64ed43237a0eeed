#!/usr/bin/env bash
set -euo pipefail
# on a machine that does nothing else
python -m dori_lightning +experiment=bench
python -m dori_lightning +experiment=bench trainer=cpu checkpoint=sd14_shape checkpoint.resolution=128 checkpoint.weights=bf16 \
    'task.rows=[attack]' task.repeats=3 task.pairs=8 task.steps=1 task.noise_batch=1
# on a GPU (make gpu runs the tests that need one before it)
# python -m dori_lightning +experiment=bench_gpu
