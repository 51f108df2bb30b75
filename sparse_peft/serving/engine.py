"""A base model, its adapters, and one thread that generates for batches of requests."""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..adapters.pool import AdapterPool
from ..tuners.files.checks import check_adapter_name
from .folders import checked_folder
from .jobs import Job
from .metrics import Metrics
from .requests import RequestError

log = logging.getLogger("sparse_peft")


class Engine:
    """Answers requests for many adapters of one base model in memory.

    Requests wait in a queue. One thread takes the oldest and, within a short time, others with the same sampling, and
    generates for all of them at once. Rows of one adapter use the base weights that hold its entries; rows of several
    are a mixed batch.

    A greedy answer is that of ``model.generate`` with the adapter alone. Rows of a batch may be padded, and mixed
    batches add deltas to products, so logits differ by rounding there: an answer differs where two tokens are as
    likely up to that. ``max_batch=1`` excludes it.

    Args:
        model: the base, a causal language model without adapters.
        tokenizer: its.
        name: the base's, for requests that want no adapter.
        max_bytes: of loaded adapters, as for [`AdapterPool`][sparse_peft.adapters.AdapterPool].
        check_base_name: as for the pool.
        max_batch: rows of a batch.
        batch_wait: seconds that a batch waits for further rows.
        max_queue: requests that may wait; further ones are refused.

    Example:
        >>> engine = Engine(model, tokenizer, "base")
        >>> engine.pool.add("law", "adapters/law")
        >>> engine.submit(Job("law", ids, Sampling(), max_tokens=20, tell=print))
        >>> engine.close()
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        max_bytes: int | None = None,
        check_base_name: bool = True,
        max_batch: int = 8,
        batch_wait: float = 0.005,
        max_queue: int = 256,
    ):
        self.tokenizer, self.name = tokenizer, name
        self.pool = AdapterPool(model, max_bytes, check_base_name=check_base_name)
        self.max_batch, self.batch_wait, self.max_queue = max_batch, batch_wait, max_queue
        self.metrics = Metrics()
        self.context_length: int | None = getattr(model.config, "max_position_embeddings", None)
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self._config: GenerationConfig = model.generation_config
        self._ends = _ends_of(self._config, tokenizer)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="sparse-peft-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ adapters

    def add(self, name: str, folder: str | os.PathLike) -> None:
        """Register an adapter, which is loaded with its first request.

        Raises:
            RequestError: the name is taken or means something else, the adapter is of another method or base, or has
                no safetensors.
        """
        with _refusing("lora_name"):
            check_adapter_name(name)
            if name == self.name:
                raise ValueError(f"{name!r} is the base model's name; choose another")
            self.pool.add(name, checked_folder(folder))

    def load(self, name: str, folder: str | os.PathLike, in_place: bool = False) -> None:
        """Register an adapter and load it; waits for the batch that is being generated.

        Args:
            name: of the adapter.
            folder: its.
            in_place: put it in the place of the adapter that has the name.

        Raises:
            RequestError: as ``add``, or the adapter cannot be loaded; the adapters are as before.
        """
        if in_place and name in self.pool.names:
            with _refusing("lora_path"):
                self.pool.replace(name, checked_folder(folder))
            return
        self.add(name, folder)
        try:
            with _refusing("lora_path"), self.pool.use(name):
                pass
        except BaseException:
            self.pool.remove(name)
            raise

    def unload(self, name: str) -> None:
        """Forget an adapter; waits for the batch that is being generated.

        Raises:
            RequestError: there is no such adapter (404).
        """
        try:
            self.pool.remove(name)
        except ValueError:
            raise _no_model(name) from None

    # ------------------------------------------------------------------ requests

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's ``model`` names; None for the base.

        Raises:
            RequestError: there is no such adapter (404).
        """
        if model == self.name:
            return None
        if model not in self.pool.names:
            raise _no_model(model)
        return model

    def submit(self, job: Job) -> None:
        """Put a request into the queue.

        Raises:
            RequestError: the queue is full (429), or the engine is being closed (503).
        """
        with self._changed:
            if not self.is_ready:
                raise RequestError("the server is shutting down", 503)
            if len(self._waiting) >= self.max_queue:
                raise RequestError(f"{len(self._waiting)} requests are waiting already; try again later", 429)
            self._waiting.append(job)
            self._changed.notify_all()

    def close(self) -> None:
        """Answer the requests that wait, refuse new ones, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    # ------------------------------------------------------------------ batches

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._serve(batch)
            except Exception:  # a batch that fails must not end the server
                log.exception("a batch of %d requests failed", len(batch))
                for job in batch:
                    job.fail(RequestError("the model failed on this request; see the server's log", 500))

    def _next_batch(self) -> list[Job]:
        """The oldest request with others that may share its batch; none once the engine is closed."""
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return []
                self._changed.wait()
            batch, deadline = [self._waiting.popleft()], time.monotonic() + self.batch_wait
            while batch[0].sampling.seed is None:
                self._join(batch)
                left = deadline - time.monotonic()
                if len(batch) >= self.max_batch or left <= 0 or self._is_closing:
                    break
                self._changed.wait(left)
            return batch

    def _join(self, batch: list[Job]) -> None:
        """Move requests with the batch's sampling from the queue into it."""
        fitting = [job for job in self._waiting if job.sampling == batch[0].sampling]
        for job in fitting[: self.max_batch - len(batch)]:
            self._waiting.remove(job)
            batch.append(job)

    def _serve(self, jobs: list[Job]) -> None:
        names = [job.adapter for job in jobs]
        with ExitStack() as stack:
            try:
                model = stack.enter_context(self._model_for(names))
            except ValueError as error:
                self._serve_apart(jobs, error)
                return
            self.metrics.add("batches_total")
            self.metrics.add("batch_rows_total", len(jobs))
            self.metrics.add("mixed_batches_total", len(set(names)) > 1)
            self._generate(model, jobs)

    def _model_for(self, names: Sequence[str | None]) -> AbstractContextManager[nn.Module]:
        return self.pool.use(names[0]) if len(set(names)) == 1 else self.pool.use_batch(names)

    def _serve_apart(self, jobs: list[Job], error: ValueError) -> None:
        """Adapter by adapter, where they do not fit into memory together, or one cannot be loaded."""
        names = list(dict.fromkeys(job.adapter for job in jobs))
        if len(names) > 1:
            for name in names:
                self._serve([job for job in jobs if job.adapter == name])
            return
        known = names[0] in self.pool.names
        log.warning("adapter %r: %s", names[0], error)
        failure = RequestError(f"adapter {names[0]!r} cannot be loaded; see the server's log", 500)
        for job in jobs:
            job.fail(failure if known else _no_model(str(names[0])))

    def _generate(self, model: Any, jobs: list[Job]) -> None:
        ids, mask = _padded([job.ids for job in jobs], self._pad)
        with _seeded(jobs[0].sampling.seed):
            model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=self._config_for(jobs),
                streamer=_Rows(jobs, partial(_decode, self.tokenizer), self._ends),
                stopping_criteria=StoppingCriteriaList([_RowsDone(jobs)]),
            )
        self.metrics.add("prompt_tokens_total", sum(len(job.ids) for job in jobs))
        self.metrics.add("completion_tokens_total", sum(len(job.tokens) for job in jobs))

    def _config_for(self, jobs: list[Job]) -> GenerationConfig:
        """The model's own generation config, with the requests' settings."""
        config, sampling = copy.deepcopy(self._config), jobs[0].sampling
        config.update(
            max_new_tokens=max(job.max_tokens for job in jobs), max_length=None, num_beams=1, pad_token_id=self._pad,
            do_sample=not sampling.is_greedy, num_return_sequences=1, return_dict_in_generate=False,
        )  # fmt: skip
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config.update(**(dict.fromkeys(drawn) if sampling.is_greedy else drawn))
        return config

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self._ends, default=0)


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """Errors of adapters inside are answers to a request."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise RequestError(str(error), param=param) from error


def _no_model(name: str) -> RequestError:
    return RequestError(f"The model {name[:200]!r} does not exist", 404, "model", "model_not_found")


def _ends_of(config: GenerationConfig, tokenizer: Any) -> frozenset[int]:
    own = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    return frozenset() if own is None else frozenset([own] if isinstance(own, int) else own)


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts as a batch ``(rows, longest)``, padded on the left, and its attention mask."""
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _Rows(BaseStreamer):
    """Hands each row of a batch its tokens, as they are generated."""

    def __init__(self, jobs: Sequence[Job], decode: Any, ends: frozenset[int]):
        self.jobs, self.decode, self.ends = jobs, decode, ends
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for job, token in zip(self.jobs, value.reshape(-1).tolist(), strict=True):
            job.take(token, self.decode, self.ends)

    def end(self) -> None:
        for job in self.jobs:
            job.finish(self.decode)


class _RowsDone(StoppingCriteria):
    """Which rows are complete."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = jobs

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([job.is_done for job in self.jobs], device=input_ids.device)
