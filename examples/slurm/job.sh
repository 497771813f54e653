# shellcheck shell=bash
# A training job on Slurm, sourced by the sbatch files of this folder: run_job CONFIG [override...]
#
# On every node one task, examples/torchrun.sh, starts one process per GPU.  When the time is nearly
# over Slurm sends SIGUSR1 to the batch script; the run saves, ends with code 0, and the job puts
# itself into the queue again, until the run has come to its end.
#
# CONTAINER         image for pyxis, an enroot .sqsh file or registry name (docker/Dockerfile);
#                   default: none, the nodes' own Python
# CONTAINER_MOUNTS  further mounts, host:container[:flags], separated by commas: of models, data and
#                   OUTPUT.  The repository has its own path inside too.
# MAX_REQUEUES      how often the job may go on after its time is over; default 100
# NPROC_PER_NODE    default: the GPUs of a node
# MAX_RESTARTS, JOIN_TIMEOUT, PYTHON: see examples/torchrun.sh

set -euo pipefail

# Slurm runs a copy of the batch script: only this variable knows where the repository is.
cd "${SLURM_SUBMIT_DIR:?start with sbatch in the root of the repository}"
root=$PWD
readonly PATH_NAMES=(LLM VISION STAGE1_RECORDS STAGE1_IMAGES STAGE2_RECORDS STAGE2_IMAGES)

run_job() {
    local hosts on_nodes train step status=0 is_over=false
    check_variables
    prepare_srun
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # one in a line
    export NNODES=$SLURM_JOB_NUM_NODES
    export NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-gpu}}
    export RDZV_ENDPOINT=${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))
    export RDZV_ID=$SLURM_JOB_ID
    unset NODE_RANK # the nodes agree on it
    train=("$root/tools/train.py" "$@")

    # A node that fails is not started again inside a job, so the others must not wait for it: the
    # whole job ends, and Slurm itself queues it again where the node is to blame (--requeue).
    "${on_nodes[@]}" --nodes="$NNODES" --kill-on-bad-exit=1 bash "$root/examples/torchrun.sh" \
        "${train[@]}" &
    step=$!
    # srun passes it on to its tasks.
    trap 'is_over=true; trap "" USR1; kill -USR1 "$step" 2>/dev/null || true' USR1
    wait "$step" || status=$?
    if $is_over; then # the signal has ended that wait
        status=0
        wait "$step" || status=$?
    fi
    if ((status)); then
        echo "Training failed with code $status." >&2
        exit "$status"
    fi

    # With the time nearly over there is none for asking: a finished run only ends again.
    if ! $is_over; then
        # shellcheck disable=SC2016 # expanded on the node
        "${on_nodes[@]}" --nodes=1 bash -c 'source "$1/examples/environment.sh" && exec "$PYTHON" "${@:2}"' \
            bash "$root" "${train[@]}" --is-done || status=$?
        case $status in
            0) exit 0 ;;
            3) ;; # stopped before its end
            *) exit "$status" ;;
        esac
    fi
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
        echo "The run has not come to its end after $SLURM_RESTART_COUNT requeues." >&2
        exit 1
    fi
    scontrol requeue "$SLURM_JOB_ID"
}

# Sets on_nodes: srun with one task per node, to be called with further options and the command.
prepare_srun() {
    local mounts=$root:$root
    on_nodes=(srun --ntasks-per-node=1)
    # srun does not take over the CPUs of the job, a task would have one.
    on_nodes+=(--cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none)
    if [[ -n ${CONTAINER:-} ]]; then
        # The container's Python, not an environment that lies in the repository.
        export PYTHON=python
        [[ -z ${CONTAINER_MOUNTS:-} ]] || mounts+=,$CONTAINER_MOUNTS
        on_nodes+=(--container-image="$CONTAINER" --container-mounts="$mounts")
        on_nodes+=(--container-workdir="$root")
    fi
}

check_variables() {
    local name
    for name in OUTPUT "${PATH_NAMES[@]}"; do
        if [[ -z ${!name:-} ]]; then
            echo "error: $name is not set: see examples/recipe.sh for the variables of a run." >&2
            exit 1
        fi
    done
}
