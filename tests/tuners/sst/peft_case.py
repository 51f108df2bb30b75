"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case("sst", "sparse_peft:SSTConfig", {"r": 2}, {"r": 3}, convolutions=False, groups=False, low_rank=True)
