"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case(
    "sparse_ift",
    "sparse_peft:SparseIFTConfig",
    {"r": 2, "sparsity": 0.5, "alpha": 2},
    {"r": 1, "sparsity": 0.5, "alpha": 2},
    groups=False,
    low_rank=True,
)
