"""The tuner of SaRA."""

from __future__ import annotations

from ..delta import SparseDelta
from ..delta_layer import SparseTunerLayer
from ..embedding_layer import EmbeddingTunerLayer
from ..entry_model import EntryModel
from .config import SaRAConfig
from .targets import DEFAULT_TARGETS


class SaRALinear(SparseTunerLayer[SparseDelta]):
    """A layer whose smallest weights train: ``W + scale * scatter(values)``, with values ``(k,)``.

    SaRA, https://arxiv.org/abs/2409.06633. Arguments and paths are those of ``SparseTunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SaRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SaRAConfig(density=0.1, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, layer.path(), tuple(layer.get_delta_weight("default").shape)
        ('SaRALinear', 'resident', (32, 64))
    """

    config_cls = SaRAConfig


class SaRAEmbedding(EmbeddingTunerLayer[SparseDelta], SaRALinear):
    """An embedding whose smallest weights train: ``W + scale * scatter(values)``, with values ``(k,)``.

    Arguments and paths are those of ``EmbeddingTunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SaRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Embedding(100, 8))
        >>> model = get_peft_model(base, SaRAConfig(num_params=10, target_modules=["0"]))
        >>> type(model.base_model.model[0]).__name__
        'SaRAEmbedding'
    """


class SaRAModel(EntryModel[SaRAConfig, SparseDelta]):
    """Creates a model that trains the smallest weights of its target layers (SaRA, https://arxiv.org/abs/2409.06633).

    A layer's state has ``values`` ``(k,)`` and their flat positions ``indices`` ``(k,)``, ascending.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.SaRAConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SaRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SaRAConfig(density=0.1, target_modules=["0"]))
        >>> model.base_model.model[0].deltas["default"]
        SparseDelta(entries=205, shape=(32, 64), density=0.1, scale=4)
    """

    layer_cls = SaRALinear
    embedding_cls = SaRAEmbedding
    target_module_mapping = DEFAULT_TARGETS
