"""Two processes with different data choose the same positions, and make the same sketches."""

from multiprocessing import Manager

import pytest
import torch
from torch import distributed, nn

from sparse_peft import SketchConfig, SparseConfig, select_support, sketch_model
from tests.helpers.processes import join_group, run_on_two

pytestmark = pytest.mark.distributed


DATA_CRITERIA = ("gradient", "fisher", "gallop", "movement", "wanda")


def choose(rank, address, results):
    join_group(rank, address)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7))
    torch.manual_seed(rank)
    batch = torch.randn(4, 9)

    def chosen(selection):
        config = SparseConfig(selection=selection, density=0.2, target_modules=["0"])
        supports = select_support(model, config, [batch], loss_fn=lambda m, b: m(b).pow(2).sum()).supports
        return supports["0"].indices.tolist()

    together = {name: chosen(name) for name in DATA_CRITERIA}
    distributed.destroy_process_group()
    results[rank] = together, {name: chosen(name) for name in DATA_CRITERIA}


def test_all_processes_get_what_the_first_chose(tmp_path):
    with Manager() as manager:
        results = manager.dict()
        run_on_two(choose, tmp_path / "rendezvous", results)
        (first, first_alone), (second, second_alone) = results[0], results[1]
        assert first == second == first_alone
        for name in DATA_CRITERIA:
            assert len(first[name]) == round(0.2 * 63) and first_alone[name] != second_alone[name], name


def sketch(rank, address, results):
    join_group(rank, address)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 7))
    torch.manual_seed(rank)
    config = SketchConfig(mode="replace", bits=2, target_modules=["0"])
    data = [torch.randn(40, 24)]
    sketched = sketch_model(model, config, data, loss_fn=lambda m, b: m(b), progress=False).sketches["0"]
    distributed.destroy_process_group()
    alone = sketch_model(model, config, data, loss_fn=lambda m, b: m(b), progress=False).sketches["0"]
    results[rank] = [(s.codebooks.tolist(), s.codes.tolist()) for s in (sketched, alone)]


def test_all_processes_get_the_sketches_of_the_first(tmp_path):
    with Manager() as manager:
        results = manager.dict()
        run_on_two(sketch, tmp_path / "rendezvous", results)
        (first, first_alone), (second, second_alone) = results[0], results[1]
        assert first == second == first_alone != second_alone
