"""What the programs share: options are checked before hours are spent, mistakes end in a sentence."""

import argparse
from collections.abc import Callable
from typing import Any

from starlm.errors import StarLMError


def parser(about: str | None) -> argparse.ArgumentParser:
    """For a program whose docstring has its commands."""
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def within(kind: type, low: float, high: float | None = None) -> Callable[[str], float]:
    """Reads an option that is a number of this kind, from `low` to `high`."""

    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= (value if high is None else high):
            bounds = f"{low} or more" if high is None else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}; got {text}")
        return value

    read.__name__ = "number" if kind is float else "whole number"
    return read


def unusual(args: argparse.Namespace, **usual: tuple[str, Any]) -> str:
    """What a file's name says of options that are not as usual, such as -l3-e4.

    Args:
        usual: by the mark in the name, the option and its usual value.
    """
    given = {mark: (getattr(args, name), value) for mark, (name, value) in usual.items()}
    return "".join(f"-{mark}{value}" for mark, (value, known) in given.items() if value != known)


def start(main: Callable[[], None]) -> None:
    """Run a program; what a user can mend ends it with a sentence.

    Raises:
        SystemExit: so it did.
    """
    try:
        main()
    except StarLMError as error:
        raise SystemExit(f"error: {error}") from None
