"""An engine's HTTP endpoints: OpenAI's completions, models, adapters at run time, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from .answers import Answer
from .engine import Engine
from .folders import AdapterFolders
from .jobs import End, Event, Failure, Job
from .requests import RequestError, Wanted, parse

CHAT, TEXT, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
HEALTH, METRICS = "/health", "/metrics"
PATHS = (CHAT, TEXT, MODELS, LOAD, UNLOAD, HEALTH, METRICS)
TEXT_TOKENS = 16  # OpenAI's default for completions


@dataclass(frozen=True)
class ServerLimits:
    """What a request may ask for.

    Attributes:
        body_bytes: of a request.
        max_tokens: of an answer; chats that name no number get as many.
    """

    body_bytes: int = 2**20
    max_tokens: int = 1024


def build_app(engine: Engine, folders: AdapterFolders | None = None, limits: ServerLimits | None = None) -> Any:
    """An ASGI application; it closes the engine when it ends.

    Args:
        engine: answers the requests.
        folders: adapters may be loaded from at run time; by default from none.
        limits: of requests.

    Raises:
        ImportError: starlette is not installed.
    """
    from starlette.applications import Starlette  # noqa: PLC0415  (an optional package)
    from starlette.exceptions import HTTPException  # noqa: PLC0415
    from starlette.middleware import Middleware  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    api = _Api(engine, folders or AdapterFolders(), limits or ServerLimits())

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    handlers: dict[Any, Any] = {
        RequestError: _refused, HTTPException: _refused_by_http, Exception: _failed,
    }  # fmt: skip
    endpoints: list[tuple[str, str, Callable[[Any], Awaitable[Any]]]] = [
        ("POST", CHAT, api.chat), ("POST", TEXT, api.text), ("GET", MODELS, api.models),
        ("GET", MODELS + "/{name:path}", api.model), ("POST", LOAD, api.load), ("POST", UNLOAD, api.unload),
        ("GET", HEALTH, api.health), ("GET", METRICS, api.metrics),
    ]  # fmt: skip
    return Starlette(
        routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in endpoints],
        middleware=[Middleware(_Measured, metrics=engine.metrics)],
        exception_handlers=handlers,
        lifespan=lifespan,
    )


async def _refused(_: Any, error: RequestError) -> Any:
    return _json(error.content(), error.status)


async def _refused_by_http(_: Any, error: Any) -> Any:
    return _json(RequestError(str(error.detail), error.status_code).content(), error.status_code)


async def _failed(_: Any, error: Exception) -> Any:
    return _json(RequestError("the server failed on this request; see its log", 500).content(), 500)


def _json(content: Any, status: int = 200) -> Any:
    from starlette.responses import JSONResponse  # noqa: PLC0415  (an optional package)

    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(content, status, headers=headers)


class _Measured:
    """Counts requests by endpoint and status, and their seconds."""

    def __init__(self, app: Any, metrics: Any):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.add("requests_total", endpoint=path, status=status)
            if path in (CHAT, TEXT):
                self.metrics.observe("request_seconds", time.monotonic() - began)


class _Api:
    def __init__(self, engine: Engine, folders: AdapterFolders, limits: ServerLimits):
        self.engine, self.folders, self.limits = engine, folders, limits
        self.started = int(time.time())

    # ------------------------------------------------------------------ completions

    async def chat(self, request: Any) -> Any:
        return await self._complete(request, "chat")

    async def text(self, request: Any) -> Any:
        return await self._complete(request, "text")

    async def _complete(self, request: Any, kind: str) -> Any:
        from starlette.responses import StreamingResponse  # noqa: PLC0415  (an optional package)

        wanted = parse(await self._body(request), kind)
        adapter = self.engine.adapter_of(wanted.model)
        ids = await asyncio.to_thread(self._ids, wanted.content)
        events = self._events(wanted, adapter, ids, self._most_tokens(wanted, len(ids), kind))
        answer = Answer(kind, wanted)
        if wanted.stream:
            first = await anext(events)  # errors until here have a status of their own
            return StreamingResponse(answer.pieces(first, events), media_type="text/event-stream")
        async with aclosing(events):
            return _json(answer.whole([event async for event in events][-1]))

    async def _body(self, request: Any) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a web page cannot send to this server without being asked first
            raise RequestError("Content-Type: application/json is expected", 415)
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > self.limits.body_bytes:
                raise RequestError(f"the body has more than {self.limits.body_bytes} bytes", 413)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no valid JSON: {error}") from None

    def _ids(self, content: str | list[int] | list[dict[str, str]]) -> list[int]:
        tokenizer = self.engine.tokenizer
        if isinstance(content, str):
            ids: list[int] = tokenizer(content)["input_ids"]
        elif isinstance(content[0], dict):
            ids = self._chat_ids(content)
        else:
            ids = [token for token in content if isinstance(token, int)]
        size = self.engine.vocabulary
        if not ids or max(ids) >= size:
            raise RequestError(f"prompt: at least one token is expected, and ids below {size}", param="prompt")
        return ids

    def _chat_ids(self, messages: Any) -> list[int]:
        tokenizer = self.engine.tokenizer
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise RequestError(
                f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from None
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _most_tokens(self, wanted: Wanted, prompt: int, kind: str) -> int:
        """The number of tokens that an answer may have.

        Raises:
            RequestError: more than the server allows, or than the model's context has room for.
        """
        context = self.engine.context_length or prompt + self.limits.max_tokens
        most = min(self.limits.max_tokens, context - prompt)
        tokens = wanted.max_tokens or (most if kind == "chat" else min(TEXT_TOKENS, most))
        if most < 1 or tokens > context - prompt:
            raise RequestError(
                f"This model's maximum context length is {context} tokens, and the request has {prompt} in its prompt "
                f"and max_tokens={wanted.max_tokens}",
                param="messages" if kind == "chat" else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        if tokens > most:
            raise RequestError(f"max_tokens={tokens}: this server allows at most {most}", param="max_tokens")
        return tokens

    async def _events(
        self, wanted: Wanted, adapter: str | None, ids: list[int], tokens: int
    ) -> AsyncGenerator[Event, None]:
        """What the engine says of a request; a client that goes away ends it."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(queue.put_nowait, event)

        job = Job(adapter, ids, wanted.sampling, tokens, tell, wanted.stop, wanted.stream)
        self.engine.submit(job)
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Failure):
                    raise event.error
                yield event
                if isinstance(event, End):
                    return
        finally:
            job.cancelled = True

    # ------------------------------------------------------------------ models and adapters

    async def models(self, _: Any) -> Any:
        names = [self.engine.name, *self.engine.pool.names]
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Any) -> Any:
        name = request.path_params["name"]
        self.engine.adapter_of(name)
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        parent = None if name == self.engine.name else self.engine.name
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "sparse_peft", "parent": parent,
            "max_model_len": self.engine.context_length,
        }  # fmt: skip

    async def load(self, request: Any) -> Any:
        body = await self._body(request)
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        in_place = body.get("load_inplace") is True
        folder = await asyncio.to_thread(self.folders.find, path)
        await asyncio.to_thread(self.engine.load, name, folder, in_place)
        return _json({"message": f"adapter {name!r} is loaded", "model": self._model(name)})

    async def unload(self, request: Any) -> Any:
        name = _text(await self._body(request), "lora_name")
        await asyncio.to_thread(self.engine.unload, name)
        return _json({"message": f"adapter {name!r} is unloaded"})

    # ------------------------------------------------------------------ state

    async def health(self, _: Any) -> Any:
        ready = self.engine.is_ready
        return _json({"status": "ok" if ready else "shutting down"}, 200 if ready else 503)

    async def metrics(self, _: Any) -> Any:
        from starlette.responses import PlainTextResponse  # noqa: PLC0415  (an optional package)

        pool = self.engine.pool
        now = {
            "queue_requests": self.engine.waiting, "adapters_registered": len(pool.names),
            "adapters_loaded": len(pool.loaded), "adapter_bytes": pool.statistics.loaded_bytes,
            "pool_hits_total": pool.statistics.hits, "pool_misses_total": pool.statistics.misses,
            "pool_evictions_total": pool.statistics.evictions,
        }  # fmt: skip
        return PlainTextResponse(self.engine.metrics.text(now), media_type="text/plain; version=0.0.4")


def _text(body: Any, field: str) -> str:
    value = body.get(field) if isinstance(body, Mapping) else None
    if not isinstance(value, str) or not value:
        raise RequestError(f"{field}: a text is expected", param=field)
    return value
