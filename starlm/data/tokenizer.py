"""The tokenizer: byte-level BPE, so every text has tokens and comes back exactly."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from starlm.errors import InputError
from starlm.files import write_whole

SPECIAL = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
MIN_VOCAB = 256 + len(SPECIAL)
FILE = "tokenizer.json"
# What fills up batches in transformers. Trainers leave the pad token out of the loss, so it is one that no
# model is to predict: the end of a tool's output, which the tool writes. With <|bos|> no model would learn to
# end.
PAD = "<|output_end|>"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# GPT-4's split, with at most two digits to a token: a small vocabulary has no room for 1000 numbers.
# It never keeps "<|", a word and "|>" together, so no merge can spell a special token.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Characters encoded in one go. The library keeps about 100 bytes for each token of a text.
_PIECE = 1 << 20
# PATTERN always splits between a line end and a non-space, so a text may be cut there without a trace.
_CUT = re.compile(r"\n(?=\S)")
# Training costs the square of a word's length. What runs on like this is no word: DNA, a ruler, blank lines.
# \x1c to \x1f are blanks to Python and signs to PATTERN.
_RUN = re.compile(r"[^\W\d_]{256}|(?:[^\w\s]|[_\x1c-\x1f]){256}|\s{256}")


def check_vocab_size(vocab_size: int) -> None:
    """What `Tokenizer.train` checks first.

    Raises:
        InputError: `vocab_size` is below 265.
    """
    if vocab_size < MIN_VOCAB:
        raise InputError(
            f"vocab_size must be at least {MIN_VOCAB} (256 bytes and {len(SPECIAL)} special tokens); got "
            f"{vocab_size}."
        )


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Wrap a byte-level tokenizer of the `tokenizers` library; see `train` and `load`.

        Raises:
            InputError: it lacks a special token or a byte, its ids have gaps, or an added token takes blanks.
        """
        # Otherwise "<|bos|>" in somebody's text would become the token.
        inner.encode_special_tokens = True
        # transformers writes what its last call cut or filled up to into the file.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size()
        added = dict(sorted(inner.get_added_tokens_decoder().items()))
        # A text spells what was added and is no special token, and what the vocabulary had as a word before.
        spelt = {
            number
            for number, token in added.items()
            if not token.special or inner.encode(token.content, add_special_tokens=False).ids == [number]
        }
        # Ours, and those that others add with a chat template of their own.
        self.special: dict[str, int] = {t.content: n for n, t in added.items() if n not in spelt}
        self.ordinary: dict[str, int] = {t.content: n for n, t in added.items() if n in spelt}
        """What was added and is a word of the vocabulary: a text that spells one has it."""
        for name in SPECIAL:
            if name not in self.special:
                raise InputError(f"The tokenizer has no special token {name}. Train a tokenizer with StarLM.")
        for token in added.values():
            if not token.special and (token.lstrip or token.rstrip):
                raise InputError(
                    f"The tokenizer's added token {token.content!r} takes the blanks beside it away, so a "
                    f"text would not come back. Add it without lstrip and rstrip, or train one with StarLM."
                )
        self.bos: int = self.special["<|bos|>"]
        self.end_of_turn: int = self.special["<|assistant_end|>"]
        self.pad: int = self.special[PAD]
        self._bytes = _bytes_of_tokens(
            inner, {number: t.content.encode() if number in spelt else b"" for number, t in added.items()}
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer for texts like these; the same texts give the same tokenizer.

        Args:
            texts: read once; only the counts of their words are kept.
            vocab_size: tokens, with the 9 special ones and the 256 bytes. Fewer result if the texts have
                not enough pairs that occur twice.

        Raises:
            InputError: `vocab_size` is below 265, or `texts` is a text itself.
        """
        check_vocab_size(vocab_size)
        if isinstance(texts, str | bytes):
            raise InputError(f"Give texts, as in [text], to train on; got one {type(texts).__name__}.")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        parts = (part for text in texts for piece in _pieces(text) for part in _short_runs(piece))
        inner.train_from_iterator(parts, trainer)
        # For readers of tokenizer.json other than this class: a text is a document, and begins with bos.
        inner.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], inner.token_to_id(SPECIAL[0]))]
        )
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer in a file, or in `tokenizer.json` of a folder.

        Raises:
            InputError: there is none, or it is damaged or of another kind.
        """
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"There is no readable tokenizer at {file}: {getattr(error, 'strerror', None) or error}. "
                f"Give a {FILE}, or a folder of prepared data, a run or a checkpoint."
            ) from None
        try:
            # The library raises plain `Exception` for anything that it cannot parse.
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise InputError(
                f"{file} is not a tokenizer: {error}. Copy the file again, or train a new one with starlm "
                f"tokenizer train."
            ) from None
        try:
            return cls(inner)
        except InputError as error:
            raise InputError(f"{file} cannot be used. {error}") from None

    def save(self, path: str | Path) -> Path:
        """Write `path` (or `tokenizer.json` in it, if it is a folder), whole or not at all; the file written.

        Raises:
            StarLMError: the disk is full.
            InputError: the place is not writable.
        """
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        write_whole(file, self._inner.to_str(pretty=True).encode("utf-8"))
        return file

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `AutoTokenizer` of transformers reads: the tokenizer, its settings, a chat template.

        There the same text has the same ids, with <|bos|> in front, as `encode(text, bos=True)`; but names of
        special tokens in a text become the tokens, unless it is asked for `split_special_tokens=True`.

        Args:
            folder: exists.

        Raises:
            StarLMError: the disk is full.
            InputError: the place is not writable.
        """
        folder = Path(folder)
        self.save(folder / FILE)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[0],
            "pad_token": PAD,
            "extra_special_tokens": [name for name in SPECIAL[1:] if name != PAD],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        write_whole(folder / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())
        write_whole(folder / CHAT_TEMPLATE.name, CHAT_TEMPLATE.read_bytes())

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`; names of special tokens in it are ordinary text.

        Args:
            bos: put <|bos|> in front.

        Raises:
            InputError: half of a surrogate pair in the text.
        """
        ids = self.encode_batch([text])[0]
        return [self.bos, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores.

        Raises:
            InputError: half of a surrogate pair in a text.
        """
        pieces = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(text)]
        encodings = self._inner.encode_batch_fast([piece for _, piece in pieces], add_special_tokens=False)
        ids: list[list[int]] = [[] for _ in texts]
        for (number, _), encoding in zip(pieces, encodings, strict=True):
            ids[number] += encoding.ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            skip_special: leave special tokens out; otherwise they appear by name.

        Raises:
            InputError: an id outside of the vocabulary.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([*(stream.push(number) for number in ids), stream.flush()])

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """A `decode` that takes one id at a time."""
        return TextStream(self, skip_special=skip_special)

    def token_bytes(self, number: int) -> bytes:
        """UTF-8 bytes that the token stands for, perhaps part of a character; none for special tokens.

        Raises:
            InputError: an id outside of the vocabulary.
        """
        if not 0 <= number < self.vocab_size:
            raise InputError(
                f"Token {number} is not in the vocabulary of {self.vocab_size}. Use the tokenizer that the "
                f"tokens were made with."
            )
        return self._bytes[number]

    def byte_lengths(self) -> np.ndarray:
        """How many UTF-8 bytes each token stands for, int32 [vocab]; 0 for special tokens."""
        return np.array([len(token) for token in self._bytes], dtype=np.int32)

    @cached_property
    def names(self) -> dict[int, str]:
        """Name of each special token by its id."""
        return {number: name for name, number in self.special.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, in hex: equal for tokenizers that act alike."""
        content: Any = json.loads(self._inner.to_str())
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


class TextStream:
    """Text from token ids that come one at a time, never broken within a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        """Args: skip_special: as in `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._names = {} if skip_special else tokenizer.names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, number: int) -> str:
        """The characters that this token completes; may be empty."""
        if number in self._names:
            return self._decoder.decode(b"", final=True) + self._names[number]
        return self._decoder.decode(self._tokenizer.token_bytes(number))

    def flush(self) -> str:
        """U+FFFD if a character was left unfinished, otherwise nothing; then the stream is as new."""
        return self._decoder.decode(b"", final=True)


def _short_runs(text: str) -> Iterator[str]:
    begin = 0
    for run in _RUN.finditer(text):
        yield text[begin : run.end()]
        begin = run.end()
    yield text[begin:]


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces that encode as the whole does, and nearly all of them not longer than `_PIECE`.

    Raises:
        InputError: half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"The text has half of a surrogate pair at character {error.start}, which is no character, so "
            f"it cannot be encoded. Take it out."
        ) from None
    begin = 0
    while len(text) - begin > _PIECE:
        cut = _CUT.search(text, begin + _PIECE)
        if cut is None:
            break
        yield text[begin : cut.end()]
        begin = cut.end()
    yield text[begin:]


def _bytes_of_tokens(inner: tokenizers.Tokenizer, added: Mapping[int, bytes]) -> list[bytes]:
    """The bytes behind each token id; for those that were added, as given.

    Raises:
        InputError: not a byte-level vocabulary, or not a complete one.
    """
    byte_of = _byte_of_char()
    found: list[bytes] = []
    for number in range(inner.get_vocab_size()):
        token = inner.id_to_token(number)
        if token is None:
            raise InputError(
                f"The tokenizer's ids have a gap: there is no token {number}. Train one with StarLM."
            )
        try:
            found.append(added[number] if number in added else bytes(byte_of[char] for char in token))
        except KeyError:
            raise InputError(
                f"The tokenizer is not a byte-level one: token {number} is {token!r}. Train one with StarLM."
            ) from None
    missing = set(range(256)) - {token[0] for token in found if len(token) == 1}
    if missing:
        raise InputError(
            f"The tokenizer has no token for the byte 0x{min(missing):02x}. Train one with StarLM."
        )
    return found


def _byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
