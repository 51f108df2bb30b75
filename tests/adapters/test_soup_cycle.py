"""Cycles of soups: the support shrinks from phase to phase, and each average is that of its members."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from sparse_peft import SparseConfig
from sparse_peft.adapters import read_stored, soup_cycle
from tests.helpers.two_layers import TwoLayers

CONFIG = {"density": 0.4, "target_modules": ["first", "second"]}


def base():
    torch.manual_seed(0)
    return TwoLayers(9, 20, 5)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 9, generator=generator), torch.randint(0, 5, (32,), generator=generator)


def loss(model):
    x, y = batch()
    return F.cross_entropy(model(x), y)


class Training:
    def __init__(self):
        self.seen = []

    def __call__(self, model, phase, member):
        self.seen.append((phase, member, float(loss(model).detach())))
        values = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(values, lr=0.02, weight_decay=10.0**-member)
        for _ in range(5):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()


def entries(folder):
    return {name: state.as_sparse() for name, state in read_stored(folder).states.items()}


def score(folder):
    with torch.no_grad():
        return -float(loss(PeftModel.from_pretrained(base(), folder).eval()))


@pytest.mark.parametrize("how", ["uniform", "greedy"])
def test_a_cycle_prunes_trains_and_averages(tmp_path, how):
    training = Training()
    soups = soup_cycle(
        base, SparseConfig(**CONFIG), training, tmp_path, keep=[1.0, 0.5, 0.5], members=2, how=how,
        score=score if how == "greedy" else None,
    )  # fmt: skip
    assert [(phase, member) for phase, member, _ in training.seen] == [(p, m) for p in range(3) for m in range(2)]
    first = soups[0].entries
    assert first == round(0.4 * 280) and [s.entries for s in soups] == [first, *(s.entries for s in soups[1:])]
    assert soups[1].entries == pytest.approx(first / 2, abs=2) and soups[2].entries == pytest.approx(first / 4, abs=3)
    for phase in range(3):
        here = tmp_path / f"phase-{phase}"
        members = [entries(folder) for folder in soups[phase].folders]
        for name, average in entries(here / "soup").items():
            assert all(average.support == member[name].support for member in members)
            mean = sum(member[name].values.double() for member in members) / len(members)
            torch.testing.assert_close(average.values.double(), mean, rtol=1e-6, atol=1e-8)
        if phase:
            previous = entries(tmp_path / f"phase-{phase - 1}" / "soup")
            for name, start in entries(here / "start").items():
                old = previous[name]
                kept = old.values.abs().topk(start.support.nnz).indices.sort().values
                assert torch.equal(start.support.indices, old.support.indices[kept])
                torch.testing.assert_close(start.values, old.values[kept])
    # the next phase begins where the soup left off, less what was pruned
    assert training.seen[2][2] < training.seen[0][2] and -score(tmp_path / "phase-2" / "soup") < training.seen[0][2]


def test_what_does_not_fit_is_refused(tmp_path):
    for fields, given, message in (
        ({}, {"how": "greedy"}, "how='greedy' without a score"),
        ({}, {"how": "best"}, "how='best'"),
        ({}, {"keep": [0.0]}, r"keep\[0\]=0"),
        ({"selection": "rigl"}, {}, "changes its support"),
    ):
        with pytest.raises(ValueError, match=message):
            soup_cycle(base, SparseConfig(**CONFIG, **fields), Training(), tmp_path, **given)
    assert not list(tmp_path.iterdir())
