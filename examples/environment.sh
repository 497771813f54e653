# shellcheck shell=bash
# Sourced by every script of this directory: root, PYTHON and environment variables.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Megatron's tensor parallelism relies on kernels running in the order they were started.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    [[ -n ${VIRTUAL_ENV:-} || ! -x $root/.venv/bin/python ]] || PYTHON=$root/.venv/bin/python
fi
export PYTHON
