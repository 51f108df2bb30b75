"""Fields of a request: taken, refused by name, or without meaning here."""

import pytest

from sparse_peft.serving import RequestError, Sampling
from sparse_peft.serving.requests import parse

CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "a", "prompt": "hi"}


def test_defaults():
    wanted = parse(TEXT, "text")
    assert (wanted.model, wanted.content, wanted.sampling) == ("a", "hi", Sampling(1.0, 1.0, 0, None))
    assert (wanted.max_tokens, wanted.stop, wanted.stream, wanted.include_usage) == (None, (), False, False)


def test_all_fields():
    fields = {
        "max_completion_tokens": 5, "temperature": 0.3, "top_p": 0.5, "top_k": 3, "seed": 4, "stop": ["x", "y"],
        "stream": True, "stream_options": {"include_usage": True}, "user": "me", "n": 1, "logprobs": False,
        "response_format": {"type": "text"}, "tools": None, "frequency_penalty": 0.0,
    }  # fmt: skip
    wanted = parse({**CHAT, **fields}, "chat")
    assert wanted.sampling == Sampling(0.3, 0.5, 3, 4) and not wanted.sampling.is_greedy
    greedy = parse({**CHAT, **fields, "temperature": 0}, "chat").sampling
    assert greedy == Sampling() and greedy.is_greedy
    assert (wanted.max_tokens, wanted.stop, wanted.stream, wanted.include_usage) == (5, ("x", "y"), True, True)


@pytest.mark.parametrize("prompt, content", [("x", "x"), (["x"], "x"), ([1, 2], [1, 2]), ([[3, 4]], [3, 4])])
def test_prompts(prompt, content):
    assert parse({"model": "a", "prompt": prompt}, "text").content == content


def test_parts_of_a_message():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({**CHAT, "messages": [{"role": "user", "content": parts}]}, "chat").content[0]["content"] == "ab"


@pytest.mark.parametrize("kind, change, param, message", [
    ("text", {"model": None}, "model", "the name of an adapter"),
    ("text", {"model": 3}, "model", "model=3"),
    ("text", {"temperature": 3}, "temperature", "in \\[0, 2\\]"),
    ("text", {"temperature": float("nan")}, "temperature", "temperature=nan"),
    ("text", {"top_p": 0}, "top_p", "a share"),
    ("text", {"max_tokens": 0}, "max_tokens", "at least 1"),
    ("text", {"max_tokens": "5"}, "max_tokens", "max_tokens='5'"),
    ("text", {"stream": "yes"}, "stream", "stream='yes'"),
    ("text", {"stop": ["a"] * 5}, "stop", "at most 4"),
    ("text", {"stop": ""}, "stop", "none of them empty"),
    ("text", {"prompt": ""}, "prompt", "one text"),
    ("text", {"prompt": ["a", "b"]}, "prompt", "one text"),
    ("text", {"prompt": [1, -1]}, "prompt", "one text"),
    ("text", {"prompt": [True]}, "prompt", "one text"),
    ("text", {"n": 2}, "n", "supports 1 alone"),
    ("text", {"echo": True}, "echo", "supports False alone"),
    ("text", {"logprobs": 5}, "logprobs", "supports False alone"),
    ("text", {"messages": []}, "messages", "no field of such a request"),
    ("text", {"temprature": 0}, "temprature", "no field of such a request"),
    ("chat", {"messages": None}, "messages", "at least one message"),
    ("chat", {"messages": []}, "messages", "at least one message"),
    ("chat", {"messages": ["hi"]}, "messages", "messages"),
    ("chat", {"messages": [{"content": "x"}]}, "messages", r"messages\[0\].role"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", r"\[0\].content"),
    ("chat", {"tools": [{"type": "function"}]}, "tools", r"supports \[\] alone"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format", "alone"),
])  # fmt: skip
def test_what_is_refused(kind, change, param, message):
    with pytest.raises(RequestError, match=message) as refused:
        parse({**(CHAT if kind == "chat" else TEXT), **change}, kind)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.content()["error"]["type"] == "invalid_request_error"


def test_what_is_no_object():
    with pytest.raises(RequestError, match="the body is a list"):
        parse([], "text")
