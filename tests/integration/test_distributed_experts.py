"""Fused experts with adapters on two processes: DDP, and FSDP2 that leaves experts out."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparse_peft import SparsityController, select_support
from sparse_peft.dynamics.full_tensor import full_tensor
from tests.helpers.expert_models import adapted, config, layers, mixture
from tests.helpers.processes import process_group, results_on_two

pytestmark = pytest.mark.distributed
STEPS = 7


def batch_at(step):
    ids = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def dynamic(seed=0):
    return adapted(
        selection="accumulated_gradient", reselect_every=4, accumulate=2, candidates=10.0, seed=seed, init_weights=True
    ).train()


def train(model, called, rows):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = SparsityController(called, optimizer, total_steps=8)
    seen = []
    for step in range(STEPS):
        called(**{name: tensor[rows] for name, tensor in batch_at(step).items()}).loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        seen.append(state_of(model))
    return seen


def state_of(model):
    return {
        name: (layer.support("default").indices.tolist(), full_tensor(layer.deltas["default"].values).tolist())
        for name, layer in layers(model).items()
    }


def half(rank):
    return slice(2 * rank, 2 * rank + 2)


def with_ddp(rank):
    model = dynamic(seed=rank)  # process 0's positions count
    return train(model, nn.parallel.DistributedDataParallel(model), half(rank))


def with_fsdp2(rank):
    model = dynamic()
    experts = {p for name, p in model.named_parameters() if "experts." in name and p.ndim == 3}
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh, ignored_params=experts)
    fully_shard(model, mesh=mesh, ignored_params=experts)
    return train(model, model, half(rank))


def refused(rank):
    mesh = init_device_mesh("cpu", (2,))
    model = adapted()
    fully_shard(model.get_base_model().model.layers[0], mesh=mesh)
    with pytest.raises(NotImplementedError, match=r"layers.0.mlp.experts: FSDP2 shards.*use DDP"):
        model(**batch_at(0))
    base = mixture()
    fully_shard(base.model.layers[1], mesh=mesh)
    with pytest.raises(NotImplementedError, match=r"target_parameters: model.layers.1.mlp.experts.*sharded.*use DDP"):
        get_peft_model(base, config())
    return "refused"


def chosen(rank):
    made = select_support(mixture(), config(selection="fisher", density=0.05), [batch_at(rank)])
    return {name: support.indices.tolist() for name, support in made.supports.items()}


def process(rank, run, address):
    with process_group(rank, address):
        return run(rank)


def on_two_processes(run, tmp_path):
    return results_on_two(process, run, tmp_path / "rendezvous")


@pytest.mark.parametrize("run", [with_ddp, with_fsdp2])
def test_two_processes_do_what_one_does_with_the_whole_batch(tmp_path, run):
    first, second = on_two_processes(run, tmp_path)
    assert first == second, "the processes agree to the bit"
    alone = dynamic()
    before = state_of(alone)
    for step, (found, wanted) in enumerate(zip(first, train(alone, alone, slice(None)), strict=True)):
        for name, (indices, values) in wanted.items():
            assert found[name][0] == indices, f"positions of {name} after step {step}"
            assert found[name][1] == pytest.approx(values, rel=1e-3, abs=2e-5), f"values of {name} after step {step}"
    assert all(first[-1][name][0] != indices for name, (indices, _) in before.items()), "positions changed"


@pytest.mark.parametrize("run", [refused, chosen])
def test_sharded_experts_are_refused_and_choices_agree(tmp_path, run):
    first, second = on_two_processes(run, tmp_path)
    assert first == second
