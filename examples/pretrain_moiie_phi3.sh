#!/usr/bin/env bash
''':'
# MoIIE on Phi-3-mini and SigLIP-so400m-384, both stages.  Variables: examples/recipe.sh;
# values: examples/configs/phi3-stage{1,2}.yaml.  Arguments are overrides for both stages.
#
#   bash examples/pretrain_moiie_phi3.sh
#   torchrun --nproc-per-node 8 examples/pretrain_moiie_phi3.sh
#   torchrun --nproc-per-node 8 --no-python examples/pretrain_moiie_phi3.sh
#
# torchrun reads this file as Python: to Python it is a text up to the three quotes below, to
# bash the first line is an empty command.
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
train_in_turn phi3 configs/phi3-stage1 configs/phi3-stage2 -- "$@"
exit
'''
import os
import sys

os.environ["PYTHON"] = sys.executable
os.execvp("bash", ["bash", __file__, *sys.argv[1:]])
