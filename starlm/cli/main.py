"""The command `starlm`: finds the verb, runs it, and turns every outcome into a message and an exit code.

Exit codes: 0 done, 1 the work failed, 2 the input cannot be used; 130 interrupted, 141 the reader went away,
143 told to end: as shells have it of the signals.
"""

import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, get_type_hints

from starlm.errors import InputError, StarLMError
from starlm.version import __version__

if TYPE_CHECKING:
    from starlm.cli.options import Verb

# Verb: the module whose `VERBS` holds it, and its line in `starlm --help`. Imported when it is its turn.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("starlm.cli.demo", "train a small code model on this machine: data, training, samples, report"),
    "data prepare": ("starlm.cli.data", "turn text into a folder of tokens to train on"),
    "data stats": ("starlm.cli.data", "what a folder of prepared data holds"),
    "tokenizer train": ("starlm.cli.tokenizer", "make a tokenizer for your text"),
    "tokenizer show": ("starlm.cli.tokenizer", "how a text falls into tokens"),
    "train": ("starlm.cli.train", "pretrain a model; run again to go on where it was"),
    "sft": ("starlm.cli.sft", "teach a trained model to hold conversations"),
    "eval": ("starlm.cli.eval", "measure a model: bits per byte on held-out text"),
    "generate": ("starlm.cli.generate", "continue a prompt"),
    "chat": ("starlm.cli.chat", "a conversation in the terminal"),
    "inspect": ("starlm.cli.inspect", "draw where every head reads from, for a text"),
    "serve": ("starlm.cli.serve", "an OpenAI-compatible API, and a web chat at /"),
    "bench op": ("starlm.cli.bench", "time the operator beside its peers"),
    "bench layer": ("starlm.cli.bench", "time one layer beside attention, convolution and Mamba-2"),
    "bench train": ("starlm.cli.bench", "time training steps of whole models"),
    "bench decode": ("starlm.cli.bench", "time generation behind a long context"),
    "bench serve": ("starlm.cli.bench", "time a server with 1, 8 and 64 clients"),
    "report": ("starlm.cli.report", "a page with curves, samples and settings of one or several runs"),
    "doctor": ("starlm.cli.doctor", "what this machine has, and what is missing"),
}
# How long PyTorch's idle threads (GNU OpenMP) spin: while they do, other programs wait, and then so do its
# busy ones. Beside a busy program this trains twice as fast as OpenMP's own, far higher number.
SPINS = "2000"
RERUN = "Run the same command again to start over."


class _Terminated(BaseException):
    """SIGTERM, which ends a verb as Ctrl+C does: what it had begun to write goes."""


