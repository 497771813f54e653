"""Run stock Megatron-Core on the CPU over Gloo.

Megatron-Core says ``cuda`` in four ways: functions of ``torch.cuda``, literal ``device="cuda"``
arguments, ``.cuda()`` calls, and type strings such as ``torch.cuda.FloatTensor``.  Each has one
answer in ``cpu_torch.py`` or ``cpu_devices.py``; ``cpu_gloo.py`` holds what NCCL accepts and Gloo
does not.  Nothing is patched where a GPU is used, nothing is intercepted per operation (a
``TorchFunctionMode`` would cost some microseconds on every single call), and all patches are
applied once, before the first process group exists.
"""

from __future__ import annotations

import torch

from moiie_megatron.mcore.patches import cpu_devices, cpu_gloo, cpu_torch


def apply_cpu_patches() -> None:
    """Patch torch and Megatron-Core for this process; a second call does nothing.

    Raises:
        RuntimeError: CUDA has been initialised in this process already.
    """
    if cpu_torch.is_applied():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("The CPU backend was chosen after CUDA had been initialised.")
    cpu_torch.disable_compiler()
    cpu_torch.replace_cuda_functions()
    cpu_torch.keep_tensors_on_cpu()
    cpu_torch.report_cuda_type_strings()
    cpu_torch.track_cpu_generator()
    cpu_devices.redirect_literal_devices()
    cpu_gloo.pass_split_sizes_as_numbers()
    cpu_gloo.pad_uneven_parts()
    cpu_gloo.skip_collectives_of_one()
