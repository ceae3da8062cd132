"""Documents: where text comes from, and which split each piece of it belongs to."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlm.data.conversations import Message, check_messages
from starlm.errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")
# The keys or columns that are looked for: of texts, and of conversations.
TEXT, TALKS = "text", ("messages", "conversations")
_NAME_IT = (
    "Name the key or column that holds the text, or the messages, with text_field. Questions and answers in "
    'columns of their own are to be written as {"messages": [{"role": "user", "content": ...}, {"role": '
    '"assistant", "content": ...}]}.'
)

# Tests repeat themselves; encodings and pydoc_data are tables and prose, 2 of 12 MB, that would teach a code
# model to recite code pages; lib2to3 comes and goes between Python versions.
_NOT_EMBEDDED = frozenset(
    {
        *("test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"),
        *("encodings", "pydoc_data"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, or one conversation, that a model reads as a whole."""

    text: str
    """Of a conversation all that is said in it."""
    source: str
    """Where it came from: its file's name, and line or row (from 1) if the file holds several documents."""
    messages: tuple[Message, ...] = ()
    """Of a conversation."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file that holds documents."""

    path: Path
    name: str
    """Path relative to the folder that was asked for, with "/": the same on every machine. Unique."""
    required: bool = True
    """Whether it is an error that the file cannot be read or is not text; otherwise it counts as empty."""
    fetched: bool = False
    """Whether it is a copy of what is on a server."""


def find_files(paths: Iterable[str | Path]) -> list[SourceFile]:
    """The supported files that `paths` mean: paths in the order given, each folder's files sorted by name.

    Folders are searched through; what is hidden in them (a name with a leading dot) and what has another
    suffix is left out. A file that can be reached in two ways is taken once.

    Args:
        paths: files and folders.

    Raises:
        InputError: a path is missing, a file has no supported suffix, or there is no supported file at all.
    """
    return _find_files([Path(path) for path in paths], frozenset())


def _find_files(paths: list[Path], exclude: frozenset[str]) -> list[SourceFile]:
    found: list[SourceFile] = []
    seen: set[Path] = set()
    names: dict[str, int] = {}
    for root in paths:
        for path, name in _files_of(root, exclude):
            resolved = path.resolve()
            if resolved in seen:
                continue
            seen.add(resolved)
            # Two folders may hold files of one name; the split of a document depends on the name.
            names[name] = names.get(name, 0) + 1
            found.append(SourceFile(path=path, name=name if names[name] == 1 else f"{name}~{names[name]}"))
    if not found:
        where = ", ".join(str(path) for path in paths) or "an empty list of paths"
        raise InputError(f"No file to read in {where}. Supported are {_supported()}.")
    return found


def _files_of(root: Path, exclude: frozenset[str]) -> Iterator[tuple[Path, str]]:
    if not root.exists():
        raise InputError(f"There is no file or folder {root}. Check the path.")
    if not root.is_dir():
        if not root.is_file():
            raise InputError(
                f"{root} is no file but a pipe or a device. Write its content into a file first."
            )
        if not suffix_of(root.name):
            raise InputError(
                f"{root} cannot be read as documents: supported are {_supported()}. Convert the file, or "
                f"rename it if it is plain text."
            )
        yield root, root.name
        return
    files: list[tuple[tuple[str, ...], Path]] = []
    visited: set[Path] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        # Linked folders are followed, so a link that points upwards would go round for ever.
        resolved = Path(folder).resolve()
        if resolved in visited:
            folders.clear()
            continue
        visited.add(resolved)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in exclude)
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not suffix_of(name):
                continue
            # Reading a pipe would wait for ever. What cannot be looked at is for the reader to complain of.
            if os.path.isfile(path) or not os.path.exists(path):
                files.append((path.relative_to(root).parts, path))
    for parts, path in sorted(files):
        yield path, "/".join(parts)


