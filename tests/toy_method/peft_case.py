"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case("band", "tests.toy_method:BandConfig", {"width": 8}, {"width": 5})
