"""Statistics of a model over data, and the supports, channels and codebooks chosen from them.

Only the objects in the documentation are public; all other exports are internal to sparse_peft.
"""

from .channels import CHANNEL_CRITERIA, Side, channel_squares, weight_squares
from .codebooks import CODEBOOK_METHODS, Sketch, ascending, assign_codes, codes_checksum, fit_codebooks
from .gptq import compensated_sketch, output_error, refit_codebooks
from .layer_view import LayerView
from .model_pass import ModelPass
from .supports import collect_supports, given_gradients, supports_from_gradients

__all__ = [
    "CHANNEL_CRITERIA",
    "CODEBOOK_METHODS",
    "LayerView",
    "ModelPass",
    "Side",
    "Sketch",
    "ascending",
    "assign_codes",
    "channel_squares",
    "codes_checksum",
    "collect_supports",
    "compensated_sketch",
    "fit_codebooks",
    "given_gradients",
    "output_error",
    "refit_codebooks",
    "supports_from_gradients",
    "weight_squares",
]