def _terminate(number: int, frame: object) -> None:
    """What Python does between two of its steps, so behind compiled code that runs. A second signal kills."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise _Terminated


def entry() -> None:
    """Run the command line of this process and exit with its code."""
    # Text that the terminal's encoding lacks must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    words = sys.argv[1:]
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    # What the library has to say besides: that it compiles kernels.
    logging.getLogger("starlm").addHandler(logging.StreamHandler())
    logging.getLogger("starlm").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    code = main(words)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _reader_left()
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: words after `starlm`.

    Returns:
        The exit code.
    """
    argv, verb = list(argv), None
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview(), file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        if argv[0] in ("-V", "--version"):
            print(f"starlm {__version__}")
            return 0
        name, rest = _find_verb(argv)
        if name not in VERBS:
            print(_overview(name))
            return 0
        module, summary = VERBS[name]
        verb = import_module(module).VERBS[name]
        return _run(name, summary, verb, rest)
    except (KeyboardInterrupt, _Terminated) as stop:
        print(f"\ninterrupted: {verb.rerun if verb else RERUN}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    except BrokenPipeError:
        return _reader_left()
    except Exception as error:
        if "--debug" in argv:
            import traceback

            traceback.print_exc()
        message, code = _explain(error)
        print(message, file=sys.stderr)
        return code


def _run(name: str, summary: str, verb: "Verb", argv: list[str]) -> int:
    from starlm.cli.console import Console
    from starlm.cli.options import dry_run, resolve

    try:
        options, shared = resolve(f"starlm {name}", summary, verb, argv)
    except SystemExit as stop:
        # tyro has printed the help (0), or what was wrong with the command line (2).
        if stop.code and argv and os.path.exists(argv[0]) and _names_model(verb):
            print(f"Perhaps: starlm {name} --model {' '.join(argv)}", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 2
    console = Console(json=shared.json)
    result = dry_run(verb, options, console) if shared.dry_run else verb.run(options, console)
    console.finish(result)
    return 0


def _names_model(verb: "Verb") -> bool:
    """Whether its --model is a checkpoint, and not the settings of a new one."""
    kind = get_type_hints(verb.options).get("model")
    return kind is not None and not is_dataclass(kind)


def _find_verb(argv: list[str]) -> tuple[str, list[str]]:
    """The verb that `argv` begins with and the words after it; "data" alone if help on it was asked for."""
    groups = {name.split()[0] for name in VERBS if " " in name}
    first, *rest = argv
    if first in VERBS:
        return first, rest
    if first not in groups:
        known = [name for name in VERBS if " " not in name] + sorted(groups)
        raise InputError(_unknown("verb", first, known, "starlm"))
    if rest and rest[0] in ("-h", "--help"):
        return first, rest
    subs = [name.split()[1] for name in VERBS if name.startswith(f"{first} ")]
    if not rest or rest[0].startswith("-"):
        raise InputError(f"starlm {first} needs one of: {', '.join(subs)}. See starlm {first} --help.")
    if rest[0] not in subs:
        raise InputError(_unknown(f"verb of starlm {first}", rest[0], subs, f"starlm {first}"))
    return f"{first} {rest[0]}", rest[1:]


def _unknown(kind: str, word: str, known: list[str], command: str) -> str:
    near = get_close_matches(word, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
    return f"Unknown {kind} {word!r}. {hint} See {command} --help."


def _overview(group: str = "") -> str:
    """The help on all verbs, or on those of one group."""
    names = [name for name in VERBS if not group or name.startswith(f"{group} ")]
    lines = [f"  {name:<16}{VERBS[name][1]}" for name in names]
    head = f"usage: starlm {group} VERB [OPTIONS]" if group else "usage: starlm VERB [OPTIONS]"
    about = [] if group else ["", "StarLM: train language models on the Deformer, from laptop to cluster."]
    tail = [
        "",
        "Every verb: --help, --dry-run, --json, --config FILE.toml, --debug.",
        "Begin with: starlm demo",
    ]
    return "\n".join([head, *about, "", *lines, *([] if group else tail)])


def _explain(error: Exception) -> tuple[str, int]:
    """One paragraph and the exit code for an error."""
    if isinstance(error, StarLMError):
        return f"{'' if error.exit_code > 128 else 'error: '}{error}", error.exit_code
    text = " ".join(str(error).split())
    if _is_out_of_memory(error):
        return (
            "error: Out of memory. Take fewer rows at once (--micro-rows 1), a smaller --batch-tokens, "
            "--model.context or --model.depth, or free some memory. --dry-run estimates what a training run "
            f"needs. ({text[:200]})",
            1,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"error: The disk is full{_at(error)}. Free some space or choose another folder, then run the "
            f"same command again.",
            1,
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"error: {error.strerror}{_at(error)}. Choose a place that you may read and write, or change its "
            f"permissions.",
            2,
        )
    what = text.rstrip(".") or "no message"
    return (
        f"error: {type(error).__name__}: {what}. This is a bug in StarLM, not your doing; please report it. "
        f"--debug prints the traceback.",
        1,
    )


def _is_out_of_memory(error: Exception) -> bool:
    # torch is perhaps not loaded, and its CPU allocator raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    )


def _at(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _reader_left() -> int:
    """Exit code when stdout's reader is gone; the interpreter's last flush must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
