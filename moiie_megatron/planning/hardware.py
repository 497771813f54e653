"""What a plan runs on: GPUs by name or by their numbers, and a machine whose ranks share its cores.

Peak rates are those of data sheets.  What a step reaches of them is assumed, as two ends of a
range (``Efficiency``); every assumption is a sentence in the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moiie_megatron.config.messages import listed
from moiie_megatron.planning.gpu_peaks import peak_flops
from moiie_megatron.utils.errors import UserError

GIB: Final = 1 << 30
_TERA: Final = 1e12
_GIGA: Final = 1e9
_MAX: Final = 1e9  # of a number that a user gives


@dataclass(frozen=True)
class Efficiency:
    """What a step reaches of the peak rates: one end of a range.

    Attributes:
        products: Fraction of the peak in matrix products of FFNs and the output layer.
        experts: The same in the experts' grouped products, whose rows differ in number.
        attention: The same in attention with its projections.
        vision: The same in the vision encoder, whose matrices are smaller.
        memory: Fraction of the memory bandwidth in all other kernels.
        unfused: Fraction of the traced bytes and kernels that is left where fused kernels replace
            several plain ones (1: none is fused).
        links: Fraction of the bandwidth of links between GPUs.
        launch: Seconds that the host takes to launch a kernel.
        latency: Seconds of a collective beside its bytes.
        hides_data_parallel: Whether gradients are reduced behind the backward pass of the last
            micro-batch, and weights gathered behind the first forward pass, where the run
            overlaps them at all.
        hides_pipeline: Whether interleaved stages send behind the computation.
    """

    products: float
    experts: float
    attention: float
    vision: float
    memory: float
    unfused: float
    links: float
    launch: float
    latency: float
    hides_data_parallel: bool
    hides_pipeline: bool


# Assumed, not measured on GPUs by this project.  Published runs of similar models reach 41 to 49 %
# of the peak in all: dense Megatron-LM models (README of Megatron-LM 0.16.1), Llama-3-8B with eight
# experts (arXiv 2412.09952), Mixtral 8x22B (arXiv 2504.14960).
_GPU_FAST: Final = Efficiency(
    products=0.72,
    experts=0.65,
    attention=0.58,
    vision=0.50,
    memory=0.90,
    unfused=0.4,
    links=0.85,
    launch=4e-6,
    latency=10e-6,
    hides_data_parallel=True,
    hides_pipeline=True,
)
_GPU_SLOW: Final = Efficiency(
    products=0.55,
    experts=0.45,
    attention=0.40,
    vision=0.25,
    memory=0.70,
    unfused=1.0,
    links=0.60,
    launch=10e-6,
    latency=40e-6,
    hides_data_parallel=False,
    hides_pipeline=False,
)


@dataclass(frozen=True)
class Hardware:
    """One rank's device and its links, all in bytes, FLOP/s and bytes per second.

    Attributes:
        name: For tables.
        memory: Bytes that a process can allocate on an empty device.
        flops: Peak of matrix products in the dtype of the run.
        memory_bandwidth: Of the device's memory.
        node_link: Bytes per second that a rank sends to ranks of its node, one direction.
        network_link: The same to ranks of other nodes.
        ranks_per_node: How many consecutive ranks share a node.
        fast: What a step reaches at best.
        slow: What it reaches at worst.
        cores: CPU cores that all ranks share; None where every rank has its own device.
    """

    name: str
    memory: int
    flops: float
    memory_bandwidth: float
    node_link: float
    network_link: float
    ranks_per_node: int
    fast: Efficiency
    slow: Efficiency
    cores: int | None = None

    def node_of(self, rank: int) -> int:
        """Number of the node that holds a rank."""
        return rank // self.ranks_per_node


@dataclass(frozen=True)
class _Gpu:
    """A GPU's name in ``gpu_peaks``, GiB that torch can allocate, and bytes per second."""

    sheet: str
    memory_gib: float
    memory_bandwidth: float
    nvlink: float
    network: float


