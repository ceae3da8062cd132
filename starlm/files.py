"""Files and folders that appear whole or not at all."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlm.errors import InputError


def write_whole(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, atomically and durably.

    Raises:
        InputError: the disk is full or the folder is not writable; the old file is untouched.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with readable_os_errors(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends without an error, and vanishes otherwise.

    It is written beside its place, synced file by file, and renamed. Leftovers of killed processes are
    removed. An existing `path` is replaced.

    Raises:
        InputError: the disk is full or the place is not writable; an existing `path` is untouched.
    """
    with readable_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{path.name}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        partial.mkdir()
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                _sync(file)
            _sync(partial)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make the file or folder durable (folders cannot be opened for it on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def readable_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission at `path` into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"The disk is full: {path} could not be written. What was there before is untouched. Free "
                f"some space or choose another folder, then run the same command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise InputError(
                f"Cannot write {path}: {error.strerror}. Choose a folder that you may write to."
            ) from error
        raise
