"""A training loop with a controller, one batch a step."""

import torch
import torch.nn.functional as F
from torch import distributed, nn

from sparse_peft import SM3, SparseAdamW, SparsityController
from sparse_peft.tuners.base_layer import TunerLayer
from tests.helpers.processes import join_group


def optimizer_of(model, kind="adamw", lr=1e-2):
    values = [p for p in model.parameters() if p.requires_grad]
    if kind == "sm3":
        return SM3(values, lr=lr, peft_model=model)
    return {"adamw": torch.optim.AdamW, "by age": SparseAdamW, "sgd": torch.optim.SGD}[kind](values, lr=lr)


def batch_at(step, size=12, n_in=17, n_out=5):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, n_in, generator=generator), torch.randint(0, n_out, (size,), generator=generator)


def train(model, optimizer, controller, steps, accumulation=1, clip=None, scaler=None):
    """Optimizer steps ``steps`` (numbers from 0), each on its own batch."""
    records = []
    for step in steps:
        x, y = batch_at(step)
        for part, label in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            loss = F.cross_entropy(model(part), label) / accumulation
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        records += controller.step()
        optimizer.zero_grad()
    return records


def train_on_half(model, rank, folder, total_steps=None):
    """Seven steps on half of each batch, as one of two processes whose gradients DDP averages.

    The states of the default adapter are written to ``folder/rank.pt``, in the model's order.
    """
    join_group(rank, f"{folder}/store")
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    controller = SparsityController(wrapped, optimizer, total_steps=total_steps)
    for step in range(7):
        x, y = (tensor[6 * rank : 6 * rank + 6] for tensor in batch_at(step))
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    torch.save([layer.deltas["default"].state_dict() for layer in layers], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
