"""starlm chat: a conversation in the terminal."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from starlm.cli.console import Console, piped
from starlm.cli.generate import PRESETS
from starlm.cli.options import Verb
from starlm.errors import InputError, StarLMError
from starlm.text import printable

if TYPE_CHECKING:
    from starlm.data.conversations import Message
    from starlm.generate.chat import Render
    from starlm.generate.request import Piece, Stream
    from starlm.generate.text import TextModel

# Lines of at most 76 characters: a terminal of 80 breaks longer ones anywhere.
HELP = """\
/clear             begin a new conversation; the system message stays
/system [TEXT]     show or set what the model is told first; - takes it out
/temperature [X]   show or set how boldly tokens are chosen; 0: likeliest
/regenerate        another answer instead of the last one
/save [FILE]       write the conversation as JSON
/load FILE         go on with a conversation that was saved
/help              this
/quit              leave (Ctrl+D)

Ctrl+C stops an answer and keeps what came. Alt+Enter, or \\ at a line's
end, begins a new line. // at the beginning stands for / where it is no
command."""

# For the state of the conversation so far.
CACHE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Which model, how it is asked, and how the next token is chosen."""

    model: Path = Path("runs/demo")
    """Run folder (its last checkpoint is taken) or checkpoint folder."""
    system: str | None = None
    """What the model is told first."""
    load: Path | None = None
    """Conversation to go on with (JSON, as --save writes it)."""
    save: Path | None = None
    """File that the conversation is written to after every answer (JSON)."""
    conversation: Literal["auto", "template", "plain"] = "auto"
    """By the checkpoint's chat template (template), as one text to continue (plain), or as the model
    was trained (auto, by "chat" in its config.json)."""
    max_tokens: int = 512
    """At most this many new tokens per answer."""
    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability; 1 is off."""
    min_p: float = 0.0
    """Only tokens at least this share of the likeliest one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that are there already less likely; 1 is off."""
    seed: int | None = None
    """Same seed, same answers to the same messages; without it new ones each time."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights and of what is remembered; auto is the checkpoint's. bfloat16 takes half the memory."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be 1 or more; got {self.max_tokens}.")


def run(options: ChatOptions, console: Console) -> dict[str, Any]:
    """Talk until the user leaves; or, where stdin is a pipe, answer what comes through it once."""
    talks = sys.stdin is not None and sys.stdin.isatty()
    if sys.stdin is None or (talks and not console.human.isatty()):
        raise InputError(
            "starlm chat needs a terminal, or one message through a pipe: echo Hello | starlm chat."
        )
    from starlm.generate.chat import renderer
    from starlm.generate.text import load
    from starlm.model.folder import find_checkpoint

    model = load(options.model, device=options.device, dtype=options.dtype)
    render = renderer(find_checkpoint(options.model), model.tokenizer, options.conversation)
    session = Session(model, render, options, console)
    with session.engine:
        if talks:
            session.talk()
        else:
            text = piped()
            session.answer_once(text if render is None else text.strip())
    return {"messages": [asdict(message) for message in session.messages], **session.figures}


