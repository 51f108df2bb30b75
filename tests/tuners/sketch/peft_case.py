"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case("sketch", "sparse_peft:SketchConfig", {"bits": 2}, {"bits": 3}, convolutions=False, groups=False)
