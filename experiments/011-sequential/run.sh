#!/usr/bin/env bash
set -euo pipefail
# whole attacks, with images on the way: what curve.py replays
python -m dori_lightning 'attack.snapshots=[1,2,4,8,16,32]' name=011-whole
# the same mitigation by whole attacks; controls have no part in what came back
python -m dori_lightning mitigation=wanda_10 power=none 'pairs.kinds=[vm,tm]' 'pairs.self_controls=[]' 'attack.snapshots=[]' name=011-whole-wanda_10
# the sequential search on a model that memorized, the same pruned, one that never saw the images, and with every control
python -m dori_lightning attack=dori_sequential name=011-sequential
python -m dori_lightning attack=dori_sequential mitigation=wanda_10 power=none name=011-sequential-wanda_10
python -m dori_lightning attack=dori_sequential checkpoint=dori_tiny_twin power=none name=011-sequential-twin
python -m dori_lightning attack=dori_sequential pairs.controls=all name=011-sequential-all
python -m dori_lightning task=report name=011-claims task.runs=outputs/011-sequential task.expected=experiments/011-sequential/expected.json
