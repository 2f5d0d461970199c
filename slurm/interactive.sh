#!/bin/bash
#
# A shell on the first node of an allocation, with the jobs' environment. From the project's folder:
#
#   slurm/interactive.sh --nodes=2 --gpus-per-node=8 --time=01:00:00     # options of salloc
#   slurm/interactive.sh --nodes=1 --gpus-per-node=1 -- nvidia-smi       # a command in place of the shell
#
# In it `slurm/train.sbatch RECIPE ...` trains at once, on all nodes of the allocation; Ctrl-C stops it with a checkpoint.

case ${1:-} in
  -h | --help)
    sed -n '3,/^$/s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac

# ---- 1. Allocation ----

# What a site may ask for, off.
options=(--job-name=fvae-interactive --ntasks-per-node=1)
# options+=(--account=ACCOUNT --partition=PARTITION)
# options+=(--exclusive --mem=0)

while (($#)) && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
shift
[ -e slurm/environment.sh ] || { echo "error: start it in the project's folder, not in $PWD" >&2 && exit 2; }

# ---- 2. Environment, and 3. launch: one step on the first node that leaves its resources to steps inside it ----

if (($#)); then
  exec salloc "${options[@]}" srun --nodes=1 --ntasks=1 --overlap bash -c '. slurm/environment.sh && exec "$@"' bash "$@"
fi
# The environment comes after ~/.bashrc, which may set a PATH of its own.
exec salloc "${options[@]}" srun --nodes=1 --ntasks=1 --overlap --pty bash -c '
  exec bash --rcfile <(echo "[ ! -e ~/.bashrc ] || . ~/.bashrc; . slurm/environment.sh") -i'
