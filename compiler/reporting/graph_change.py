"""What became of the nodes that two graphs do not have in common: places where some nodes took the place of others."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence

import networkx
import onnx_ir as ir

from ..graph import FROM_KEY, PASS_KEY, qualified_op
from .graph_match import Matching
from .records import GraphChange, Replacement

SHOWN = 60


@dataclasses.dataclass
class Place:
    """Nodes that went and the nodes that came instead; either may be empty."""

    before: list[ir.Node] = dataclasses.field(default_factory=lambda: list[ir.Node]())
    after: list[ir.Node] = dataclasses.field(default_factory=lambda: list[ir.Node]())


def places(match: Matching) -> list[Place]:
    """The nodes without a partner, put together.

    A node belongs to the result that alone needs it, on each side. Two results are one place where the same pair of
    nodes reads them at the same input, where they have one name (a pass leaves its result the name of the old one), or
    where the metadata of the new nodes says what they come from.
    """
    owners = _owners(match.removed, match, new=False), _owners(match.added, match, new=True)
    together: networkx.Graph[ir.Node] = networkx.Graph()
    together.add_nodes_from(owner for side in owners for owner in side.values())
    for old, new in _links(match):
        if old in owners[0] and new in owners[1]:
            together.add_edge(owners[0][old], owners[1][new])
    origins = {f"{node.op_type}:{node.name}": node for node in match.removed}
    for node in match.added:
        owner = owners[1][node]
        if together.degree[owner]:
            continue
        for origin in node.metadata_props.get(FROM_KEY, "").split(", "):
            if origin in origins:
                together.add_edge(owners[0][origins[origin]], owner)
    number = {node: n for n, group in enumerate(networkx.connected_components(together)) for node in group}
    found: dict[int, Place] = defaultdict(Place)
    for node in match.removed:
        found[number[owners[0][node]]].before.append(node)
    for node in match.added:
        found[number[owners[1][node]]].after.append(node)
    return list(found.values())


def graph_change(match: Matching, found: Sequence[Place]) -> GraphChange:
    """The places by what became what, those with most nodes first."""
    alike: dict[Hashable, list[Place]] = defaultdict(list)
    for place in found:
        before, after = (Counter(map(qualified_op, nodes)) for nodes in (place.before, place.after))
        alike[frozenset(before.items()), frozenset(after.items()), tuple(_passes(place.after))].append(place)
    groups = sorted(alike.values(), key=lambda group: -sum(len(p.before) + len(p.after) for p in group))
    return GraphChange(
        unchanged=len(match.pairs),
        removed=len(match.removed),
        added=len(match.added),
        replacements=[_replacement(group) for group in groups[:SHOWN]],
        more=sum(map(len, groups[SHOWN:])),
    )


def _replacement(group: Sequence[Place]) -> Replacement:
    first = group[0]
    before, after = (dict(Counter(map(qualified_op, nodes)).most_common()) for nodes in (first.before, first.after))
    example = (first.after or first.before)[-1]
    return Replacement(before, after, _passes(first.after), len(group), example.name or "")


def _passes(nodes: Iterable[ir.Node]) -> list[str]:
    return list(dict.fromkeys(n.metadata_props[PASS_KEY] for n in nodes if PASS_KEY in n.metadata_props))


def _owners(nodes: Sequence[ir.Node], match: Matching, *, new: bool) -> dict[ir.Node, ir.Node]:
    """For each of ``nodes``, in the order of the graph, the last node that alone needs it: maybe itself."""
    named = {value.name for node in (match.removed if new else match.added) for value in node.outputs}
    left, owners = set(nodes), dict[ir.Node, ir.Node]()
    for node in reversed(nodes):
        readers = [use.node for value in node.outputs for use in value.uses()]
        wanted = any(value.is_graph_output() or value.name in named for value in node.outputs)
        above = {owners.get(reader) for reader in readers}
        alone = not wanted and left.issuperset(readers) and len(above) == 1
        owners[node] = (above.pop() if alone else None) or node
    return owners


def _links(match: Matching) -> Iterator[tuple[ir.Node | None, ir.Node | None]]:
    """Makers of values that mean the same."""
    for old, new in match.pairs.items():
        for x, y in zip(old.inputs, new.inputs, strict=True):
            if x is not None and y is not None:
                yield x.producer(), y.producer()
    made = {value.name: node for node in match.added for value in node.outputs}
    for node in match.removed:
        for value in node.outputs:
            if value.name in made:
                yield node, made[value.name]
