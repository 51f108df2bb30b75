"""Runs that go on with another number of processes, or in another wrapper, than they were saved with; in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from sparse_peft import SparseConfig, SparsityController
from sparse_peft.dynamics.full_tensor import full_tensor
from sparse_peft.training.shared_checkpoint import load_checkpoint, save_checkpoint
from tests.helpers.blocks import Net
from tests.helpers.processes import process_group, results_on_two
from tests.integration import test_distributed_tensor_parallel as tensor_parallel
from tests.integration.test_distributed_training import OPTIMIZERS, adapted, batch_at, half, leaves

pytestmark = pytest.mark.distributed

FIRST, ALL, TOTAL = 6, 10, 12
CASES = {
    "rigl": ("rigl", "by age", {}),  # one reselection before the stop, one after it
    "in a window": ("accumulated_gradient", "adamw", {"reselect_every": 8, "accumulate": 4}),
    "sara": ("sara", "adamw", {"density": 0.2, "progressive": 7, "nuclear_weight": 0.01, "nuclear_min_size": 4}),
    "snella": ("snella", "adamw", {"r": 2, "target_sparsity": 0.6, "allocate_start": 0, "allocate_every": 4}),
}


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2}
# another model begins at other positions, where nothing but these follows from the seed
OTHER_SEED = {"rigl": 1, "in a window": 1, "sara": 0, "snella": 0}


class Run:
    """A model that trains in float64."""

    def __init__(self, case, wrap=None, part=slice(None), seed=0):
        selection, kind, fields = CASES[case]
        self.model = adapted(selection, seed=seed, net=Net().double(), **fields)
        self.called = self.model if wrap is None else wrap(self.model)
        self.part = part
        self.optimizer = OPTIMIZERS[kind]([p for p in self.called.parameters() if p.requires_grad], lr=1e-2)
        self.controller = SparsityController(self.called, self.optimizer, TOTAL)

    def train(self, steps):
        for step in steps:
            x, y = (tensor[self.part] for tensor in batch_at(step))
            F.cross_entropy(self.called(x.double()), y).backward()
            self.optimizer.step()
            self.controller.step()
            self.optimizer.zero_grad()
        return self

    def seen(self):
        """Values, positions and optimizer state, whole."""
        states = leaves(self.model)
        tensors = {
            f"{name}.{key}": full_tensor(tensor).clone()
            for name, state in states.items()
            for key, tensor in state.state_dict().items()
        }
        for name, state in states.items():
            for key, parameter in state.own_parameters.items():
                for kind, value in self.optimizer.state[parameter].items():
                    whole = full_tensor(value).clone()
                    # an age of all entries together
                    tensors[f"{name}.{key}.{kind}"] = whole.expand(parameter.shape) if kind == "age" else whole
        records = [record.to_dict() for record in self.controller.history]
        return {"steps": self.controller.completed_steps, "records": records, "tensors": tensors}


def assert_equal(found, expected, exact=True):
    assert found["steps"] == expected["steps"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        if name.endswith(("default.tau", "default.age")):
            continue  # SNELL's threshold, and when it was computed: saving and the next pass bring it up to date
        if exact or not tensor.is_floating_point():
            assert torch.equal(found["tensors"][name], tensor), name
        else:
            torch.testing.assert_close(
                found["tensors"][name], tensor, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    if exact:
        assert found["records"] == expected["records"]


def on_rank(rank, address, folder):
    found = {}
    with process_group(rank, address):
        for wrapper, wrap in WRAPPERS.items():
            for case in CASES:
                run = Run(case, wrap, half(rank)).train(range(FIRST))
                saved, here = run.seen(), folder / f"{wrapper} {case}"
                save_checkpoint(here, run.called, run.optimizer)
                whole = run.train(range(FIRST, ALL)).seen()
                again = Run(case, wrap, half(rank), seed=OTHER_SEED[case])
                load_checkpoint(here, again.called, again.optimizer)
                assert_equal(again.seen(), saved)
                assert_equal(again.train(range(FIRST, ALL)).seen(), whole)
                # what one process saved, and the other wrapper
                for source in ("one", *(set(WRAPPERS) - {wrapper})):
                    if not (folder / f"{source} {case}").exists():
                        continue
                    other = Run(case, wrap, half(rank), seed=OTHER_SEED[case])
                    load_checkpoint(folder / f"{source} {case}", other.called, other.optimizer)
                    assert_equal(other.train(range(FIRST, ALL)).seen(), whole, exact=False)
                found[wrapper, case] = saved, whole
    return found


def test_runs_go_on_with_another_number_of_processes(tmp_path):
    expected = {}
    for case in CASES:
        run = Run(case).train(range(FIRST))
        save_checkpoint(tmp_path / f"one {case}", run.model, run.optimizer)
        expected[case] = run.seen(), run.train(range(FIRST, ALL)).seen()
        assert run.controller.history
    first, second = results_on_two(on_rank, tmp_path / "rendezvous", tmp_path)
    for (wrapper, case), (saved, whole) in first.items():
        assert_equal(second[wrapper, case][1], whole)
        assert_equal(whole, expected[case][1], exact=False)
        run = Run(case, seed=OTHER_SEED[case])
        load_checkpoint(tmp_path / f"{wrapper} {case}", run.model, run.optimizer)
        assert_equal(run.seen(), saved)
        assert_equal(run.train(range(FIRST, ALL)).seen(), whole, exact=False)


# ---------------------------------------------------------------------- tensor parallelism

FIELDS = {"selection": "rigl", "density": 0.1, "reselect_every": 2, "candidates": 10.0, "accumulate": 1}


def causal(folder, divided, seed=0):
    plan = {"distributed_config": DistributedConfig(tp_plan="auto")} if divided else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plan)
    for parameter in base.parameters():
        if isinstance(parameter, DTensor):
            parameter._local_tensor = parameter._local_tensor.clone()  # on a CPU a view of the whole
    config = SparseConfig(target_modules=tensor_parallel.TARGETS[:-1], seed=seed, **FIELDS)
    model = tensor_parallel.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, SparsityController(model, optimizer, total_steps=8)


def trained(run, steps):
    model, optimizer, controller = run
    for step in steps:
        tensor_parallel.loss(model, tensor_parallel.IDS.roll(step, 1)).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    return tensor_parallel.positions(model), {
        name: state.values.detach().clone() for name, state in tensor_parallel.states(model).items()
    }


def in_parts(rank, address, folder):
    disable_progress_bar()
    with process_group(rank, address):
        run = causal(folder, divided=True)
        trained(run, range(3))
        save_checkpoint(folder / "parts", *run[:2])
        whole = trained(run, range(3, 6))
        again = causal(folder, divided=True, seed=1)
        load_checkpoint(folder / "one", *again[:2])
        return whole, trained(again, range(3, 6))


def test_tensor_parallel_runs_go_on_in_one_process_and_back(tmp_path):
    tensor_parallel.make(tmp_path)
    run = causal(tmp_path, divided=False)
    trained(run, range(3))
    save_checkpoint(tmp_path / "one", *run[:2])
    positions, values = trained(run, range(3, 6))
    results = list(results_on_two(in_parts, tmp_path / "rendezvous", tmp_path))
    again = causal(tmp_path, divided=False, seed=1)
    load_checkpoint(tmp_path / "parts", *again[:2])
    for found, theirs in (*results[0], *results[1], trained(again, range(3, 6))):
        assert found == positions
        torch.testing.assert_close(theirs, values, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------- what cannot work


def flat(rank, address, folder):
    with process_group(rank, address):
        model = adapted("nonzero")
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
        with pytest.raises(NotImplementedError, match=r"FSDP1's flat parameters .* use FSDP2"):
            save_checkpoint(folder, wrapped, optimizer)
        distributed.barrier()


def test_what_cannot_work_is_refused(tmp_path):
    results_on_two(flat, tmp_path / "rendezvous", tmp_path / "flat")
    run = Run("rigl").train(range(2))
    save_checkpoint(tmp_path / "saved", run.model, run.optimizer)
    smaller = adapted("rigl", net=Net().double(), density=0.05)
    optimizer = torch.optim.AdamW([p for p in smaller.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"a tensor of shape \(28,\) for .*values of shape \(14,\); make the model"):
        load_checkpoint(tmp_path / "saved", smaller, optimizer)
    model = adapted("rigl", net=Net().double())
    parameters = [p for p in model.parameters() if p.requires_grad]
    split = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    with pytest.raises(ValueError, match="trains 4 parameters in 1 groups, and this one 4 in 2, or others"):
        load_checkpoint(tmp_path / "saved", model, split)
    other = torch.optim.AdamW([*parameters, nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="AdamW trains parameters that the model does not have"):
        save_checkpoint(tmp_path / "other", model, other)
