# shellcheck shell=bash
# Sourced by the scripts that train at full size: paths, a tiny substitute, runs in sequence.
#
# LLM, VISION                    Hugging Face directories; the LLM's tokenizer is used
# STAGE1_RECORDS, STAGE1_IMAGES  LLaVA records (.json, .jsonl) of captions, and their image directory
# STAGE2_RECORDS, STAGE2_IMAGES  the same for instructions
# OUTPUT                         checkpoints and logs, one directory per run; default runs/moiie-*
# TP, PP, EP                     degrees of parallelism; default: those in the YAML files
# NPROC_PER_NODE, NNODES, RDZV_ENDPOINT, NODE_RANK, MAX_RESTARTS, PYTHON
#                                see examples/torchrun.sh
#
# Under torchrun its processes are used; else torchrun is started here.  If no path is set, a tiny
# model trains on built-in images of digits, on the CPU.

set -euo pipefail

readonly PATH_NAMES=(LLM VISION STAGE1_RECORDS STAGE1_IMAGES STAGE2_RECORDS STAGE2_IMAGES)
readonly ARGUMENTS=("$@")
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Runs one after the other, each a file of examples/: train_in_turn BACKBONE RUN... -- [override...]
train_in_turn() {
    local missing=() name is_tiny=false runs=()
    export BACKBONE=$1
    shift
    while [[ $1 != -- ]]; do
        runs+=("$1")
        shift
    done
    shift
    for name in "${PATH_NAMES[@]}"; do
        [[ -n ${!name:-} ]] || missing+=("$name")
    done
    ((${#missing[@]} < ${#PATH_NAMES[@]})) || is_tiny=true
    if ! $is_tiny && ((${#missing[@]})); then
        fail "$(listed "${missing[@]}") not set: set all of $(listed "${PATH_NAMES[@]}"), or none\
 of them for a tiny model."
    fi

    # LOCAL_RANK, because cluster managers set RANK and WORLD_SIZE per node.
    if [[ -z ${LOCAL_RANK:-} ]]; then
        ! $is_tiny || export NPROC_PER_NODE=${NPROC_PER_NODE:-2}
        exec bash "$root/examples/torchrun.sh" --no-python bash "$0" "${ARGUMENTS[@]}"
    fi

    local degrees=() words=() run
    [[ -z ${TP:-} ]] || degrees+=("parallel.tensor=$TP")
    [[ -z ${PP:-} ]] || degrees+=("parallel.pipeline=$PP")
    [[ -z ${EP:-} ]] || degrees+=("parallel.expert=$EP")
    if $is_tiny; then
        export OUTPUT=${OUTPUT:-runs/moiie-$BACKBONE-tiny}
        prepare_tiny
    else
        export OUTPUT=${OUTPUT:-runs/moiie-$BACKBONE}
    fi
    for run in "${runs[@]}"; do
        words+=("$root/examples/$run.yaml")
        ! $is_tiny || add_tiny_overrides "$run"
        words+=("${degrees[@]}" "$@")
    done
    exec "$PYTHON" "$root/tools/train.py" "${words[@]}"
}

# Writes the built-in data and points the paths to it.
prepare_tiny() {
    local data=$OUTPUT/data
    [[ ${RANK:-0} != 0 ]] || echo "No paths are set: a tiny model trains on built-in data."
    "$PYTHON" -c 'import sys
from moiie_megatron.data.digits.dataset import write_digits
write_digits(sys.argv[1], train=200, test=20)' "$data"
    export LLM=$data VISION=$data # the tokenizer is there; pretrained weights are not
    export STAGE1_RECORDS=$data/captions.json STAGE1_IMAGES=$data/images
    export STAGE2_RECORDS=$data/train.jsonl STAGE2_IMAGES=$data/images
}

# What makes a run of the recipe small: add_tiny_overrides RUN; appends to words.
add_tiny_overrides() {
    local language=tiny-phi3 vision=tiny-siglip world=${WORLD_SIZE:-1}
    [[ $BACKBONE != llama3 ]] || language=tiny-llama
    [[ $1 != *clip* ]] || vision=tiny-clip
    words+=(
        "language.preset=$language" language.pretrained=null
        "vision.preset=$vision" vision.pretrained=null
        data.sequence_length=256 data.num_workers=0
        train.steps=5 train.epochs=null train.micro_batch_size=2
        "train.global_batch_size=$((4 * world))"
        train.precision=fp32 train.device=cpu
        parallel.tensor=1 "parallel.expert=$((world % 2 ? 1 : 2))"
    )
    # The markers that the built-in tokenizer has; captions have none.
    [[ $1 == *-stage1 ]] || words+=(stage.template=phi3)
}

listed() {
    local IFS=,
    local joined="$*"
    echo "${joined//,/, }"
}

fail() {
    [[ ${RANK:-0} != 0 ]] || echo "error: $1" >&2
    exit 1
}
