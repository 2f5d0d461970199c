# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv with the tested versions, once, and puts it on the PATH.
#   set_up_environment EXTRA     EXTRA: an optional-dependency group of pyproject.toml
# With FVAE_NO_INSTALL=1 the python on the PATH is used as it is (a container, a cluster's own environment).

set_up_environment() {
  local extra=$1 python=${PYTHON:-python3} stamp
  [ -z "${FVAE_NO_INSTALL:-}" ] || return 0
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2
    return 2
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv || return
  stamp=.venv/.installed-$extra-$(cat pyproject.toml launch/constraints.txt | cksum | cut -d' ' -f1)
  if [ ! -e "$stamp" ]; then
    echo "installing into .venv (a few minutes, once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".[$extra]" || return
    touch "$stamp"
  fi
  PATH=$PWD/.venv/bin:$PATH
  export PATH
}
