"""Sources on the network: fetched once, continued where they broke off, verified."""

import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from starlm.data.documents import SUFFIXES, suffix_of
from starlm.errors import InputError, StarLMError
from starlm.files import only_writer, readable_os_errors, sha256, sync, write_whole

Progress = Callable[[str, int, int | None], None]

STAGE = "bytes downloaded"
ATTEMPTS = 5
"""Failures in a row, without a byte between them, after which a download is given up."""
_PAUSE, _TIMEOUT, _CHUNK = 1.0, 30.0, 1 << 20
# Answers that another try may change.
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
# In the path and the query of an address; a % is there because something is encoded already.
_AS_IT_IS = "/%:@!$&'()*+,;=?~"
_HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<path>.*))?")


def cache_folder() -> Path:
    """Where downloads stay: $STARLM_CACHE, or starlm in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("STARLM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starlm"


def downloads() -> Path:
    """Its part for single files."""
    return cache_folder() / "downloads"


class _NoAnswer(InputError):
    """The network or the server fails; what was fetched before may do."""


def local(
    sources: Iterable[str | Path], report: Progress, *, again: bool = False, notes: list[str] | None = None
) -> list[Path]:
    """The sources as paths, in order: what is on the network is fetched, unless it was before.

    Args:
        sources: paths, and as text: http:// and https:// addresses of one file each, with #sha256=HEX behind
            it if its content is known; hf:OWNER/NAME[@REVISION][/PATH], the supported files of a Hugging Face
            dataset, or of one folder or file in it. These stay in Hugging Face's own cache.
        report: called with STAGE, the bytes that came, and how many there are, or None.
        again: fetch files anew that have changed on their servers; those with #sha256= cannot, and datasets
            are asked for in any case.
        notes: receives sources of which an older copy is taken, since their server did not answer.

    Raises:
        InputError: an address that is wrong, does not answer, or sends something else than it promised.
    """
    found: list[Path] = []
    notes = [] if notes is None else notes
    for source in sources:
        if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
            found.append(_file(source, report, again, notes))
        elif isinstance(source, str) and source.lower().startswith("hf:"):
            found += _dataset(source, report, notes)
        elif source == "":
            # As a path it would be the current folder, with all that is in it.
            raise InputError("A source is empty. Name a file or a folder; the current one is called '.'.")
        else:
            found.append(Path(source))
    return found


def _file(source: str, report: Progress, again: bool, notes: list[str]) -> Path:
    url, _, fragment = source.partition("#")
    expected = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if fragment and not expected:
        raise InputError(f"{source}: behind the # may stand sha256= and 64 hex digits; got {fragment!r}.")
    address = _address(url)
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path.rpartition("/")[2]))
    if not suffix_of(name):
        raise InputError(
            f"{source} does not name a file that can be read: supported are {', '.join(SUFFIXES)}. Download "
            f"and convert it."
        )
    path = downloads() / _digest(url) / name
    with only_writer(path.parent):
        there = path.exists()
        if not there or (again and not expected):
            try:
                _download(address, path, report)
            except _NoAnswer as error:
                if not there:
                    raise
                notes.append(f"{error} Until then, the copy of it that was fetched before is used: {path}.")
        if expected and sha256(path) != expected[1].lower():
            path.unlink()
            raise InputError(f"{url} is another file than expected: its SHA-256 differs. Check the source.")
    return path


def _address(url: str) -> str:
    """`url` in the letters that HTTP has: others than ASCII's, and blanks, are encoded.

    Raises:
        InputError: it cannot be an address.
    """
    try:
        parts = urlsplit(url)
        if not (parts.hostname and parts.port != 0):
            raise ValueError("it names no server")
        # As it is written: `hostname` is in lower case.
        host = re.sub(r":\d*$", "", parts.netloc.rpartition("@")[2])
        return urlunsplit(
            parts._replace(
                netloc=parts.netloc.replace(host, host.encode("idna").decode()),
                path=quote(parts.path, safe=_AS_IT_IS),
                query=quote(parts.query, safe=_AS_IT_IS),
            )
        )
    except ValueError as error:
        raise InputError(f"{url} is no address: {error}. Check it.") from None


def _download(url: str, path: Path, report: Progress) -> None:
    """Fetch `url` into `path`, which appears whole; what came before a failure is kept and continued.

    A `path` that is there stays if the server says that it has not changed.
    """
    partial, failures = path.with_name(f".{path.name}.part"), 0
    unchanged = _unless(path)
    while True:
        before = _size(partial)
        try:
            _receive(url, partial, report, unchanged)
            break
        except urllib.error.HTTPError as error:
            if error.code == 304:
                return
            problem = f"the server answered {error.code} {error.reason}"
            if error.code == 416:
                partial.unlink(missing_ok=True)
            elif error.code not in _BUSY:
                raise InputError(f"{url}: {problem}. Check the address.") from None
        except http.client.InvalidURL as error:
            raise InputError(f"{url} is no address: {error}. Check it.") from None
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", "") or error or type(error).__name__)
        failures = 1 if _size(partial) > before else failures + 1
        if failures >= ATTEMPTS:
            # Without a tag nobody knows whether what comes next belongs to what came.
            kept = _size(partial) if _tag(partial).exists() else 0
            again = f": it goes on after the {kept:,} bytes that came" if kept else ""
            raise _NoAnswer(
                f"{url} could not be fetched: {problem}. Check the address and the network, then run the "
                f"same command again{again}."
            )
        time.sleep(_PAUSE * 2 ** (failures - 1))
    with readable_os_errors(path):
        sync(partial)
        partial.replace(path)
        _tag(path).unlink(missing_ok=True)
        if _tag(partial).exists():
            _tag(path).write_text(f"{_tag(partial).read_text()}\n{sha256(path)}")
            _tag(partial).unlink()


def _unless(path: Path) -> dict[str, str]:
    """Headers that ask for a file unless it is the one at `path`; none if that is not as it came."""
    try:
        validator, _, known = _tag(path).read_text().partition("\n")
        if known != sha256(path):
            return {}
    except (OSError, UnicodeDecodeError):
        return {}
    return {"If-None-Match" if validator.startswith('"') else "If-Modified-Since": validator}


def _receive(url: str, partial: Path, report: Progress, unchanged: dict[str, str]) -> None:
    """One try: append to `partial` what is missing of the file, or begin anew if it has changed.

    Args:
        unchanged: headers to which the server answers 304, if it has nothing new.

    Raises:
        HTTPError: 304 among others.
    """
    headers = {"User-Agent": "starlm"}
    done, tag = _size(partial), _tag(partial)
    if done and tag.exists():
        # The server sends the rest only if the file is still the same, else all of it.
        headers |= {"Range": f"bytes={done}-", "If-Range": tag.read_text()}
    else:
        headers |= unchanged
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as answer:
        if answer.status == 206 and not (answer.headers["Content-Range"] or "").startswith(f"bytes {done}-"):
            raise ConnectionError("the server sent another part of the file than it was asked for")
        done = done if answer.status == 206 else 0
        total = None if answer.length is None else done + answer.length
        etag = answer.headers["ETag"] or ""
        validator = answer.headers["Last-Modified"] if etag.startswith("W/") or not etag else etag
        with readable_os_errors(partial):
            file = partial.open("ab" if done else "wb")
            tag.write_text(validator) if validator else tag.unlink(missing_ok=True)
        with file:
            while piece := answer.read1(_CHUNK):
                with readable_os_errors(partial):
                    file.write(piece)
                    file.flush()
                done += len(piece)
                report(STAGE, done, total)
    if total is not None and done != total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")
    if total is None and not answer.chunked:
        # Nobody knows whether this was all, so whoever asks again is to get all of it.
        tag.unlink(missing_ok=True)
    if not done:
        raise ConnectionError("the server sent an empty file")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows what stays as safe as it was."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(
            "https://" if req.full_url.startswith("https://") else ("http://", "https://")
        ):
            raise InputError(f"{req.full_url} redirects to {newurl}, which is not safe. Check the address.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(file: Path) -> Path:
    """Beside what came: the server's name for the version of the file that it belongs to."""
    return file.with_name(f".{file.name.removeprefix('.')}.tag")


