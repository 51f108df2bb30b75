"""The HTTP server: OpenAI's endpoints, errors in OpenAI's form, adapters at run time, the end of it."""

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

PROMPT = "The quick fox"


def test_models_and_health(client, served):
    status, listed = client.send("/v1/models")
    assert status == 200 and [model["id"] for model in listed["data"]] == ["base", *served.names]
    assert [model["parent"] for model in listed["data"]] == [None, "base", "base", "base"]
    assert client.send("/v1/models/b")[1]["id"] == "b"
    assert client.send("/health") == (200, {"status": "ok"})


def test_completions_and_chat(client, served):
    for name in ("a", "base"):
        text, tokens = served.answer(None if name == "base" else name, PROMPT, 10)
        status, answer = client.complete(name, PROMPT, max_tokens=10)
        assert status == 200 and answer["object"] == "text_completion" and answer["model"] == name
        assert answer["choices"][0]["text"] == text
        assert answer["usage"] == {
            "prompt_tokens": 13, "completion_tokens": tokens, "total_tokens": 13 + tokens,
        }  # fmt: skip
    ids = served.tokenizer(PROMPT)["input_ids"]
    assert client.complete("base", ids, max_tokens=10)[1]["choices"][0]["text"] == text
    content = {"model": "b", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 7}
    status, answer = client.send("/v1/chat/completions", content)
    assert status == 200 and answer["object"] == "chat.completion"
    said = {"role": "assistant", "content": served.answer("b", "user: hi ", 7)[0]}
    assert answer["choices"][0]["message"] == said
    assert client.complete("a", "x")[1]["usage"]["completion_tokens"] <= 16


def test_streams(client, served):
    text, tokens = served.answer("a", PROMPT, 12)
    content = {"model": "a", "prompt": PROMPT, "max_tokens": 12, "stream_options": {"include_usage": True}}
    *events, usage = client.stream("/v1/completions", content)
    assert "".join(event["choices"][0]["text"] for event in events) == text and len(events) > 2
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == tokens
    text = served.answer("c", "user: hi ", 12)[0]
    content = {"model": "c", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
    first, *events = client.stream("/v1/chat/completions", content)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("content, status, param, code, message", [
    ({"model": "nobody", "prompt": "x"}, 404, "model", "model_not_found", "'nobody' does not exist"),
    ({"model": "a"}, 400, "prompt", None, "prompt"),
    ({"model": "a", "prompt": "x", "max_tokens": -1}, 400, "max_tokens", None, "max_tokens=-1"),
    ({"model": "a", "prompt": "x", "max_tokens": 33}, 400, "max_tokens", None, "allows at most 32"),
    ({"model": "a", "prompt": "x" * 2100}, 400, "prompt", "context_length_exceeded", "context length is 2048 tokens"),
    ({"model": "a", "prompt": "x" * 2040, "max_tokens": 9}, 400, "prompt", "context_length_exceeded", "max_tokens=9"),
    ({"model": "a", "prompt": [10**9]}, 400, "prompt", None, "ids below"),
    ({"model": "a", "prompt": "x" * 20_001}, 413, None, None, "more than 20000 bytes"),
    (b"{", 400, None, None, "no valid JSON"),
    (b"[" * 9_000, 400, None, None, "no valid JSON"),
    (b"\xff", 400, None, None, "no valid JSON"),
    (b"[]", 400, None, None, "a JSON object is expected"),
])  # fmt: skip
def test_errors(client, content, status, param, code, message):
    found, answer = client.send("/v1/completions", content)
    assert found == status and set(answer) == {"error"}
    error = answer["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert message in error["message"]


def test_other_errors(client, served):
    content = {"model": "a", "prompt": "x"}
    assert client.send("/v1/completions", content, kind="text/plain")[0] == 415
    assert client.send("/v1/completions")[0] == 405
    status, answer = client.send("/nothing")
    assert status == 404 and answer["error"]["type"] == "invalid_request_error"
    assert client.send("/v1/models/nobody")[0] == 404
    served.tokenizer.chat_template, before = "{{ raise_exception('no users') }}", served.tokenizer.chat_template
    try:
        content = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
        status, answer = client.send("/v1/chat/completions", content)
    finally:
        served.tokenizer.chat_template = before
    assert status == 400 and "no users" in answer["error"]["message"]


def test_many_clients_get_their_own_answers(client, served):
    asked = [(name, f"{PROMPT} {n}"[: 8 + n], 4 + n % 5) for n in range(8) for name in (*served.names, "base")]

    def ask(one):
        return client.complete(one[0], one[1], max_tokens=one[2])

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, asked))
    for (name, prompt, tokens), (status, answer) in zip(asked, answers, strict=True):
        text = served.answer(None if name == "base" else name, prompt, tokens)[0]
        assert status == 200 and answer["choices"][0]["text"] == text


