"""From sources to a folder of tokens: read, train a tokenizer, encode, write."""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from starlm.data.conversations import encode
from starlm.data.documents import (
    TEXT_SUFFIXES,
    Document,
    SourceFile,
    embedded_corpus,
    find_files,
    iter_documents,
    no_text,
    position_of,
    suffix_of,
)
from starlm.data.download import Progress, downloads, local
from starlm.data.shards import (
    FORMAT,
    META,
    SHARD_TOKENS,
    SPLITS,
    VERSION,
    ShardWriter,
    TokenData,
    token_dtype,
)
from starlm.data.tokenizer import FILE, Tokenizer, check_vocab_size
from starlm.errors import InputError
from starlm.files import check_place, readable_os_errors, settle, sha256, whole_folder

VOCAB_SIZE = 4096
# A tokenizer of some thousand tokens does not get better with more text, as long as it is from all over.
TOKENIZER_BYTES = 50_000_000
# Characters of a part: of each long document some are taken.
_PART = 1 << 16
# Characters encoded in one go: enough for all cores, few enough for the library's memory.
_BATCH = 1 << 22
# Documents are held out by their names, so of few documents that may be most of the text. Beyond so many
# times the share that was asked for, or that is asked for by default, held-out documents are cut.
_TOO_MUCH, _USUAL = 3, 0.05
# Bytes of a character at most: no document of a single one is to be cut.
_CHARACTER = 4
# Characters of a line that may always go to validation whole.
_LINE = 1000
# How many of the documents that were passed over are named.
_NAMED = 10
_OURS = re.compile(r"meta\.json|tokenizer\.json|(train|validation)-\d+\.(tokens|documents|learned)\.npy")
# What file managers leave in any folder.
_LITTER = re.compile(r"\.DS_Store|\._.*|\.directory|Thumbs\.db|desktop\.ini")


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What is in a prepared folder, and how it came there."""

    out: Path
    reused: bool
    """Whether the folder was there already, from the same sources and options."""
    vocab_size: int
    documents: dict[str, int]
    """Per split; so are tokens, learned and bytes."""
    tokens: dict[str, int]
    """With a <|bos|> for each document."""
    learned: dict[str, int]
    """Of texts all tokens, of conversations those of the answers."""
    bytes: dict[str, int]
    """UTF-8 bytes of the text."""
    skipped: int
    """Files, lines and rows without text, and files passed over by `skip_unreadable`."""
    skipped_first: tuple[str, ...]
    """The first of them."""
    notes: tuple[str, ...]
    """Sources of which an older copy was taken, since their server did not answer."""
    seconds: float


def prepare(
    sources: Iterable[str | Path] | Literal["embedded"],
    out: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    validation_fraction: float = 0.05,
    text_field: str = "text",
    skip_unreadable: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PrepareReport:
    """Turn documents into the folder that training reads; the same input gives the same files.

    A document belongs to validation if the hash of its source lies below `validation_fraction`; at least
    one document does, and at least one does not. If there is one document only, the end of it becomes
    validation: its last `validation_fraction`, begun at a line. So do the ends of the longest documents where
    few documents would make validation several times as large as `validation_fraction` of the text.
    Conversations are never cut, and stand in no folder with texts, since training makes rows of them in
    another way.

    Args:
        sources: files and folders (see `find_files`), addresses and datasets (see `download.local`);
            "embedded" is the Python standard library's source.
        out: the folder to write; it appears whole or not at all. If it holds this very preparation of
            unchanged sources, nothing is done.
        vocab_size: of the tokenizer to train, on the training documents; of more than 50 MB of text, on 50 MB
            from all over them; without it, 4096. See `Tokenizer.train`.
        tokenizer: one to use instead of training one; also a tokenizer.json, or a folder with one.
        validation_fraction: expected share of documents in validation, between 0 and 1.
        text_field: the key or column that holds the text in .jsonl and .parquet, or the messages of a
            conversation.
        skip_unreadable: pass over files of plain text that cannot be read or are not UTF-8, as over empty
            ones. Otherwise the first is an error.
        shard_tokens: tokens of one file at most, unless a single document has more.
        overwrite: write anew, replacing prepared data in `out`; fetch files again that have changed at their
            addresses. Other folders are never replaced.
        progress: called with a stage ("bytes downloaded", "read", "tokenizer", "encode"), and how much of how
            much is done: bytes, files, bytes, documents. The latter is None if unknown.

    Raises:
        InputError: unusable sources, options or `out`.
    """
    began = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction must be above 0 and below 1; got {validation_fraction}.")
    size = VOCAB_SIZE if vocab_size is None else vocab_size
    if tokenizer is None:
        check_vocab_size(size)
    elif vocab_size is not None:
        raise InputError(
            f"A tokenizer that is there has its vocabulary, so vocab_size ({vocab_size}) cannot be met. "
            f"Leave out vocab_size (or the preset that sets it), or tokenizer."
        )
    out = Path(out)
    with readable_os_errors(out):
        there = out.exists()
    if not there:
        check_place(out)
    notes: list[str] = []
    files = find_sources(sources, report, again=overwrite, notes=notes)
    if skip_unreadable:
        files = [replace(file, required=suffix_of(file.path.name) not in TEXT_SUFFIXES) for file in files]
    given = Tokenizer.load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    options = {
        "tokenizer": given.fingerprint if given else None,
        "vocab_size": None if given else size,
        "validation_fraction": validation_fraction,
        "text_field": text_field,
        "skip_unreadable": skip_unreadable,
        "shard_tokens": shard_tokens,
    }
    identity = _identity(files, options)
    with readable_os_errors(out):
        settle(out.resolve())
    reused = _check_out(out, identity, overwrite)
    if reused:
        return _report(reused.meta, out, notes, reused=True, seconds=time.perf_counter() - began)
    # What is used again may lie where nothing can be written.
    check_place(out)

    plan = _Plan.scan(files, text_field, validation_fraction, report)
    tokens = given or Tokenizer.train(_training_texts(plan, report), size)
    with whole_folder(out.resolve()) as folder:
        writers = {
            name: ShardWriter(
                folder, name, vocab_size=tokens.vocab_size, bos=tokens.bos, shard_tokens=shard_tokens
            )
            for name in SPLITS
        }
        done = 0
        for batch in _batches(plan.documents()):
            for (name, document), (ids, learned) in zip(batch, _encode(batch, tokens), strict=True):
                writers[name].add(ids, _bytes(document), learned)
            done += len(batch)
            report("encode", done, plan.pieces)
        tokens.save(folder / FILE)
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": tokens.vocab_size,
            "tokenizer": tokens.fingerprint,
            "tokenizer_file": {
                "file": FILE,
                "size": (folder / FILE).stat().st_size,
                "sha256": sha256(folder / FILE),
            },
            "dtype": token_dtype(tokens.vocab_size).name,
            "bos": tokens.bos,
            "splits": {name: writer.finish() for name, writer in writers.items()},
            "sources": {
                "preparation": identity,
                "options": options,
                "files": len(files),
                "skipped": len(plan.skipped),
                "skipped_first": plan.skipped[:_NAMED],
            },
        }
        if _identity(files, options) != identity:
            raise InputError("A source changed while it was read. Run the same command again.")
        # Somebody may have put something there meanwhile.
        _check_out(out, identity, overwrite)
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return _report(meta, out, notes, reused=False, seconds=time.perf_counter() - began)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a first reading of all documents tells: how to divide them."""

    files: list[SourceFile]
    text_field: str
    fraction: float
    count: int
    total: int
    """Bytes of all documents."""
    skipped: list[str]
    limit: int
    """Documents whose `position_of` lies below are validation."""
    most: float
    """Bytes that one of them may have; of a longer one the end is validation, and the rest is not."""
    pieces: int
    """How many texts `documents` yields."""

    @classmethod
    def scan(cls, files: list[SourceFile], text_field: str, fraction: float, report: Progress) -> "_Plan":
        skipped: list[str] = []
        wanted = int(fraction * 2**64)
        count = total = 0
        # Position and bytes of the first and the last document, and the bytes of those before `wanted`.
        lowest, highest, below = (1 << 64, 0), (-1, 0), []
        # The first text and the first conversation.
        first: dict[bool, str] = {}
        for done, file in enumerate(files, 1):
            for document in iter_documents([file], text_field, skipped=skipped):
                place = position, size = position_of(document.source), _bytes(document)
                count, total = count + 1, total + size
                first.setdefault(bool(document.messages), document.source)
                lowest, highest = min(lowest, place), max(highest, place)
                if position < wanted:
                    below.append(size)
            report("read", done, len(files))
        if not count:
            raise no_text(files)
        if len(first) > 1:
            raise InputError(
                f"{first[True]} is a conversation, {first[False]} a text. Prepare conversations in a folder "
                f"of their own."
            )
        talks = True in first
        if talks and count == 1:
            raise InputError(
                f"{first[True]} is the only conversation, so none is left for validation. Name more sources."
            )
        held_out = below or [lowest[1]]
        if highest[0] < wanted:
            held_out.remove(highest[1])
        most = math.inf if talks else _most(held_out, total, fraction)
        return cls(
            files=files,
            text_field=text_field,
            fraction=fraction,
            count=count,
            total=total,
            skipped=skipped,
            limit=min(max(wanted, lowest[0] + 1), highest[0]),
            most=most,
            pieces=max(count + sum(size > most for size in held_out), len(SPLITS)),
        )

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Every document with its split, in order."""
        for document in iter_documents(self.files, self.text_field):
            if self.count == 1:
                yield from _halves(document, self.fraction)
            elif position_of(document.source) >= self.limit:
                yield "train", document
            elif (size := _bytes(document)) > self.most:
                yield from _halves(document, self.most / size)
            else:
                yield "validation", document


def _encode(
    batch: list[tuple[str, Document]], tokenizer: Tokenizer
) -> list[tuple[list[int], list[bool] | None]]:
    """Tokens of documents, all texts or all conversations, and of the latter which are learned."""
    documents = [document for _, document in batch]
    if documents[0].messages:
        return [*encode([document.messages for document in documents], tokenizer)]
    return [(ids, None) for ids in tokenizer.encode_batch([document.text for document in documents])]


def _bytes(document: Document) -> int:
    return len(document.text.encode("utf-8"))


def _most(held_out: list[int], total: int, fraction: float) -> float:
    """Bytes that a held-out document may have, so that all are not far more than the fraction of the total.

    Args:
        held_out: bytes of each.
    """
    # The last is for large fractions: at least half of what training is to have.
    if sum(held_out) <= total * min(_TOO_MUCH * max(fraction, _USUAL), (1 + fraction) / 2):
        return math.inf
    # What short ones leave of their equal shares is for the longer ones.
    left = fraction * total
    for number, size in enumerate(sorted(held_out)):
        share = left / (len(held_out) - number)
        if size > share:
            return max(share, _CHARACTER)
        left -= size
    return math.inf


def _halves(document: Document, fraction: float) -> Iterator[tuple[str, Document]]:
    text = document.text
    if len(text) < 2:
        raise InputError(
            f"{document.source} is the only document and has a single character, so nothing is left for "
            f"validation. Name more sources."
        )
    cut = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    # The line that holds the cut goes to validation, unless it is long or there is no other.
    line = text.rfind("\n", 0, cut) + 1
    if line and len(text) - line <= 2 * (len(text) - cut) + _LINE:
        cut = line
    yield "train", Document(text=text[:cut], source=document.source)
    yield "validation", Document(text=text[cut:], source=document.source)


def _training_texts(plan: _Plan, report: Progress) -> Iterator[str]:
    """What the tokenizer learns from: the documents of training, or as large a share of each as it needs."""
    share, done = TOKENIZER_BYTES / plan.total, 0
    for name, document in plan.documents():
        if name == "train":
            for text in [document.text] if share >= 1 else _share(document, share):
                yield text
                done += len(text.encode("utf-8"))
                report("tokenizer", done, None)


def _share(document: Document, share: float) -> Iterator[str]:
    """Parts of the document, chosen by their places: not by order, lest the first sources be all."""
    for begin in range(0, len(document.text), _PART):
        if position_of(f"{document.source} {begin}") < share * 2**64:
            yield document.text[begin : begin + _PART]


def _batches(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, size = [], 0
    for name, document in documents:
        batch.append((name, document))
        size += len(document.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def find_sources(
    sources: Iterable[str | Path] | str, report: Progress, *, again: bool = False, notes: list[str]
) -> list[SourceFile]:
    """The files that the sources of `prepare` mean; `again` and `notes` as of `download.local`."""
    items = [sources] if isinstance(sources, str | Path) else list(sources)
    if items == ["embedded"]:
        return embedded_corpus()
    files = find_files(local(items, report, again=again, notes=notes))
    return [replace(file, fetched=file.path.is_relative_to(downloads())) for file in files]


def _identity(files: list[SourceFile], options: dict[str, Any]) -> str:
    """SHA-256 of what the result depends on: names, sizes and times of the sources, options, format."""
    try:
        stats = [(file.name, *_stamp(file)) for file in files]
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from None
    content = [VERSION, options, stats]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def _stamp(file: SourceFile) -> tuple[int, int]:
    """Size and time of a file; of one that may be missing and is, none."""
    try:
        stat = file.path.stat()
    except OSError:
        if file.required:
            raise
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _check_out(out: Path, identity: str, overwrite: bool) -> TokenData | None:
    """The data in `out` if it is this preparation; None if `out` may be written.

    Raises:
        InputError: `out` holds something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"{out} is a file. Choose another --out, a folder.")
    names = [path.name for path in out.iterdir() if path.is_dir() or not _LITTER.fullmatch(path.name)]
    if not names:
        return None
    if META not in names or not all(_OURS.fullmatch(name) for name in names):
        raise InputError(
            f"{out} holds something else than prepared data, so it is not replaced. Choose another --out."
        )
    if overwrite:
        return None
    try:
        meta = json.loads((out / META).read_text(encoding="utf-8"))
        same = meta["sources"]["preparation"] == identity
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise InputError(
            f"{out} holds another preparation: other sources, changed since, or other options. Choose "
            f"another --out, or replace it with --overwrite (overwrite=True)."
        )
    try:
        return TokenData.open(out)
    except InputError:
        # It was this preparation, and is damaged: doing it again is what the error would advise.
        return None


def _report(
    meta: dict[str, Any], out: Path, notes: list[str], *, reused: bool, seconds: float
) -> PrepareReport:
    splits = meta["splits"]
    return PrepareReport(
        out=out,
        reused=reused,
        vocab_size=meta["vocab_size"],
        documents={name: splits[name]["documents"] for name in SPLITS},
        tokens={name: splits[name]["tokens"] for name in SPLITS},
        learned={name: splits[name].get("learned", splits[name]["tokens"]) for name in SPLITS},
        bytes={name: splits[name]["bytes"] for name in SPLITS},
        skipped=meta["sources"]["skipped"],
        skipped_first=tuple(meta["sources"]["skipped_first"]),
        notes=tuple(notes),
        seconds=seconds,
    )
