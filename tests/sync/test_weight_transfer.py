"""Weight sync over HTTP: in TRL's protocol, in trainers, with an engine in another process."""

import copy
import inspect
import threading
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol

from sparse_peft.sync import (
    HttpEngine,
    PatchError,
    PatchServer,
    Publisher,
    Receiver,
    SparseWeightTransfer,
    WeightSyncCallback,
    sync,
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


def test_the_transfer_has_trls_protocol():
    ours, theirs = SparseWeightTransfer(engine=None), WeightTransferProtocol
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
