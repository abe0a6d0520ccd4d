"""onnxlathe: a compiler for ONNX models.

The public names are re-exported lazily, so that ``import onnxlathe`` costs nothing and never imports torch.
"""

# pyright: reportUnusedImport=false
from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HERE = Path(__file__).parent
if not (_HERE / "runtime").is_dir():  # Python started in a checkout: the other packages lie beside this folder
    __path__.append(str(_HERE.parent))

# name -> module that defines it, relative to this package
_EXPORTS = {
    "export": ".compiler.exporting.export",
    "export_causal_lm": ".compiler.exporting.export_lm",
    "compile": ".api",
    "optimize": ".optimizing.optimize",
    "Optimized": ".optimizing.optimized",
    "make_student": ".student",
    "analyze": ".analysis",
    "Analysis": ".compiler.analysis",
    "Budget": ".compiler.budget",
    "Compiled": ".compiler.pipeline",
    "load": ".runtime.artifact",
    "Session": ".runtime.session",
    "RankedSession": ".runtime.divided.ranks",
    "StagedSession": ".runtime.divided.stages",
    "save_ranks": ".compiler.ranks",
    "save_stages": ".compiler.save_parts",
    "Report": ".compiler.report",
    "PassRecord": ".compiler.report",
    "Pass": ".compiler.base",
    "PassContext": ".compiler.base",
    "Outcome": ".compiler.base",
    "Refusal": ".compiler.base",
    "Claim": ".compiler.base",
    "LatheError": ".runtime.errors",
    "ExportError": ".runtime.errors",
    "ModelError": ".runtime.errors",
    "PassError": ".runtime.errors",
    "VerifyError": ".runtime.errors",
    "PlanError": ".runtime.errors",
    "RuntimeUnavailable": ".runtime.errors",
}
_SUBPACKAGES = ("passes", "models", "runtime", "compiler")
_MODULES = {"distributed": ".runtime.distributed"}

__all__ = ["__version__", *_EXPORTS, *_SUBPACKAGES, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from onnxlathe import compiler, models, passes, runtime
    from onnxlathe.compiler.analysis import Analysis
    from onnxlathe.compiler.base import Claim, Outcome, Pass, PassContext, Refusal
    from onnxlathe.compiler.budget import Budget
    from onnxlathe.compiler.compiled import Compiled
    from onnxlathe.compiler.exporting.export import export
    from onnxlathe.compiler.exporting.export_lm import export_causal_lm
    from onnxlathe.compiler.ranks import save_ranks
    from onnxlathe.compiler.report import PassRecord, Report
    from onnxlathe.compiler.save_parts import save_stages
    from onnxlathe.runtime import distributed
    from onnxlathe.runtime.artifact import load
    from onnxlathe.runtime.divided.ranks import RankedSession
    from onnxlathe.runtime.divided.stages import StagedSession
    from onnxlathe.runtime.errors import (
        ExportError,
        LatheError,
        ModelError,
        PassError,
        PlanError,
        RuntimeUnavailable,
        VerifyError,
    )
    from onnxlathe.runtime.session import Session

    from .analysis import analyze
    from .api import compile
    from .optimizing.optimize import optimize
    from .optimizing.optimized import Optimized
    from .student import make_student


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name], __name__), name)
    elif name in _SUBPACKAGES:
        value = import_module(f".{name}", __name__)
    elif name in _MODULES:
        value = import_module(_MODULES[name], __name__)
    else:
        raise AttributeError(f"module 'onnxlathe' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
