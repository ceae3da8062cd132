"""starlm data: from text to tokens on disk, and what is there."""

import shlex
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from starlm.cli.console import Console
from starlm.cli.options import Verb
from starlm.errors import InputError

# Tokens of validation below which a loss says little.
FEW = 2_000
# Vocabularies: bytes alone; for corpora of megabytes; for corpora of gigabytes.
VOCABULARIES = {"bytes": {"vocab_size": 265}, "small": {"vocab_size": 4096}, "large": {"vocab_size": 32768}}


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to read and how to cut it."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SOURCE ...]")] = (
        "embedded",
    )
    """Folders, files and https:// addresses of files (.txt .md .py .jsonl .jsonl.gz .parquet); hf:OWNER/NAME,
    hf:OWNER/NAME/PATH, a Hugging Face dataset or a part of it; `embedded`, Python's standard library."""
    out: Path = Path("data")
    """Folder to write."""
    vocab_size: int | None = None
    """Tokens of the tokenizer that is trained on the text, or on 50 MB from all over it; at least 265.
    Without it 4096."""
    tokenizer: Path | None = None
    """Take this tokenizer instead: a tokenizer.json, or a folder of data, a run or a checkpoint."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out for validation."""
    text_field: str = "text"
    """Key or column that holds the text in .jsonl and .parquet, or the messages of a conversation; without it
    `messages` and `conversations` are looked for, too."""
    skip_unreadable: bool = False
    """Pass over .txt, .md and .py files that cannot be read or are not UTF-8. Else the first is an error."""
    overwrite: bool = False
    """Replace the folder if it is there, and fetch files again that have changed at their addresses."""


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """Which data."""

    data: Path = Path("data")
    """Folder that `starlm data prepare` wrote."""
    verify: bool = False
    """Read every byte and compare it with its checksum."""


def _prepare(options: PrepareOptions, console: Console) -> dict[str, Any]:
    from starlm.data.documents import left_out
    from starlm.data.prepare import VOCAB_SIZE, prepare
    from starlm.data.shards import TokenData
    from starlm.model.folder import find_checkpoint

    sources = source_list(options.sources)
    with console.progress() as progress:
        report = prepare(
            sources,
            options.out,
            vocab_size=options.vocab_size,
            tokenizer=options.tokenizer,
            validation_fraction=options.validation_fraction,
            text_field=options.text_field,
            skip_unreadable=options.skip_unreadable,
            overwrite=options.overwrite,
            progress=progress,
        )
    if report.skipped:
        more = ", ..." if report.skipped > len(report.skipped_first) else ""
        console.say(f"Passed over {report.skipped:,} without text: {', '.join(report.skipped_first)}{more}")
    for note in report.notes:
        console.say(note)
    if report.reused:
        console.say(f"{options.out} holds this very preparation of unchanged sources, so nothing was done.")
    if options.tokenizer is None:
        say_if_fewer(report.vocab_size, options.vocab_size or VOCAB_SIZE, console)
    talks = TokenData.open(options.out).splits["train"].conversations
    held_out = _say_splits(options.out, console)["validation"]["learned"]
    if held_out < FEW:
        what = "tokens of answers" if talks else "tokens"
        console.say(
            f"Only {held_out:,} {what} are held out: losses on them will be noise. More text or a larger "
            f"--validation-fraction mends that."
        )
    if sources != "embedded" and (passed_over := left_out(sources)):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in list(passed_over.items())[:5])
        more = " ..." if len(passed_over) > 5 else ""
        console.say(f"Left out, for their names: {kinds}{more}. Plain text has to be called .txt to be read.")
    begin = "--preset demo"
    if options.tokenizer is not None:
        # Of a tokenizer alone there is no model to begin with.
        with suppress(InputError):
            find_checkpoint(options.tokenizer)
            begin = f"--init-from {shlex.quote(str(options.tokenizer))}"
    place = f"--data {shlex.quote(str(options.out))}"
    if not talks:
        console.say(f"Next: starlm train {begin} {place} --out runs/mine")
    elif begin.startswith("--init-from"):
        console.say(f"Next: starlm sft {begin} {place} --out runs/chat")
    else:
        console.say(
            "These are conversations, which a model is to learn that can write already. Prepare them with "
            "its tokenizer, --tokenizer RUN; then starlm sft --init-from RUN."
        )
    return asdict(report)


def source_list(sources: tuple[str, ...]) -> Any:
    """What `prepare` takes: the paths, or "embedded".

    Raises:
        InputError: nothing given, or `embedded` beside paths.
    """
    if not sources:
        raise InputError("Name at least one folder, file or address to read, or `embedded`.")
    if "embedded" not in sources:
        return list(sources)
    if len(sources) > 1:
        raise InputError("`embedded` stands alone; got it beside other sources. Write ./embedded for a path.")
    return "embedded"


def say_if_fewer(vocab_size: int, wanted: int, console: Console) -> None:
    """Say so if a tokenizer has fewer tokens than it was to have."""
    if vocab_size < wanted:
        console.say(
            f"The tokenizer has {vocab_size:,} tokens, not {wanted:,}: its text has no further pairs that "
            f"occur twice."
        )


def _stats(options: StatsOptions, console: Console) -> dict[str, Any]:
    from starlm.data.shards import TokenData

    data = TokenData.open(options.data)
    if options.verify:
        data.verify()
    splits = _say_splits(options.data, console)
    if options.verify:
        console.say("Every file matches its checksum.")
    return {"data": str(options.data), "splits": splits, "verified": options.verify}


def _say_splits(folder: Path, console: Console) -> dict[str, Any]:
    """Print the table of splits; its numbers."""
    from starlm.data.shards import TokenData

    data, found = TokenData.open(folder), {}
    # Of texts all tokens are learned.
    talks = data.splits["train"].conversations
    columns = ["documents", "tokens", *(["learned"] if talks else []), "bytes"]
    rows: list[tuple[str, ...]] = [(str(folder), *columns, "bytes per token")]
    for name, split in data.splits.items():
        numbers = {
            "documents": split.num_documents,
            "tokens": split.num_tokens,
            "learned": split.num_learned,
            "bytes": split.num_bytes,
        }
        ratio = split.num_bytes / max(split.num_tokens, 1)
        rows.append((name, *(f"{numbers[column]:,}" for column in columns), f"{ratio:.2f}"))
        found[name] = {**numbers, "bytes_per_token": ratio}
    console.table(rows)
    console.say(f"vocabulary: {data.vocab_size:,} tokens")
    return found


VERBS = {
    "data prepare": Verb(
        options=PrepareOptions,
        run=_prepare,
        presets=VOCABULARIES,
        rerun="No folder was written. Run the same command again to start over.",
    ),
    "data stats": Verb(options=StatsOptions, run=_stats),
}
