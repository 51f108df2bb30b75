"""A training loop with a controller, one batch a step."""

import torch
import torch.nn.functional as F
from torch import nn

from sparse_peft import SM3, SparseAdamW


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
