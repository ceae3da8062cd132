"""starlm tokenizer: make one, and see how it cuts a text."""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from starlm.cli.console import Console, piped
from starlm.cli.data import VOCABULARIES, say_if_fewer, source_list
from starlm.cli.options import Verb
from starlm.errors import InputError
from starlm.files import readable_os_errors


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to learn from."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SOURCE ...]")] = (
        "embedded",
    )
    """As of `starlm data prepare`."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")] = "tokenizer.json"
    """File to write; an existing one is replaced. Or a folder, there or with a slash at the end, for a
    tokenizer.json in it; not one of data, a run or a checkpoint, which have their own."""
    vocab_size: int = 4096
    """Tokens, with the 256 bytes and 9 special ones."""
    text_field: str = "text"
    """Key or column that holds the text in .jsonl and .parquet."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Which text, which tokenizer."""

    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[TEXT]")] = None
    """The text; without it, stdin."""
    tokenizer: Path = Path("runs/demo")
    """A tokenizer.json, or a folder of data, a run or a checkpoint."""


def _train(options: TrainOptions, console: Console) -> dict[str, Any]:
    from starlm.data.documents import iter_documents, no_text
    from starlm.data.prepare import find_sources
    from starlm.data.tokenizer import Tokenizer, check_vocab_size

    check_vocab_size(options.vocab_size)
    sources, out = source_list(options.sources), _place(options.out)
    with readable_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    size, documents, notes = 0, 0, []
    with console.progress() as progress:
        files = find_sources(sources, progress, notes=notes)

        def texts():
            nonlocal size, documents
            for documents, document in enumerate(iter_documents(files, options.text_field), 1):
                size += len(document.text.encode())
                progress("documents", documents, None)
                yield document.text

        tokenizer = Tokenizer.train(texts(), options.vocab_size)
    if not documents:
        raise no_text(files)
    path = tokenizer.save(out)
    for note in notes:
        console.say(note)
    console.say(f"{path}: {tokenizer.vocab_size:,} tokens from {documents:,} documents, {size:,} bytes")
    say_if_fewer(tokenizer.vocab_size, options.vocab_size, console)
    return {
        "path": str(path),
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "bytes": size,
        "fingerprint": tokenizer.fingerprint,
    }


def _place(out: str) -> Path:
    """The file that `out` means.

    Raises:
        InputError: it would be the tokenizer of data, a run or a checkpoint.
    """
    from starlm.data.shards import META
    from starlm.data.tokenizer import FILE

    path = Path(out)
    file = path / FILE if path.is_dir() or out.endswith(("/", os.sep)) else path
    with readable_os_errors(file):
        target = file.resolve()
    folder = target.parent
    holds = {META: "prepared data"}
    if target.name == FILE:
        # Prepared data can have no other file beside them.
        holds |= {"run.toml": "a run", **dict.fromkeys(_of_a_model(folder), "a checkpoint")}
    for name, what in holds.items():
        if (folder / name).is_file():
            raise InputError(
                f"{file} is not written: its folder holds {what} ({name}), which another tokenizer "
                f"would spoil. Choose another --out."
            )
    return file


def _of_a_model(folder: Path) -> list[str]:
    """Files in the folder by which it is a checkpoint of any library; many programs have a config.json."""
    from starlm.model.folder import CONFIG, read_json

    weights = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json")
    found = sorted(path.name for pattern in weights for path in folder.glob(pattern))
    with suppress(InputError):  # Somebody's notes, or none.
        if not read_json(folder / CONFIG).keys().isdisjoint({"model_type", "architectures"}):
            found.insert(0, CONFIG)
    return found


def _show(options: ShowOptions, console: Console) -> dict[str, Any]:
    from starlm.data.tokenizer import Tokenizer

    text = options.text
    if text is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError('Give a text: starlm tokenizer show "some text", or pipe one in.')
        text = piped()
    tokenizer = Tokenizer.load(options.tokenizer)
    ids = tokenizer.encode(text)
    pieces = [tokenizer.token_bytes(number) for number in ids]
    size = len(text.encode())
    console.say("│".join(visible(piece) for piece in pieces))
    console.say()
    if ids:
        console.table([(str(number), visible(piece)) for number, piece in zip(ids, pieces, strict=True)])
        console.say()
    ratio = size / max(len(ids), 1)
    console.say(f"{len(ids):,} tokens, {len(text):,} characters, {size:,} bytes, {ratio:.2f} bytes per token")
    return {
        "ids": ids,
        "tokens": [visible(piece) for piece in pieces],
        "num_tokens": len(ids),
        "bytes": size,
        "bytes_per_token": ratio,
    }


def visible(piece: bytes) -> str:
    """A token on one line: spaces as ·, line ends as ↵, tabs as →, what cannot be shown as \\x.."""
    text = piece.decode("utf-8", "backslashreplace")
    shown = text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


VERBS = {
    "tokenizer train": Verb(options=TrainOptions, run=_train, presets=VOCABULARIES),
    "tokenizer show": Verb(options=ShowOptions, run=_show),
}
