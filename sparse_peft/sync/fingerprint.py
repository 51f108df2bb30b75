"""Which base model weights belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from ..numerics import checksum


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """A hexadecimal digest of names, shapes, dtypes and bits, in any order; one pass over the weights.

    It recognises the same weights again. It is no protection against someone who wants two models to have the same.

    Args:
        parameters: ``{name: tensor}``.

    Example:
        >>> import torch
        >>> from sparse_peft.sync import fingerprint
        >>> weights = {"a": torch.zeros(3), "b": torch.ones(2)}
        >>> fingerprint(weights) == fingerprint(dict(reversed(weights.items())))
        True
        >>> fingerprint(weights) == fingerprint({**weights, "b": torch.zeros(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {checksum(tensor)}\n".encode())
    return digest.hexdigest()
