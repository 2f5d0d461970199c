#!/usr/bin/env bash
# Sets up .venv if needed and runs the tests, two files at a time; arguments go to pytest (e.g. tests/run.sh tests/unit -x,
# or -m gpu, which runs them one by one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
set_up_environment dev
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
case " $* " in
*" gpu "*) workers=0 ;;
*) workers=2 ;;
esac
# In the order of the files, slow ones first; by default those of few tests, which are the slow ones, come last.
exec python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
