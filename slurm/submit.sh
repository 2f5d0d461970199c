# shellcheck shell=bash disable=SC2034 # what read_arguments leaves is read by its caller
# Sourced by the batch scripts where they are called directly: arguments are checked before sbatch is.
#
#   read_arguments SCRIPT [--SBATCH-OPTION=VALUE ...] RECIPE ... [--set section.key=value ...] [--resume auto|PATH]
#
# leaves the arrays options, recipes, overrides, and logs/ for SLURM to write to. Ends with 2 if something is wrong.

refuse() {
  echo "error: $*" >&2
  exit 2
}

read_arguments() {
  local script=$1 recipe
  shift
  options=() recipes=() overrides=()
  while [[ ${1:-} == -* ]]; do
    case $1 in
      -h | --help)
        sed -n '3,/^$/s/^# \{0,1\}//p' "$script"
        exit
        ;;
      --*=* | --test-only | --parsable | --hold | --wait | --exclusive) options+=("$1") ;;
      *) refuse "$1: options of sbatch, before the recipe, are written --option=value (see --help)" ;;
    esac
    shift
  done
  while (($#)) && [[ $1 != -* ]]; do
    recipes+=("$1")
    shift
  done
  ((${#recipes[@]})) || refuse "no recipe (see --help)"
  overrides=("$@")
  [ -e launch/train.py ] || refuse "start it in the project's folder, not in $PWD"
  . slurm/environment.sh || exit
  for recipe in "${recipes[@]}"; do
    check_recipe "$recipe" "$@" || exit
  done
  command -v sbatch >/dev/null || refuse "no sbatch here; without SLURM: deepspeed launch/train.py --config RECIPE"
  mkdir -p logs
}

# Everything that a recipe shows by itself, in half a second. Data and model are looked at by --dry-run.
check_recipe() {
  python - "$@" <<'END'
import argparse
import sys

from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.recipe_file import load_recipe

parser = argparse.ArgumentParser(prog="after the recipe", allow_abbrev=False, add_help=False)
parser.add_argument("recipe")
parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
parser.add_argument("--resume", metavar="auto|PATH")
args = parser.parse_args()
try:
    load_recipe(args.recipe, args.set)
except RecipeError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
END
}
