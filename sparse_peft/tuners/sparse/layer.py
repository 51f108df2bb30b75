"""The layer of a sparse delta."""

from __future__ import annotations

from ..delta import SparseDelta
from ..delta_layer import SparseTunerLayer
from ..embedding_layer import EmbeddingTunerLayer
from .config import SparseConfig


class SparseLinear(SparseTunerLayer[SparseDelta]):
    """A layer with trained entries: ``W + scale * scatter(values)``, with ``W`` ``(out, in)`` and values ``(k,)``.

    SpIEL, https://arxiv.org/abs/2401.16405. Arguments and paths are those of ``SparseTunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SparseConfig(num_params=10, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, layer.path(), tuple(layer.get_delta_weight("default").shape)
        ('SparseLinear', 'resident', (32, 64))
    """

    config_cls = SparseConfig


class SparseEmbedding(EmbeddingTunerLayer[SparseDelta], SparseLinear):
    """An embedding with trained entries: ``W + scale * scatter(values)``, with ``W`` ``(rows, cols)``.

    Arguments and paths are those of ``EmbeddingTunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> base = torch.nn.Sequential(torch.nn.Embedding(100, 8))
        >>> model = get_peft_model(base, SparseConfig(num_params=10, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, layer.path(), tuple(layer.get_delta_weight("default").shape)
        ('SparseEmbedding', 'resident', (100, 8))
    """
