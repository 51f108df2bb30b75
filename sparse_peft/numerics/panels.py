"""The memory limit of temporaries.

A *panel* is a block of consecutive rows. Operations that would need a matrix of the weight's size (a weight gradient,
an overlaid or cast copy of the weight) run panel by panel, so that no temporary exceeds the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_PANEL_BYTES = 64 * 2**20

# A global and no context variable: backward may run in the autograd engine's own threads.
_panel_bytes = DEFAULT_PANEL_BYTES


def panel_bytes() -> int:
    """Largest temporary of an operation, in bytes, besides its inputs and outputs."""
    return _panel_bytes


@contextmanager
def panel_limit(num_bytes: int) -> Iterator[None]:
    """Set the panel limit for the calls, forward and backward, made inside the block.

    Args:
        num_bytes: largest temporary of an operation; 64 MiB by default.

    Raises:
        ValueError: ``num_bytes`` is not positive.

    Example:
        >>> import sparse_peft
        >>> from sparse_peft.numerics import panels
        >>> with sparse_peft.panel_limit(2**20):
        ...     panels(1000, bytes_per_item=4096)
        [(0, 256), (256, 512), (512, 768), (768, 1000)]
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
    """Split ``range(length)`` into half-open ranges whose items fit the panel limit.

    Args:
        length: number of items.
        bytes_per_item: memory of one item.
        at_most: maximum number of items in a range.

    Returns:
        ``(start, stop)`` of each range; each holds at least one item.

    Example:
        >>> from sparse_peft.numerics import panels
        >>> panels(10, bytes_per_item=8, at_most=4)
        [(0, 4), (4, 8), (8, 10)]
    """
    step = max(1, min(_panel_bytes // max(1, bytes_per_item), at_most or length))
    return [(start, min(start + step, length)) for start in range(0, length, step)]
