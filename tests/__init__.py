import pytest

# asserts in shared helpers show their values, as those in tests do
pytest.register_assert_rewrite("tests.helpers", "tests.ops.kernel_checks")