def left_out(paths: Iterable[str | Path]) -> dict[str, int]:
    """How many files `find_files` passes over for their suffix, by suffix, the most frequent first.

    Args:
        paths: files and folders that `find_files` takes; what is hidden in them does not count.
    """
    counts: Counter[str] = Counter()
    for root in paths:
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            counts.update(
                Path(folder, name).suffix.lower() or "no suffix"
                for name in names
                if not name.startswith(".") and not suffix_of(name)
            )
    return dict(counts.most_common())


def suffix_of(name: str) -> str:
    """The supported suffix that the file's name ends with, or an empty string."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def _supported() -> str:
    return ", ".join(SUFFIXES)


def embedded_corpus() -> list[SourceFile]:
    """The Python standard library's own source files, sorted by name: a corpus that is always there.

    Raises:
        InputError: this Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    try:
        found = _find_files([root], _NOT_EMBEDDED)
    except InputError:
        found = []
    files = [
        SourceFile(path=file.path, name=file.name, required=False)
        for file in found
        if file.name.endswith(".py")
    ]
    if not files:
        raise InputError(
            f"This Python has no standard library sources in {root}, which are the embedded corpus. Name "
            f"your own files or folders instead."
        )
    return files


def iter_documents(
    files: Iterable[SourceFile], text_field: str = TEXT, *, skipped: list[str] | None = None
) -> Iterator[Document]:
    """The documents of `files`, in order, one at a time.

    Text files (.txt .md .py) are one document each; .jsonl and .jsonl.gz have one per line; .parquet has
    one per row. Where a line or row holds messages instead of a text, or a line is a list of them, it is a
    conversation. What holds no text (nothing, white space, or null), and a conversation in which nobody
    answers, is passed over.

    Args:
        files: what to read.
        text_field: the key or column that holds the text, or the messages, in .jsonl and .parquet; if it is
            TEXT, TALKS are looked for, too.
        skipped: receives the sources that were passed over.

    Raises:
        InputError: a file cannot be read or decoded; the message names file and byte, line or row.
    """
    for file in files:
        for document in _documents_of(file, text_field):
            if document.text.strip():
                yield document
            elif skipped is not None:
                skipped.append(document.source)


def no_text(files: Sequence[SourceFile]) -> InputError:
    """The error where `iter_documents` yields nothing."""
    places = ", ".join(str(file.path) for file in files[:3]) + (", ..." if len(files) > 3 else "")
    return InputError(f"There is no text in {places}: every document is empty. Name other sources.")


def _documents_of(file: SourceFile, text_field: str) -> Iterator[Document]:
    suffix = suffix_of(file.path.name)
    try:
        if suffix in TEXT_SUFFIXES:
            yield Document(text=_read_text(file), source=file.name)
        elif suffix == ".parquet":
            yield from _read_parquet(file, text_field)
        elif suffix == ".jsonl.gz":
            with gzip.open(file.path, "rb") as lines:
                yield from _read_lines(file, text_field, lines)
        else:
            with file.path.open("rb") as lines:
                yield from _read_lines(file, text_field, lines)
    except OSError as error:
        _raise_unreadable(error, file.path)
    except InputError as error:
        if not file.fetched:
            raise
        raise InputError(
            f"{error} The file is a copy of what a server sent: starlm data prepare --overwrite "
            f"(overwrite=True) asks for it again."
        ) from None


def _read_text(file: SourceFile) -> str:
    try:
        data = file.path.read_bytes()
    except OSError:
        if file.required:
            raise
        return ""
    try:
        offset, what = data.index(b"\0"), "a NUL byte"
    except ValueError:
        try:
            return data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            offset, what = error.start, f"the byte 0x{data[error.start]:02x}, which is not UTF-8"
    if not file.required:
        return ""
    raise InputError(
        f"{file.path} is not a text file: at byte offset {offset} there is {what}. Convert the file to "
        f"UTF-8, leave it out, or pass over all such files with --skip-unreadable (skip_unreadable=True)."
    )


def _read_lines(file: SourceFile, text_field: str, lines: Iterable[bytes]) -> Iterator[Document]:
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{file.path}:{number}"
                value = _value_of_line(line, text_field, place)
                yield _document(value, source=f"{file.name}:{number}", place=place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{file.path} is a damaged or truncated gzip file: after line {number}, {error}. Copy or "
            f"download the file again."
        ) from None


