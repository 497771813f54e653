#!/usr/bin/env bash
# torchrun on this node, configured so that nodes may leave a run and rejoin it:
#
#   bash examples/torchrun.sh tools/train.py CONFIG.yaml [override...]
#
# Arguments are torchrun's, from its further options or the script on.
#
# NPROC_PER_NODE   processes of this node; default: one per GPU
# NNODES           number of nodes; default 1
# RDZV_ENDPOINT    host:port of one node, the same on all nodes; for NNODES > 1.  The agent on that
#                  host keeps the store that the others meet in: every other agent may be killed and
#                  started again, when this one is gone all must be started again.
# RDZV_ID          name of the job, if several share an endpoint; default moiie
# NODE_RANK        number of this node; may be left out where the nodes can agree on it (torchrun's
#                  c10d rendezvous), and must be for a killed agent to be taken back
# MAX_RESTARTS     how often the workers are started again after one has failed; default 3 on
#                  several nodes, 0 on one.  Training continues from the last checkpoint.
# JOIN_TIMEOUT     seconds that the others wait for a node that is gone; default 1800
# LOCAL_ADDRESS    address of this node for the others; default: its host name, localhost on one node
# NUMA_BINDING     torchrun's --numa-binding (node, socket, exclusive, core-complex), or none; default
#                  node where there are GPUs.  Needs numactl.
# OMP_NUM_THREADS  threads of every process; default 8 where there are GPUs, else 1
# PYTHON           default: .venv/bin/python if it exists, else python
#
# On SIGTERM or SIGUSR1 the run saves a checkpoint and exits with code 0; on Ctrl-C it saves, too,
# and the code is 130, which ends scripts.  A second Ctrl-C ends at once, unsaved.

set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

options=(--nproc-per-node "${NPROC_PER_NODE:-gpu}")
if [[ $NUMA_BINDING != none ]] && command -v numactl >/dev/null; then
    options+=(--numa-binding "$NUMA_BINDING")
fi
if ((${NNODES:-1} > 1)); then
    if [[ -z ${RDZV_ENDPOINT:-} ]]; then
        echo "error: NNODES is $NNODES but RDZV_ENDPOINT is not set: set it to host:port of a" \
            "node." >&2
        exit 1
    fi
    options+=(--nnodes "$NNODES" --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-moiie}")
    if [[ -n ${NODE_RANK:-} ]]; then
        options+=(--rdzv-backend static --node-rank "$NODE_RANK")
    else
        # join_timeout: the default of 600 s is short for a node that boots.  A node that is gone
        # without a word counts as dead after keep_alive_interval * keep_alive_max_attempt = 15 s.
        conf="join_timeout=${JOIN_TIMEOUT:-1800},keep_alive_interval=5,keep_alive_max_attempt=3"
        options+=(--rdzv-backend c10d --rdzv-conf "$conf")
    fi
    # Every failed worker and every node that goes is one restart; torchrun's default is none.
    options+=(--max-restarts "${MAX_RESTARTS:-3}")
    [[ -z ${LOCAL_ADDRESS:-} ]] || options+=(--local-addr "$LOCAL_ADDRESS")
else
    # The host name of a container may be unknown even to itself.
    options+=(--standalone --local-addr "${LOCAL_ADDRESS:-localhost}")
    options+=(--max-restarts "${MAX_RESTARTS:-0}")
fi
# A store of its own for the workers of every attempt.  torchrun would keep one store for all
# attempts, in which an agent that joins later does not find the address, and restarted workers
# find the addresses of their predecessors.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Signals go to the workers and not to torchrun, which would kill them 30 s after SIGTERM, end with
# code 1, and die of SIGUSR1: it ignores that one from the start, as what it starts inherits.
trap '' USR1
set -m # a process group of its own, so that a Ctrl-C in the terminal does not reach torchrun
"$PYTHON" -m torch.distributed.run "${options[@]}" "$@" &
agent=$!
set +m

# shellcheck disable=SC2317,SC2329 # called by stop
workers_of() { # their process ids in one line
    cat "/proc/$1/task/"*/children 2>/dev/null || true
}

is_stopping=false
is_interrupted=false
# shellcheck disable=SC2317,SC2329 # called by trap
stop() {
    local workers=()
    is_stopping=true
    trap '' TERM USR1
    if [[ -z $(workers_of "$agent") ]]; then # nothing has begun, so there is nothing to save
        kill -TERM "$agent" 2>/dev/null || true
        wait "$agent" 2>/dev/null || true
        $is_interrupted && exit 130
        exit 0
    fi
    # Again and again: a worker that is still importing does not listen yet.
    while kill -0 "$agent" 2>/dev/null; do
        read -r -a workers < <(workers_of "$agent") || true
        kill -USR1 "${workers[@]}" 2>/dev/null || true
        sleep 2
    done
}
trap stop TERM USR1
# shellcheck disable=SC2317,SC2329 # called by trap
interrupt() {
    is_interrupted=true
    # The workers die with it.
    trap 'kill -KILL "$agent" 2>/dev/null || true; exit 130' INT
    echo "Saving after this step; a second Ctrl-C ends at once, unsaved." >&2
    stop
}
trap interrupt INT
trap 'kill -KILL "$agent" 2>/dev/null || true; exit 129' HUP

status=0
wait "$agent" || status=$?
if $is_stopping; then # the signal has ended that wait
    status=0
    wait "$agent" || status=$?
fi
if $is_interrupted && ((status == 0)); then
    status=130
fi
exit "$status"