def test_metrics(client):
    client.complete("a", PROMPT, max_tokens=3)
    client.complete("nobody", PROMPT)
    status, text = client.send("/metrics")
    values = dict(re.findall(r"^(sparse_peft_\S+) (\S+)$", text, flags=re.MULTILINE))
    assert status == 200 and all(re.fullmatch(r"# (HELP|TYPE) \S+ .+|\S+ [\d.e+-]+", row) for row in text.splitlines())
    assert values['sparse_peft_requests_total{endpoint="/v1/completions",status="200"}'] == "1"
    assert values['sparse_peft_requests_total{endpoint="/v1/completions",status="404"}'] == "1"
    assert values["sparse_peft_prompt_tokens_total"] == "13" and values["sparse_peft_adapters_loaded"] == "1"
    assert values["sparse_peft_pool_misses_total"] == "1" and float(values["sparse_peft_adapter_bytes"]) > 0
    assert (
        values["sparse_peft_request_seconds_count"] == values['sparse_peft_request_seconds_bucket{le="+Inf"}'] == "2"
    )


def test_adapters_at_run_time(client, served):
    served.save("d", 8)
    assert client.complete("d", PROMPT)[0] == 404
    content = {"lora_name": "new", "lora_path": "d"}
    assert client.send("/v1/load_lora_adapter", content)[0] == 200
    assert client.complete("new", PROMPT, max_tokens=5)[1]["choices"][0]["text"] == served.answer("d", PROMPT, 5)[0]
    status, answer = client.send("/v1/load_lora_adapter", content)
    assert status == 400 and "registered already" in answer["error"]["message"]
    content = {**content, "lora_path": str(served.folder / "a"), "load_inplace": True}
    assert client.send("/v1/load_lora_adapter", content)[0] == 200
    assert client.complete("new", PROMPT, max_tokens=5)[1]["choices"][0]["text"] == served.answer("a", PROMPT, 5)[0]
    assert client.send("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    assert client.complete("new", PROMPT)[0] == 404
    assert client.send("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 404
    assert client.send("/v1/unload_lora_adapter", {})[0] == 400


@pytest.mark.parametrize("path", ["..", "/etc", "a/../..", "link", "", "a\0", "nowhere", "~"])
def test_paths_outside_of_the_named_folders_are_refused(client, served, tmp_path, path):
    link = served.folder / "link"
    if path == "link" and not link.exists():
        link.symlink_to(tmp_path)
    status, answer = client.send("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
    assert status in (400, 403) and answer["error"]["param"] == "lora_path"
    assert "x" not in [model["id"] for model in client.send("/v1/models")[1]["data"]]


def test_pickles_are_refused(client, served):
    folder = served.save("pickled", 9)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    status, answer = client.send("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "pickled"})
    assert status == 400 and "no adapter_model.safetensors" in answer["error"]["message"]


def test_a_client_that_goes_away_does_not_hold_the_others_up(client, served):
    host, port = client.url.removeprefix("http://").split(":")
    content = json.dumps({"model": "a", "prompt": PROMPT, "max_tokens": 32, "temperature": 0, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as gone:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        gone.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        gone.recv(200)
    assert client.complete("b", PROMPT, max_tokens=5)[1]["choices"][0]["text"] == served.answer("b", PROMPT, 5)[0]


def test_adapters_come_and_go_beside_requests(client, served):
    expected = {"guest": served.answer("c", PROMPT, 4)[0], "a": served.answer("a", PROMPT, 4)[0]}

    def come_and_go():
        for _ in range(4):
            assert client.send("/v1/load_lora_adapter", {"lora_name": "guest", "lora_path": "c"})[0] == 200
            assert client.send("/v1/unload_lora_adapter", {"lora_name": "guest"})[0] == 200

    def ask(name):
        return [(name, *client.complete(name, PROMPT, max_tokens=4)) for _ in range(8)]

    with ThreadPoolExecutor(4) as threads:
        changes = threads.submit(come_and_go)
        found = [one for answers in threads.map(ask, ["guest", "a", "guest"]) for one in answers]
        changes.result()
    for name, status, answer in found:
        assert status in ((200, 404) if name == "guest" else (200,)), answer
        assert status == 404 or answer["choices"][0]["text"] == expected[name]
