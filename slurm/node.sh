#!/bin/bash
# One node's launcher and its ranks; train.sbatch starts it on every node.
#
# The launcher is torchrun because it can be told to leave signals alone: on SIGTERM deepspeed's, and torchrun as it
# comes, kill the ranks after 30 s, and a step with a checkpoint may take longer.

stopping=
trap '' USR1 TERM # inherited: by the launcher for good, by a rank until it installs its handlers

# torchrun puts each rank into a session of its own. Where SLURM tracks jobs by process group (proctrack/pgid) it does
# not reach them there: signals are passed on below, and a rank whose launcher was killed ends itself.
#
# A rank that stopped in order to resume (75) has not failed: torchrun would print a traceback, srun end the other
# nodes. Rank 0, which runs beside train.sbatch, leaves its exit code there.
run_rank() {
  (while kill -0 "$PPID"; do sleep 1; done && kill -KILL 0) >/dev/null 2>&1 &
  local watch=$! code
  "$@"
  code=$?
  kill -KILL "$watch"
  # USR1 is ignored or handled, but for the moment in which Python exits: it had stopped already.
  ((code != 128 + $(kill -l USR1))) || code=75
  if [ "$RANK" = 0 ]; then
    echo "$code" >"$RANK0_STATUS" || return
  fi
  # Stood still: the other ranks notice within 10 s, rank 0 among them.
  ((code != 76)) || sleep 15
  ((code == 75)) || return "$code"
}
export -f run_rank

cores=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}

torchrun --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
  --no-python bash -c 'run_rank "$@"' rank python launch/train.py --config "$@" &
launcher=$!

# Passed on until the rank ends: it may not have been listening yet.
trap 'stopping=1' USR1 TERM
while kill -0 "$launcher" 2>/dev/null; do
  [ -z "$stopping" ] || pkill -USR1 -P "$(pgrep -d , -P "$launcher")" 2>/dev/null
  (trap '' USR1 TERM && exec sleep 1) # SLURM signals it too
done
wait "$launcher"
