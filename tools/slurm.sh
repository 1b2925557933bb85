#!/bin/bash
# Train on a Slurm cluster with torchrun: one launcher a node, one process a GPU, over time limits and lost nodes.
#
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 tools/slurm.sh \
#       --config recipes/imagenet_tiny_gkan.yaml --data-path /shared/imagenet --output_dir /shared/runs/tiny
#
# What follows the script's name goes to main.py. Submit it from the repository's folder, or name that by VISION_KAN;
# PYTHON is the interpreter (else .venv/bin/python of that folder, else python3).
#
# Two minutes before the time limit Slurm sends USR2 to this script. The training is then asked to stop (TERM, which
# srun and torchrun hand on), saves, and says so in status.json of --output_dir; the job goes back into the queue, at
# most MAX_RESTARTS (100) times, and goes on from there. Where Slurm preempts the job or loses a node it puts the job back
# by itself. scancel and a failed training end it.
#
#SBATCH --job-name=vision_kan
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

say() { echo "slurm.sh: $*" >&2; }
refuse() { say "error: $*"; exit 2; }

# ---------------------------------------------------------------- what to run
output_dir='' before=''
for word in "$@"; do
    case "$before" in --output_dir|--output-dir) output_dir=$word ;; --resume) resume=$word ;; esac
    case "$word" in --output_dir=*|--output-dir=*) output_dir=${word#*=} ;; --resume=*) resume=${word#*=} ;; esac
    before=$word
done
[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a batch script: start it with sbatch"
[ -n "$output_dir" ] || refuse "give --output_dir, a folder that all nodes share: the training goes on from there after a stop"
[ "${resume:-auto}" = auto ] || refuse "--resume $resume: the training always goes on from the newest checkpoint in --output_dir;" \
    "start from other weights with --finetune"
folder=${VISION_KAN:-${SLURM_SUBMIT_DIR:-.}}
[ -f "$folder/main.py" ] || refuse "there is no main.py in $folder: submit from the repository's folder, or set VISION_KAN"
python=${PYTHON:-$folder/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
case "$output_dir" in "~"/*) output_dir=$HOME/${output_dir#"~/"} ;; esac
status=$output_dir/status.json
rm -f "$status"         # of an earlier start: it would say nothing about this one

nodes=${SLURM_NNODES:-1}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# srun does not take the number of cores over from sbatch by itself
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# ---------------------------------------------------------------- run it
warned='' again='' launcher=''
trap 'warned=1 again=1; say "the time is nearly up: asking the training to stop"; [ -z "$launcher" ] || kill -TERM "$launcher"' USR2
trap 'again=1' TERM     # Slurm sends it to srun too: wait for what the training saves

# shellcheck disable=SC2016  # each node expands its own SLURM_NODEID
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' \
    "$python" --nnodes "$nodes" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --master-addr "$host" --master-port "$port" \
    "$folder/main.py" "$@" --resume auto &
launcher=$!
code=0 again=1
while [ -n "$again" ]; do       # a signal ends `wait`, and not what it waits for
    again=''
    wait "$launcher"
    code=$?
done

# ---------------------------------------------------------------- what came of it
read -r state exit_code < <("$python" -c '
import json, sys
status = json.load(open(sys.argv[1]))
print(status["state"], status["exit_code"])' "$status" 2>/dev/null) || state=unknown exit_code=None
say "srun ended with code $code, the training is $state"
case "$state" in
    finished) exit 0 ;;
    failed) exit "${exit_code/None/1}" ;;
    preempted|running)      # running: it took longer to stop than torchrun waits; an earlier checkpoint is there
        if [ -z "$warned" ]; then
            [ "$state" = running ] && [ "$code" -ne 0 ] && exit "$code"
            exit 75
        fi
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
            say "not put back into the queue: it has been started again ${SLURM_RESTART_COUNT} times (MAX_RESTARTS)"
            exit 75
        fi
        if scontrol requeue "$SLURM_JOB_ID"; then
            exit 0
        fi
        say "the job could not be put back into the queue: submit it again, it goes on from the last checkpoint"
        exit 75 ;;
    *) exit "$code" ;;
esac
