"""What an order of the nodes needs, and what no order can do without."""

from __future__ import annotations

from collections.abc import Sequence

from .lifetimes import Flow, buffers_in_order


def order_bound(flow: Flow, order: Sequence[int]) -> int:
    """Bytes that running the nodes in ``order`` needs at least."""
    change = [0] * (len(order) + 1)
    for buffer in buffers_in_order(flow, order):
        change[buffer.start] += buffer.size
        change[buffer.end] -= buffer.size
    total = most = 0
    for difference in change:
        total += difference
        most = max(most, total)
    return most


def least_bound(flow: Flow) -> int:
    """Bytes that every order needs: at each node what it reads and makes, and what was made before it for after it."""
    count = len(flow.before)
    ancestors = [0] * count  # bits
    for node, before in enumerate(flow.before):
        for other in before:
            ancestors[node] |= ancestors[other] | 1 << other
    made = flow.made
    most = 0
    for node in range(count):
        across = over = 0
        for index, tensor in enumerate(flow.tensors):
            earlier = ancestors[node] >> tensor.producer & 1
            later = tensor.kept or any(ancestors[consumer] >> node & 1 for consumer in tensor.consumers)
            if earlier and (later or node in tensor.consumers):
                across += tensor.size
                if not later and index in flow.in_place[node]:
                    over = max(over, tensor.size)
        most = max(most, across + sum(flow.tensors[index].size for index in made[node]) - over)
    return most
