"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case("s2ft", "sparse_peft:S2FTConfig", {"ratio": 0.4}, {"ratio": 0.2}, groups=False)
