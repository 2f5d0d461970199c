#!/usr/bin/env bash
# From a fresh clone to a fine-tuned adapter: installs into .venv, makes a tiny base model and data from text that Python
# brings along, fine-tunes it with FVAE-LoRA under ZeRO-3 (two CPU ranks, or every GPU), evaluates and plots.
# Nothing but packages is downloaded. A second run reuses environment, model and data.
#   bash launch/quickstart.sh [--fast] [--set section.key=value ...]    --fast: a much smaller model, to see it run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
set_up_environment quickstart

export TOKENIZERS_PARALLELISM=false
num_gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$num_gpus" -gt 0 ]; then
  ranks="--num_gpus $num_gpus"
else
  ranks="--num_accelerators 2"
  export DS_ACCELERATOR=cpu
fi

fast=
if [ "${1:-}" = --fast ]; then
  fast=--fast
  shift
fi
python launch/quickstart.py prepare --dir .quickstart $fast
# A free port, so that two quickstarts on one machine do not meet.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# shellcheck disable=SC2086  # $ranks is two words
deepspeed --master_port "$port" $ranks launch/train.py --config launch/recipes/quickstart.yaml "$@"
python launch/quickstart.py report --dir .quickstart --output-dir runs/quickstart
