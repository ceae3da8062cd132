"""starlm chat on real pseudo-terminals and pipes, with a model whose answers are noise."""

import codecs
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from runs import write_model_folder

from starlm.cli.chat import HELP
from starlm.text import printable

ROOT = Path(__file__).parents[2]
TEMPLATE = """{{ bos_token }}{% for m in messages %}<|user_start|>{{ m.role }}: {{ m.content }}<|user_end|>
{%- endfor %}<|assistant_start|>"""
# Makes the terminal the one whose Ctrl+C the command hears, even where the tests run in the background.
LOGIN = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); out = os.dup(1); os.login_tty(0); "
    "os.dup2(out, 1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = write_model_folder(tmp_path_factory.mktemp("chat") / "tuned", chat=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


class Terminal:
    """A command on a pseudo-terminal of 100 columns, but for its stdout, if that is given."""

    def __init__(self, *words, cwd, stdout=None):
        self.main, other = pty.openpty()
        os.set_blocking(self.main, False)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100"}
        environment |= {"LINES": "30", "OMP_NUM_THREADS": "1", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOGIN, "-m", "starlm", "chat", *map(str, words)],
            **{"stdin": other, "stdout": stdout or other, "stderr": other, "cwd": cwd, "env": environment},
        )
        os.close(other)
        self.raw, self.read_to = "", 0
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    @property
    def shown(self):
        """All text so far, without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02\r]", "", self.raw)

    def take(self, seconds):
        """Read what is there, or comes in this time."""
        if select.select([self.main], [], [], seconds)[0]:
            self.raw += self.decode(os.read(self.main, 65536))

    def until(self, text, seconds=60):
        """Wait for `text` behind what was waited for before; what came up to its end."""
        end = time.monotonic() + seconds
        while (at := self.shown.find(text, self.read_to)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[self.read_to :]!r}"
            self.take(0.2)
        begin, self.read_to = self.read_to, at + len(text)
        return self.shown[begin : self.read_to]

    def until_more(self, characters, seconds=60):
        """Wait for so many characters behind what was waited for before."""
        end = time.monotonic() + seconds
        while len(self.shown) < self.read_to + characters:
            assert time.monotonic() < end, self.shown[self.read_to :]
            self.take(0.2)

    def type(self, text):
        os.write(self.main, text.encode())

    def enter(self, text):
        self.type(text + "\r")

    def stop(self):
        """Ctrl+C."""
        self.type("\x03")

    def leave(self):
        # Between two lines that are read the terminal itself would take it.
        self.until("> ")
        self.type("\x04")
        return self.process.wait(60)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def open_one(*words, **options):
        opened.append(Terminal(*words, cwd=tmp_path, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGKILL)
            one.process.wait()
        os.close(one.main)


def messages(path):
    return [(m["role"], m["content"]) for m in json.loads(path.read_text())["messages"]]


def test_a_base_model(terminal, base, tmp_path):
    """From greeting to leaving: answers, a new line, a wrong command, history, files."""
    chat = terminal("--model", base, "--max-tokens", "9", "--seed", "0")
    greeting = chat.until("Ctrl+D leaves.")
    assert "a base model): it continues your text" in greeting
    chat.until("> ")
    chat.enter("def f(x):")
    line = re.search(r"(\d+) tokens(, [\d.,]+ tokens/s)?, the first after [\d.]+ s", chat.until(" s"))
    assert line is not None
    assert ("as many as max_tokens allows" in chat.until("> ")) == (line[1] == "9")
    chat.type("a\x1b\rb\\\r")
    chat.until("· ")
    # A paste of two lines.
    chat.type("\x1b[200~c\nd\x1b[201~\r")
    chat.until("the first after")
    chat.enter("/save talk.json")
    chat.until("4 messages saved to talk.json")
    said = messages(tmp_path / "talk.json")
    assert [role for role, _ in said] == ["user", "assistant"] * 2
    assert (said[0][1], said[2][1]) == ("def f(x):", "a\nb\nc\nd")

    chat.enter("/regenerat")
    chat.until("error: There is no command /regenerat. Did you mean /regenerate? /help lists them")
    chat.enter("/regenerate")
    chat.until("the first after")
    chat.enter("/save")
    chat.until("error: Name a file: /save talk.json")
    chat.enter("/save talk.json")
    chat.until("4 messages saved")
    again = messages(tmp_path / "talk.json")
    assert again[:3] == said[:3]
    assert again[3] != said[3], "another answer with the same seed"

    for bad, says in (
        ("/load none", "error: Cannot read the conversation none: No such file"),
        ("/load bad.json", "error: bad.json is not a conversation: it is not JSON"),
        ("/temperature warm", "error: temperature must be a number, 0 or more; got 'warm'."),
        ("/temperature -1", "error: temperature must be 0 or more; got -1.0"),
        ("/save bad.json", "error: bad.json exists already."),
        ("/save no/where.json", "error: Cannot write no/where.json: there is no folder no."),
    ):
        (tmp_path / "bad.json").write_text("{")
        chat.enter(bad)
        chat.until(says)
    chat.enter("/save talk.json")
    chat.until("4 messages saved")
    assert messages(tmp_path / "talk.json") == again
    assert (tmp_path / "bad.json").read_text() == "{"

    chat.enter("/temperature 0.25")
    chat.until("temperature 0.25\n")
    chat.enter("/system Sei kurz")
    chat.until("system: Sei kurz\n")
    chat.enter("/clear")
    chat.until("a new conversation, under the same system message")
    chat.enter("/regenerate")
    chat.until("error: There is no answer yet to give again.")
    chat.enter("/load talk.json")
    assert "> def f(x):" in chat.until("4 messages loaded from talk.json")
    # The history: up twice, past /load and /regenerate, to /clear.
    chat.type("\x1b[A\x1b[A\x1b[A\r")
    chat.until("a new conversation")
    chat.enter("/help")
    chat.until("Alt+Enter")
    assert chat.leave() == 0
    assert "Traceback" not in chat.shown


def test_the_help_fits_a_terminal_of_80_columns():
    assert max(map(len, HELP.splitlines())) < 80


def test_ctrl_c_keeps_what_came(terminal, tuned, tmp_path):
    """In the middle of an answer; at the prompt it only says how to leave."""
    chat = terminal("--model", tuned, "--max-tokens", "1000000", "--save", "talk.json", "--system", "S")
    chat.until("> ")
    assert "it continues your text" not in chat.shown
    # Python misses an interrupt between the prompt and the wait for a key; nobody is as fast as this test.
    time.sleep(0.5)
    chat.stop()
    chat.until("Ctrl+D or /quit leaves.")
    chat.until("> ")
    chat.enter("Hello")
    chat.until("\n")
    chat.until_more(300)
    chat.stop()
    assert int(chat.until(", stopped").rsplit(" tokens,", 1)[0].split()[-1].replace(",", "")) > 5
    said = messages(tmp_path / "talk.json")
    assert said[:2] == [("system", "S"), ("user", "Hello")]
    assert len(said[2][1]) > 5
    chat.enter("//etc")
    chat.until("\n")
    time.sleep(0.5)
    chat.stop()
    chat.until("stopped")
    chat.enter("/quit")
    assert chat.process.wait(60) == 0
    assert "Traceback" not in chat.shown


@pytest.mark.parametrize("first", [0, 0.03, 0.15])
def test_ctrl_c_at_any_moment_breaks_nothing(terminal, base, first):
    """Before the answer is asked for, while kernels are compiled for the first one, or within it."""
    chat = terminal("--model", base, "--max-tokens", "1000000")
    chat.until("> ")
    for number, seconds in enumerate((first, 0, 0.01, 0.02, 0.04, 0.08)):
        time.sleep(0.3)
        chat.enter(f"m{number}")
        chat.until(f"m{number}\n")
        time.sleep(seconds)
        chat.stop()
        chat.until("> ")
    time.sleep(0.3)
    chat.enter("last")
    chat.until("last\n")
    chat.until_more(300)
    chat.stop()
    chat.until(", stopped")
    assert "error" not in chat.shown
    assert chat.leave() == 0


def test_json_while_talking(terminal, base, tmp_path):
    """Stdout has the object alone; prompts and the history are on the terminal."""
    with (tmp_path / "out.json").open("wb") as file:
        chat = terminal("--model", base, "--max-tokens", "3", "--json", stdout=file)
        chat.until("> ")
        chat.enter("Hello")
        chat.until("the first after")
        chat.until("> ")
        chat.type("\x1b[A\r")
        chat.until("the first after")
        assert chat.leave() == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [m["content"] for m in found["messages"][::2]] == ["Hello", "Hello"]


def test_no_template_and_no_name_steers_the_terminal(terminal, tmp_path):
    folder = write_model_folder(tmp_path / "a[bold]\x1b]0;name", chat=True)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('\x1b]0;title\x07') }}")
    chat = terminal("--model", folder.name)
    chat.until("a[bold]\\x1b]0;name, ")
    chat.until("> ")
    chat.enter("Hello")
    chat.until("error: The model's chat template does not take this conversation: \\x1b]0;title\\x07.")
    assert "\x1b]0;" not in chat.raw


def talk(command, monkeypatch, text, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return command("chat", *words)


def test_one_message_through_a_pipe(command, monkeypatch, base):
    """A base model says what `generate` says; nothing else is printed."""
    options = ("--model", base, "--max-tokens", 12, "--seed", 4)
    done = talk(command, monkeypatch, "def f(x):\n", *options)
    assert (done.code, done.err) == (0, "")
    assert done.out == command("generate", *options, "--prompt", "def f(x):\n").out
    found = talk(command, monkeypatch, "def f(x):\n", *options, "--json").json
    assert [m["content"] for m in found["messages"]] == ["def f(x):\n", done.out[:-1]]
    # Those that were drawn, not those that the text would be cut into again.
    assert found["tokens"] == 12


def test_one_message_through_a_pipe_to_a_terminal(command, monkeypatch, base):
    """What was said stays what it is, and steers no terminal."""
    words = ("--model", base, "--max-tokens", 60, "--seed", 4, "--temperature", 9, "--save", "talk.json")
    with monkeypatch.context() as change:
        change.setattr(sys.stdout, "isatty", lambda: True)
        done = talk(command, change, "def", *words)
    said = messages(Path("talk.json"))[1][1]
    assert printable(said) != said
    assert done.out == printable(said) + "\n"


def test_a_pipe_to_a_chat_model(command, monkeypatch, tuned):
    """The template is used, but for --conversation plain; a conversation goes on where it was."""
    options = ("--model", tuned, "--max-tokens", 12, "--seed", 4)
    done = talk(command, monkeypatch, "Hi\n", *options, "--save", "talk.json", "--json")
    assert done.json["messages"][0]["content"] == "Hi"
    plain = talk(command, monkeypatch, "Hi", *options, "--conversation", "plain", "--json").json
    assert plain["messages"][1] != done.json["messages"][1]
    more = ("--load", "talk.json", "--save", "talk.json")
    assert len(talk(command, monkeypatch, "Go on", *options, *more, "--json").json["messages"]) == 4
    assert len(messages(Path("talk.json"))) == 4


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("", (), "There is no message: stdin is empty."),
        ("a", ("--max-tokens", "0"), "max_tokens must be 1 or more; got 0"),
        ("a", ("--temperature", "-1"), "temperature must be 0 or more; got -1.0"),
        ("a", ("--load", "none.json"), "Cannot read the conversation none.json: No such file"),
        ("a", ("--save", "there.json"), "there.json exists already. Load it to go on with it"),
        ("a", ("--save", "no/a.json"), "Cannot write no/a.json: there is no folder no. Make it first."),
        ("a", ("--load", "open.json"), "ends with a message of the user, so no other can follow"),
        ("a", ("--model", "none"), "There is no model at none"),
    ],
)
def test_errors(command, monkeypatch, base, text, words, says):
    Path("there.json").write_text("[]")
    Path("open.json").write_text('[{"role": "user", "content": "x"}]')
    done = talk(command, monkeypatch, text, "--model", base, *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert says in done.err
    assert Path("there.json").read_text() == "[]"


def test_without_stdin(command, monkeypatch, base):
    monkeypatch.setattr(sys, "stdin", None)
    done = command("chat", "--model", base)
    assert (done.code, "needs a terminal, or one message through a pipe" in done.err) == (2, True)


def test_what_is_pasted_is_one_message(terminal, base, tmp_path):
    chat = terminal("--model", base, "--max-tokens", "2")
    chat.until("> ")
    chat.type("\x1b[200~line one\nline two\x1b[201~\r")
    chat.until("> ")
    chat.enter("/save talk.json")
    chat.until("2 messages saved")
    assert messages(tmp_path / "talk.json")[0] == ("user", "line one\nline two")


def test_sigterm_ends_it(terminal, base):
    chat = terminal("--model", base)
    chat.until("> ")
    # Python's readline misses a signal in the instant between a prompt and the wait for a key.
    for _ in range(5):
        chat.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            chat.process.wait(5)
            break
    assert chat.process.poll() in (128 + signal.SIGTERM, -signal.SIGTERM)
