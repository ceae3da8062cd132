"""What a server serves, where, and its limits. No torch, so that `--help` stays instant."""

import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import tyro

from starlm.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NAME = re.compile(r"[\w.:=-]+")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Which models are served, where, to whom, and within which limits."""

    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """RUN or NAME=RUN: run folder (its last checkpoint is taken) or checkpoint folder; default runs/demo.
    May be given again for further models. The name is what requests call it, by default the folder's."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine (0.0.0.0) only with api_key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and says which."""
    api_key: str | None = None
    """What clients must send as `Authorization: Bearer KEY`; without it, all may ask who reach the port, by
    localhost or an address."""
    cors_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Origin of web pages elsewhere that may use the API, such as https://example.org; may be given again."""
    slots: int = 32
    """Sequences that are generated at the same time, per model."""
    queue: int = 128
    """Requests that may wait for a slot, per model; beyond it they are answered 429."""
    max_context: int | None = None
    """Tokens of a prompt and its answer; default: as many as memory has room for."""
    max_tokens: int = 512
    """Tokens of an answer where a request for a chat does not say; completions have OpenAI's 16."""
    max_body: int = 4 << 20
    """Bytes of a request."""
    timeout: float = 600.0
    """Seconds that a request may take, waiting included."""
    grace: float = 30.0
    """Seconds that answers have to finish in after SIGTERM or Ctrl+C; then they are cut off."""
    conversation: Literal["auto", "template", "plain"] = "auto"
    """By the checkpoint's chat template (template), as one text to continue (plain), or as the model
    was trained (auto, by "chat" in its config.json)."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights and of what is remembered; auto is the checkpoint's. bfloat16 takes half the memory."""

    def __post_init__(self) -> None:
        def require(ok: bool, rule: str, name: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

        require(0 <= self.port < 65536, "between 0 and 65535", "port")
        # A header carries nothing else, and loses blanks at its ends.
        key = self.api_key
        fits = key is None or re.fullmatch("[!-~]([ -~]*[!-~])?", key) is not None
        require(fits, "printable ASCII that neither begins nor ends with a blank", "api_key")
        require(self.slots >= 1, "at least 1", "slots")
        require(self.queue >= 1, "at least 1", "queue")
        require(self.max_context is None or self.max_context >= 2, "at least 2", "max_context")
        require(self.max_tokens >= 1, "at least 1", "max_tokens")
        require(self.max_body >= 1024, "at least 1024", "max_body")
        require(0 < self.timeout < float("inf"), "above 0", "timeout")
        require(0 <= self.grace < float("inf"), "0 or more", "grace")
        origins = all(re.fullmatch(r"https?://[^/\s]+", origin) for origin in self.cors_origin)
        require(origins, "scheme://host[:port], without a path", "cors_origin")
        if self.host not in LOOPBACK and self.api_key is None:
            raise InputError(
                f"host {self.host} can be reached from other machines, so it needs --api-key KEY. To serve "
                f"this machine alone, leave --host out."
            )
        self.models  # noqa: B018

    @property
    def models(self) -> dict[str, Path]:
        """Folder of each model by its name.

        Raises:
            InputError: a name that cannot be one, or that two have.
        """
        found: dict[str, Path] = {}
        for word in self.model or ("runs/demo",):
            name, equals, folder = word.partition("=")
            # Folders may have the sign in their names, too.
            if not equals or "/" in name or Path(word).exists():
                name, folder = Path(word).resolve().name, word
            cure = f"--model {quote(f'NAME={folder}')}"
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"A model's name has letters, digits, '.', ':', '=', '_' and '-'; got {name!r}. Write "
                    f"NAME=RUN: {cure}."
                )
            if name in found:
                raise InputError(f"Two models are called {name!r}. Name them: {cure}.")
            found[name] = Path(folder)
        return found
