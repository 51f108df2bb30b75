"""Answers of OpenAI's completions API, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from .jobs import End, Event, Failure
from .requests import RequestError, Wanted

OBJECTS = {
    "chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
    "text": ("cmpl",) + 2 * ("text_completion",),
}


class Answer:
    """Objects of OpenAI's API for one request.

    Args:
        kind: ``"chat"`` or ``"text"``.
        wanted: the request.
    """

    def __init__(self, kind: str, wanted: Wanted):
        self.kind, self.wanted = kind, wanted
        prefix, self.object, self.chunk = OBJECTS[kind]
        self.shared = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": wanted.model}

    def whole(self, end: Event) -> dict[str, Any]:
        """An answer that is not streamed."""
        assert isinstance(end, End)
        said = {"message": {"role": "assistant", "content": end.text}} if self.kind == "chat" else {"text": end.text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": end.finish_reason}
        return {**self.shared, "object": self.object, "choices": [choice], "usage": _usage(end)}

    async def pieces(self, first: Event, rest: AsyncGenerator[Event, None]) -> AsyncIterator[str]:
        """Server-sent events."""
        async with aclosing(rest):
            try:
                if self.kind == "chat":
                    yield self._piece({"role": "assistant", "content": ""})
                for sent in self._of(first):
                    yield sent
                async for event in rest:
                    for sent in self._of(event):
                        yield sent
            except RequestError as error:
                yield _sent(error.content())
        yield "data: [DONE]\n\n"

    def _of(self, event: Event) -> list[str]:
        if not isinstance(event, End):
            assert not isinstance(event, Failure)
            return [self._piece({"content": event.text})]
        last = [self._piece({}, event.finish_reason)]
        if self.wanted.include_usage:
            last.append(_sent({**self.shared, "object": self.chunk, "choices": [], "usage": _usage(event)}))
        return last

    def _piece(self, delta: dict[str, str], reason: str | None = None) -> str:
        said: dict[str, Any] = {"delta": delta} if self.kind == "chat" else {"text": delta.get("content", "")}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return _sent({**self.shared, "object": self.chunk, "choices": [choice]})


def _usage(end: End) -> dict[str, int]:
    total = end.prompt_tokens + end.completion_tokens
    return {
        "prompt_tokens": end.prompt_tokens, "completion_tokens": end.completion_tokens, "total_tokens": total,
    }  # fmt: skip


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
