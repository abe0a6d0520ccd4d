"""What a pass is: a frozen dataclass that rewrites a model in place and says truthfully what it did."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ..runtime.capabilities import KernelCosts
from ..runtime.ranges import TensorRange

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
Device = Literal["cpu", "cuda"]
Gate = Literal["off", "not-slower", "faster"]


class Claim(enum.Enum):
    """What a pass promises about the numbers."""

    EXACT = "exact"
    """Same meaning: fp32 relative error <= ``Pass.tolerance`` against the graph before the pass."""
    APPROXIMATE = "approximate"
    """The numbers change on purpose; a quality budget, not the equivalence check, decides."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A place where a pass could have acted and did not.

    Attributes:
        node: name of the node at which the pattern was anchored.
        rule: the rule that nearly matched, e.g. ``"MatMul + Add -> Gemm"``.
        reason: why not, in words a user can act on.
    """

    node: str
    rule: str
    reason: str


@dataclasses.dataclass
class Outcome:
    """What one run of a pass did.

    Attributes:
        counts: how many times each rule fired, e.g. ``{"Gelu(erf)": 6}``. Empty means: nothing changed.
        notes: remarks for the report, e.g. which of two equivalent forms was chosen and why.
        refusals: near misses with their reasons.
        ort_config: session options the rewritten graph needs to run as intended (see ``runtime/artifact.py``).
        ranges: ranges of values by name, as calibrated or taken over; the report keeps them for a second compile.
    """

    counts: Counter[str] = dataclasses.field(default_factory=lambda: Counter[str]())
    notes: list[str] = dataclasses.field(default_factory=lambda: list[str]())
    refusals: list[Refusal] = dataclasses.field(default_factory=lambda: list[Refusal]())
    ort_config: dict[str, Any] = dataclasses.field(default_factory=lambda: dict[str, Any]())
    ranges: dict[str, TensorRange] = dataclasses.field(default_factory=lambda: dict[str, TensorRange]())

    @property
    def changed(self) -> bool:
        """Whether the model was modified."""
        return bool(self.counts)

    def refuse(self, node: ir.Node, rule: str, reason: str) -> None:
        """Records a near miss at ``node``."""
        self.refusals.append(Refusal(node.name or f"<{node.op_type}>", rule, reason))


def no_progress(message: str) -> None:
    """The progress sink that says nothing."""


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the model. Nothing global.

    Attributes:
        device: the execution provider the artifact is compiled for.
        threads: intra-op threads of the target; 0 means ONNX Runtime's default.
        feeds: calibration samples, ``{input name: array}`` each, which can be read more than once; () for none.
        ranges: ranges of values by name that an earlier compile found; what is known needs no samples.
        seed: seed of anything random.
        progress: called with a short line for work that takes longer than about two seconds.
        costs: measured relative kernel costs of the target, for choosing between equivalent forms.
        reference: the last graph of this compile in which nothing was quantized; not to be changed.
        original: the graph that this compile began with; not to be changed.
    """

    device: Device = "cpu"
    threads: int = 0
    feeds: Iterable[Feeds] = ()
    ranges: Mapping[str, TensorRange] = dataclasses.field(default_factory=lambda: dict[str, TensorRange]())
    seed: int = 0
    progress: Callable[[str], None] = no_progress
    costs: KernelCosts = dataclasses.field(default_factory=KernelCosts)
    reference: ir.Model | None = None
    original: ir.Model | None = None


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewrite of a model. Subclasses are frozen dataclasses; their fields are their options.

    Class attributes:
        name: the name used in reports, presets and on the command line (kebab-case).
        claims: what is promised about the numbers.
        tolerance: largest relative error allowed when ``claims`` is EXACT.
        gate: what the speed gate asks of this pass: ``"off"`` for what can only take work away, ``"not-slower"``, or
            ``"faster"`` for what is only worth its change to the graph if every sample gains.
        changes_signature: whether changing inputs or outputs is this pass's declared job.
    """

    name: ClassVar[str]
    claims: ClassVar[Claim] = Claim.EXACT
    tolerance: ClassVar[float] = 1e-5
    gate: ClassVar[Gate] = "not-slower"
    changes_signature: ClassVar[bool] = False

    def expected(self, results: Mapping[str, Array]) -> dict[str, Array]:
        """What the graph after this pass should give, from what the graph before gave: the same.

        A pass whose declared job is to change an output (``changes_signature``) says here how.
        """
        return dict(results)

    @abc.abstractmethod
    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        """Rewrites ``model`` in place and returns what was done.

        Args:
            model: a valid model; it is modified in place and must be valid afterwards.
            context: target, feeds, seed, progress, costs.
        """
