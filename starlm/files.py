"""Files and folders that appear whole or not at all."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from starlm.errors import InputError, StarLMError

_FULL = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "A file is larger than the file system or ulimit -f allows",
}


def write_whole(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, atomically and durably; write into a device or pipe.

    Raises:
        StarLMError: the disk is full; the old file is untouched.
        InputError: the folder is not writable.
    """
    with readable_os_errors(path):
        # Of a link it is the file behind it.
        place = path.resolve()
        if place.is_char_device() or place.is_fifo():
            place.write_bytes(data)
            return
        settle(place)
        partial = _beside(place, "partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(place)
            sync(place.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends without an error, and vanishes otherwise.

    It is written beside its place, synced file by file, and renamed. An existing `path` is replaced.

    Raises:
        StarLMError: the disk is full; an existing `path` is untouched.
        InputError: the place is not writable.
    """
    with readable_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        settle(path)
        partial, old = _beside(path, "partial"), _beside(path, "old")
        partial.mkdir()
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                sync(file)
            sync(partial)
            # Python cannot swap two folders. Between these two renames `path` is missing; whoever is killed
            # there leaves both, and `settle` puts the old one back.
            if path.exists():
                path.rename(old)
            partial.rename(path)
            sync(path.parent)
        finally:
            settle(path)


def check_place(path: Path) -> None:
    """Look whether `path` could be written, before work that would be lost otherwise. Nothing is made.

    Raises:
        InputError: a file is in the way, or the folder is not writable.
    """
    with readable_os_errors(path):
        folder = path.resolve().parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def settle(path: Path) -> None:
    """Remove what killed processes left beside `path`; put back what one of them had just moved aside.

    Leftovers of processes that still run are theirs.
    """
    if not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(partial|old)-(\d+)")
    for leftover in path.parent.iterdir():
        match = pattern.fullmatch(leftover.name)
        if not match or _runs_elsewhere(int(match[2])):
            continue
        if match[1] == "old" and not path.exists():
            leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out that ask in this way; a killed one no longer counts.

    A folder that stays empty is removed at the end.

    Raises:
        InputError: another process is at work in it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    with readable_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"Another process is writing to {folder}. Wait for it, stop it, or choose another folder."
            ) from None
    try:
        yield
    finally:
        # Before the release: behind it, the file might be the lock of the next one already. What cannot be
        # removed stays: the folder is gone, or somebody has put something into it.
        with suppress(OSError):
            if set(os.listdir(folder)) <= {".lock"}:
                (folder / ".lock").unlink(missing_ok=True)
                folder.rmdir()
        lock.release()


def _beside(path: Path, kind: str) -> Path:
    # A leading dot: what looks for checkpoints or documents passes it over.
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def _runs_elsewhere(pid: int) -> bool:
    """Whether this is the number of a process other than this one."""
    import psutil

    return pid != os.getpid() and psutil.pid_exists(pid)


def sync(path: Path) -> None:
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
    """Turn a full disk, a missing permission or something in the way at `path` into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StarLMError(
                f"{_FULL[error.errno]}: {path} could not be written. What was there before is untouched. "
                f"Free some space or choose another folder, then run the same command again."
            ) from error
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise InputError(
                f"Cannot write {path}: it is a mount point, which cannot be replaced as a whole. Choose a "
                f"folder within it."
            ) from error
        if error.errno == errno.EISDIR:
            raise InputError(
                f"Cannot write {path}: a folder has that name. Choose another name, or remove the folder."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise InputError(
                f"Cannot write {path}: {error.strerror}. Choose a folder that you may write to."
            ) from error
        raise
