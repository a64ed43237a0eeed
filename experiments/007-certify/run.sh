#!/usr/bin/env bash
set -euo pipefail
python -m dori_lightning +experiment=certify mitigation=adversarial_finetuning_cheap name=007-certify 'certify.paths=[prompts,transfer,trajectory,dori_strong,initial_noise,completion,quantization,relearning,interpolation]'
python -m dori_lightning task=report name=007-certify-claims task.runs=outputs/007-certify task.expected=experiments/007-certify/expected.json
