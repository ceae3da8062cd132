"""The models of a server, by name: loaded in the background, each with an engine of its own."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlm.data.tokenizer import Tokenizer
from starlm.generate.chat import renderer, speaker
from starlm.generate.engine import Engine
from starlm.generate.request import Request
from starlm.generate.text import TextModel, load
from starlm.model.folder import find_checkpoint
from starlm.serve.chat import Chat
from starlm.serve.config import ServeOptions
from starlm.serve.errors import APIError
from starlm.serve.schemas import Model


@dataclass(frozen=True)
class Served:
    """A model that can be asked."""

    name: str
    folder: Path
    text: TextModel
    engine: Engine
    chat: Chat
    max_context: int | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.text.tokenizer

    def describe(self) -> Model:
        """Its entry in /v1/models."""
        return Model(
            id=self.name,
            object="model",
            created=int(self.folder.stat().st_mtime) if self.folder.exists() else 0,
            owned_by="starlm",
            chat=self.chat.kind,
            vocab_size=self.tokenizer.vocab_size,
            parameters=sum(p.numel() for p in self.text.model.parameters()),
            max_context=self.max_context,
        )


class Models:
    """All models of a server."""

    def __init__(self, options: ServeOptions) -> None:
        """Find the checkpoints.

        Raises:
            InputError: there is none in one of the folders.
        """
        self._options = options
        self._folders = {name: find_checkpoint(folder) for name, folder in options.models.items()}
        self._served: dict[str, Served] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def ready(self) -> bool:
        """Whether all are loaded."""
        return len(self._served) == len(self._folders)

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Those that run."""
        return {served.name: served.engine for served in self.served}

    @property
    def served(self) -> list[Served]:
        """Those that are loaded, in the order of the options."""
        return [self._served[name] for name in self._folders if name in self._served]

    def load(self) -> None:
        """Load them one after the other and start their engines; `close` ends it early.

        Raises:
            InputError: a checkpoint that cannot be used.
        """
        options = self._options
        for name, folder in self._folders.items():
            text = speaker(load(folder, device=options.device, dtype=options.dtype))
            chat = Chat(model=text, render=renderer(folder, text.tokenizer, options.conversation))
            engine = Engine(text, slots=options.slots, queue=options.queue, max_context=options.max_context)
            # The first call compiles kernels, which takes seconds: nobody is to wait for it.
            room = options.max_context or 5
            prompt = [text.tokenizer.bos] * min(3, room - 1)
            warming = Request(tokens=prompt, max_tokens=min(2, room - len(prompt)))
            for _ in engine.start().submit(warming):
                pass
            with self._lock:
                if self._closed:
                    engine.close()
                    return
                self._served[name] = Served(name, folder, text, engine, chat, options.max_context)

    def close(self) -> None:
        """Stop the engines; what they are at is cancelled."""
        with self._lock:
            self._closed = True
            for served in self._served.values():
                served.engine.close()

    def __getitem__(self, name: str) -> Served:
        """The model of that name.

        Raises:
            APIError: it is being loaded (503), or there is none (404).
        """
        if name in self._served:
            return self._served[name]
        if name in self._folders:
            raise APIError(
                503, f"The model {name!r} is being loaded. Try again soon.", headers={"Retry-After": "2"}
            )
        known = ", ".join(self._folders)
        raise APIError(
            404,
            f"There is no model {name!r} here. There are: {known}.",
            param="model",
            code="model_not_found",
        )
