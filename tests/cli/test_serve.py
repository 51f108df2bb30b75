"""``sparse-peft serve`` in a process of its own: its address, an answer, and its end by a signal."""

import json
import signal
import subprocess
import sys
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from sparse_peft import SparseConfig
from sparse_peft.cli import serve as command
from tests.helpers.http_client import Client


@pytest.fixture(scope="module")
def adapter(stand_in, tmp_path_factory):
    config = SparseConfig(density=0.1, target_modules="all-linear", init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stand_in), config)
    model.save_pretrained(tmp_path_factory.mktemp("adapter") / "law")
    return tmp_path_factory.getbasetemp() / "adapter0" / "law"


def said_first(process):
    """The JSON object that the command prints once it listens."""
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            return json.loads(text)
    raise AssertionError(process.stderr.read())


@pytest.mark.subprocess
def test_it_serves_until_a_signal_and_answers_what_it_has_begun(stand_in, adapter):
    pytest.importorskip("starlette", reason="the server's packages are in the extra 'serve'")
    pytest.importorskip("uvicorn", reason="the server's packages are in the extra 'serve'")
    arguments = ["serve", stand_in, "--adapter", f"law={adapter}", "--name", "base", "--port", "0", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_peft.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = said_first(process)
        assert said["command"] == "serve" and said["models"] == ["base", "law"]
        assert said["url"].startswith("http://127.0.0.1:")
        client = Client(said["url"])
        whole = client.complete("law", "The quick", max_tokens=150)[1]["choices"][0]["text"]
        content = {"model": "law", "prompt": "The quick", "max_tokens": 150, "temperature": 0, "stream": True}
        request = Request(
            said["url"] + "/v1/completions", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=60) as answer:
            first = answer.readline()
            process.send_signal(signal.SIGTERM)
            events = [line for line in [first, *answer] if line.startswith(b"data: {")]
        pieces = [json.loads(line.removeprefix(b"data: "))["choices"][0]["text"] for line in events]
        assert "".join(pieces) == whole
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out == "" and "Traceback" not in err
        with pytest.raises(URLError):
            client.send("/health")
    finally:
        process.kill()


@pytest.mark.parametrize("given, message", [
    (["law"], "NAME=FOLDER is expected"),
    (["law="], "NAME=FOLDER is expected"),
    (["law=nowhere"], "nowhere: no such folder"),
    (["law={adapter}", "law={adapter}"], "'law' is given twice"),
])  # fmt: skip
def test_adapters_that_are_none(run, stand_in, adapter, given, message, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    options = [part for text in given for part in ("--adapter", text.format(adapter=adapter))]
    assert message in run("serve", stand_in, *options, "--json", expect=2).said["error"]["message"]


def test_a_base_that_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    assert "none: no such" in run("serve", tmp_path / "none", "--json", expect=2).said["error"]["message"]


def test_adapters_that_do_not_fit(run, stand_in, adapter, world, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    said = run("serve", stand_in, "--adapter", f"keys={adapter}", "--json", expect=1).said
    assert "choose another" in said["error"]["message"]
    said = run("serve", stand_in, "--adapter", f"x={world / 'sparse'}", "--json", expect=1).said
    assert "was made for the base model" in said["error"]["message"]


def test_without_the_servers_packages(run, stand_in, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    message = run("serve", stand_in, "--json", expect=2).said["error"]["message"]
    assert "serve needs starlette and uvicorn: pip install" in message and "[serve]" in message


@pytest.mark.parametrize(
    "host, expected", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback(host, expected):
    assert command._is_loopback(host) is expected
