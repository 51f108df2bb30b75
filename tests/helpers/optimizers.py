"""Optimizers that only some machines can run."""

import torch


def bnb_optimizers_run():
    """Whether bitsandbytes can step on the CPU, which its older versions cannot."""
    import bitsandbytes  # noqa: PLC0415  (an optional package)

    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = bitsandbytes.optim.AdamW32bit([parameter])
    try:
        optimizer.step()
    except Exception:
        return False
    return True
