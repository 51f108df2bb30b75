"""Weight sync over HTTP: in TRL's protocol, in trainers, with an engine in another process."""

import copy
import dataclasses
import inspect
import socket
import struct
import threading
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from sparse_peft.sync import (
    HttpEngine,
    Kind,
    PatchError,
    PatchServer,
    Publisher,
    Receiver,
    SparseWeightTransfer,
    WeightSyncCallback,
    sync,
    to_bytes,
)
from tests.helpers.language_models import small_llama
from tests.helpers.methods import config


@pytest.fixture
def pair():
    base = small_llama()
    engine = copy.deepcopy(base)
    return get_peft_model(base, config("sparse", init_weights=False)), engine


@pytest.fixture
def served(pair):
    model, engine = pair
    with PatchServer(Receiver(engine), threading.Lock()) as server:
        yield model, engine, HttpEngine(server.url)


def step(model):
    tokens = torch.randint(40, (2, 6))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def assert_equal_to_merged(engine, model):
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in engine.state_dict().items())


def test_an_engine_behind_http_follows_training(served):
    model, engine, client = served
    assert client.sequence is None
    publisher = Publisher(model)
    for number in range(1, 4):
        publication = sync(publisher, client)
        assert client.sequence == publication.sequence == number
        assert_equal_to_merged(engine, model)
        step(model)


def test_the_log_probabilities_of_trainer_and_engine_are_equal(served):
    model, engine, client = served
    step(model)
    sync(Publisher(model), client)
    tokens = torch.randint(40, (2, 9))
    with torch.no_grad():
        trainers, engines = (m.eval()(tokens).logits.log_softmax(-1) for m in (model, engine))
    assert torch.equal(trainers, engines)


def test_a_refused_publication_is_answered_with_a_full_one(served):
    model, engine, client = served
    publisher = Publisher(model)
    publisher.acknowledge(publisher.publish().sequence)  # lost
    assert sync(publisher, client).is_full
    step(model)
    assert not sync(publisher, client).is_full
    assert_equal_to_merged(engine, model)


def test_the_engines_reason_arrives(served):
    model, engine, client = served
    with torch.no_grad():
        engine.model.layers[0].self_attn.q_proj.weight[0] += 1
    with pytest.raises(PatchError, match="for the base"):
        sync(Publisher(model), client)


def test_other_paths_are_unknown(served):
    *_, client = served
    with pytest.raises(HTTPError, match="404"):
        urlopen(client.url + "/other")


def raw_request(url, length, body=b""):
    """A request that announces ``length`` bytes and sends ``body``; the status of its answer."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=30) as connection:
        connection.sendall(f"POST /publications HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode() + body)
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(100).split()[1])


def hostile_messages(publication):
    """``{what: bytes}``: damaged publications, and bytes that are none."""
    patch, *others = publication.patches

    def made(**fields):
        first = dataclasses.replace(patch, **fields)
        return to_bytes(dataclasses.replace(publication, patches=(first, *others)))

    return {
        "nothing": b"",
        "no safetensors": b"\xff" * 100,
        "a header without end": struct.pack("<Q", 2**62) + b"{}",
        "nesting": struct.pack("<Q", 10**5) + b"[" * 10**5,
        "cut": to_bytes(publication)[:-1],
        "not finite": made(values=torch.full_like(patch.values, float("nan"))),
        "not sorted": made(indices=patch.indices.flip(0)),
        "negative": made(indices=patch.indices - patch.indices[-1] - 1),
        "beyond the weight": made(indices=patch.indices + 10**6),
        "another dtype of positions": made(indices=patch.indices.long()),
        "another dtype of values": made(values=patch.values.half()),
        "another shape": made(shape=(2**40, 2**40)),
        "of values without positions": made(kind=Kind.HELD, indices=None),
    }


def test_hostile_requests_change_nothing_and_the_engine_still_listens(served):
    model, engine, client = served
    publisher = Publisher(model)
    sync(publisher, client)
    before = copy.deepcopy(engine.state_dict())
    step(model)
    for what, message in hostile_messages(publisher.publish(full=True)).items():
        assert raw_request(client.url, len(message), message) == 409, what
    assert raw_request(client.url, 2**35, b"announces 32 GiB") == 409
    assert raw_request(client.url, 2**40) == 413
    assert [raw_request(client.url, length) for length in (-1, "many", "")] == [411] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state_dict().items())
    sync(publisher, client)
    assert_equal_to_merged(engine, model)


def test_publications_have_a_limit(pair):
    model, engine = pair
    message = to_bytes(Publisher(model).publish())
    with PatchServer(Receiver(engine), max_bytes=len(message) - 1) as server:
        with pytest.raises(HTTPError, match="413"):
            HttpEngine(server.url).send(Publisher(model).publish())
        assert HttpEngine(server.url).sequence is None
    with pytest.raises(ValueError, match="max_bytes=0"):
        PatchServer(Receiver(engine), max_bytes=0)


def test_the_client_counts_its_bytes(served):
    model, _, client = served
    publication = Publisher(model).publish()
    client.send(publication)
    assert client.bytes_sent == len(to_bytes(publication))


def test_the_transfer_has_trls_protocol():
    trainer = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    if not hasattr(trainer, "WeightTransferProtocol"):
        pytest.skip("TRL 1.0 has no such protocol")
    ours, theirs = SparseWeightTransfer(engine=None), trainer.WeightTransferProtocol
    for name, method in inspect.getmembers(theirs, inspect.isfunction):
        if not name.startswith("_"):
            expected = list(inspect.signature(method).parameters)[1:]
            assert list(inspect.signature(getattr(ours, name)).parameters) == expected, name


def test_the_transfer_works_as_trl_drives_it(served):
    model, engine, client = served
    calls = []
    transfer = SparseWeightTransfer(client, lambda: calls.append("pause"), lambda: calls.append("resume"))
    with pytest.raises(RuntimeError, match=r"trainer\.model"):
        transfer.init_weight_transfer()
    transfer.model = model
    transfer.init_weight_transfer()
    for _ in range(3):
        transfer.pause()
        model.merge_adapter()
        transfer.send_weights(iter(()))
        model.unmerge_adapter()
        transfer.resume()
        assert_equal_to_merged(engine, model)
        step(model)
    transfer.destroy()
    assert calls == ["pause", "resume"] * 3
    assert transfer.bytes_sent > 0


def test_a_trainer_syncs_after_its_steps(served, tmp_path):
    model, engine, client = served
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(40, (8, 6))]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=4, report_to=[], save_strategy="no", use_cpu=True
    )
    callback = WeightSyncCallback(client, every=2)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert client.sequence == 3  # at the beginning, after two steps and after four
    assert_equal_to_merged(engine, model)


def test_every_is_checked():
    with pytest.raises(ValueError, match="every=0"):
        WeightSyncCallback(None, every=0)
