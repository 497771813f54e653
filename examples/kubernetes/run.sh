#!/usr/bin/env bash
# What a pod of a training Job runs: bash examples/kubernetes/run.sh CONFIG [override...] [CONFIG...]
#
# A pod is a node.  The runs follow each other; one that is finished is not started again.  The exit
# code tells the Job what to do (podFailurePolicy in the manifests):
#
#   0  all runs have come to their end
#   1  training has failed: the pod is started again, a limited number of times
#   2  the configuration is wrong: the Job fails
#   3  the runs were stopped before their end, and have saved: the pod is started again, without
#      limit (a node that is drained, a pod that is deleted)
#
# JOB_COMPLETION_INDEX  number of the pod, which Kubernetes sets.  Pod 0 keeps the store in which the
#                       others meet.
# RDZV_ENDPOINT         host name of pod 0 and a port
# NNODES, NPROC_PER_NODE, LOCAL_ADDRESS, MAX_RESTARTS, JOIN_TIMEOUT, PYTHON
#                       see examples/torchrun.sh

set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

child=
is_stopping=false
# shellcheck disable=SC2317,SC2329 # called by trap
stop() {
    is_stopping=true
    trap '' TERM
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM

# Runs a command and returns its exit code; ends if the pod is to stop.
is_training=false
run() {
    local status=0
    ! $is_stopping || exit 3
    "$@" &
    child=$!
    wait "$child" || status=$?
    if $is_stopping; then # the signal has ended that wait
        status=0
        wait "$child" || status=$?
        ! $is_training || ((status == 0)) || exit 1
        # A run that has just come to its end is found finished when the pod starts again.
        exit 3
    fi
    child=
    return "$status"
}

# The others may start while the image of pod 0 is still being fetched, and before its name is known.
# shellcheck disable=SC2317,SC2329 # called by run
wait_for_store() {
    local host=${RDZV_ENDPOINT%:*} port=${RDZV_ENDPOINT##*:} end
    end=$((SECONDS + ${JOIN_TIMEOUT:-1800}))
    until (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; do
        if ((SECONDS > end)); then
            echo "Pod 0 has not opened $RDZV_ENDPOINT for ${JOIN_TIMEOUT:-1800} s." >&2
            return 1
        fi
        sleep 2
    done
}

train=("$root/tools/train.py" "$@")
run "$PYTHON" "${train[@]}" --dry-run >/dev/null || exit 2

status=0
run "$PYTHON" "${train[@]}" --is-done || status=$?
case $status in
    0) exit 0 ;;
    3) ;; # not finished
    *) exit 1 ;;
esac

if ((${NNODES:-1} > 1)); then
    : "${RDZV_ENDPOINT:?set it to the host name of pod 0 and a port}"
    if [[ ${JOB_COMPLETION_INDEX:-} == 0 ]]; then
        # Its name may not be known yet; torchrun keeps the store where it finds its own address.
        export RDZV_ENDPOINT=localhost:${RDZV_ENDPOINT##*:}
    else
        run wait_for_store || exit 1
    fi
fi
unset NODE_RANK # the nodes agree on it, so that one of them can be replaced
is_training=true
run bash "$root/examples/torchrun.sh" "${train[@]}" || exit 1
is_training=false

# Another pod may have been told to stop: then all have saved and ended with 0.
status=0
run "$PYTHON" "${train[@]}" --is-done || status=$?
((status == 0 || status == 3)) || status=1
exit "$status"
