"""Publications over HTTP: an engine's endpoint, and the trainer's client."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from .messages import from_bytes, to_bytes
from .patches import PatchError, Publication
from .receive import Receiver

PATH = "/publications"
REFUSED = 409
MAX_BYTES = 2**36


class PatchServer:
    """Receives publications on ``POST /publications`` and applies them; ``GET`` says which one the engine has.

    It runs in a thread of its own. A refused publication is answered with status 409 and the reason.

    Args:
        receiver: of the engine.
        lock: held while weights are written; the engine holds it while it computes.
        host: address to listen on. Anyone who reaches it can change the engine's weights.
        port: 0 for any free one.

    Attributes:
        url: where it listens.

    Example:
        >>> with PatchServer(Receiver(engine), lock) as server:
        ...     print(server.url)
    """

    def __init__(
        self,
        receiver: Receiver,
        lock: AbstractContextManager[Any] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ):
        handler = type("Handler", (_Handler,), {"receiver": receiver, "lock": lock or threading.Lock()})
        self._server = ThreadingHTTPServer((host, port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://{host}:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop listening, after the publication that is being applied."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> PatchServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    receiver: Receiver
    lock: AbstractContextManager[Any]

    def do_GET(self) -> None:
        self._answer(200 if self.path == PATH else 404, {"sequence": self.receiver.sequence})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != PATH or length > MAX_BYTES:
            self._answer(404 if self.path != PATH else 413, {})
            return
        try:
            publication = from_bytes(self.rfile.read(length))
            with self.lock:
                self.receiver.apply_(publication)
        except PatchError as error:
            self._answer(REFUSED, {"error": str(error)})
            return
        self._answer(200, {"sequence": publication.sequence})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Publications are no news on stderr."""


class HttpEngine:
    """An engine that listens with ``PatchServer``, for ``SparseWeightTransfer`` and loops.

    Args:
        url: of the engine.
        timeout: seconds for one publication.
    """

    def __init__(self, url: str, timeout: float = 300.0):
        self.url, self.timeout = url.rstrip("/") + PATH, timeout

    def send(self, publication: Publication) -> None:
        """Have the engine apply a publication.

        Raises:
            PatchError: the engine refused it; its reason.
            OSError: the engine cannot be reached.
        """
        request = Request(self.url, to_bytes(publication), {"Content-Type": "application/octet-stream"})
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                answer.read()
        except HTTPError as error:
            if error.code != REFUSED:
                raise
            raise PatchError(json.loads(error.read())["error"]) from None

    @property
    def sequence(self) -> int | None:
        """Of the publication that the engine has; None for the base."""
        with urlopen(self.url, timeout=self.timeout) as answer:
            found: int | None = json.loads(answer.read())["sequence"]
        return found
