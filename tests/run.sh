#!/usr/bin/env bash
# Sets up .venv if needed and runs the tests; arguments go to pytest (e.g. tests/run.sh tests/unit -x, or -m gpu).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
set_up_environment dev
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec python -m pytest "$@"