def _value_of_line(line: bytes, text_field: str, place: str) -> Any:
    """What the line has of a text or of messages."""
    try:
        # The first line may begin with a byte order mark.
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        # A byte order mark, which is not counted, may stand before it.
        at = error.start + len(line) - len(error.object)
        raise InputError(
            f"{place} is not text in UTF-8: at byte {at} of the line there is 0x{line[at]:02x}. Convert the "
            f"file to UTF-8, or take the line out."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place} is not JSON: {error}. Each line of a .jsonl file must be one JSON object; mend the "
            f"line or take it out."
        ) from None
    if isinstance(record, list):
        return record
    if not isinstance(record, dict):
        raise InputError(
            f"{place} is not a JSON object: it begins with {line[:20].decode(errors='replace')!r}. Each line "
            f'of a .jsonl file must be one, such as {{"{text_field}": "..."}}.'
        )
    return _value(record, _fields(text_field, record, f"{place} has no key"), place)


def _fields(text_field: str, names: Iterable[str], missing: str) -> list[str]:
    """Where a text or messages can stand: what is asked for, or, if that is the usual, messages too.

    Args:
        missing: begins the message of the error.

    Raises:
        InputError: none of it is there.
    """
    wanted = (TEXT, *TALKS) if text_field == TEXT else (text_field,)
    if not (found := [field for field in wanted if field in names]):
        sought = ", ".join(f'"{field}"' for field in wanted)
        raise InputError(f"{missing} {sought}; it has {', '.join(names)}. {_NAME_IT}")
    return found


def _value(record: dict[str, Any], fields: Iterable[str], place: str) -> Any:
    """The first of these that holds something, or None."""
    for field in fields:
        value = record[field]
        if value in (None, []) or (isinstance(value, str) and not value.strip()):
            continue
        if field in TALKS and isinstance(value, str):
            raise InputError(
                f'{place}: "{field}" holds a text that begins with {value[:20]!r}, not a list of them. '
                f"Write it as a list."
            )
        return value
    return None


def _document(value: Any, *, source: str, place: str) -> Document:
    """The document that a line or a row holds; of a conversation in which nobody answers an empty one.

    Raises:
        InputError: neither a text nor a conversation.
    """
    if isinstance(value, list):
        try:
            messages = tuple(check_messages(value))
        except InputError as error:
            raise InputError(
                f"{place} is not a conversation: {error} Mend it, or take the conversation out."
            ) from None
        if not any(message.role == "assistant" for message in messages):
            return Document(text="", source=source)
        return Document(text="\n".join(m.content for m in messages), source=source, messages=messages)
    if not isinstance(value, str | None):
        raise InputError(f"{place} holds {type(value).__name__}, not text. {_NAME_IT}")
    text = value or ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: the text has half of a surrogate pair at character {error.start}, which is no "
            f"character. Mend the line or take it out."
        ) from None
    return Document(text=text, source=source)


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document]:
    # pyarrow takes a fifth of a second to import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file.path) as table:
            fields = _fields(text_field, table.schema_arrow.names, f"{file.path} has no column")
            for batch in table.iter_batches(batch_size=1024, columns=fields):
                for record in batch.to_pylist():
                    row += 1
                    place = f"{file.path}, row {row}"
                    value = _value(record, fields, place)
                    yield _document(value, source=f"{file.name}:{row}", place=place)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file.path} is not a readable Parquet file: after row {row}, {error}. Copy or download the "
            f"file again."
        ) from None


def _raise_unreadable(error: OSError, path: Path | None = None) -> None:
    raise InputError(
        f"{path or error.filename} cannot be read: {error.strerror or error}. Check the path and its "
        f"permissions."
    ) from error


def position_of(source: str) -> int:
    """Where a document lies among all, in [0, 2^64): the beginning of the SHA-256 of its source."""
    return int.from_bytes(hashlib.sha256(source.encode("utf-8", "surrogateescape")).digest()[:8], "big")
