"""What a pass that leaves out layers or heads of a decoder did to its cache: samples and results of the decoder before,
as the one after takes and gives them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]
KEY = "onnxlathe.kept_caches"
"""Metadata that a pass writes and the compile loop takes out again; it is not in artifacts."""


@dataclasses.dataclass(frozen=True)
class KeptCaches:
    """The caches that are left.

    Attributes:
        sources: name of each cache input and output that is left -> its name before; caches that are not there went.
            None: all are left under their names.
        heads: name (after) of each cache input and output of which heads went -> the heads that are left.
    """

    sources: Mapping[str, str] | None
    heads: Mapping[str, list[int]]

    def write(self, model: ir.Model) -> None:
        """Puts it into the model's metadata for the compile loop; follows what is there already."""
        earlier = KeptCaches.take(model) or KeptCaches(None, {})
        sources, heads = earlier.sources, dict(earlier.heads)
        if self.sources is not None:
            before = sources or {}
            sources = {new: before.get(old, old) for new, old in self.sources.items()}
            back = {old: new for new, old in self.sources.items()}
            heads = {back[name]: kept for name, kept in heads.items() if name in back}
        for name, kept in self.heads.items():
            heads[name] = [heads[name][head] for head in kept] if name in heads else kept
        model.metadata_props[KEY] = json.dumps({"sources": sources, "heads": heads})

    @classmethod
    def take(cls, model: ir.Model) -> KeptCaches | None:
        """Takes it out of the model's metadata; None where no pass wrote any."""
        text = model.metadata_props.pop(KEY, None)
        return cls(**json.loads(text)) if text is not None else None

    def of(self, arrays: Mapping[str, Array], model: ir.Model) -> dict[str, Array]:
        """A sample or the results of the decoder before, for ``model``, the one after."""
        names = {value.name for value in [*model.graph.inputs, *model.graph.outputs]}
        sources = self.sources or {}
        moved = {old for new, old in sources.items() if new in names}
        some = self.sources is not None
        caches = {name for name in arrays if name in moved or (some and name.startswith(("past", "present")))}
        kept = {name: array for name, array in arrays.items() if name not in caches}
        kept.update({new: arrays[old] for new, old in sources.items() if old in arrays})
        return {name: array[:, self.heads[name]] if name in self.heads else array for name, array in kept.items()}

    def samples(self, feeds: Iterable[Mapping[str, Array]], model: ir.Model) -> Adapted:
        """Samples for ``model``, read one at a time."""
        return Adapted(feeds, self, model)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Samples of the decoder before, as the one after takes them."""

    feeds: Iterable[Mapping[str, Array]]
    kept: KeptCaches
    model: ir.Model

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for sample in self.feeds:
            yield self.kept.of(sample, self.model)
