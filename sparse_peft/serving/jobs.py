"""One request on its way through a batch: its tokens, its text, and why it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .requests import RequestError, Sampling

INCOMPLETE = "\ufffd"  # how tokens decode that are a part of a character


@dataclass(frozen=True)
class Piece:
    """The next part of an answer's text."""

    text: str


@dataclass(frozen=True)
class End:
    """A whole answer.

    Attributes:
        text: all of it.
        finish_reason: ``"stop"`` or ``"length"``.
        prompt_tokens, completion_tokens: their numbers; of the answer with the token that ends it.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """No answer."""

    error: RequestError


Event = Piece | End | Failure


@dataclass(eq=False)
class Job:
    """A request for an engine.

    Attributes:
        adapter: its name; None for the base model.
        ids: the prompt's tokens.
        sampling: of the answer's tokens.
        max_tokens: of the answer.
        stop: texts before which it ends.
        streams: whether pieces are wanted.
        tell: called with each ``Piece``, and last with the ``End`` or ``Failure``, in the engine's thread.
        cancelled: set it, and the answer ends with the next token.
    """

    adapter: str | None
    ids: Sequence[int]
    sampling: Sampling
    max_tokens: int
    tell: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    streams: bool = False
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False
    _sent: int = 0

    def take(self, token: int, decode: Callable[[list[int]], str], ends: Collection[int]) -> None:
        """Take the answer's next token.

        Args:
            token: ignored once the answer is complete: rows of a batch end one after the other.
            decode: gives the text of tokens.
            ends: tokens that end an answer.
        """
        if self.is_done:
            return
        self.tokens.append(token)
        if token in ends:
            self._end(decode(self.tokens[:-1]), "stop")
            return
        full = len(self.tokens) >= self.max_tokens or self.cancelled
        if not (full or self.streams or self.stop):
            return
        text = decode(self.tokens)
        if (cut := self._stops_at(text)) is not None:
            self._end(text[:cut], "stop")
        elif full:
            self._end(text, "length")
        elif self.streams:
            self._send(text, len(text) - self._held_back(text))

    def finish(self, decode: Callable[[list[int]], str]) -> None:
        """End with the tokens that there are, where the model stopped by a limit of its own."""
        if not self.is_done:
            self._end(decode(self.tokens), "length")

    def fail(self, error: RequestError) -> None:
        """End without an answer."""
        if not self.is_done:
            self.is_done = True
            self.tell(Failure(error))

    def _stops_at(self, text: str) -> int | None:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _held_back(self, text: str) -> int:
        """How many characters at the end may still change, or may begin a text before which the answer ends."""
        begun = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(len(text) - len(text.rstrip(INCOMPLETE)), *begun, 0)

    def _send(self, text: str, until: int) -> None:
        if until > self._sent:
            self.tell(Piece(text[self._sent : until]))
            self._sent = until

    def _end(self, text: str, reason: str) -> None:
        # a stop text or the last token may leave what was held back
        cut = self._stops_at(text)
        text = text if cut is None else text[:cut]
        self.is_done = True
        if self.streams:
            self._send(text, len(text))
        self.tell(End(text, reason, len(self.ids), len(self.tokens)))