class Session:
    """A conversation and the terminal that it is held on; its engine must be started."""

    def __init__(
        self, model: "TextModel", render: "Render | None", options: ChatOptions, console: Console
    ) -> None:
        """Args: render: see `starlm.generate.chat.answer`.

        Raises:
            InputError: impossible sampling, or a conversation that cannot be loaded or would be overwritten.
        """
        from rich.console import Console as RichConsole

        from starlm.generate.chat import read_conversation, speaker
        from starlm.generate.engine import Engine
        from starlm.generate.sampling import Sampling

        self.render, self.options, self.console = render, options, console
        # Each turn reads on where the one before ended.
        self.engine = Engine(speaker(model), slots=1, cache_bytes=CACHE_BYTES)
        self.out = RichConsole(file=console.human, highlight=False)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        self.sampling = Sampling(**{name: getattr(options, name) for name in names})
        self.messages: list[Message] = []
        # For Ctrl+C, see `_interrupt`.
        self.breakable = self.stopped = False
        self.stream: Stream | None = None
        self.figures: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "answers": 0}
        # Files that this conversation came from or went to: only these may be overwritten.
        self.mine: set[Path] = set()
        if options.load is not None:
            self.messages = read_conversation(options.load)
            self.mine.add(options.load.absolute())
        if options.system is not None:
            self._set_system(options.system)
        if options.save is not None:
            self._check_place(options.save)
            self.mine.add(options.save.absolute())

    def answer_once(self, text: str) -> None:
        """Answer one message and say nothing else."""
        if not text.strip():
            raise InputError(
                "There is no message: stdin is empty. Pipe one in, or start starlm chat on a terminal."
            )
        if self.messages and self.messages[-1].role == "user":
            raise InputError(
                "The loaded conversation ends with a message of the user, so no other can follow."
            )
        asked = [*self.messages, _message("user", text)]
        pieces = []
        for piece in self._answer(asked):
            pieces.append(piece.text)
            self.out.file.write(self.console.shown(piece.text))
            self.out.file.flush()
        self.out.file.write("\n")
        self._keep(asked, "".join(pieces))

    def talk(self) -> None:
        """Read and answer until the user leaves."""
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with _stdout_to_terminal(self.console):
                self._talk()
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_: object) -> None:
        """Ctrl+C: leaves the line typed, or the command, or ends the answer, and breaks off no more."""
        if self.breakable:
            self.breakable = False
            raise KeyboardInterrupt
        self.stopped = True
        if self.stream is not None:
            self.stream.cancel()

    def _talk(self) -> None:
        _prepare_readline([line.split()[0] for line in HELP.splitlines() if line.startswith("/")])
        self._greet()
        while (text := self._read()) is not None:
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if self._command(text):
                        break
                elif text.strip():
                    self._turn(text.removeprefix("/") if text.startswith("//") else text)
            except StarLMError as error:
                self._complain(str(error))
            except Exception as error:
                # A conversation is not lost to a bug or a full memory.
                self._complain(f"{type(error).__name__}: {error}. The conversation is as it was before.")

    def _greet(self) -> None:
        size = self.engine.model.config.num_parameters["total"]
        self.out.print("[bold]starlm chat[/]", end="  ")
        self.out.print(printable(f"{self.options.model}, {size / 1e6:.1f} M parameters"), markup=False)
        if self.render is None:
            why = (
                "As asked"
                if self.options.conversation == "plain"
                else "This model knows no conversations (a base model)"
            )
            self._note(
                f"{why}: it continues your text, and what both of you write is one text without turns."
            )
        self._note("/help lists the commands. Ctrl+C stops an answer, Ctrl+D leaves.\n")
        self._show_messages()

    def _read(self) -> str | None:
        """What the user enters, perhaps in several lines; None to leave."""
        lines: list[str] = []
        try:
            while True:
                lines.append(self._line("· " if lines else "> "))
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines)
                lines[-1] = lines[-1][:-1]
        except EOFError:
            self.out.print()
            return None
        except KeyboardInterrupt:
            self.out.print()
            self._note("Ctrl+D or /quit leaves.")
            return ""
        except UnicodeDecodeError as error:
            self._complain(f"That was no {error.encoding} text: at byte {error.start}.")
            return ""

    def _line(self, prompt: str) -> str:
        self.stopped = False
        self.breakable = True
        try:
            return input(_prompt(prompt))
        finally:
            self.breakable = False

    def _turn(self, text: str) -> None:
        """Answer a message of the user."""
        if self.messages and self.messages[-1].role == "user":
            raise InputError(
                "The conversation ends with a message of yours: /regenerate answers it, /clear begins anew."
            )
        self._respond([*self.messages, _message("user", text)])

    def _respond(self, asked: "list[Message]") -> None:
        """Answer the last of these messages; with an answer they become the conversation."""
        from starlm.cli.markdown import MarkdownStream

        pieces: list[Piece] = []
        began = time.perf_counter()
        first = began
        self.out.print()
        markdown = None if self.render is None else MarkdownStream(self.out)
        with markdown or nullcontext():
            for piece in self._answer(asked):
                first = first if pieces else time.perf_counter()
                pieces.append(piece)
                if markdown:
                    markdown.push(piece.text)
                else:
                    self.out.out(printable(piece.text), end="", highlight=False)
        text = "".join(piece.text for piece in pieces)
        if not markdown:
            self.out.print("" if text.endswith("\n") else "\n")
        stopped = pieces[-1].finish == "cancelled"
        if stopped and not text.strip():
            self._note("stopped before anything came; your message is taken back")
            return
        seconds = time.perf_counter() - first
        self._keep(asked, text)
        tokens = sum(len(piece.tokens) for piece in pieces)
        speed = f", {(tokens - 1) / seconds:,.1f} tokens/s" if tokens > 1 else ""
        if stopped:
            end = ", stopped"
        else:
            end = ", as many as max_tokens allows" if pieces[-1].finish == "length" else ""
        self._note(f"{tokens:,} tokens{speed}, the first after {first - began:.2f} s{end}\n")

    def _answer(self, asked: "list[Message]") -> "Iterator[Piece]":
        from starlm.generate.chat import answer

        sampling = self.sampling
        if sampling.seed is not None:
            # Otherwise another answer to the same message would be the same one.
            sampling = replace(sampling, seed=sampling.seed + self.figures["answers"])
        began = time.perf_counter()
        stream = self.stream = answer(
            self.engine, asked, render=self.render, max_tokens=self.options.max_tokens, sampling=sampling
        )
        try:
            if self.stopped:
                # Ctrl+C came before there was anything to cancel.
                stream.cancel()
            for piece in stream:
                self.figures["tokens"] += len(piece.tokens)
                yield piece
        finally:
            self.stream = None
            stream.cancel()
            self.figures["seconds"] += time.perf_counter() - began
            self.figures["answers"] += 1

    def _keep(self, asked: "list[Message]", text: str) -> None:
        """Go on from these messages and the answer, and save them if that was asked for."""
        from starlm.generate.chat import write_conversation

        self.messages = [*asked, _message("assistant", text)]
        if self.options.save is not None:
            write_conversation(self.options.save, self.messages)

    def _command(self, text: str) -> bool:
        """Run a command; whether it is the last one."""
        word, _, rest = text[1:].partition(" ")
        if word in ("quit", "exit"):
            return True
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.out.print(HELP, markup=False),
            "clear": self._clear,
            "system": self._system,
            "temperature": self._temperature,
            "regenerate": self._regenerate,
            "save": self._save,
            "load": self._load,
        }
        if word not in commands:
            near = get_close_matches(word, [*commands, "quit"], n=1)
            hint = f"Did you mean /{near[0]}? " if near else ""
            raise InputError(f"There is no command /{word}. {hint}/help lists them; // begins a text with /.")
        # Their files may be pipes that nobody writes into. An answer is stopped in another way.
        self.breakable = word != "regenerate"
        try:
            commands[word](rest.strip())
        except KeyboardInterrupt:
            self._note("stopped")
        finally:
            self.breakable = False
        return False

    def _clear(self, rest: str) -> None:
        self.messages = [message for message in self.messages if message.role == "system"]
        self._note("a new conversation" + (", under the same system message" if self.messages else ""))

    def _system(self, rest: str) -> None:
        if rest:
            self._set_system("" if rest == "-" else rest)
        said = self.messages[0].content if self.messages and self.messages[0].role == "system" else ""
        self._note(f"system: {said}" if said else "no system message")

    def _set_system(self, text: str) -> None:
        others = [message for message in self.messages if message.role != "system"]
        self.messages = [_message("system", text), *others] if text else others

    def _temperature(self, rest: str) -> None:
        if rest:
            try:
                number = float(rest)
            except ValueError:
                raise InputError(f"temperature must be a number, 0 or more; got {rest!r}.") from None
            self.sampling = replace(self.sampling, temperature=number)
        self._note(f"temperature {self.sampling.temperature:g}")

    def _regenerate(self, rest: str) -> None:
        if not self.messages or self.messages[-1].role == "system":
            raise InputError("There is no answer yet to give again.")
        answered = self.messages[-1].role == "assistant"
        self._respond(self.messages[:-1] if answered else self.messages)

    def _save(self, rest: str) -> None:
        from starlm.generate.chat import write_conversation

        path = Path(rest).expanduser() if rest else self.options.save or self.options.load
        if path is None:
            raise InputError("Name a file: /save talk.json")
        self._check_place(path)
        write_conversation(path, self.messages)
        self.mine.add(path.absolute())
        self._note(f"{len(self.messages)} messages saved to {path}")

    def _check_place(self, path: Path) -> None:
        if path.exists() and path.absolute() not in self.mine:
            raise InputError(f"{path} exists already. Load it to go on with it, or choose another name.")
        if not path.parent.is_dir():
            raise InputError(f"Cannot write {path}: there is no folder {path.parent}. Make it first.")

    def _load(self, rest: str) -> None:
        from starlm.generate.chat import read_conversation

        if not rest:
            raise InputError("Name a file: /load talk.json")
        path = Path(rest).expanduser()
        self.messages = read_conversation(path)
        self.mine.add(path.absolute())
        self._show_messages()
        self._note(f"{len(self.messages)} messages loaded from {path}")

    def _show_messages(self) -> None:
        for message in self.messages:
            name = {"user": ">", "assistant": "", "system": "system:"}[message.role]
            style = "bold cyan" if message.role == "user" else None
            self.out.print(f"{name} {printable(message.content)}".strip(), style=style, markup=False)
            if message.role != "user":
                self.out.print()

    def _note(self, text: str) -> None:
        self.out.print(printable(text), style="dim", markup=False)

    def _complain(self, text: str) -> None:
        self.out.print(f"error: {printable(text)}", style="red", markup=False)


def _message(role: Any, content: str) -> "Message":
    from starlm.data.conversations import Message

    return Message(role, content)


@contextmanager
def _stdout_to_terminal(console: Console) -> Iterator[None]:
    """With --json, lead this process's stdout to the terminal of stderr: readline prompts nowhere else."""
    if not console.json or sys.stdout is None:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _prompt(text: str) -> str:
    # Between these marks readline counts no columns.
    return f"\001\x1b[1;36m\002{text}\001\x1b[0m\002" if "readline" in sys.modules else text


def _prepare_readline(commands: list[str]) -> None:
    """Arrow keys, history, Tab for commands, Alt+Enter for a new line, what is pasted as one text."""
    with suppress(ImportError):
        import readline

        def complete(text: str, number: int) -> str | None:
            # Python's readline adds no blank of its own.
            found = [f"{command} " for command in commands if text[:1] == "/" and command.startswith(text)]
            return found[number] if number < len(found) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" \n")
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')


VERBS = {"chat": Verb(options=ChatOptions, run=run, presets=PRESETS)}
