"""Presets: named pipelines, readable top to bottom; and how names become passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..compiler.base import Pass
from ..compiler.budget import Budget
from ..runtime.errors import PassError
from . import PASSES
from .quantization.quantize_static import QuantizeStatic
from .quantization.smooth_quant import SmoothQuant


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named pipeline.

    Attributes:
        description: what it is for.
        passes: pass names in order, or passes with the options that the preset wants.
        speed_gate: whether each pass is measured on the target and dropped if slower, unless the user says otherwise.
    """

    description: str
    passes: tuple[str | Pass, ...]
    speed_gate: bool


_CLEAN = ("cleanup", "simplify-shapes", "fold-constants")
_FUSE = (
    "fuse-gelu",
    "fuse-normalization",
    "fuse-group-query-attention",
    "fuse-rotary",
    "fuse-attention",
    "pack-qkv",
    "fuse-qkv",
    "fuse-gate-up",
    "fuse-linear",
    "fuse-skip-normalization",
    "split-skip-normalization",
)

# alpha 0.5 is the default of the paper; the best alpha by mean square lets single values go further astray.
_INT8 = (SmoothQuant(alpha=0.5, multiply="where-it-pays"), "quantize-static", "fuse-integer-product")
# Unlike cpu-int8: 7 bits of weights, so that the 16-bit sums of x86 without VNNI do not saturate, whoever runs it; and
# no speed gate, as this machine is not the one that will run it.
_EDGE = (_INT8[0], QuantizeStatic(reduced=True), "fuse-integer-product")
# Integer products of q, k and v are so fast that splitting a joined one costs more than it saves.
_FUSE_INT8 = tuple(name for name in _FUSE if name != "fuse-qkv")

PRESETS: dict[str, Preset] = {
    "basic": Preset(
        "Same operators, less of them: dead, duplicate, constant work removed.", (*_CLEAN, "cleanup"), False
    ),
    "cpu-int8": Preset(
        "int8 on the CPU provider, calibrated: needs samples.",
        ("upgrade-opset", *_CLEAN, "fuse-conv", *_FUSE_INT8, "cleanup", *_INT8, "cleanup"),
        True,
    ),
    "cpu-int8-dynamic": Preset(
        "int8 on the CPU provider without samples: scales of activations are found in each run.",
        ("upgrade-opset", *_CLEAN, "fuse-conv", *_FUSE_INT8, "cleanup", "quantize-dynamic", *_INT8[2:], "cleanup"),
        True,
    ),
    "cpu-int4": Preset(
        "Weights in blocks of 4 bits (head and tables 8) on the CPU provider, the rest as cpu-fp32.",
        ("upgrade-opset", *_CLEAN, *_FUSE, "quantize-weights", "cleanup"),
        True,
    ),
    "edge": Preset(
        "Small, quick to load, little memory, one answer on every CPU: int8 with weights of 7 bits; needs samples.",
        ("upgrade-opset", *_CLEAN, "fuse-conv", *_FUSE_INT8, "cleanup", *_EDGE, "cleanup"),
        False,
    ),
    "cpu-fast": Preset(
        "Less of every part (1.5 x in fp32), chosen by what it costs, then int8 on the CPU provider: needs samples.",
        ("upgrade-opset", *_CLEAN, "fuse-conv", *_FUSE_INT8, "cleanup", "prune-adaptive", "cleanup", *_INT8, "cleanup"),
        True,
    ),
    "cuda-fp16": Preset(
        "float16 on the CUDA provider, sums in float32; samples show what must stay float32.",
        ("upgrade-opset", *_CLEAN, "fuse-conv", *_FUSE, "cleanup", "convert-float16", "cleanup"),
        True,
    ),
    "cpu-fp32": Preset("fp32 on the CPU provider, answers equal.", ("upgrade-opset", *_CLEAN, *_FUSE, "cleanup"), True),
}


def make_pass(name: str, **options: object) -> Pass:
    """The pass called ``name`` with ``options``.

    Raises:
        PassError: no such pass, or an option it does not have; the message lists what there is.
    """
    if name not in PASSES:
        raise PassError(f"There is no pass {name!r}.", f"Passes: {', '.join(PASSES)}. Presets: {', '.join(PRESETS)}.")
    kind = PASSES[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    unknown = [option for option in options if option not in fields]
    if unknown:
        raise PassError(f"The pass {name!r} has no option {unknown}.", f"Its options: {', '.join(fields) or 'none'}.")
    hints = get_type_hints(kind)
    for option, value in options.items():
        if isinstance(value, str) and Budget in get_args(hints[option]):
            options[option] = value = _budget(name, option, value)
        if not _fits(value, hints[option]):
            say = repr if get_origin(hints[option]) is Literal else str
            wanted = ", ".join(map(say, get_args(hints[option]))) or hints[option].__name__
            raise PassError(f"The option {option} of {name!r} cannot be {value!r}.", f"It takes: {wanted}.")
    try:
        return kind(**options)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise PassError(f"The pass {name!r} refuses its options: {error}.", "See `onnxlathe passes`.") from error


def _budget(name: str, option: str, text: str) -> Budget:
    try:
        return Budget.parse(text)
    except ValueError as error:
        raise PassError(
            f"The option {option} of {name!r} cannot be read.", f"{error}."[:1].upper() + f"{error}."[1:]
        ) from error


def _fits(value: object, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``: a plain class, a Literal, a tuple, or a choice of these."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin is not None:
        return isinstance(value, origin)
    if isinstance(value, bool):  # Python counts True as an int
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def resolve_passes(passes: str | Sequence[str | Pass]) -> tuple[list[Pass], bool]:
    """Turns a preset name, or a list of names and pass values, into passes and the speed gate's default.

    Raises:
        PassError: an unknown name, or something that is no pass.
    """
    if isinstance(passes, str):
        if passes in PRESETS:
            preset = PRESETS[passes]
            return [item if isinstance(item, Pass) else make_pass(item) for item in preset.passes], preset.speed_gate
        return [make_pass(passes)], False
    steps: list[Pass] = []
    for item in passes:
        if isinstance(item, str):
            steps += resolve_passes(item)[0]
        elif isinstance(item, Pass):  # pyright: ignore[reportUnnecessaryIsInstance]
            steps.append(item)
        else:
            raise PassError(f"{item!r} is not a pass.", "Give pass names or values such as FuseGelu().")
    return steps, False
