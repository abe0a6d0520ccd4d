"""What became of the nodes that two graphs do not have in common: places where some nodes took the place of others."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

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

    A node belongs to the result that alone needs it, on each side; but an old node that is inside of what makes a
    result belongs to the new nodes whose metadata name it, if those are in one place. Two results are one place where
    the same pair of nodes reads them at the same input, where they have one name (a pass leaves its result the name of
    the old one), or, where neither is so, if the metadata of the new nodes names the old.
    """
    owners = _owners(match.removed, match, new=False), _owners(match.added, match, new=True)
    links = [(old, new) for old, new in _links(match) if old in owners[0] and new in owners[1]]
    linked = {owners[1][new] for _, new in links}
    for old, heirs in _heirs(match, owners[1]).items():
        inside = owners[0][old] is not old
        if len(heirs) == 1 and (inside or not heirs & linked):
            owners[0][old] = old
            links += [(old, heir) for heir in heirs]
    together: networkx.Graph[ir.Node] = networkx.Graph()
    together.add_nodes_from(owner for side in owners for owner in side.values())
    together.add_edges_from((owners[0][old], owners[1][new]) for old, new in links)
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


def _heirs(match: Matching, owners: Mapping[ir.Node, ir.Node]) -> dict[ir.Node, set[ir.Node]]:
    """Old nodes that the metadata of new ones name, with the owners of those."""
    named = {f"{node.op_type}:{node.name}": node for node in match.removed}
    heirs: dict[ir.Node, set[ir.Node]] = defaultdict(set)
    for node in match.added:
        for origin in node.metadata_props.get(FROM_KEY, "").split(", "):
            if origin in named:
                heirs[named[origin]].add(owners[node])
    return heirs


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
