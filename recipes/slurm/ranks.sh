#!/bin/bash
# Run a recipe with one rank per Slurm task, and requeue the job when the recipe asks for it. Called by the .sbatch files:
#   exec bash recipes/slurm/ranks.sh recipes/stage2_flow_matching.py --config ... a.b=value
# Slurm's warning before the time limit (USR1) and TERM go on to every rank; the recipe then finishes its step, saves and
# exits with 75: "saved, run me again". A training that diverged exits with 75, too, and leaves that data out next time. The ranks are tasks of srun, without a launcher in between: torchrun would turn 75 into 1.
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# A rank that ends does not end the others at once (they may be about to exit with 75, too); but they get no more than
# these seconds, because a rank that died leaves the others waiting in a collective.
# shellcheck disable=SC2016  # the variables in quotes are each task's own
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -u "$@"' ranks "$@" &
srun=$!
# srun passes USR1 on to its tasks. TERM would make it kill them, so that becomes USR1 here.
trap 'kill -USR1 "$srun" 2>/dev/null' USR1 TERM

# A trapped signal ends `wait` early with a code above 128: wait again until srun itself has ended.
ended=
wait "$srun"
code=$?
while [ "$code" -gt 128 ] && [ -z "$ended" ]; do
    kill -0 "$srun" 2>/dev/null || ended=yes
    wait "$srun"
    code=$?
done

if [ "$code" -eq 75 ]; then
    # A job that was cancelled or preempted is already completing: Slurm ends or requeues that one itself.
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null)
    case $state in
        COMPLETING* | CANCELLED* | PREEMPTED*) echo "saved; job $SLURM_JOB_ID is $state, so it is not requeued from here" ;;
        *) echo "saved before the end; requeueing job $SLURM_JOB_ID" && scontrol requeue "$SLURM_JOB_ID" ;;
    esac
fi
exit "$code"
