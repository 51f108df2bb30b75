"""An application at an address."""

from __future__ import annotations

import socket
import threading
from typing import Any


class HttpServer:
    """An application at an address. ``run`` serves until a signal; as a block it serves in a thread.

    Args:
        app: an ASGI application.
        host: address to listen on.
        port: 0 for any free one.
        grace: seconds that requests have to end in once the server stops.

    Attributes:
        url: where it listens.

    Raises:
        ImportError: uvicorn is not installed.
        OSError: the address is taken.
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0, grace: int = 120):
        import uvicorn  # noqa: PLC0415  (an optional package)

        self._socket = socket.create_server((host, port))
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=grace, lifespan="on"
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C: requests in work are answered, new ones refused."""
        self._server.run(sockets=[self._socket])

    def __enter__(self) -> HttpServer:
        self._thread = threading.Thread(target=self.run, name="sparse-peft-http", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join()
