"""A plan's memory of one of two processes, against measured peaks."""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import measure_phases
from sparse_peft import SparseConfig
from sparse_peft.planning import PlanOptions, plan_training
from tests.helpers.processes import process_group, results_on_two

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_hidden_layers": 4}
LLAMA = LlamaConfig(vocab_size=512, tie_word_embeddings=False, **SIZES)
IDS = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(0))


def adapted(base):
    return get_peft_model(base, SparseConfig(density=0.05, target_modules="all-linear"))


def trained(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def stepper(called, optimizer):
    """A function that takes a step."""

    def step():
        called(IDS, labels=IDS).loss.backward()
        optimizer.step()  # with gradients of the step before, as a plan counts them
        optimizer.zero_grad(set_to_none=False)

    return step


def compare(strategy, make):
    """The lower of the two processes' peaks in a step, and the plan's, in bytes.

    A process may free what gloo gathered for it late, the other one does not.

    Args:
        strategy: the plan's.
        make: makes a model in its wrapper, and returns a function that takes a step.
    """
    config = SparseConfig(density=0.05, target_modules="all-linear")
    options = PlanOptions(batch=1, length=64, flops=1e12, processes=2, strategy=strategy)
    planned = plan_training(LLAMA, config, options).needs[0].peak_bytes
    made = []
    phases = measure_phases(
        [lambda: made.append(make()), *[lambda: made[0]()] * 3],  # the list is empty until then
        torch.device("cpu"),
    )
    peak = torch.tensor(phases[-1].peak)
    distributed.all_reduce(peak, distributed.ReduceOp.MIN)
    return int(peak), planned


def ddp(folder):
    model = adapted(LlamaForCausalLM(LLAMA))
    return stepper(nn.parallel.DistributedDataParallel(model), trained(model))


def fsdp2(folder):
    model = adapted(LlamaForCausalLM(LLAMA))
    mesh = init_device_mesh("cpu", (2,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    return stepper(fully_shard(model, mesh=mesh), trained(model))


def tp(folder):
    base = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    for parameter in base.parameters():
        # on a GPU in memory of its own, on a CPU in the file's, of which a part is a view
        if isinstance(parameter, DTensor):
            parameter._local_tensor = parameter._local_tensor.clone()
        else:
            parameter.data = parameter.data.clone()
    model = adapted(base)
    return stepper(model, trained(model))


def measured(rank, address, folder):
    disable_progress_bar()
    with process_group(rank, address):
        return {make.__name__: compare(make.__name__, partial(make, folder)) for make in (ddp, fsdp2, tp)}


def test_a_plan_s_memory_of_one_process(tmp_path):
    LlamaForCausalLM(LLAMA).save_pretrained(tmp_path / "base")
    first, _ = results_on_two(measured, tmp_path / "rendezvous", tmp_path / "base")
    wrong = {name: figures for name, figures in first.items() if abs(figures[0] / figures[1] - 1) > 0.15}
    assert not wrong, first
