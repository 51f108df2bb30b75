"""The memory limit of temporaries."""

import pytest

from sparse_peft.numerics import panel_limit, panels


def test_panels_cover_the_range_within_the_limit():
    with panel_limit(100):
        assert panels(10, 30) == [(0, 3), (3, 6), (6, 9), (9, 10)]
        assert panels(2, 1000) == [(0, 1), (1, 2)]
        assert panels(0, 8) == []
    with pytest.raises(ValueError, match="num_bytes=0"), panel_limit(0):
        pass
