"""What Megatron-Core and torch do without the patches; run as a program, in a process of its own.

One check per patch, by its name in ``moiie_megatron/mcore/patches/registry.py``.  A check raises
AssertionError once its patch is no longer needed.  Prints a JSON object: the failed checks and
their messages.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, jit
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, optimizer
from megatron.core.tensor_parallel import layers, mappings, random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from moiie_megatron.mcore.patches import cpu_devices, cpu_torch, warning_filters
from moiie_megatron.mcore.patches.registry import PATCHES

IS_FIRST_VERSION = megatron.core.__version__.startswith("0.16.")


def fails(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a call raises; what it raises depends on the build of torch."""
    try:
        function(*arguments)
    except (AssertionError, AttributeError, NameError, RuntimeError, TypeError, ValueError):
        return True
    return False


def source(module: str) -> str:
    """The source of a module."""
    return inspect.getsource(importlib.import_module(module))


def compiler() -> None:
    assert jit.jit_fuser in (torch.compile, torch.jit.script), jit.jit_fuser


def cuda_functions() -> None:
    arguments = {"set_device": (0,)}
    silent = ("manual_seed", "set_rng_state", "stream")
    for name in set(cpu_torch.CUDA_FUNCTIONS) - set(silent):
        assert fails(getattr(torch.cuda, name), *arguments.get(name, ())), name
    before = torch.get_rng_state()
    torch.cuda.manual_seed(17)
    torch.cuda.set_rng_state(torch.Generator().manual_seed(5).get_state())
    assert torch.equal(torch.get_rng_state(), before)


def nvtx() -> None:
    for name, arguments in (("range_push", ("a",)), ("range_pop", ()), ("mark", ("a",))):
        assert name in cpu_torch.NVTX_FUNCTIONS
        assert fails(getattr(torch.cuda.nvtx, name), *arguments), name


def tensors_on_cuda() -> None:
    assert fails(torch.zeros(1).cuda)
    assert fails(torch.nn.Linear(1, 1).cuda)


def type_strings() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert "'torch.cuda.FloatTensor'" in inspect.getsource(distrib_optimizer)


def rng_tracker() -> None:
    assert fails(random._get_cuda_rng_state)
    before = torch.get_rng_state()
    random._set_cuda_rng_state(torch.Generator().manual_seed(5).get_state())
    assert torch.equal(torch.get_rng_state(), before)


def literal_devices() -> None:
    literal = re.compile(r"""["']cuda["':]""")
    modules = cpu_devices.MODULES_WITH_LITERAL_DEVICE
    without = [name for name in modules if not literal.search(source(name))]
    # Newer versions of Megatron-Core have fewer.
    assert not without if IS_FIRST_VERSION else len(without) < len(modules), without


def split_sizes() -> None:
    assert torch.is_tensor(moe_utils.maybe_move_tensor_to_cpu(torch.zeros(1), as_numpy=True))


def uneven_parts() -> None:
    """Two processes gather one and two rows."""
    assert "torch.distributed.all_gather(" in inspect.getsource(mappings._gather_along_first_dim)
    with tempfile.TemporaryDirectory() as folder:
        pids = [os.fork() or _gather(rank, Path(folder)) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [3, 3], codes


def _gather(rank: int, folder: Path) -> int:
    code = 1
    try:
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        outputs = [torch.zeros(1, 2), torch.zeros(2, 2)]
        code = 3 if fails(dist.all_gather, outputs, outputs[rank].clone()) else 0
        # One that has left is an error to one that still connects.
        store.set(f"done {rank}", "")
        store.wait(["done 0", "done 1"])
    finally:
        os._exit(code)


def te_general_gemm() -> None:
    assert fails(
        moe_utils.router_gating_linear, torch.ones(2, 4), torch.ones(3, 4), None, torch.float32
    )


def aux_loss_scale() -> None:
    output, loss = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    moe_utils.te_general_gemm = None
    moe_utils.MoEAuxLossAutoScaler.apply(output, loss).sum().backward()
    assert fails(moe_utils.MoEAuxLossAutoScaler.set_loss_scale, torch.ones(1))


def output_layer() -> None:
    init = inspect.getsource(layers.ColumnParallelLinear.__init__)
    assert "self.sequence_parallel = config.sequence_parallel" in init
    assert "self.allreduce_dgrad = " in init
    assert "tensor_parallel.ColumnParallelLinear" in inspect.getsource(GPTModel.__init__)


def output_layer_without_apex() -> None:
    init = inspect.getsource(layers.ColumnParallelLinear.__init__)
    assert "if config.gradient_accumulation_fusion and not _grad_accum_fusion_available" in init
    assert "self.gradient_accumulation_fusion = config.gradient_accumulation_fusion" in init


def token_types_with_block_recompute() -> None:
    """Only a call with keywords names it, and the one for layers that are kept has none."""
    forward = inspect.getsource(TransformerBlock._checkpointed_forward)
    (kept,) = re.findall(r"custom\(layer_idx, layer_idx \+ 1\)\(([^)]*)\)", forward)
    assert "hidden_states" in kept and "padding_mask" not in kept, kept


def fused_adamw() -> None:
    default = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).param_groups[0]["fused"]
    assert not default
    assert not any("fused" in name for name in OptimizerConfig.__dataclass_fields__)


