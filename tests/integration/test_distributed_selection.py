"""Two processes with different data choose the same positions."""

import torch
import torch.multiprocessing as mp
from torch import distributed, nn

from sparse_peft import SparseConfig, select_support


def choose(rank, address, results):
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7))
    torch.manual_seed(rank)
    config = SparseConfig(selection="gradient", density=0.2, target_modules=["0"])
    chosen = select_support(model, config, [torch.randn(4, 9)], loss_fn=lambda m, b: m(b).pow(2).sum())
    results[rank] = chosen.supports["0"].indices.tolist()
    distributed.destroy_process_group()


def test_all_processes_get_what_the_first_chose(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(choose, (tmp_path / "rendezvous", results), nprocs=2)
        assert results[0] == results[1] and len(results[0]) == round(0.2 * 63)