# Memory: what torch reports for an empty GPU (``get_device_properties``).  The 80, 141 and 180 GB
# of the data sheets are GiB, of which the driver takes a part.
# Memory bandwidth, and NVLink (half of the printed sum of both directions): NVIDIA's data sheets
# "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM), "DGX B200", "A100 Tensor Core GPU"
# (80 GB SXM).  Network: data sheets of the DGX systems, which have one ConnectX-7 port of 400 Gb/s
# for each H100, H200 and B200, and one ConnectX-6 port of 200 Gb/s for each A100.
_GPUS: Final = {
    "h100": _Gpu("H100", 79.1, 3.35e12, 450e9, 50e9),
    "h200": _Gpu("H200", 139.8, 4.8e12, 450e9, 50e9),
    "b200": _Gpu("B200", 178.3, 8.0e12, 900e9, 50e9),
    "a100": _Gpu("A100", 79.1, 2.039e12, 300e9, 25e9),
}
GPU_NAMES: Final = tuple(_GPUS)
CUSTOM: Final = "MEMORY,TFLOPS,NVLINK,NET"


def gpu(name: str, gpus_per_node: int = 8) -> Hardware:
    """A GPU by name, or by its numbers.

    Args:
        name: One of ``GPU_NAMES``, or ``MEMORY,TFLOPS,NVLINK,NET``: GiB, dense bf16 TFLOP/s, GB/s
            per direction to GPUs of the node and GB/s to those of other nodes.  Its memory is as
            fast, for its FLOP/s, as an H100's.
        gpus_per_node: GPUs that NVLink connects.

    Raises:
        UserError: An unknown name, or not four positive numbers.
    """
    if "," in name:
        memory, tflops, nvlink, network = _numbers(name)
        h100 = _GPUS["h100"]
        flops = tflops * _TERA
        bandwidth = flops * h100.memory_bandwidth / _peak(h100)
        values = (memory * GIB, flops, bandwidth, nvlink * _GIGA, network * _GIGA)
        title = f"GPU of {memory:g} GiB and {tflops:g} TFLOP/s"
    else:
        known = _GPUS.get(name.lower())
        if known is None:
            raise UserError(f"--gpu is {name!r}: use {listed([*GPU_NAMES, CUSTOM])}.")
        values = (
            known.memory_gib * GIB,
            _peak(known),
            known.memory_bandwidth,
            known.nvlink,
            known.network,
        )
        title = known.sheet
    memory, flops, bandwidth, node_link, network_link = values
    return Hardware(
        name=title,
        memory=int(memory),
        flops=flops,
        memory_bandwidth=bandwidth,
        node_link=node_link,
        network_link=network_link,
        ranks_per_node=gpus_per_node,
        fast=_GPU_FAST,
        slow=_GPU_SLOW,
    )


@dataclass(frozen=True)
class CpuRates:
    """What a CPU machine was measured to do with one thread per rank.

    Attributes:
        flops_per_core: FLOP/s of matrix products of the model's sizes.
        memory_bandwidth: Bytes per second of all cores together.
        gloo_bandwidth: Bytes per second that a rank sends.
        kernel_seconds: Of an operation beside its bytes and products.
        collective_seconds: Of a collective beside its bytes.
    """

    flops_per_core: float
    memory_bandwidth: float
    gloo_bandwidth: float
    kernel_seconds: float
    collective_seconds: float


def cpu_machine(cores: int, memory: int, rates: CpuRates) -> Hardware:
    """A machine on whose cores all ranks of a run take turns; what it reaches is measured.

    Args:
        cores: Of the machine.
        memory: Bytes.
        rates: Measured values: both ends of the range are the same.
    """
    reached = Efficiency(
        products=1.0,
        experts=1.0,
        attention=1.0,
        vision=1.0,
        memory=1.0,
        unfused=1.0,
        links=1.0,
        launch=rates.kernel_seconds,
        latency=rates.collective_seconds,
        hides_data_parallel=False,
        hides_pipeline=False,
    )
    return Hardware(
        name=f"CPU with {cores} cores",
        memory=memory,
        flops=rates.flops_per_core,
        memory_bandwidth=rates.memory_bandwidth / cores,
        node_link=rates.gloo_bandwidth,
        network_link=rates.gloo_bandwidth,
        ranks_per_node=1 << 30,  # all
        fast=reached,
        slow=reached,
        cores=cores,
    )


def _peak(known: _Gpu) -> float:
    peak = peak_flops(known.sheet)
    assert peak is not None, known.sheet
    return peak


def _numbers(text: str) -> tuple[float, float, float, float]:
    try:
        memory, tflops, nvlink, network = (float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--gpu is {text!r}: use {CUSTOM}, e.g. 80,989,450,50.") from None
    values = (memory, tflops, nvlink, network)
    if not all(0 < value <= _MAX for value in values):  # NaN is not
        raise UserError(
            f"--gpu is {text!r}: use four positive numbers, GiB, TFLOP/s, GB/s and GB/s."
        )
    return values
