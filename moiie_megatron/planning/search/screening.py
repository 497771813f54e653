"""How layouts rank before anything is simulated: a rough time of a step, by arithmetic.

It decides which layouts are simulated first, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.flops import model_flops
from moiie_megatron.planning.hardware import Hardware
from moiie_megatron.planning.plans.jobs import Inputs
from moiie_megatron.planning.plans.plan import rank_loads
from moiie_megatron.planning.plans.state_bytes import (
    TensorGroup,
    state_bytes,
    tensor_groups,
)
from moiie_megatron.planning.step_time import work_of

_ACTIVATION = 2  # bytes of a number in bf16
_WEIGHT = 2


@dataclass(frozen=True)
class Screening:
    """What is the same in all layouts of a run.

    Attributes:
        config: The run.
        world: Number of ranks.
        hardware: What it runs on.
        inputs: What it processes.
        groups: Its tensors.
        flops: Of all tokens of a step, on all ranks.
        expert_flops: Those of them that experts compute.
    """

    config: RunConfig
    world: int
    hardware: Hardware
    inputs: Inputs
    groups: Mapping[TensorGroup, int]
    flops: float
    expert_flops: float

    def seconds(self, config: RunConfig) -> float:
        """A step of a layout, without recomputation.

        Every FLOP and byte at the middle of the assumed efficiencies; nothing is hidden.
        """
        parallel, hardware = config.active_parallel, self.hardware
        fast, slow = hardware.fast, hardware.slow
        workload, _ = self.inputs.workloads(config, self.world)
        count = len(workload.micro_batches)
        loads = rank_loads(config, self.inputs.routing(config, workload), workload)
        imbalance = max(loads) * len(loads) / sum(loads) if loads else 1.0
        flops = self.flops + self.expert_flops * (imbalance - 1)
        peak = hardware.flops * (fast.products + slow.products) / 2
        bubble = (parallel.pipeline - 1) / (config.parallel.virtual_pipeline * count)
        compute = flops / self.world / peak
        links = (fast.links + slow.links) / 2
        node, network = hardware.node_link * links, hardware.network_link * links

        positions = sum(shape.positions for shape in workload.micro_batches)
        hidden = positions * config.language.hidden_size * _ACTIVATION
        layers = config.language.num_layers / parallel.pipeline
        moe_layers = len(config.moe_layers) / parallel.pipeline
        # Sequence parallelism gathers and scatters around attention and around a dense FFN: twice
        # forward, and three times backward, where the input is gathered again.
        around = 5 * (2 * layers - moe_layers) * hidden * (parallel.tensor - 1) / parallel.tensor
        tensor = around / node
        rows = moe_layers * hidden / parallel.tensor * config.moe.top_k
        # There and back, forward and backward.
        sent = 4 * rows * (1 - 1 / parallel.expert)
        gathered = 4 * rows * (parallel.expert_tensor - 1)
        crosses = parallel.expert * parallel.expert_tensor > hardware.ranks_per_node
        experts = sent / (network if crosses else node) + gathered / node
        steady = compute + tensor + experts
        return steady * (1 + bubble) + self._data_parallel(config, node, network)

    def _data_parallel(self, config: RunConfig, node: float, network: float) -> float:
        """Reduction of gradients and gather of weights, of the pipeline rank with the most."""
        states = max(state_bytes(config, self.world, self.groups), key=lambda s: s.trained)
        replicas = self.world // (config.parallel.tensor * config.parallel.pipeline)
        if replicas == 1:
            return 0.0
        sent = states.gradients + states.trained * _WEIGHT
        is_inside = self.world <= self.hardware.ranks_per_node
        near = max(1, self.hardware.ranks_per_node // config.parallel.tensor)
        return sent / (node if is_inside else min(node, near * network))


def screening(config: RunConfig, world: int, hardware: Hardware, inputs: Inputs) -> Screening:
    """Prepare for the layouts of a run."""
    groups = tensor_groups(config)
    workload, _ = inputs.workloads(config, world)
    replicas = world // (config.parallel.tensor * config.parallel.pipeline)
    work = work_of(workload)
    layout = config.moe.layout
    experts = sum(size for group, size in groups.items() if group.is_expert)
    active = experts * layout.top_k / max(layout.num_experts, 1)
    return Screening(
        config=config,
        world=world,
        hardware=hardware,
        inputs=inputs,
        groups=groups,
        flops=model_flops(config).of(work) * replicas,
        expert_flops=6 * active * work.tokens * replicas,
    )
