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
PIECE = 2**20  # bytes that are read at once


class PatchServer:
    """Receives publications on ``POST /publications`` and applies them; ``GET`` says which one the engine has.

    It runs in a thread of its own. A refused publication is answered with status 409 and the reason. Memory is taken
    for bytes that have arrived, not for those that a request announces.

    Args:
        receiver: of the engine.
        lock: held while weights are written; the engine holds it while it computes.
        host: address to listen on. Anyone who reaches it can change the engine's weights.
        port: 0 for any free one.
        max_bytes: of a publication; longer ones are answered with 413, unread. A publication of ``n`` entries in
            bfloat16 takes ``6 * n`` bytes.

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
        max_bytes: int = MAX_BYTES,
    ):
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: at least 1 is expected")
        fields = {"receiver": receiver, "lock": lock or threading.Lock(), "max_bytes": max_bytes}
        handler = type("Handler", (_Handler,), fields)
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
    max_bytes: int
    timeout = 300.0  # seconds of silence after which a request is given up

    def do_GET(self) -> None:
        self._answer(200 if self.path == PATH else 404, {"sequence": self.receiver.sequence})

    def do_POST(self) -> None:
        status = self._unreadable()
        if status is not None:
            self.close_connection = True  # the body is not read
            self._answer(status, {})
            return
        try:
            publication = from_bytes(self._body())
            with self.lock:
                self.receiver.apply_(publication)
        except PatchError as error:
            self._answer(REFUSED, {"error": str(error)})
            return
        self._answer(200, {"sequence": publication.sequence})

    def _unreadable(self) -> int | None:
        """The status of a request whose body is not read; None for others."""
        length = self.headers.get("Content-Length", "")
        if self.path != PATH:
            return 404
        if not length.isdecimal():
            return 411  # length required
        return 413 if int(length) > self.max_bytes else None

    def _body(self) -> bytes:
        """What arrives of the announced bytes."""
        body, length = bytearray(), int(self.headers["Content-Length"])
        while piece := self.rfile.read(min(PIECE, length - len(body))):
            body += piece
        return bytes(body)

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

    Attributes:
        bytes_sent: of all messages, refused ones too.
    """

    def __init__(self, url: str, timeout: float = 300.0):
        self.url, self.timeout, self.bytes_sent = url.rstrip("/") + PATH, timeout, 0

    def send(self, publication: Publication) -> None:
        """Have the engine apply a publication.

        Raises:
            PatchError: the engine refused it; its reason.
            OSError: the engine cannot be reached.
        """
        message = to_bytes(publication)
        request = Request(self.url, message, {"Content-Type": "application/octet-stream"})
        self.bytes_sent += len(message)
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
