"""Samples that were learnt and never forgotten leave the training."""

import pytest
import torch

from sparse_peft.procedures import SampleHistory


def test_samples_that_are_never_forgotten_go_first():
    history = SampleHistory(6)
    everything = torch.arange(6)
    #                                      0  1  2  3  4  5
    for learnt in ([1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 0, 1]):
        history.note(everything, torch.tensor(learnt).bool(), torch.tensor([0.3, 0.2, 3.0, 0.1, 2.0, 0.2]))
    assert history.forgotten.tolist() == [0, 1, 0, 0, 1, 0] and history.seen.tolist() == [3] * 6
    assert history.kept(1.0).tolist() == [0, 1, 2, 3, 4, 5]
    assert history.kept(5 / 6).tolist() == [0, 1, 2, 4, 5], "the lowest loss goes first"
    assert history.kept(0.5).tolist() == [1, 2, 4]
    assert history.kept(0.01).tolist() == [2, 4], "what is not learnt stays"
    again = SampleHistory(6)
    again.load_state_dict(history.state_dict())
    assert again.kept(0.5).tolist() == [1, 2, 4]


def test_what_does_not_fit_is_refused():
    history = SampleHistory(3)
    with pytest.raises(ValueError, match="0 to 2"):
        history.note(torch.tensor([3]), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"shape \(1,\) with learnt of shape \(2,\)"):
        history.note(torch.tensor([0]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="share=0"):
        history.kept(0)
    with pytest.raises(ValueError, match="of 4 samples, this one of 3"):
        history.load_state_dict(SampleHistory(4).state_dict())
