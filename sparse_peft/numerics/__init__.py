"""Numerical helpers without layers: panels, products over tokens, top-k, order statistics, random numbers,
k-means, sorted vectors, checksums.

Except for [`panel_limit`][sparse_peft.panel_limit], all exports are internal to sparse_peft.
"""

from .bits import count_bits, pack_bits, unpack_bits
from .checksums import bits, checksum
from .order_statistics import order_statistics
from .panels import panel_bytes, panel_limit, panels
from .rng import sample_without_replacement, uniform
from .sorted import among
from .tokens import accumulation_dtype, flatten_tokens, transposed_product
from .topk import RunningTopK, topk_indices

__all__ = [
    "RunningTopK",
    "accumulation_dtype",
    "among",
    "bits",
    "checksum",
    "count_bits",
    "flatten_tokens",
    "order_statistics",
    "pack_bits",
    "panel_bytes",
    "panel_limit",
    "panels",
    "sample_without_replacement",
    "topk_indices",
    "transposed_product",
    "uniform",
    "unpack_bits",
]
