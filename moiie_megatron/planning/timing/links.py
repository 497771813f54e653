"""How long a collective takes on the links between ranks."""

from __future__ import annotations

from moiie_megatron.planning.hardware import Efficiency, Hardware
from moiie_megatron.planning.trace import RankTrace, Transfer

_POINT_TO_POINT = ("send", "recv")


def crosses_nodes(transfer: Transfer, trace: RankTrace, stages: int, hardware: Hardware) -> bool:
    """Whether some of the bytes leave the rank's node.

    Args:
        transfer: One of the trace's transfers.
        trace: Of the rank that sends.
        stages: Pipeline ranks: a stage sends to the next one, ``world / stages`` ranks away.
        hardware: Its ``ranks_per_node`` says which ranks share a node.
    """
    return any(
        hardware.node_of(peer) != hardware.node_of(trace.rank)
        for peer in _peers(transfer, trace, stages)
    )


def transfer_seconds(
    transfer: Transfer,
    trace: RankTrace,
    stages: int,
    hardware: Hardware,
    efficiency: Efficiency,
) -> float:
    """Seconds of all calls of a transfer, without anything behind which they hide.

    Within a node ranks send over the node's links.  A ring through several nodes (reduction,
    gather, broadcast) enters and leaves a node through the network ports of all its members in the
    node at once, as NCCL builds its rings.  An all-to-all sends to every member an equal part,
    those of the node and the others at the same time.

    Args:
        transfer: One of the trace's transfers.
        trace: Of the rank that sends.
        stages: Pipeline ranks.
        hardware: Bandwidths.
        efficiency: Fraction that is reached of them, and the latency of a call.
    """
    node = hardware.node_link * efficiency.links
    network = hardware.network_link * efficiency.links
    sent = transfer.bytes_sent
    waits = transfer.calls * efficiency.latency
    if not crosses_nodes(transfer, trace, stages, hardware):
        return sent / node + waits
    if transfer.operation in _POINT_TO_POINT:
        return sent / network + waits
    members = len(set(transfer.members))
    near = _members_in_node(transfer, trace, hardware)
    if transfer.operation.startswith("all_to_all"):
        fraction_near = (near - 1) / (members - 1)
        return max(sent * fraction_near / node, sent * (1 - fraction_near) / network) + waits
    return max(sent / node, sent / (near * network)) + waits


def _peers(transfer: Transfer, trace: RankTrace, stages: int) -> tuple[int, ...]:
    if transfer.operation not in _POINT_TO_POINT:
        return transfer.members
    distance = trace.world // stages
    step = distance if transfer.operation == "send" else -distance
    # The last stage sends gradients back, and, with virtual stages, to the first one.
    return ((trace.rank + step) % trace.world, (trace.rank - step) % trace.world)


def _members_in_node(transfer: Transfer, trace: RankTrace, hardware: Hardware) -> int:
    node = hardware.node_of(trace.rank)
    return max(1, sum(hardware.node_of(member) == node for member in set(transfer.members)))
