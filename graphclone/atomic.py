"""Atomic: files appear whole or not at all, and what was there before survives every failure."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from graphclone.errors import InputError


@contextlib.contextmanager
def replacing(*paths: str | Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Open a temporary file beside each path; when the block ends well they take the paths' places, in order.

    A file that is mapped or open keeps its old content, so a model may be saved over the file it is read from. After an
    error or an interrupt the old files stand and no temporary file is left.
    Raises: InputError where a path cannot be written or the disk is full.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with replacing(folder / "notes.txt") as (file,):
        ...     _ = file.write(b"whole or not at all")
        >>> [path.name for path in folder.iterdir()]
        ['notes.txt']
    """
    targets = [check_target(path) for path in paths]
    temporary = [target.with_name(f".graphclone-{secrets.token_hex(6)}.tmp") for target in targets]
    try:
        with contextlib.ExitStack() as stack:
            files = tuple(stack.enter_context(open(path, "xb")) for path in temporary)
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        _rename(temporary, targets)
    except OSError as error:
        raise InputError(_reason(targets[-1], error)) from error
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def check_target(path: str | Path) -> Path:
    """Check what can be checked before any work is done. Raises: InputError where a file could not be written there."""
    path = Path(path)
    try:
        parent = os.stat(path.parent).st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"cannot write '{path}': there is no folder '{path.parent}'; create it first") from None
        raise InputError(_reason(path, error)) from None
    if not stat.S_ISDIR(parent):
        raise InputError(f"cannot write '{path}': '{path.parent}' is a file, not a folder; choose another path")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return path
    except OSError as error:
        raise InputError(_reason(path, error)) from None
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot write '{path}': it is a folder; name a file in it, like '{path / 'model.onnx'}'")
    if not stat.S_ISREG(mode):
        raise InputError(f"cannot write '{path}': it is a device or pipe, and the output must be a file")
    return path


def _rename(temporary: list[Path], targets: list[Path]) -> None:
    """Rename all, or undo: every replaced file but the last is kept until the last rename is done."""
    undo: list[tuple[Path, Path | None]] = []
    try:
        for source, target in zip(temporary[:-1], targets[:-1], strict=True):
            undo.append((target, _keep(target)))
            os.replace(source, target)
        os.replace(temporary[-1], targets[-1])
    except BaseException:
        done = not temporary[-1].exists()
        for target, kept in () if done else undo:
            if kept:
                os.replace(kept, target)
            else:
                target.unlink(missing_ok=True)
        raise
    finally:
        for _, kept in undo:
            if kept:
                kept.unlink(missing_ok=True)
    for folder in {target.parent for target in targets}:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _keep(target: Path) -> Path | None:
    """Give a file a second name, by a hard link or, where the file system has none, by renaming it."""
    if not os.path.lexists(target):
        return None
    kept = target.with_name(f".graphclone-{secrets.token_hex(6)}.old")
    try:
        os.link(target, kept, follow_symlinks=False)
    except OSError:
        os.replace(target, kept)
    return kept


def _reason(path: Path, error: OSError) -> str:
    if isinstance(error, NotADirectoryError):
        return f"cannot write '{path}': part of its folder is a file; choose another path"
    advice = "free some space or choose another disk; nothing was changed"
    if isinstance(error, PermissionError):
        advice = "choose a folder you may write to"
    return f"cannot write '{path}': {error.strerror or error}; {advice}"
