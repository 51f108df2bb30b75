"""The tuner of SaRA."""

from __future__ import annotations

from ..delta import SparseDelta
from ..delta_layer import SparseTunerLayer
from ..entry_model import EntryModel
from .config import SaRAConfig
from .targets import DEFAULT_TARGETS


class SaRALinear(SparseTunerLayer[SparseDelta]):
    """A layer whose smallest weights train; see ``SparseTunerLayer``."""

    config_cls = SaRAConfig


class SaRAModel(EntryModel[SaRAConfig, SparseDelta]):
    """Creates a model that trains the smallest weights of its target layers.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.SaRAConfig): the adapter's config.
        adapter_name: the adapter's name.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> from sparse_peft import SaRAConfig
        >>> unet = UNet2DConditionModel.from_pretrained("sd-legacy/stable-diffusion-v1-5", subfolder="unet")
        >>> unet.requires_grad_(False)
        >>> unet.add_adapter(SaRAConfig(threshold=2e-3))
    """

    layer_cls = SaRALinear
    target_module_mapping = DEFAULT_TARGETS
