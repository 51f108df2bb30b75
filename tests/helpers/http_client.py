"""A client of OpenAI's endpoints, from the standard library."""

import json
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT = 60


class Client:
    """Sends JSON and returns ``(status, decoded answer)``."""

    def __init__(self, url):
        self.url = url

    def send(self, path, content=None, kind="application/json"):
        data = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
        request = Request(self.url + path, data, {} if data is None else {"Content-Type": kind})
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:
                return answer.status, self._decoded(answer)
        except HTTPError as error:
            return error.code, self._decoded(error)

    def listens(self, path):
        """Whether a server answers."""
        try:
            return self.send(path)[0] == 200
        except URLError:
            return False

    def _decoded(self, answer):
        content = answer.read().decode()
        return json.loads(content) if answer.headers["Content-Type"] == "application/json" else content

    def complete(self, model, prompt, **fields):
        """A completion, greedy unless asked otherwise."""
        return self.send("/v1/completions", {"model": model, "prompt": prompt, "temperature": 0, **fields})

    def stream(self, path, content):
        """The events of a streamed answer, without the last, ``[DONE]``."""
        status, sent = self.send(path, {"temperature": 0, **content, "stream": True})
        assert status == 200, sent
        lines = sent.strip().split("\n\n")
        assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
