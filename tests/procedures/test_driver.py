"""The driver: any part's moments, its state and its records, on PEFT's LoRA and on a sparse delta."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparse_peft import SparsityController, procedures
from sparse_peft.constraints import Count
from sparse_peft.dynamics.protocol import Moments
from sparse_peft.dynamics.records import Record
from sparse_peft.procedures import Procedure, StepDriver
from sparse_peft.procedures.driver import packed, unpacked
from tests.helpers.procedures import adapted, assert_resumes, loss_of, optimizer_of, run, train
from tests.helpers.training_loop import batch_at

pytestmark = pytest.mark.filterwarnings("ignore:adapter.*what suits its config")


@dataclass(frozen=True)
class Shrink(Record, event="test_shrink"):
    times: int


@dataclass(frozen=True)
class Shrinking(Procedure):
    """Halves the largest parameter every few steps."""

    every: Count = 2

    def start(self, run):
        return Shrinks(self, run)


class Shrinks(Moments):
    def __init__(self, config, run):
        self.every, self.parameters, self.times, self.seen = config.every, run.parameters(), 0, []

    def begin_step(self, step):
        self.seen.append(("begin", step))

    def before_step(self, step):
        self.seen.append(("before", step))

    @torch.no_grad()
    def after_step(self, step):
        self.seen.append(("after", step))
        if step % self.every:
            return None
        self.times += 1
        max(self.parameters.values(), key=lambda p: float(p.abs().max())).mul_(0.5)
        return Shrink(step, "Shrinking", self.times)

    def discard_step(self):
        self.seen.append("discard")

    def close(self):
        self.seen.append("close")

    def state_dict(self):
        return {"times": self.times}

    def load_state_dict(self, state):
        self.times = state["times"]


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_procedure_acts_and_resumes(kind):
    _, controller = run(kind, Shrinking(), steps=5)
    part = controller.parts["procedures"]["Shrinking"]
    assert part.seen[:4] == [("begin", 1), ("before", 1), ("after", 1), ("begin", 2)]
    assert [record.step for record in controller.history] == [2, 4] and part.times == 2
    state = unpacked(controller.optimizer.state_dict()["param_groups"][0]["sparse_peft"])
    assert state["procedures"] == {"Shrinking": {"completed_steps": 5, "times": 2}} and state["adapters"] == {}
    controller.close()
    assert part.seen[-1] == "close" and "sparse_peft" not in controller.optimizer.state_dict()["param_groups"][0]
    assert_resumes(kind, Shrinking(), stops=(1, 4))


def test_a_procedure_acts_beside_the_changes_of_an_adapter():
    assert_resumes("sparse", Shrinking(), selection="rigl", reselect_every=3, stops=(3, 5))
    _, controller = run("sparse", Shrinking(), selection="rigl", reselect_every=3)
    assert {type(record).__name__ for record in controller.history} == {"Shrink", "Reselection"}


def test_a_state_of_an_earlier_version_is_taken_as_it_is():
    _, controller = run("sparse", Shrinking(), steps=5)
    state = controller.optimizer.state_dict()
    state["param_groups"][0]["sparse_peft"] = unpacked(state["param_groups"][0]["sparse_peft"])
    _, other = run("sparse", Shrinking(), steps=1)
    other.optimizer.load_state_dict(state)
    assert other.completed_steps == 5 and other.history == controller.history
    assert unpacked(packed(other.state_dict())) == other.state_dict()


def test_skipped_steps_do_not_count():
    model = adapted()
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, procedures=[Shrinking()])
    assert controller.step() == []
    train(model, optimizer, controller, range(2))
    assert controller.completed_steps == 2 and "discard" in controller.parts["procedures"]["Shrinking"].seen


def test_passes_beside_the_training_leave_no_trace():
    model = adapted("sparse", selection="accumulated_gradient", reselect_every=3, accumulate=3)
    optimizer = optimizer_of(model)
    seen = {}

    @dataclass(frozen=True)
    class Aside(Procedure):
        def start(self, run):
            seen["run"] = run
            return Moments()

    controller = SparsityController(model, optimizer, 9, procedures=[Aside()])
    run, parameters = seen["run"], seen["run"].parameters()
    (gradients,) = run.gradients([batch_at(50)], loss_of, parameters)
    assert all(parameter.grad is None for parameter in parameters.values())
    loss_of(model.eval(), batch_at(50)).backward()
    assert gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)
    model.train().zero_grad()
    controller.discard_step()
    train(model, optimizer, controller, range(2))
    list(run.gradients([batch_at(51)], loss_of, parameters))
    assert model.training
    train(model, optimizer, controller, range(2, 9))
    other = adapted("sparse", selection="accumulated_gradient", reselect_every=3, accumulate=3)
    stepped = optimizer_of(other)
    train(other, stepped, SparsityController(other, stepped, 9), range(9))
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_does_not_fit_is_refused():
    model = adapted()
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="Shrinking is given twice"):
        SparsityController(model, optimizer, procedures=[Shrinking(), Shrinking(3)])
    with pytest.raises(ValueError, match="every=0"):
        Shrinking(0)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    with pytest.raises(ValueError, match=r"does not train \S*layers\.0\.up\.lora_A.*after get_peft_model"):
        SparsityController(model, other, procedures=[Shrinking()])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no adapter that trains"):
        SparsityController(model, optimizer, procedures=[Shrinking()])
    _, controller = run("lora", Shrinking(), steps=2)
    state = controller.optimizer.state_dict()
    fresh = adapted()
    stepped = optimizer_of(fresh)
    stepped.load_state_dict(state)
    with pytest.raises(ValueError, match=r"of the procedures \['Shrinking'\].*are \['Other'\]"):
        SparsityController(fresh, stepped, procedures=[type("Other", (Shrinking,), {})()])


def test_procedures_are_found_by_file_and_are_those_of_the_stub():
    stub = ast.parse(Path(procedures.__file__).with_suffix(".pyi").read_text())
    names = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == sorted(procedures.__all__) and StepDriver in SparsityController.__mro__
