"""The texts that models are compared on, prepared once for all programs."""

from pathlib import Path

from experiments import packages
from starlm.data.prepare import prepare
from starlm.errors import InputError

WORK = Path("runs/experiments")
VOCAB = 4096
# Whole files, so that the tokens that are measured come from all of the corpus: how much of it is held out.
HELD_OUT = {"packages": 0.01}


def folder(corpus: str, *, path: str | None = None, vocab: int = VOCAB) -> Path:
    """The folder of prepared data; made, if it is not there.

    Args:
        corpus: embedded, packages, or a name for the text at `path`.
        path: text file or folder.
        vocab: tokens of the tokenizer that is trained on it.

    Raises:
        InputError: unusable text, a `path` too many or too few, or the name is that of another text.
    """
    own = corpus not in ("embedded", "packages")
    if own is (path is None):
        wrong = f"{corpus} needs a text" if own else f"{corpus} has a text of its own"
        raise InputError(
            f"The corpus {wrong}. Give --corpus-path with a name that you choose, and only then."
        )
    out = WORK / "data" / name_of(corpus, vocab)
    if out.exists() and not own:
        # Perhaps made elsewhere: it is what it is called, whatever is installed here.
        return out
    sources = "embedded" if corpus == "embedded" else [path] if path is not None else packages.sources()
    prepare(sources, out, vocab_size=vocab, validation_fraction=HELD_OUT.get(corpus, 0.05))
    return out


def name_of(corpus: str, vocab: int) -> str:
    """How folders and results call a corpus with a vocabulary."""
    return corpus if vocab == VOCAB else f"{corpus}-v{vocab}"
