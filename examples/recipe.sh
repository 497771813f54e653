# The two-stage recipe, sourced by the pretrain_moiie_*.sh scripts.
#
# LLM, VISION                    Hugging Face folders; the LLM's tokenizer is used
# STAGE1_RECORDS, STAGE1_IMAGES  LLaVA records (.json, .jsonl) of captions, and their image folder
# STAGE2_RECORDS, STAGE2_IMAGES  the same for instructions
# OUTPUT                         checkpoints and logs, stage1/ and stage2/; default runs/moiie-*
# TP, PP, EP                     degrees of parallelism; default: those in the YAML files
# NPROC_PER_NODE                 processes of this node; default: one per GPU
# NNODES                         number of nodes; default 1
# RDZV_ENDPOINT                  host:port of one node, the same on all nodes; for NNODES > 1
# NODE_RANK                      number of this node; may be left out where the nodes can agree
#                                on it (torchrun's c10d rendezvous)
# PYTHON                         default: .venv/bin/python if it is there, else python
#
# Started by torchrun, the processes that exist are used; else torchrun is started here.  With no
# path set at all, a tiny model trains on built-in pictures of digits, on the CPU.

set -euo pipefail

readonly PATH_NAMES=(LLM VISION STAGE1_RECORDS STAGE1_IMAGES STAGE2_RECORDS STAGE2_IMAGES)

# Both stages: pretrain BACKBONE TINY_PRESET [override...]
pretrain() {
    local backbone=$1 tiny=$2 missing name
    shift 2
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Megatron's tensor parallelism relies on kernels running in the order they were started.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python
        [[ -n ${VIRTUAL_ENV:-} || ! -x $root/.venv/bin/python ]] || PYTHON=$root/.venv/bin/python
    fi

    missing=()
    for name in "${PATH_NAMES[@]}"; do
        [[ -n ${!name:-} ]] || missing+=("$name")
    done
    local is_tiny=false
    ((${#missing[@]} < ${#PATH_NAMES[@]})) || is_tiny=true
    if ! $is_tiny && ((${#missing[@]})); then
        fail "$(listed "${missing[@]}") not set: set all of $(listed "${PATH_NAMES[@]}"), or none\
 of them for a tiny model."
    fi

    # LOCAL_RANK, because cluster managers set RANK and WORLD_SIZE per node.
    if [[ -z ${LOCAL_RANK:-} ]]; then
        $is_tiny && launch "${NPROC_PER_NODE:-2}" "$@"
        launch "${NPROC_PER_NODE:-gpu}" "$@"
    fi

    local both=() stage2=()
    if $is_tiny; then
        export OUTPUT=${OUTPUT:-runs/moiie-$backbone-tiny}
        prepare_tiny "$tiny"
    else
        export OUTPUT=${OUTPUT:-runs/moiie-$backbone}
    fi
    [[ -z ${TP:-} ]] || both+=("parallel.tensor=$TP")
    [[ -z ${PP:-} ]] || both+=("parallel.pipeline=$PP")
    [[ -z ${EP:-} ]] || both+=("parallel.expert=$EP")
    exec "$PYTHON" "$root/tools/train.py" \
        "$root/examples/configs/$backbone-stage1.yaml" "${both[@]}" "$@" \
        "$root/examples/configs/$backbone-stage2.yaml" "${both[@]}" "${stage2[@]}" "$@"
}

# Replaces this process by torchrun, which starts the script again in every process:
# launch PROCESSES [override...]
launch() {
    local processes=$1 rendezvous=(--standalone)
    shift
    if ((${NNODES:-1} > 1)); then
        [[ -n ${RDZV_ENDPOINT:-} ]] ||
            fail "NNODES is $NNODES but RDZV_ENDPOINT is not set: set it to host:port of a node."
        rendezvous=(--nnodes "$NNODES" --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id moiie)
        if [[ -n ${NODE_RANK:-} ]]; then
            rendezvous+=(--rdzv-backend static --node-rank "$NODE_RANK")
        else
            rendezvous+=(--rdzv-backend c10d)
        fi
    fi
    export PYTHON
    exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" \
        --nproc-per-node "$processes" --no-python bash "$0" "$@"
}

# Sets the paths to the built-in data, and the overrides that make the recipe small.
prepare_tiny() {
    local data=$OUTPUT/data world=${WORLD_SIZE:-1}
    [[ ${RANK:-0} != 0 ]] || echo "No paths are set: a tiny model trains on built-in data."
    "$PYTHON" -c 'import sys
from moiie_megatron.data.digits import write_digits
write_digits(sys.argv[1], train=200, test=20)' "$data"
    export LLM=$data VISION=$data  # the tokenizer is there; pretrained weights are not
    export STAGE1_RECORDS=$data/captions.json STAGE1_IMAGES=$data/images
    export STAGE2_RECORDS=$data/train.jsonl STAGE2_IMAGES=$data/images
    both=(
        "language.preset=$1" language.pretrained=null
        vision.preset=tiny-siglip vision.pretrained=null
        data.sequence_length=256 data.num_workers=0
        train.steps=5 train.epochs=null train.micro_batch_size=2
        "train.global_batch_size=$((4 * world))"
        train.precision=fp32 train.device=cpu
        parallel.tensor=1 "parallel.expert=$((world % 2 ? 1 : 2))"
    )
    stage2=(stage.template=phi3)  # the markers that the built-in tokenizer has
}

listed() {
    local IFS=,
    local words="$*"
    echo "${words//,/, }"
}

fail() {
    [[ ${RANK:-0} != 0 ]] || echo "error: $1" >&2
    exit 1
}
