"""An inference engine in a process of its own, which takes weights and answers over HTTP.

Generation is transformers' own. Publications arrive at a ``PatchServer`` of ``sparse_peft.sync``; ``/weights`` takes a
whole model, as trainers without sparse sync send it.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sparse_peft.sync import HttpEngine, PatchServer, Receiver

from .sync import read_weights

Load = Callable[[], PreTrainedModel]


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> Tensor:
    """``(rows, longest)`` tokens."""
    longest = max(map(len, rows))
    pads = [[pad] * (longest - len(row)) for row in rows]
    return torch.tensor([[*p, *row] if left else [*row, *p] for p, row in zip(pads, rows, strict=True)])


@torch.no_grad()
def token_log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """``(rows, length - 1)`` log-probabilities of each token after those before it, from one pass."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2).float()


def until(row: list[int], end: int) -> list[int]:
    """A completion up to its end of text, with it."""
    return row[: row.index(end) + 1] if end in row else row


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: list[list[int]], length: int, seed: int, end: int) -> dict[str, Any]:
    """One completion of each prompt at temperature 1, and its tokens' log-probabilities."""
    torch.manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = padded(prompts, end, left=True)
    width = tokens.shape[1]
    settings = GenerationConfig(
        do_sample=True, max_new_tokens=length, eos_token_id=end, pad_token_id=end, output_logits=True,
        return_dict_in_generate=True, top_k=0, top_p=1.0, temperature=1.0,
    )  # fmt: skip
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    out = model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings)
    found = out.sequences[:, width:]
    chosen = torch.stack(out.logits, 1).log_softmax(-1).gather(2, found[:, :, None]).squeeze(2).tolist()
    completions = [until(row, end) for row in found.tolist()]
    return {
        "completions": completions,
        "log_probabilities": [row[: len(c)] for row, c in zip(chosen, completions, strict=True)],
    }


class _Handler(BaseHTTPRequestHandler):
    model: PreTrainedModel
    lock: AbstractContextManager[Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            answer = json.dumps(self._answer(body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _answer(self, body: bytes) -> Any:
        if self.path == "/weights":
            read_weights(self.model, body)
            return {}
        request = json.loads(body)
        if self.path == "/sample":
            return sample(self.model, **request)
        return token_log_probabilities(self.model, torch.tensor(request["tokens"])).tolist()

    def log_message(self, *_: object) -> None:
        """Requests are no news on stderr."""


def _serve(load: Load, threads: int, connection: Connection) -> None:
    """The engine's process: listens until the connection is closed."""
    torch.set_num_threads(threads)
    model, lock = load().eval(), threading.Lock()
    handler = type("Handler", (_Handler,), {"model": model, "lock": lock})
    with PatchServer(Receiver(model), lock) as patches, ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection.send((patches.url, f"http://127.0.0.1:{server.server_address[1]}"))
        with suppress(EOFError):  # the trainer has gone
            connection.recv()
        server.shutdown()


class EngineProcess:
    """A started engine, and the trainer's client of it.

    Args:
        load: makes the model there.
        context: how processes are started.

    Attributes:
        patches: takes publications.
    """

    def __init__(self, load: Load, context: Any = None):
        context = context or multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(load, torch.get_num_threads(), theirs), daemon=True)
        self._process.start()
        theirs.close()
        patches, self._url = self._connection.recv()
        self.patches = HttpEngine(patches)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def sample(self, prompts: list[list[int]], length: int, seed: int, end: int) -> dict[str, Any]:
        """See ``sample``."""
        return self._post("/sample", {"prompts": prompts, "length": length, "seed": seed, "end": end})

    def token_log_probabilities(self, tokens: Tensor) -> Tensor:
        """See ``token_log_probabilities``."""
        return torch.tensor(self._post("/log-probabilities", {"tokens": tokens.tolist()}))

    def replace_weights(self, message: bytes) -> None:
        """Take a whole model."""
        self._post("/weights", message)

    def _post(self, path: str, content: Any) -> Any:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        with urlopen(Request(self._url + path, body), timeout=600) as answer:
            return json.loads(answer.read())
