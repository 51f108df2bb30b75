"""The worker extension, on a stand-in of the attributes that vLLM's workers have."""

import copy
from types import SimpleNamespace

import torch
from peft import get_peft_model

from sparse_peft.sync import PatchFolder, Publisher, checkpoint_shapes, to_bytes
from sparse_peft.sync.vllm_worker import PatchWorker
from tests.helpers.fused_engine import assert_same, fuse
from tests.helpers.language_models import small_llama
from tests.helpers.methods import config


class Worker(PatchWorker):
    """vLLM's ``Worker`` with the extension: a model runner and a parallel config."""

    def __init__(self, model, rank, size):
        self.model_runner = SimpleNamespace(model=model)
        self.parallel_config = SimpleNamespace(tensor_parallel_size=size, rank=rank)


def test_workers_apply_publications_and_files(tmp_path):
    base = small_llama()
    engines = [fuse(base.state_dict(), rank, 2) for rank in range(2)]
    own = copy.deepcopy(engines)
    workers = [Worker(engine, rank, 2) for rank, engine in enumerate(engines)]
    model = get_peft_model(base, config("sparse", init_weights=False))
    publisher, folder = Publisher(model), PatchFolder(tmp_path)
    shapes = {name: list(shape) for name, shape in checkpoint_shapes(model).items()}
    for worker in workers:
        worker.sparse_peft_init(shapes, publisher.base)
    assert [worker.sparse_peft_apply(to_bytes(publisher.publish())) for worker in workers[:1]] == [1]
    assert workers[1].sparse_peft_apply(to_bytes(publisher.publish(full=True))) == 2
    publisher.acknowledge(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    publication = publisher.publish(full=True)
    folder.write(publication)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    for rank, worker in enumerate(workers):
        assert worker.sparse_peft_apply_file(str(tmp_path), publication.sequence) == 3
        assert_same(engines[rank], fuse(merged, rank, 2))
        worker.sparse_peft_restore()
        assert_same(engines[rank], own[rank])
