"""The process that serves: its socket, signals, logs, and the loading of its models."""

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from starlm.errors import InputError
from starlm.serve.app import create_app
from starlm.serve.config import ServeOptions
from starlm.serve.gate import JSONLines
from starlm.serve.models import Models

# Seconds for connections to close once their answers have been cut off.
_CLOSING = 5


def serve(options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl+C; answers may then finish within `options.grace` seconds.

    Args:
        say: tells people where the server is and when it is ready; the log goes to stderr as JSON lines.

    Raises:
        InputError: a checkpoint that cannot be used, or an address that cannot be listened on.
    """
    models = Models(options)
    with _listen(options.host, options.port) as listener, _logging():
        server = _Server(options, models)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"Loading {', '.join(options.models)}; listening on {url}")
        failed: list[BaseException] = []

        def load() -> None:
            try:
                models.load()
                if models.ready:
                    say(f"Ready: the chat is at {url}/, the API at {url}/v1")
            except BaseException as error:
                failed.append(error)
                server.should_exit = True

        loader = threading.Thread(target=load, name="loader", daemon=True)
        loader.start()
        try:
            server.run(sockets=[listener])
        finally:
            models.close()
            # A process that ends while this thread is at work in PyTorch is aborted.
            loader.join()
    if failed:
        raise failed[0]


class _Server(uvicorn.Server):
    """Uvicorn, which on a signal lets answers finish, then cuts them off so that clients are told."""

    def __init__(self, options: ServeOptions, models: Models) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(options, models),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=round(options.grace) + _CLOSING,
            )
        )
        self._grace, self._models = options.grace, models

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server gracefully, the second at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers, at most the time of grace."""
        cut = asyncio.get_running_loop().call_later(self._grace, self._models.close)
        await super().shutdown(sockets)
        cut.cancel()


def _listen(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Whoever connects from now on waits until the server runs.
        listener.listen(2048)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        raise InputError(
            f"Cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}. Choose "
            f"another with --port; --port 0 takes a free one."
        ) from None
    return listener


@contextmanager
def _logging() -> Iterator[None]:
    """The server's log and uvicorn's on stderr, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    loggers = {"starlm.serve": logging.INFO, "starlm.ops": logging.INFO, "uvicorn": logging.WARNING}
    # Below that it says of each client that leaves early what the access log says better.
    loggers["asyncio"] = logging.ERROR
    for name, level in loggers.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).propagate = False
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeHandler(handler)
