"""Requests of OpenAI's completions API: their fields, checked, and the errors that answer others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ..constraints import Count, CountOrZero, Limits, Share, validated

MOST_STOPS = 4  # OpenAI's limit


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: for the client.
        status: of HTTP.
        param: the field that is wrong.
        code: OpenAI's word for programs.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def content(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; requests with equal settings share batches.

    Attributes:
        temperature: 0 for the most likely token.
        top_p: share of the probability that is drawn from.
        top_k: number of tokens that are drawn from; 0 for all.
        seed: of the draws; such a request has a batch of its own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Wanted:
    """A checked request.

    Attributes:
        model: an adapter's name, or the base's.
        content: messages ``[{"role": ..., "content": text}]``, a prompt, or token ids.
        sampling: of the tokens.
        max_tokens: None if the request has none.
        stop: texts before which the answer ends.
        stream: whether it is sent in pieces.
        include_usage: whether the last piece has the numbers of tokens.
    """

    model: str
    content: list[dict[str, str]] | str | list[int]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


Temperature = Annotated[float, Limits(least=0, most=2, noun="a temperature")]
SHARED: dict[str, Any] = {
    "model": str,
    "max_tokens": Count | None,
    "temperature": Temperature,
    "top_p": Share,
    "top_k": CountOrZero,
    "seed": Annotated[int, Limits(least=0)] | None,
    "stop": str | list[str],
    "stream": bool,
    "stream_options": dict,
}
FIELDS: dict[str, dict[str, Any]] = {
    "chat": {**SHARED, "messages": list[dict], "max_completion_tokens": Count | None},
    "text": {**SHARED, "prompt": str | list},
}
# What the server does not do, with the values that ask for nothing.
ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}  # fmt: skip
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


def parse(body: object, kind: str) -> Wanted:
    """A request's JSON, checked.

    Args:
        body: the decoded JSON.
        kind: ``"chat"`` or ``"text"``.

    Raises:
        RequestError: with status 400; names the field.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body is a {type(body).__name__}; a JSON object is expected")
    given = {name: value for name, value in body.items() if value is not None}
    found: dict[str, Any] = {name: _checked(name, value, kind) for name, value in given.items() if name not in IGNORED}
    if "model" not in found:
        raise RequestError("model: the name of an adapter or of the base model is expected", param="model")
    stop = found.get("stop", ())
    return Wanted(
        model=found["model"],
        content=_messages(found) if kind == "chat" else _prompt(found),
        sampling=_sampling(found),
        max_tokens=found.get("max_completion_tokens", found.get("max_tokens")),
        stop=_stops([stop] if isinstance(stop, str) else stop),
        stream=found.get("stream", False),
        include_usage=found.get("stream_options", {}).get("include_usage") is True,
    )


def _sampling(found: Mapping[str, Any]) -> Sampling:
    """Greedy requests are alike, whatever else they say of draws."""
    temperature = found.get("temperature", 1.0)
    if temperature == 0:
        return Sampling()
    return Sampling(temperature, found.get("top_p", 1.0), found.get("top_k", 0), found.get("seed"))


def _checked(name: str, value: Any, kind: str) -> Any:
    hint = FIELDS[kind].get(name)
    if hint is not None:
        try:
            return validated(name, value, hint)
        except (TypeError, ValueError) as error:
            raise RequestError(str(error), param=name) from None
    if name not in ONLY:
        raise RequestError(f"{name!r}: no field of such a request is known by this name", param=name)
    if value not in ONLY[name]:
        allowed = " or ".join(repr(neutral) for neutral in ONLY[name])
        raise RequestError(f"{name}={str(value)[:80]}: this server supports {allowed} alone", param=name)
    return value


def _stops(stops: list[str]) -> tuple[str, ...]:
    if len(stops) > MOST_STOPS or not all(stops):
        raise RequestError(f"stop: at most {MOST_STOPS} texts are expected, none of them empty", param="stop")
    return tuple(stops)


def _messages(found: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = found.get("messages")
    if not messages:
        raise RequestError("messages: a list with at least one message is expected", param="messages")
    return [_message(message, number) for number, message in enumerate(messages)]


def _message(message: Mapping[str, Any], number: int) -> dict[str, str]:
    where, role, content = f"messages[{number}]", message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RequestError(f"{where}.role: a text such as 'user' is expected", param="messages")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content: a text, or a list of texts, is expected", param="messages")
    return {"role": role, "content": content}


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _prompt(found: Mapping[str, Any]) -> str | list[int]:
    prompt = found.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return prompt
    if not isinstance(prompt, str) or not prompt:
        raise RequestError("prompt: one text, or the token ids of one, is expected", param="prompt")
    return prompt
