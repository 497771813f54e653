#!/usr/bin/env bash
# Both stages as two jobs, the second one after the first: bash examples/slurm/submit.sh [override...]
# in the root of the repository.  Overrides are for both; variables: examples/slurm/stage1.sbatch.
#
# NODES    nodes of both jobs; default: those in the sbatch files
# Options for sbatch (account, partition): its own variables, e.g. SBATCH_ACCOUNT, SBATCH_PARTITION.

set -euo pipefail

options=(--parsable ${NODES:+--nodes="$NODES"})
first=$(sbatch "${options[@]}" examples/slurm/stage1.sbatch "$@")
first=${first%%;*} # a cluster's name may follow
second=$(sbatch "${options[@]}" --dependency="afterok:$first" --kill-on-invalid-dep=yes \
    examples/slurm/stage2.sbatch "$@")
echo "stage 1: job $first; stage 2: job ${second%%;*}, when that has come to its end"
