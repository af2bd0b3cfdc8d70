#!/usr/bin/env bash
# A run on one node or several under SLURM: it saves and queues itself again when its time is up or it is preempted.
#
#   sbatch launch/slurm.sh --preset cifar10                    2 nodes of 8 GPUs, as below
#   sbatch --nodes 8 --time 4:00:00 launch/slurm.sh --preset images64 --data.source hub:me/cats --run /shared/cats
#
# What follows the script's name goes to `fastddpm train`; --run (or RUN below) is on a disk that all nodes share.
# A resumed run is the uninterrupted one, whatever the number of nodes it gets, as long as the batch divides by it.
#
# To have it save and stop for good:  scontrol update JobId=N Requeue=0; scancel --batch --signal=TERM N
# A plain scancel ends it at once, with the last checkpoint as it is.

#SBATCH --job-name=fastddpm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# TERM this many seconds before the end, to this script alone (B:): time for a step, a save and the end of everything.
#SBATCH --signal=B:TERM@300
# Also after the failure of a node, of which this script would not live to see the end.
#SBATCH --requeue
# One log over all starts.
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

# --- Options, each of which may also be set in the environment of sbatch. ---
# Python of the environment that fastddpm is installed in.
PYTHON=${PYTHON:-python}
# Run folder, unless --run is among the arguments.
RUN=${RUN:-runs/slurm-${SLURM_JOB_ID:?is not set: start this script with sbatch}}
# Training processes per node: one per GPU.
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
# Port of the first node where the processes find each other. Of the job's own, since nodes may be shared by jobs.
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# Seconds that torchrun waits for its processes to save after TERM; less than what --signal above leaves. Torch 2.11
# does not know it: there torchrun kills them after 30 s, and a checkpoint that takes longer is lost (the one before it
# is not). In the environment, since the option --shutdown-timeout would be an error there.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

set -u

say() { echo "slurm.sh: $(date '+%F %T') job $SLURM_JOB_ID: $*" >&2; }

previous=
given=
for argument in "$@"; do
    case $previous,$argument in
    --run,*) RUN=$argument given=1 ;;
    *,--run=*) RUN=${argument#--run=} given=1 ;;
    esac
    previous=$argument
done
[[ -n $given ]] || set -- "$@" --run "$RUN"

# Launchers lose the trainer's exit code (torchrun makes 1 of every other), so its status file is what counts.
status() { cat "$RUN/status.json" 2>/dev/null; }
field() { "$PYTHON" -c 'import json, sys; print(json.loads(sys.argv[1]).get(sys.argv[2]) or "")' "$after" "$1"; }
newest() { find "$RUN/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1; }

pid=
stopping=
forward() {
    stopping=1
    [[ -n $pid ]] || return
    say "TERM: the trainers save and stop"
    # Not `kill $pid`: srun answers a TERM of its own with SIGKILL to all tasks.
    scancel --signal=TERM "$SLURM_JOB_ID"
}
# Without a trap, TERM would end this script, and with it the job, before anything is saved.
trap forward TERM

# The first node of the job is the one that runs this script. Its name and fixed ranks, since torchrun's c10d rendezvous
# has to recognise the first node by comparing host names.
master=${SLURMD_NODENAME:-$(hostname)}
# shellcheck disable=SC2016
step=(
    # sbatch's number of cores per task does not reach srun by itself since SLURM 22.05.
    srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
    # One launcher that has ended must not take along those whose processes still save (torchrun exits 1 even after a
    # good save), nor may they wait for ever for a node that is gone.
    --kill-on-bad-exit=0 --wait=300
    # The node's number is another on each node, so it is expanded there.
    bash -c 'exec "$0" -m torch.distributed.run --node-rank "${SLURM_NODEID:-0}" "$@"' "$PYTHON"
    --nnodes "${SLURM_JOB_NUM_NODES:-1}" --nproc-per-node "$PROCESSES"
    --master-addr "$master" --master-port "$PORT"
    -m fastddpm -- train "$@"
)
before=$(status)
saved_before=$(newest)
say "start ${SLURM_RESTART_COUNT:-0} of $RUN on ${SLURM_JOB_NUM_NODES:-1} x $PROCESSES processes"
"${step[@]}" &
pid=$!
[[ -z $stopping ]] || forward # it came just before
# A trap breaks off `wait`, and the step is then still to be waited for.
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
wait "$pid"
code=$?

again() { # exits; $1 is what has come of this start
    # While the job is cancelled or already queued again, Slurm has its own plans for it.
    local state
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null)
    if [[ -z $state || $state == RUNNING ]] && scontrol requeue "$SLURM_JOB_ID"; then
        say "$1 and queued again"
        exit 0
    fi
    say "$1 and not queued again (${state:-no state}); the same sbatch with --run $RUN goes on"
    exit 130
}

after=$(status)
if [[ $after == "$before" ]]; then
    # A status of an earlier start must not queue the job again: one that fails at its start would do so for ever. Nor
    # does a TERM in the first minute, which comes at once where --time is shorter than what --signal leaves.
    [[ -z $stopping ]] || ((SECONDS < 60)) || again "stopped before the first step"
    say "the trainers have ended with exit code $code before the first step"
    exit "$code"
fi
case $(field status) in
done)
    say "done at step $(field step)"
    exit 0
    ;;
preempted)
    again "saved at step $(field step)"
    ;;
failed)
    failed=$(field exit_code)
    say "failed at step $(field step): $(field reason)"
    exit "${failed:-$((code ? code : 1))}"
    ;;
*)
    # After TERM they took too long to save, and there is more to go on from than before.
    [[ -z $stopping || $(newest) == "$saved_before" ]] || again "killed while saving"
    # Otherwise for lack of memory, say; once more would most likely end the same way.
    say "the trainers were killed (exit code $code); the same sbatch with --run $RUN goes on from the last checkpoint"
    exit $((code ? code : 1))
    ;;
esac
