"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case(
    "monarch",
    "sparse_peft:MonarchConfig",
    {"nblocks": 2, "blk_r": 2},
    {"nblocks": 2, "blk_r": 4},
    convolutions=False,
    groups=False,
    low_rank=True,
)
