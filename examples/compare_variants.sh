#!/usr/bin/env bash
# Dense, Vanilla MoE, Modality MoE and MoIIE on the built-in images of digits, on two CPU cores:
# the same dense start, steps, batches and samples in the same order for all four.  Prints a table
# and draws losses and accuracies.
#
#   bash examples/compare_variants.sh
#
# The results hold for these images, this model size and these seeds.
#
# OUTPUT       output directory; default runs/variants
# STEPS        optimizer steps of every variant, 32 conversations each; default 300
# START_STEPS  of the dense model that all start from, and again a quarter of them for a new
#              connector (stage 1); default 400
# SEEDS        of the order of samples and of the routers, e.g. "3 4 5"; default 3.  Each is one
#              more run of every variant.
# PICTURES     images of the training set; default 6000
# QUESTIONS    largest number of held-out questions; default: all 420
# NPROC        processes, 1 or 2; default 2, experts spread over both
# PYTHON       default: .venv/bin/python if it exists, else python
#
# Arguments are overrides for all runs.  Started again, it continues where it was stopped.

set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
OUTPUT=${OUTPUT:-runs/variants}
STEPS=${STEPS:-300}
START_STEPS=${START_STEPS:-400}
NPROC=${NPROC:-2}
read -r -a seeds <<<"${SEEDS:-3}"

"$PYTHON" -c 'import sys
from moiie_megatron.data.digits.dataset import write_digits
write_digits(sys.argv[1], train=int(sys.argv[2]), test=100)' "$OUTPUT/data" "${PICTURES:-6000}"

# add_run NAME FILE RECORDS START [override...]: what tools/train.py is given; START may be empty.
runs=()
add_run() {
    runs+=(
        "$root/examples/configs/$2.yaml" "output=$OUTPUT/$1"
        "data.sources=[{records: $OUTPUT/data/$3, images: $OUTPUT/data/images}]"
        "data.tokenizer=$OUTPUT/data/tokenizer.model"
    )
    [[ -z $4 ]] || runs+=("checkpoint.init_from=$OUTPUT/$4")
    runs+=("${@:5}")
}

add_run dense-start digits-dense captions.json "" "train.steps=$START_STEPS" "$@"
add_run stage1 digits-stage1 captions.json dense-start "train.steps=$(((START_STEPS + 3) / 4))" "$@"
names=()
for seed in "${seeds[@]}"; do
    for variant in dense vanilla modality moiie; do
        names+=("$variant-$seed")
        choice=("moe.variant=$variant" "parallel.expert=$NPROC")
        # Without experts there is no rate for them.
        [[ $variant != dense ]] || choice+=(stage.preset=stage-dense stage.learning_rates.moe=null)
        add_run "$variant-$seed" digits-stage2 train.jsonl stage1 \
            "${choice[@]}" "train.steps=$STEPS" "train.seed=$seed" "$@"
    done
done

# One job for all: processes start and find each other once.
NPROC_PER_NODE=$NPROC bash "$root/examples/torchrun.sh" "$root/tools/train.py" "${runs[@]}"

for name in "${names[@]}"; do
    echo "== $name"
    "$PYTHON" "$root/tools/accuracy.py" "$OUTPUT/$name" --records "$OUTPUT/data/test.jsonl" \
        --images "$OUTPUT/data/images" --out "$OUTPUT/$name/scores.json" --max-new-tokens 8 \
        --limit "${QUESTIONS:-420}"
done

"$PYTHON" -c 'import json, sys
from pathlib import Path
from moiie_megatron.analysis.variants import format_table, plot_variants, read_run, to_json
output, *names = sys.argv[1:]
runs = [read_run(Path(output, name)) for name in names]
print(format_table(runs))
Path(output, "comparison.json").write_text(json.dumps(to_json(runs), indent=1) + "\n")
print(plot_variants(runs, Path(output, "comparison.png")))
' "$OUTPUT" "${names[@]}"