def bucket_order() -> None:
    """What a bucket does as soon as it is ready, or needed, with no look at the others."""
    group = param_and_grad_buffer._ParamAndGradBucketGroup
    ready = inspect.getsource(group.register_grad_ready)
    assert re.search(r"self.start_grad_sync\(", ready) and "bucket_group" not in ready
    needed = inspect.getsource(group.finish_param_sync)
    assert re.search(r"if not self.param_gather_dispatched:\s+self.start_param_sync\(\)", needed)


def results_queue() -> None:
    assert filesystem_async._results_queue is None
    assert "Manager().Queue()" in inspect.getsource(filesystem_async)


def common_state() -> None:
    parameters = inspect.signature(dist_checkpointing.save).parameters
    assert parameters["async_strategy"].default == "nvrx"


def pickles_in_checkpoints() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".metadata").write_bytes(b"cos\nmkdir\n(V" + bytes(folder / "ran") + b"\ntR.")
        assert fails(FileSystemReader(folder).read_metadata)
        assert (folder / "ran").is_dir()
    assert "weights_only=False" in inspect.getsource(DefaultLoadPlanner.load_bytes)


def optimizer_without_parameters() -> None:
    method = distrib_optimizer.DistributedOptimizer.state_dict
    assert "assert len(steps) == 1" in inspect.getsource(method)


def parameter_groups() -> None:
    for module in (optimizer, distrib_optimizer):
        assert "max_lr" not in module.param_group_identifier_keys, module


def expected_logs() -> None:
    minor = ".".join(megatron.core.__version__.split(".")[:2])
    logs = [log for log in warning_filters.EXPECTED_LOGS if minor in log.versions]
    assert logs
    assert [log.start for log in logs if log.start not in source(log.logger)] == []


CHECKS: dict[str, Callable[[], None]] = {
    "compiler": compiler,
    "cuda functions": cuda_functions,
    "nvtx": nvtx,
    "tensor.cuda()": tensors_on_cuda,
    "type strings": type_strings,
    "rng tracker": rng_tracker,
    "literal devices": literal_devices,
    "split sizes": split_sizes,
    "uneven parts": uneven_parts,
    "te_general_gemm": te_general_gemm,
    "aux loss scale": aux_loss_scale,
    "output layer": output_layer,
    "output layer without Apex": output_layer_without_apex,
    "token types with block recompute": token_types_with_block_recompute,
    "fused AdamW": fused_adamw,
    "bucket order": bucket_order,
    "results queue": results_queue,
    "common state": common_state,
    "pickles in checkpoints": pickles_in_checkpoints,
    "optimizer without parameters": optimizer_without_parameters,
    "parameter groups": parameter_groups,
    "expected logs": expected_logs,
}


def main() -> None:
    assert not cpu_torch.is_applied()
    failed = {}
    for patch in PATCHES:
        if patch.need_not_shown or not patch.is_needed_in(megatron.core.__version__):
            continue
        try:
            CHECKS[patch.name]()
        except Exception as error:
            failed[patch.name] = f"{type(error).__name__}: {error}"
    print(json.dumps(failed))


if __name__ == "__main__":
    sys.exit(main())