def _dataset(source: str, report: Progress, notes: list[str]) -> list[Path]:
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    # HTTPError is the base of their HTTP library's errors; which library that is depends on their version.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    )

    match = _HUB.fullmatch(source)
    if not match:
        raise InputError(f"{source} is no dataset: write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION/PATH.")
    name, inside, paths = match["name"], (match["path"] or "").strip("/"), []
    record = cache_folder() / "datasets" / f"{_digest(source)}.json"
    try:
        try:
            info = HfApi().dataset_info(name, revision=match["revision"], files_metadata=True)
        except (OSError, HTTPError) as error:
            # An answer that says no is one. Whether all is there, the library's cache does not tell.
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code not in _BUSY
            if refused or not (paths := _recorded(record)):
                raise
            notes.append(f"{source}: nobody answered ({_reason(error)}), so what was fetched before is used.")
            return paths
        files = [file for file in info.siblings or [] if _wanted(file.rfilename, inside)]
        if not files:
            raise InputError(f"{source} has no file that can be read: supported are {', '.join(SUFFIXES)}.")
        where: dict[str, Any] = {"repo_type": "dataset", "revision": info.sha}
        cached = [isinstance(try_to_load_from_cache(name, file.rfilename, **where), str) for file in files]
        needed = sum(file.size or 0 for file, there in zip(files, cached, strict=True) if not there)
        _check_room(source, needed, Path(constants.HF_HUB_CACHE))
        where["tqdm_class"] = _bar(report, needed)
        for file in sorted(files, key=lambda file: file.rfilename):
            path = Path(hf_hub_download(name, file.rfilename, **where))
            if file.lfs and sha256(path) != file.lfs.sha256:
                path.resolve().unlink()
                raise InputError(f"{file.rfilename} of {source} is damaged. Run the same command again.")
            paths.append(path)
    except (OSError, HTTPError, HFValidationError) as error:
        raise InputError(
            f"{source} could not be fetched: {_reason(error)}. Check the name and the network; a private "
            f"dataset needs HF_TOKEN."
        ) from None
    # Where it cannot be written, the next time needs the network.
    with suppress(OSError, StarLMError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps([str(path) for path in paths]).encode())
    return paths


def _recorded(record: Path) -> list[Path]:
    """The files of a dataset that was fetched as a whole; none if one of them is gone, or nobody knows."""
    try:
        paths = [Path(path) for path in json.loads(record.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
    return paths if all(path.exists() for path in paths) else []


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _wanted(file: str, inside: str) -> bool:
    # A dataset's card is about the data.
    if not suffix_of(file) or file == "README.md":
        return False
    return not inside or file == inside or file.startswith(f"{inside}/")


def _bar(report: Progress, total: int) -> type:
    """Hugging Face's progress bar, silent: it tells `report`, over all files."""
    from huggingface_hub.utils import tqdm

    done = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.update(kwargs.get("initial"))

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            done += int(n or 0)
            report(STAGE, done, total)

    return Bar


def _check_room(source: str, needed: int, folder: Path) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{source} is {needed / 1e9:,.1f} GB and {folder} has {free / 1e9:,.1f} GB free. Name a folder "
            f"or file of it (hf:OWNER/NAME/PATH), or set HF_HOME to a larger disk."
        )
