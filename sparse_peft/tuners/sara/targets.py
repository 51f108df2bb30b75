"""Where SaRA trains by default: the architectures of diffusers, which have no ``model_type``, by their class."""

from __future__ import annotations

from ..base_model import BaseSparseModel

# Attention and feed-forward layers of a UNet's transformer blocks, and its residual blocks' convolutions.
UNET = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
]
DIFFUSION_TRANSFORMER = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]

DIFFUSERS_TARGETS = {
    **dict.fromkeys(["UNet2DConditionModel", "UNet2DModel", "UNet3DConditionModel", "UNetMotionModel"], UNET),
    **dict.fromkeys(
        ["SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel"],
        DIFFUSION_TRANSFORMER,
    ),
}
DEFAULT_TARGETS = {**BaseSparseModel.target_module_mapping, **DIFFUSERS_TARGETS}
