"""Turns what torch raises during an export into one paragraph: what, where in the user's code, what to do."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

from ...runtime.errors import ExportError

_STATIC = re.compile(r"inferred a static shape of (\d+) for dimension inputs\['([^']+)'\](\S*?)\.shape\[(\d+)\]")
# Frames of these packages are not the user's code.
_TOOLS = ("/torch/", "/onnxscript/", "/onnx_ir/", f"{Path(__file__).parent}/", "/contextlib.py")


def explain(error: BaseException, module: str) -> ExportError:
    """The ExportError that tells the user why ``module`` (a class name) could not be exported.

    Args:
        error: what ``torch.onnx.export`` raised.
        module: name of the module's class, for the message.
    """
    causes = _causes(error)
    text = _plain(str(causes[-1]))
    kind = type(causes[-1]).__name__
    where = _where(causes)
    operator = re.search(r"OpOverload\(op='([^']+)'", text)
    static = re.search(
        r"inferred a static shape of (\d+) for dimension inputs\['([^']+)'\](\S*?)\.shape\[(\d+)\]", text
    )
    if "data-dependent" in text or kind == "GuardOnDataDependentSymNode":
        reason = "it branches on a value that is only known when it runs"
        remedy = "Replace the Python `if` or loop by torch.where, masking or torch.cond, or move it out of forward()."
    elif operator and "No ONNX function" in text:
        reason = f"the operator {operator[1]} has no ONNX translation"
        remedy = "Rewrite that line with other operators, or move it out of forward()."
    elif static:
        reason = (
            f"dimension {static[4]} of input {static[2]}{static[3]} was asked to be dynamic but only {static[1]} works"
        )
        remedy = (
            "Leave it out of dynamic_shapes, or remove what ties it to that number: a parameter of that size, "
            "`int(x.shape[i])`, or an example size of 1."
        )
    else:
        reason = f"{kind}: {_first_sentence(text)}"
        remedy = "Change that line, or export a part of the module that leaves it out."
    return ExportError(f"{module} cannot be exported: {reason}{where}.", remedy)


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[\d+m", "", text).strip()


def _first_sentence(text: str) -> str:
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    # torch likes to end its first line with a colon and to say the thing in the second
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1]).rstrip(".")


def _where(causes: list[BaseException]) -> str:
    """`` (file:line in function)`` of the innermost line of user code, or nothing."""
    for cause in reversed(causes):
        frames = [(frame.filename, frame.lineno, frame.name) for frame in traceback.extract_tb(cause.__traceback__)]
        if not any(name == "forward" for _, _, name in frames):
            frames = _traced_frames(cause)
        theirs = [frame for frame in frames if not any(tool in frame[0] for tool in _TOOLS)]
        if any(name == "forward" for _, _, name in theirs):
            path, line, function = theirs[-1]
            return f" ({Path(path).name}:{line} in {function})"
    return ""


def _traced_frames(error: BaseException) -> list[tuple[str, int | None, str]]:
    """The stack torch recorded when it traced the node whose translation failed.

    The exception does not carry the node, but the translating frame has it as a local variable.
    """
    tb = error.__traceback__
    frames: list[tuple[str, int | None, str]] = []
    while tb is not None:
        node: Any = tb.tb_frame.f_locals.get("node")
        stack = getattr(node, "meta", {}).get("stack_trace") if node is not None else None
        if isinstance(stack, str):
            found = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', stack)
            frames = [(path, int(line), function) for path, line, function in found]
        tb = tb.tb_next
    return frames
