"""How much of a weight-sized matrix may be alive at a time.

A *panel* is a block of consecutive rows. Every operation that would need a matrix of the weight's size (a weight
gradient, an overlaid or cast copy of the weight) runs panel by panel, so that no temporary is larger than the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_PANEL_BYTES = 64 * 2**20

# A plain global, not a context variable: backward may run in the autograd engine's own threads.
_panel_bytes = DEFAULT_PANEL_BYTES


def panel_bytes() -> int:
    """Largest temporary, in bytes, that an operation of this package makes besides its inputs and outputs."""
    return _panel_bytes


@contextmanager
def panel_limit(num_bytes: int) -> Iterator[None]:
    """Set the panel limit, in bytes, for the calls (forward and backward) made inside the block.

    Raises:
        ValueError: ``num_bytes`` is not positive.
    """
    global _panel_bytes
    if num_bytes <= 0:
        raise ValueError(f"num_bytes={num_bytes}: a panel needs a positive number of bytes")
    previous, _panel_bytes = _panel_bytes, num_bytes
    try:
        yield
    finally:
        _panel_bytes = previous


def panels(length: int, bytes_per_item: int, at_most: int | None = None) -> list[tuple[int, int]]:
    """Cut ``range(length)`` into half-open ranges whose items fit the panel limit, and are ``at_most`` so many.

    Each range holds at least one item.
    """
    step = max(1, min(_panel_bytes // max(1, bytes_per_item), at_most or length))
    return [(start, min(start + step, length)) for start in range(0, length, step)]
