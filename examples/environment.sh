# shellcheck shell=bash
# Sourced by every script of this directory: root, PYTHON and environment variables.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if nvidia-smi -L >/dev/null 2>&1; then
    # Checkpoints are copied and written by the CPU.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    # Keeps processes on the CPUs next to their GPUs; "none" does not (torchrun.sh).
    NUMA_BINDING=${NUMA_BINDING:-node}
else # more processes than cores
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    NUMA_BINDING=none
fi
# Lengths vary from step to step: memory in segments that cannot grow falls into useless pieces.
if [[ -z ${PYTORCH_CUDA_ALLOC_CONF:-} ]]; then # the older name of the same variable
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi
# Megatron's tensor parallelism relies on kernels running in the order they were started.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    [[ -n ${VIRTUAL_ENV:-} || ! -x $root/.venv/bin/python ]] || PYTHON=$root/.venv/bin/python
fi
export PYTHON
