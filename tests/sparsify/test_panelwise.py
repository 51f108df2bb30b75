"""Masks from scores in panels: those of all scores at once."""

import pytest
import torch

from sparse_peft.numerics import pack_bits, panel_limit
from sparse_peft.sparsify import NM, Unstructured, keep_in_panels


def scores_of(kind, shape=(37, 24)):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(shape, generator=generator)
    return {"signed": scores, "tied": (scores * 2).round(), "equal": torch.zeros(shape), "positive": scores.abs()}[
        kind
    ]


@pytest.mark.parametrize("kind", ["signed", "tied", "equal", "positive"])
@pytest.mark.parametrize(
    "pattern",
    [NM(2, 4), NM(1, 5, pad=True), Unstructured(0.3, "row"), Unstructured(0.77, "matrix"), Unstructured(0.5)],
    ids=str,
)
def test_panels_change_nothing(pattern, kind):
    scores = scores_of(kind)
    for units in (None, 0, 1, 100, scores.numel()) if isinstance(pattern, Unstructured) else (None,):
        whole = pattern.keep(scores, units)
        with panel_limit(24 * 16 * 3):  # three rows
            packed = keep_in_panels(pattern, lambda a, b: scores[a:b], (37, 24), units)
        assert torch.equal(packed, pack_bits(whole)), units


def test_what_has_no_order_is_refused():
    scores = scores_of("signed")
    with pytest.raises(ValueError, match="scope='column'"):
        keep_in_panels(Unstructured(0.5, "column"), lambda a, b: scores[a:b], (37, 24))
    scores[11, 3] = torch.nan
    for limit in (24 * 16 * 3, 2**26):
        with panel_limit(limit), pytest.raises(ValueError, match=r"layer here.*NaN"):
            keep_in_panels(Unstructured(0.5, "matrix"), lambda a, b: scores[a:b], (37, 24), name="here")
