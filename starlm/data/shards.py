"""Prepared data: a folder of token files that can be memory mapped.

    meta.json  tokenizer.json  train-00000.tokens.npy  train-00000.documents.npy  validation-00000...

`tokens` is 1-D (uint16, or uint32 for a vocabulary above 65536). `documents` is int64: where in this shard
each document begins. Every document begins with <|bos|> and lies in one shard. Of conversations there is
`train-00000.learned.npy` besides, bool: the tokens that a model learns to predict.
"""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from starlm.errors import InputError
from starlm.files import settle, sha256

FORMAT = "starlm-data"
VERSION = 1
META = "meta.json"
SPLITS = ("train", "validation")
SHARD_TOKENS = 100_000_000
# The files of a shard; the last of conversations alone.
_KINDS = ("tokens", "documents", "learned")

# Tokens that `verify` looks at in one go.
_CHUNK = 1 << 24


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ShardWriter:
    """Collects the documents of one split and writes them as shards.

    Holds at most one shard in memory.
    """

    def __init__(
        self, folder: Path, split: str, *, vocab_size: int, bos: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        """Args: folder: exists. split: name. bos: put before each document. shard_tokens: begin a new shard
        before a document that would make this one longer.
        """
        if shard_tokens < 1:
            raise InputError(f"shard_tokens must be 1 or more; got {shard_tokens}.")
        self._folder, self._split, self._bos = folder, split, bos
        self._dtype, self._shard_tokens = token_dtype(vocab_size), shard_tokens
        self._tokens = array(self._dtype.char)
        self._starts = array("q")
        self._learned, self._num_learned = bytearray(), None
        self._shards: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, ids: Sequence[int], num_bytes: int, learned: Sequence[bool] | None = None) -> None:
        """Add one document.

        Args:
            ids: its tokens, without <|bos|>.
            num_bytes: UTF-8 bytes of its text.
            learned: of a conversation, which of these a model learns to predict.

        Raises:
            OSError: the disk is full.
        """
        if self._tokens and len(self._tokens) + len(ids) + 1 > self._shard_tokens:
            self._write()
        self._starts.append(len(self._tokens))
        self._tokens.append(self._bos)
        self._tokens.extend(ids)
        if learned is not None:
            self._learned += bytes([False, *learned])
            self._num_learned = (self._num_learned or 0) + sum(learned)
        self._bytes += num_bytes

    def finish(self) -> dict[str, Any]:
        """Write what is left; the split's entry of meta.json.

        Raises:
            OSError: the disk is full.
        """
        if self._tokens:
            self._write()
        return {
            "tokens": sum(shard["num_tokens"] for shard in self._shards),
            "documents": sum(shard["num_documents"] for shard in self._shards),
            "bytes": self._bytes,
            **({} if self._num_learned is None else {"learned": self._num_learned}),
            "shards": self._shards,
        }

    def _write(self) -> None:
        name = f"{self._split}-{len(self._shards):05d}"
        shard: dict[str, Any] = {"num_tokens": len(self._tokens), "num_documents": len(self._starts)}
        parts = [("tokens", self._tokens, self._dtype), ("documents", self._starts, np.int64)]
        if self._learned:
            parts.append(("learned", self._learned, np.bool_))
        for kind, values, dtype in parts:
            path = self._folder / f"{name}.{kind}.npy"
            _write_npy(path, np.frombuffer(values, dtype=dtype))
            shard[kind] = {"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)}
        self._shards.append(shard)
        self._tokens, self._starts, self._learned = array(self._dtype.char), array("q"), bytearray()


def _write_npy(path: Path, values: np.ndarray) -> None:
    """Write a 1-D array as .npy. (np.save loses the reason of the failure when the disk is full.)"""
    header = {
        "descr": np.lib.format.dtype_to_descr(values.dtype),
        "fortran_order": False,
        "shape": values.shape,
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(values.data)


class Split:
    """The documents of one split, in arrays that may be memory maps. Many threads may read it."""

    def __init__(
        self,
        name: str,
        *,
        tokens: Sequence[np.ndarray],
        starts: Sequence[np.ndarray],
        bos: int,
        num_bytes: int,
        fingerprint: str,
        learned: Sequence[np.ndarray] = (),
        num_learned: int | None = None,
        folder: Path | str = "memory",
    ) -> None:
        """Args, per shard: tokens: 1-D integer. starts: int64, beginning with 0, rising. learned: bool, for
        each token; of texts none.

        num_learned: how many tokens are. bos: id of <|bos|>. num_bytes: UTF-8 bytes of the text.
        fingerprint: names this very content. folder: where it lies, for messages.
        """
        self.folder = folder
        self.name, self.bos, self.num_bytes, self.fingerprint = name, bos, num_bytes, fingerprint
        self._tokens, self._learned = list(tokens), list(learned)
        self._bounds = [np.append(start, len(shard)) for start, shard in zip(starts, tokens, strict=True)]
        self._base = [0]
        for start in starts:
            self._base.append(self._base[-1] + len(start))
        self.num_tokens: int = sum(len(shard) for shard in self._tokens)
        self.num_documents: int = self._base[-1]
        self.conversations = bool(self._learned)
        """Whether the documents are conversations, of which not all tokens are learned."""
        self.num_learned: int = self.num_tokens if num_learned is None else num_learned

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Sequence[int]],
        *,
        name: str = "train",
        learned: Sequence[Sequence[bool]] = (),
    ) -> "Split":
        """A split in memory. Args: documents: tokens of each, beginning with <|bos|>. learned: of each, of
        conversations: which of these are learned.
        """
        arrays = [np.asarray(document, dtype=np.uint32) for document in documents]
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        tokens = np.concatenate(arrays)
        return cls(
            name,
            tokens=[tokens],
            starts=[np.cumsum(lengths) - lengths],
            bos=int(tokens[0]),
            num_bytes=0,
            learned=[np.concatenate([np.asarray(each, dtype=bool) for each in learned])] if learned else [],
            num_learned=sum(map(sum, learned)) if learned else None,
            fingerprint=hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest(),
        )

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, <|bos|> included, in stored order: int64 [num_documents]."""
        return np.concatenate([np.diff(bounds) for bounds in self._bounds])

    def read(self, document: int, start: int, stop: int, out: np.ndarray) -> None:
        """Copy tokens [start, stop) of a document into `out`: any integer dtype, stop - start elements."""
        shard, begin = self._place(document)
        out[:] = self._tokens[shard][begin + start : begin + stop]

    def read_learned(self, document: int, start: int, stop: int, out: np.ndarray) -> None:
        """Which of the tokens that `read` gives a model learns to predict: bool; of texts all."""
        shard, begin = self._place(document)
        out[:] = self._learned[shard][begin + start : begin + stop] if self._learned else True

    def learned_within(self, length: int) -> np.ndarray:
        """How many of the first `length` tokens of each document are learned: int64 [num_documents]."""
        counts = []
        for shard, bounds in enumerate(self._bounds):
            stops = np.minimum(bounds[:-1] + length, bounds[1:])
            if self._learned:
                # Sums from each start to its stop, and from there to the next start, which are left out.
                places = np.stack([bounds[:-1], stops], axis=1).ravel()
                ends = len(places) - (places[-1] == bounds[-1])
                learned = self._learned[shard].view(np.uint8)
                counts.append(np.add.reduceat(learned, places[:ends], dtype=np.int64)[::2])
            else:
                counts.append(stops - bounds[:-1])
        return np.concatenate(counts)

    def _place(self, document: int) -> tuple[int, int]:
        shard = bisect_right(self._base, document) - 1
        return shard, int(self._bounds[shard][document - self._base[shard]])


class TokenData:
    """A prepared folder: `splits["train"]` and `splits["validation"]`, memory mapped."""

    def __init__(self, folder: Path, meta: dict[str, Any], splits: dict[str, Split]) -> None:
        """See `open`."""
        self.folder, self.meta, self.splits = folder, meta, splits
        self.vocab_size: int = meta["vocab_size"]

    @classmethod
    def open(cls, folder: str | Path) -> "TokenData":
        """Open what `starlm data prepare` wrote. Sizes, headers and offsets are checked; `verify` does more.

        Raises:
            InputError: there is no prepared data, or a file of it is missing, truncated or of another kind.
        """
        folder = Path(folder)
        if not folder.exists():
            # Somebody may have been killed while replacing it. If that cannot be mended, it is missing.
            with suppress(OSError):
                settle(folder)
        meta = _read_meta(folder)
        try:
            dtype = token_dtype(meta["vocab_size"])
            if meta["dtype"] != dtype.name:
                raise damaged(
                    folder / META, f"dtype {meta['dtype']} does not fit {meta['vocab_size']} tokens"
                )
            _check_number(folder, "bos", meta["bos"], meta["vocab_size"])
            for name in SPLITS:
                for count in ("bytes", "learned"):
                    _check_number(folder, f"{count} of {name}", meta["splits"][name].get(count, 0))
            _check_file(folder, meta["tokenizer_file"])
            splits = {name: _open_split(folder, name, meta, dtype) for name in SPLITS}
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(folder / META, f"a value is missing or of another kind ({error})") from None
        return cls(folder, meta, splits)

    def verify(self) -> None:
        """Read everything: every file's SHA-256, every token in the vocabulary, <|bos|> before each document.

        Raises:
            InputError: something does not fit.
        """
        from starlm.data.tokenizer import Tokenizer

        shards = [shard for name in SPLITS for shard in self.meta["splits"][name]["shards"]]
        files = [shard[kind] for shard in shards for kind in _KINDS if kind in shard]
        for entry in [self.meta["tokenizer_file"], *files]:
            path = self.folder / entry["file"]
            if sha256(path) != entry["sha256"]:
                raise damaged(path, "its content does not match its SHA-256")
        if Tokenizer.load(self.folder).fingerprint != self.meta["tokenizer"]:
            raise damaged(self.folder / META, "it names another tokenizer than tokenizer.json")
        for shard in shards:
            path = self.folder / shard["tokens"]["file"]
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            starts = np.load(self.folder / shard["documents"]["file"], allow_pickle=False)
            for begin in range(0, len(tokens), _CHUNK):
                highest = int(tokens[begin : begin + _CHUNK].max())
                if highest >= self.vocab_size:
                    raise damaged(path, f"it has the token {highest} of a vocabulary of {self.vocab_size}")
            if (tokens[starts] != self.meta["bos"]).any():
                raise damaged(path, "a document does not begin with <|bos|>")


def damaged(path: Path, problem: str) -> InputError:
    """The error for a file of a prepared folder that cannot be used."""
    return InputError(
        f"The prepared data cannot be used: {path}: {problem}. Run starlm data prepare again, "
        f"with --overwrite."
    )


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    if not path.is_file():
        raise InputError(
            f"There is no prepared data in {folder} (no {META}). Run starlm data prepare, or give the folder "
            f"that it wrote."
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"it is not readable JSON ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise damaged(path, f'it does not say "format": "{FORMAT}"')
    if meta.get("version") != VERSION:
        raise InputError(
            f"{path} has version {meta.get('version')} of the data format; this StarLM reads "
            f"version {VERSION}. Update StarLM, or run starlm data prepare again, with --overwrite."
        )
    return meta


def _check_number(folder: Path, name: str, value: Any, below: int = 1 << 63) -> None:
    if type(value) is not int or not 0 <= value < below:
        raise damaged(folder / META, f"{name} is {value!r}")


def _check_file(folder: Path, entry: dict[str, Any]) -> Path:
    """The path of an entry {file, size, sha256} of meta.json, if the file is there in this size."""
    name = entry["file"]
    if Path(name).name != name:
        raise damaged(folder / META, f"it names the file {name}, which is not in this folder")
    path = folder / name
    if not path.is_file():
        raise damaged(path, "the file is missing")
    if path.stat().st_size != entry["size"]:
        raise damaged(path, f"it has {path.stat().st_size} bytes instead of {entry['size']}")
    return path


def _open_split(folder: Path, name: str, meta: dict[str, Any], dtype: np.dtype) -> Split:
    entry = meta["splits"][name]
    tokens: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    digest = hashlib.sha256()
    for shard in entry["shards"]:
        path = _check_file(folder, shard["tokens"])
        tokens.append(_map(path, dtype, shard["num_tokens"]))
        path = _check_file(folder, shard["documents"])
        start = np.array(_map(path, np.dtype(np.int64), shard["num_documents"]))
        if not len(start) or start[0] != 0 or start[-1] >= len(tokens[-1]) or (np.diff(start) <= 0).any():
            raise damaged(path, "its offsets are out of order")
        starts.append(start)
        if "learned" in shard:
            learned.append(
                _map(_check_file(folder, shard["learned"]), np.dtype(np.bool_), shard["num_tokens"])
            )
        digest.update((" ".join(shard[kind]["sha256"] for kind in _KINDS if kind in shard) + "\n").encode())
    if len(learned) != (len(tokens) if "learned" in entry else 0):
        raise damaged(folder / META, f"not all shards of the split {name} say what is learned of them")
    split = Split(
        name,
        tokens=tokens,
        starts=starts,
        bos=meta["bos"],
        num_bytes=entry["bytes"],
        fingerprint=digest.hexdigest(),
        learned=learned,
        num_learned=entry.get("learned"),
        folder=folder,
    )
    if not tokens or (split.num_tokens, split.num_documents) != (entry["tokens"], entry["documents"]):
        raise damaged(folder / META, f"its shards do not add up to the split {name}")
    return split


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Memory map a 1-D .npy file of this dtype and length."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise damaged(path, f"it is not a readable .npy file ({error})") from None
    if array.dtype != dtype or array.shape != (length,):
        raise damaged(
            path, f"it holds {array.dtype} of shape {array.shape} instead of {dtype} of shape ({length},)"
        )
    return array
