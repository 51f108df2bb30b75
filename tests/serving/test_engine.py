"""Batches of requests: each gets the answer of its adapter alone."""

import queue
import threading

import pytest
import torch

from sparse_peft.serving import Engine, Job, RequestError, Sampling
from sparse_peft.serving.jobs import End, Failure, Piece

PROMPTS = {"a": "The quick fox", "b": "abcdef 123", None: "Zebra", "c": "q"}


class Asked:
    """A request, and what the engine has said of it."""

    def __init__(self, served, adapter, prompt, tokens=12, sampling=None, **fields):
        self.said = queue.Queue()
        ids = served.tokenizer(prompt)["input_ids"]
        self.job = Job(adapter, ids, sampling or Sampling(), tokens, self.said.put, **fields)

    def events(self):
        found = []
        while not (found and isinstance(found[-1], (End, Failure))):
            found.append(self.said.get(timeout=60))
        return found


def ask(engine, *asked):
    for one in asked:
        engine.submit(one.job)
    return [one.events()[-1] for one in asked]


@pytest.mark.parametrize("name", PROMPTS)
def test_an_answer_is_that_of_generate_with_the_adapter_alone(served, engine, name):
    text, tokens = served.answer(name, PROMPTS[name], 12)
    (end,) = ask(engine, Asked(served, name, PROMPTS[name]))
    assert (end.text, end.completion_tokens) == (text, tokens)
    assert end.prompt_tokens == len(PROMPTS[name]) and end.finish_reason in ("stop", "length")


def test_the_adapters_answer_differently(served):
    assert len({served.answer(name, "The quick fox", 12)[0] for name in ("a", "b", "c", None)}) > 2


def in_one_batch(engine, asked):
    """Submit while the engine waits for the pool, so that all of it is one batch."""
    engine.batch_wait = 10
    engine.max_batch = len(asked)
    ends = ask(engine, *asked)
    assert engine.metrics._counts["batches_total", ""] == 1
    return ends


def test_a_mixed_batch_with_rows_of_different_lengths(served, engine):
    lengths = {"a": 5, "b": 12, None: 1, "c": 9}
    asked = [Asked(served, name, PROMPTS[name], tokens) for name, tokens in lengths.items()]
    for (name, tokens), end in zip(lengths.items(), in_one_batch(engine, asked), strict=True):
        text, count = served.answer(name, PROMPTS[name], tokens)
        assert (end.text, end.completion_tokens) == (text, count)
    assert engine.metrics._counts["mixed_batches_total", ""] == 1
    assert engine.metrics._counts["completion_tokens_total", ""] == sum(len(one.job.tokens) for one in asked)


def test_a_batch_of_one_adapter(served, engine):
    prompts = ["The quick fox", "jumps over the", "x"]
    ends = in_one_batch(engine, [Asked(served, "b", prompt) for prompt in prompts])
    assert [end.text for end in ends] == [served.answer("b", prompt, 12)[0] for prompt in prompts]
    assert engine.metrics._counts["mixed_batches_total", ""] == 0


def test_other_sampling_has_another_batch(served, engine):
    engine.batch_wait = 0.2
    asked = [Asked(served, "a", "x"), Asked(served, "a", "x", sampling=Sampling(0.7)), Asked(served, "a", "x")]
    ends = ask(engine, *asked)
    assert ends[0].text == ends[2].text == served.answer("a", "x", 12)[0]
    assert engine.metrics._counts["batches_total", ""] == 2 and engine.metrics._counts["batch_rows_total", ""] == 3


def test_a_seed_repeats_an_answer(served, engine):
    sampling = Sampling(1.5, 0.9, 20, seed=3)
    ask(engine, Asked(served, "a", "x"))  # loading draws
    engine.batch_wait = 0.2
    state = torch.random.get_rng_state()
    ends = ask(engine, *[Asked(served, "a", "x", 20, sampling) for _ in range(2)])
    assert ends[0] == ends[1] and engine.metrics._counts["batches_total", ""] == 3
    other = ask(engine, Asked(served, "a", "x", 20, Sampling(1.5, 0.9, 20, seed=4)))
    assert other != ends[:1]
    engine.close()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pieces_are_the_answer_and_stop_texts_end_it(served, engine):
    whole = served.answer("a", "The quick fox", 16)[0]
    assert len(whole) > 6
    streamed = Asked(served, "a", "The quick fox", 16, streams=True)
    engine.submit(streamed.job)
    *pieces, end = streamed.events()
    assert len(pieces) > 1 and "".join(piece.text for piece in pieces) == end.text == whole
    assert all(isinstance(piece, Piece) for piece in pieces)
    stop = whole[4:6]
    cut = whole[: whole.find(stop)]
    for streams in (True, False):
        asked = Asked(served, "a", "The quick fox", 16, stop=("no such text", stop), streams=streams)
        engine.submit(asked.job)
        *pieces, end = asked.events()
        assert end.text == cut and end.finish_reason == "stop"
        assert "".join(piece.text for piece in pieces) == (cut if streams else "")


