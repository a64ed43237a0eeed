#!/usr/bin/env bash
set -euo pipefail
# triggers searched on a pruned model, tried on the checkpoint and on another pruned one
python -m dori_lightning +experiment=locality
# triggers searched on the checkpoint itself, tried on two pruned models
python -m dori_lightning +experiment=locality mitigation=none mitigation@task.transfer_to.second=nemo_replication
