"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path

from .errors import ModelError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary file beside ``path``, then renames it.

    Raises:
        ModelError: the disk is full, or the folder cannot be written.
    """
    with writing(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.close()
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_folder(target: Path, marker: str, kind: str) -> Generator[Path]:
    """A folder to fill, which takes the place of ``target`` when the block ends; an older one stays whole until then.

    Args:
        target: the folder to write.
        marker: a file that every folder of this kind has; a folder without it is somebody else's and is not touched.
        kind: what such a folder is, for the message.

    Raises:
        ModelError: ``target`` is something else, or cannot be written.
    """
    draft = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    with writing(target):
        if target.exists() and not (target.is_dir() and ((target / marker).exists() or not any(target.iterdir()))):
            raise ModelError(f"{target} exists and is not {kind}.", "Give another path, or remove it.")
        try:
            draft.mkdir()
            yield draft
            _replace_folder(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Generator[None]:
    """Turns what the system says while ``target`` is written into one clear error.

    Raises:
        ModelError: the disk is full, or the folder is not there or cannot be written.
    """
    try:
        if not target.parent.is_dir():
            raise ModelError(f"The folder {target.parent} does not exist.", "Create it first.")
        yield
    except OSError as error:
        # NumPy says how much it could write, and no more.
        why = error.strerror or f"there was no room for all of it ({error})"
        raise ModelError(f"{target} cannot be written: {why}.", "Check permissions and free space.") from error


def _replace_folder(draft: Path, target: Path) -> None:
    """Moves ``draft`` to ``target``; an old folder and the new one change places at once where the system can."""
    if not target.exists():
        draft.rename(target)
        return
    if _exchange(draft, target):
        return  # the old one is the draft now, and goes with it
    old = draft.with_name(f"{draft.name}-old")
    target.rename(old)
    try:
        draft.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Lets two paths change places in one step (Linux, most file systems); False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