def take_all(job, text):
    for character in text:
        job.take(ord(character), lambda tokens: "".join(map(chr, tokens)), ends=(0,))


def test_nothing_of_a_stop_text_or_a_half_character_is_sent():
    said = []
    job = Job("a", [1], Sampling(), 9, said.append, stop=("END",), streams=True)
    take_all(job, "xE")
    assert [piece.text for piece in said] == ["x"]
    take_all(job, "EN")
    assert "".join(piece.text for piece in said) == "xE"
    take_all(job, "D more")
    assert said[-1] == End("xE", "stop", 1, 5)
    said.clear()
    half = Job("a", [1], Sampling(), 4, said.append, streams=True)
    take_all(half, "a\ufffd")
    assert said == [Piece("a")]
    half.take(0, lambda tokens: "aé", ends=(0,))
    assert said[1:] == [Piece("é"), End("aé", "stop", 1, 3)]


def test_a_cancelled_request_ends(served, engine):
    asked = Asked(served, "a", "The quick fox", 10_000)
    asked.job.cancelled = True
    (end,) = ask(engine, asked)
    assert end.completion_tokens == 1


def test_more_adapters_than_fit_into_memory_are_served_apart(served):
    engine = served.engine(batch_wait=5, max_batch=3)
    with engine.pool.use("c"):
        engine.pool.max_bytes = engine.pool.statistics.loaded_bytes
    ends = ask(engine, *[Asked(served, name, PROMPTS[name]) for name in ("a", "b", "c")])
    assert [end.text for end in ends] == [served.answer(name, PROMPTS[name], 12)[0] for name in ("a", "b", "c")]
    assert engine.pool.statistics.loaded_bytes <= engine.pool.max_bytes
    engine.close()


def test_a_damaged_adapter_fails_alone(served, tmp_path):
    engine = served.engine(batch_wait=5, max_batch=2)
    folder = served.save("damaged", 5)
    engine.add("damaged", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    bad, good = ask(engine, Asked(served, "damaged", "x"), Asked(served, "a", "x"))
    assert bad.error.status == 500 and "'damaged' cannot be loaded" in bad.error.message
    assert good.text == served.answer("a", "x", 12)[0]
    engine.close()


def test_a_model_that_fails_does_not_end_the_engine(served, engine, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "_config_for", lambda *_: 1 / 0)
        (failure,) = ask(engine, Asked(served, "a", "x"))
    assert failure.error.status == 500 and "division" not in failure.error.message
    assert ask(engine, Asked(served, "a", "x"))[0].text == served.answer("a", "x", 12)[0]


def test_loading_replacing_and_unloading(served, engine):
    folder = served.save("e", 6)
    engine.load("d", folder)
    assert "d" in engine.pool.loaded and ask(engine, Asked(served, "d", "x"))[0].text == served.answer("e", "x", 12)[0]
    with pytest.raises(RequestError, match="'d' is registered already"):
        engine.load("d", folder)
    engine.load("d", served.folder / "b", in_place=True)
    assert ask(engine, Asked(served, "d", "x"))[0].text == served.answer("b", "x", 12)[0]
    engine.unload("d")
    (failure,) = ask(engine, Asked(served, "d", "x"))
    assert failure.error.status == 404
    for name, message in (("base", "the base model's name"), ("keys", "choose another"), ("x/y", "adapter_name")):
        with pytest.raises(RequestError, match=message):
            engine.add(name, folder)
    with pytest.raises(RequestError, match="does not exist"):
        engine.unload("d")


def test_one_that_cannot_be_loaded_is_not_registered(served, engine):
    folder = served.save("nan", 7)
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:-64] + b"\xff" * 64)
    with pytest.raises(RequestError) as refused:
        engine.load("nan", folder)
    assert refused.value.status == 400 and "nan" not in engine.pool.names


def test_a_full_queue_and_a_closed_engine_refuse(served):
    engine = served.engine(max_queue=2)
    with engine.pool.use("a"):
        first = Asked(served, "a", "x")
        engine.submit(first.job)
        while engine.waiting:  # the engine takes it, and waits for the pool
            threading.Event().wait(0.01)
        others = [Asked(served, "b", "x"), Asked(served, "c", "x")]
        for one in others:
            engine.submit(one.job)
        with pytest.raises(RequestError, match="2 requests are waiting") as refused:
            engine.submit(Asked(served, "a", "x").job)
        assert refused.value.status == 429
    closing = threading.Thread(target=engine.close)
    closing.start()
    ends = [one.events()[-1] for one in (first, *others)]
    closing.join(60)
    assert [end.text for end in ends] == [served.answer(name, "x", 12)[0] for name in ("a", "b", "c")]
    with pytest.raises(RequestError, match="shutting down") as refused:
        engine.submit(Asked(served, "a", "x").job)
    assert refused.value.status == 503
