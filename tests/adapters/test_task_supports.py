"""Tasks one after the other: three tasks on disjoint entries, of which none forgets anything."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model

from sparse_peft import SparseConfig
from sparse_peft.adapters import TaskSupports
from tests.helpers.two_layers import TwoLayers, layers_of

TASKS = ("one", "two", "three")


def base():
    torch.manual_seed(0)
    return TwoLayers(9, 20, 5)


def config(**fields):
    return SparseConfig(**{"density": 0.3, "target_modules": ["first", "second"], "scale": 1.0, **fields})


def batch(task):
    generator = torch.Generator().manual_seed(TASKS.index(task))
    return torch.randn(16, 9, generator=generator), torch.randint(0, 5, (16,), generator=generator)


def train(model, task, steps=8):
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=0.05)
    x, y = batch(task)
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def output(tasks, task):
    tasks.activate(task)
    with torch.no_grad():
        return tasks.model(batch(task)[0])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [{"density": 0.3}, {"density": 0.25, "allocation": "erk"}], ids=["numel", "erk"])
def test_earlier_tasks_compute_what_they_computed(share, budget, tmp_path):
    tasks = TaskSupports(base(), config(**budget), share)
    learnt = {}
    for number, task in enumerate(TASKS):
        model = tasks.add(task)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f".{task}." in name for name in trained)
        x, y = batch(task)
        before = float(F.cross_entropy(model(x), y))
        train(model, task)
        assert float(F.cross_entropy(model(x), y)) < before
        assert model.base_model.model.first.active_adapters == (list(TASKS[: number + 1]) if share else [task])
        learnt[task] = output(tasks, task)
    for task in TASKS:
        assert torch.equal(output(tasks, task), learnt[task]), "nothing is forgotten"
    assert not any(p.requires_grad for p in tasks.model.parameters())
    for layer in layers_of(tasks.model).values():
        supports = [layer.support(task) for task in TASKS]
        assert all(supports[a].intersection_size(supports[b]) == 0 for a in range(3) for b in range(a)), (
            "entries are disjoint"
        )
    capacity = tasks.capacity()
    assert {name: one.weights for name, one in capacity.items()} == {"first": 180, "second": 100}
    assert all(one.free == one.weights - sum(one.used.values()) for one in capacity.values())
    assert sum(one.used["three"] for one in capacity.values()) == round(budget["density"] * 280)

    tasks.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "one", adapter_name="one")
    for task in TASKS[1:]:
        loaded.load_adapter(tmp_path / task, task)
    again = TaskSupports(loaded, config(**budget), share)
    for task in TASKS:
        torch.testing.assert_close(output(again, task), learnt[task], rtol=0, atol=0)
    assert again.capacity() == capacity
    with pytest.raises(ValueError, match=r"layer \w+: task 'fourth' gets \d+ entries and \d+ are free after 3 tasks"):
        again.add("fourth")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="selection='magnitude'"):
        TaskSupports(base(), config(selection="magnitude"))
    tasks = TaskSupports(base(), config())
    with pytest.raises(ValueError, match="none yet"):
        tasks.activate("one")
    tasks.add("one")
    with pytest.raises(ValueError, match="there is one already"):
        tasks.add("one")
    assert get_peft_model(base(), config()).peft_config["default"].num_entries
