"""Embeddings and tied weights on two processes: DDP and FSDP2, against one process with the whole batch."""

import pytest
import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparse_peft import SparseConfig
from sparse_peft.dynamics.full_tensor import full_tensor
from tests.helpers.embedding_models import IDS, Words, layers
from tests.helpers.processes import join_group, run_on_two

pytestmark = pytest.mark.distributed
BATCH = torch.cat((IDS, IDS.flip(1)))[:4]


def adapted(tied):
    config = SparseConfig(target_modules=["emb", "head"], density=0.4, init_weights=False, scale=1.0)
    return get_peft_model(Words(tied=tied), config)


def gradients(model, inputs, target):
    model(inputs).square().mean().backward()
    return {name: full_tensor(layer.deltas["default"].values.grad) for name, layer in layers(target).items()}


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def _on_rank(rank, address, tied, wrap):
    join_group(rank, address)
    try:
        wanted = gradients(alone := adapted(tied), BATCH, alone)
        model = adapted(tied)
        found = gradients(wrap(model), BATCH[2 * rank : 2 * rank + 2], model)
        assert found.keys() == wanted.keys() and len(found) == (1 if tied else 2)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [ddp, fsdp2])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_one_process(tmp_path, tied, wrap):
    run_on_two(_on_rank, tmp_path / "rendezvous", tied, wrap)
