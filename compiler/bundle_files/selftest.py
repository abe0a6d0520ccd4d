"""Checks that this bundle is whole and answers here as where it was written: python selftest.py (exit code 0 or 1)."""

import hashlib
import re
import sys

import numpy as np
import onnxruntime as ort
from run import BUNDLE, HERE, open_session, run


def check_files():
    """Every file has the sha256 that SHA256SUMS lists (as `sha256sum --check` reads it)."""
    listed = [line.split("  ", 1) for line in (HERE / "SHA256SUMS").read_text().splitlines()]
    wrong = [name for digest, name in listed if not (HERE / name).is_file() or _sha256(HERE / name) != digest]
    return f"{len(listed)} files as listed", f"changed or missing: {', '.join(wrong)}" if wrong else ""


def check_versions():
    """onnxruntime is new enough for the kernels that the model was checked against."""
    have, need = ([int(number) for number in re.findall(r"\d+", text)[:2]] for text in _versions())
    said = "onnxruntime {}, written with {}".format(ort.__version__, BUNDLE["written_with"]["onnxruntime"])
    return said, f"{said}; at least {BUNDLE['requires']['onnxruntime']} is needed" if have < need else ""


def check_answers():
    """The outputs for the sample input are the expected ones."""
    got, worst, where = run(open_session(), dict(np.load(HERE / "sample" / "inputs.npz"))), 0.0, ""
    for name, expected in np.load(HERE / "sample" / "expected.npz").items():
        error = relative_error(expected, got[name])
        if not error <= worst:
            worst, where = error, name
    said = f"largest relative error {worst:.1e} (allowed {BUNDLE['tolerance']:.1e})"
    return said, "" if worst <= BUNDLE["tolerance"] else f"{said} in {where}"


def check_tokens():
    """The decoder continues the sample prompt with the expected tokens."""
    from generate import MODEL, generate

    got = generate(open_session(), MODEL["prompt"], len(MODEL["expected"]))
    return f"{len(got)} tokens as expected", "" if got == MODEL["expected"] else f"{got}, not {MODEL['expected']}"


def relative_error(expected, got):
    """max |expected - got| / max |expected|; whole numbers must be equal, and NaN where NaN is expected."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return float("inf")
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(expected, got) else float("inf")
    a, b = expected.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    return float(np.abs(a - b)[finite].max(initial=0.0) / max(np.abs(a[finite]).max(initial=0.0), 1e-30))


def _versions():
    return ort.__version__, BUNDLE["requires"]["onnxruntime"]


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main():
    """Prints a line for each check; returns the exit code."""
    print(f"{BUNDLE['model']}: onnxlathe {BUNDLE['written_with']['onnxlathe']}")
    checks = [check_files, check_versions, check_answers, *([check_tokens] if "decoder" in BUNDLE else [])]
    failed = 0
    for check in checks:
        try:
            said, problem = check()
        except Exception as error:  # whatever it is, the bundle does not work here
            said, problem = "", f"{type(error).__name__}: {error}".splitlines()[0]
        print("FAIL" if problem else "ok  ", check.__name__.removeprefix("check_"), problem or said, sep="  ")
        failed += bool(problem)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
