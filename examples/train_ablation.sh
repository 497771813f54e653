#!/usr/bin/env bash
# One baseline or ablation of the paper, with every stage before it:
#
#   bash examples/train_ablation.sh phi3 vanilla
#
# First argument: llama3 or phi3; second: a file of examples/ablations/ without .yaml; further ones
# are overrides for all stages.  Variables: examples/recipe.sh.  Runs of one OUTPUT share their
# first stages: what is finished is not trained again, and all start from the same weights.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

main() {
    local backbone=${1:-} name=${2:-} first
    [[ $backbone == llama3 || $backbone == phi3 ]] ||
        fail "The first argument is '$backbone': use llama3 or phi3."
    [[ -n $name && -f $root/examples/ablations/$name.yaml ]] ||
        fail "The second argument is '$name': use $(names)."
    shift 2
    first=("configs/$backbone-stage1")
    case $name in
        clip-stage1) first=() ;;
        clip) first=(ablations/clip-stage1) ;;
        three-stage) first+=(ablations/dense) ;;
    esac
    train_in_turn "$backbone" "${first[@]}" "ablations/$name" -- "$@"
}

names() {
    local files=("$root"/examples/ablations/*.yaml)
    files=("${files[@]##*/}")
    listed "${files[@]%.yaml}"
}

main "$@"
