import pytest
import torch

from benchmarks import channels, runner


@pytest.fixture(autouse=True, scope="module")
def _few_samples():
    """Every action is timed once a round, where a benchmark repeats it until its time is measurable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "DECODE_ROUNDS", 1)
        patch.setattr(runner, "SWITCH_ROUNDS", 1)
        for module in (runner, channels):
            patch.setattr(module, "MOST_REPEATS", 1)
        yield


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """The commands set the number of torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
