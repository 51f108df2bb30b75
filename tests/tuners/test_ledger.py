"""The base weight through threads and interruptions: never half written, and its own again whenever it has to be."""

import copy
import io
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import sparse_peft
from tests.helpers.every_method import CONFIGS, adapted, dense_output, is_base, layers_of, output
from tests.helpers.interrupts import first_of_each, interrupted, lines_of
from tests.helpers.threads import together


def passes(model, x, count):
    return lambda: [output(model, x) for _ in range(count)]


def are(outputs, *expected):
    return all(any(torch.equal(y, e) for e in expected) for y in outputs)


# ---------------------------------------------------------------------------------------------------------- threads


class Wide(nn.Module):
    """Layers whose products take long enough that threads meet in them."""

    def __init__(self, layers=4, width=256):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def served(layers=4, width=256, method="sparse"):
    torch.manual_seed(1)
    model, reference = adapted(method, Wide(layers, width))
    return model, reference, torch.randn(64, width)


def test_the_first_passes_of_several_threads():
    for _ in range(4):
        model, reference, x = served(6, 384)
        expected = output(copy.deepcopy(model), x)
        found = together(*[passes(model, x, 3)] * 3)
        assert all(are(outputs, expected) for outputs in found)
        assert is_base(model, reference)


def test_another_models_optimizer_beside_inference():
    model, reference, x = served(6, 384)
    expected, done = output(copy.deepcopy(model), x), threading.Event()

    def infer():
        try:
            return passes(model, x, 25)()
        finally:
            done.set()

    def step():
        other = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        while not done.is_set():
            other(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    found, _ = together(infer, step)
    assert are(found, expected) and is_base(model, reference)


@pytest.mark.parametrize("method", CONFIGS)
def test_two_models_trained_at_once_train_as_if_alone(method):
    def train(model):
        generator = torch.Generator().manual_seed(3)
        values = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(values, lr=1e-2)
        for _ in range(5):
            model(torch.randn(4, 96, generator=generator)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [value.detach().clone() for value in values]

    models = [served(2, 96, method)[:2] for _ in range(2)]
    alone = train(copy.deepcopy(models[0][0]))
    for found in together(*[lambda model=model: train(model) for model, _ in models]):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert all(is_base(*pair) for pair in models)


def read_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def read_state_later(model):
    state = model.state_dict()
    time.sleep(0.01)
    return state


def read_copy(model):
    return copy.deepcopy(model).state_dict()


def read_pickle(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False).state_dict()


def read_in_block(model):
    with sparse_peft.base_weights(model):
        time.sleep(0.01)
        return {name: parameter.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("read", [read_state, read_state_later, read_copy, read_pickle, read_in_block])
def test_what_is_read_beside_inference_is_the_base_and_inference_goes_on(read):
    model, reference, x = served(3)
    expected, begun, done = output(copy.deepcopy(model), x), threading.Event(), threading.Event()
    weights = {f"layers.{number}.weight": weight for number, weight in enumerate(reference.dense)}

    def infer():
        found = []
        while not done.is_set():
            found.append(output(model, x))
            begun.set()
        return found

    def look():
        begun.wait(60)
        try:
            return [read(model) for _ in range(4)]
        finally:
            done.set()

    found, states = together(infer, look)
    assert are(found, expected)
    for state in states:
        for name, tensor in state.items():
            if name.endswith("base_layer.weight"):
                own = name.removeprefix("base_model.model.").replace(".base_layer", "")
                assert torch.equal(tensor, weights[own])
    assert is_base(model, reference)


def test_saving_beside_inference_gives_the_files_and_tokens_of_each_alone(tmp_path):
    model, _, x = served(3)
    alone = copy.deepcopy(model)
    alone.save_pretrained(tmp_path / "alone")
    expected = output(alone, x)
    found, _ = together(passes(model, x, 25), lambda: [model.save_pretrained(tmp_path / "beside") for _ in range(3)])
    assert are(found, expected)
    name = "adapter_model.safetensors"
    assert (tmp_path / "beside" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("method", CONFIGS)
def test_replicas_of_data_parallel_are_refused(method):
    for layer in layers_of(adapted(method)[0]):
        with pytest.raises(RuntimeError, match=rf"layer {layer.name}: nn\.DataParallel cannot replicate"):
            layer._replicate_for_data_parallel()


@pytest.mark.parametrize("method", ["sparse", "sora"])
def test_no_pass_sees_half_a_weight(method):
    """One layer, whose output is that of one of its states: the base, an adapter, a merged adapter."""
    model, reference, x = served(1, 384, method)
    states, done = copy.deepcopy(model), threading.Event()
    with states.disable_adapter():
        expected = [output(states, x)]
    expected.append(output(states, x))
    states.merge_adapter()
    expected.append(output(states, x))
    states.unmerge_adapter()
    states.set_adapter("other")
    expected.append(output(states, x))

    def infer():
        try:
            return passes(model, x, 60)()
        finally:
            done.set()

    def change():
        while not done.is_set():
            with model.disable_adapter():
                time.sleep(1e-4)
            model.merge_adapter()
            model.unmerge_adapter()
            model.set_adapter("other")
            model.set_adapter("default")

    first, second, _ = together(infer, infer, change)
    assert are([*first, *second], *expected) and is_base(model, reference)


# ----------------------------------------------------------------------------------------------------- interruptions


def train_once(model):
    model.train()
    model.base_model.model(torch.ones(2, 7)).sum().backward()


def step_once(model):
    values = [p for p in model.parameters() if p.grad is not None]
    torch.optim.SGD(values, lr=0.1).step()


def enter_disabled(model):
    with model.disable_adapter():
        pass


def all_transitions(model):
    train_once(model)
    step_once(model)
    model.eval()
    output(model, X)
    model.set_adapter("other")
    with model.disable_adapter():
        output(model, X)
    model.merge_adapter(["default"])
    model.to(torch.float64)
    model.unmerge_adapter()
    model.state_dict()


# The files with the code of transitions.
TRANSITIONS = ("ledger", "backups", "transitions", "residency", "held_entries")
X = torch.linspace(-1, 1, 21).view(3, 7)
# {action: (what is done before, the action that is interrupted)}
ACTIONS = {
    "write": (lambda model: None, lambda model: output(model, X)),
    "train": (lambda model: None, train_once),
    "step": (train_once, step_once),
    "switch": (lambda model: output(model, X), lambda model: (model.set_adapter("other"), output(model, X))),
    "several": (
        lambda model: output(model, X),
        lambda model: (model.base_model.set_adapter(["default", "other"]), output(model, X)),
    ),
    "hold": (lambda model: None, lambda model: model.base_model.make_resident()),
    "release": (lambda model: output(model, X), lambda model: model.base_model.release()),
    "merge": (lambda model: output(model, X), lambda model: model.merge_adapter()),
    "merge another": (lambda model: model.merge_adapter(["default"]), lambda model: model.merge_adapter(["other"])),
    "unmerge": (lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
    "disable": (lambda model: output(model, X), enter_disabled),
    "state_dict": (lambda model: output(model, X), lambda model: model.state_dict()),
    "copy": (lambda model: output(model, X), lambda model: copy.deepcopy(model)),
    "move": (lambda model: output(model, X), lambda model: model.to(torch.float64)),
    "move merged": (lambda model: model.merge_adapter(), lambda model: model.to(torch.float64)),
    "all": (lambda model: None, all_transitions),
    "base_weights": (lambda model: output(model, X), read_in_block),
}


@pytest.fixture(scope="module")
def elsewhere():
    """Runs something in another thread, which has twenty seconds for it."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda act: pool.submit(act).result(20)


def check_mended(template, reference, before, act, number, elsewhere):
    model = copy.deepcopy(template)
    before(model)
    interrupted(lambda: act(model), number)
    model.to(torch.float32).eval()
    y = elsewhere(lambda: output(model, X))  # another thread is neither kept out nor given something else
    assert torch.equal(output(model, X), y)
    torch.testing.assert_close(y.double(), dense_output(model, reference, X), rtol=1e-4, atol=1e-4)
    if any(layer.merged for layer in layers_of(model)):
        model.unmerge_adapter()
    assert is_base(model, reference)


def steps_of(template, before, act):
    model = copy.deepcopy(template)
    before(model)
    return lines_of(lambda: act(model))


def check_each(method, action, elsewhere, choose):
    template, reference = adapted(method)
    before, act = ACTIONS[action]
    for number in choose(steps_of(template, before, act)):
        check_mended(template, reference, before, act, number, elsewhere)


QUICK = ("train", "step", "switch", "merge another", "disable", "state_dict", "copy", "move merged", "base_weights")


@pytest.mark.parametrize("action", QUICK)
def test_an_interruption_at_any_line_is_mended(action, elsewhere):
    check_each("sparse", action, elsewhere, first_of_each)


@pytest.mark.parametrize("method", [name for name in CONFIGS if name != "sparse"])
def test_an_interruption_at_any_line_of_transitions_is_mended(method, elsewhere):
    check_each(method, "all", elsewhere, lambda lines: first_of_each(lines, TRANSITIONS))


@pytest.mark.parametrize("action", ["train", "step", "all"])
def test_an_interruption_between_pieces_of_a_weight_is_mended(action, elsewhere, monkeypatch):
    """Each entry's original is read right before its piece is written."""
    monkeypatch.setattr("sparse_peft.ops.held_entries.FEW_ENTRIES", 0)
    monkeypatch.setattr("sparse_peft.support.support.PIECE_ENTRIES", 3)

    def within(lines):
        numbers = [number for number, (file, _) in enumerate(lines) if file.endswith("held_entries.py")]
        assert len(numbers) > 15
        return numbers if action != "all" else numbers[::5]

    check_each("sparse", action, elsewhere, within)


@pytest.mark.parametrize("method", ["sparse", "sora"])
def test_an_interrupted_cast_of_a_merged_model_is_no_change_of_its_base(method):
    template, _ = adapted(method)
    template.to(torch.bfloat16).to(torch.float32)
    reference = [layer.base_parameter.clone() for layer in layers_of(template)]
    template.merge_adapter()  # which gives numbers that bfloat16 rounds
    twin = copy.deepcopy(template)
    lines = lines_of(lambda: twin.to(torch.bfloat16))
    for number in first_of_each(lines, ("ledger", "backups", "base_layer")):
        model = copy.deepcopy(template)
        interrupted(lambda model=model: model.to(torch.bfloat16), number)
        model.unmerge_adapter()
        found = [layer.base_parameter for layer in layers_of(model)]
        assert all(torch.equal(own.float(), base) for own, base in zip(found, reference, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("action", ACTIONS)
def test_an_interruption_at_any_step_is_mended(method, action, elsewhere):
    check_each(method, action, elsewhere, lambda lines: range(len(lines)))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize(
    "method", ["sparse", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "sparse")]
)
def test_signals_at_random_moments_of_training(method):
    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    model, reference = adapted(method)
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(values, lr=1e-3)
    delays = torch.rand(150, generator=torch.Generator().manual_seed(0)) * 3e-3 + 1e-5
    before, rang = signal.signal(signal.SIGALRM, ring), 0
    try:
        for delay in delays.tolist():
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                for _ in range(30):  # some alarms are lost: Python ignores exceptions in what it calls itself
                    model(X).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    with model.disable_adapter():
                        output(model, X)
                    model.merge_adapter()
                    model.unmerge_adapter()
                    model.state_dict()
            except Alarm:
                rang += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if any(layer.merged for layer in layers_of(model)):
                model.unmerge_adapter()
            torch.set_grad_enabled(True)  # torch's own no_grad blocks are left in between, too
            model.base_model.enable_adapter_layers()
            assert is_base(model, reference)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rang > len(delays) / 2


# ------------------------------------------------------------------------------------------------- merged, and changed


@pytest.mark.parametrize("method", CONFIGS)
def test_a_base_changed_while_merged_is_not_undone(method):
    model, _ = adapted(method)
    model.merge_adapter()
    changed = layers_of(model)[1]
    with torch.no_grad():
        changed.base_parameter.data.mul_(2)  # which torch does not count
    merged = changed.base_parameter.clone()
    for undo in (model.unmerge_adapter, lambda: model.set_adapter("other"), lambda: model.merge_adapter(["other"])):
        with pytest.raises(RuntimeError, match=r"layer second was changed while adapters 'default' were merged"):
            undo()
        assert torch.equal(changed.base_parameter, merged)
    assert torch.equal(model.merge_and_unload().second.weight, merged)


@pytest.mark.parametrize("copier", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_copy_of_a_merged_model_can_be_unmerged(method, copier):
    model, reference = adapted(method)
    output(model, X)
    model.merge_adapter()
    merged = output(model, X)
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(output(twin, X), merged) and twin.base_model.model.first.merged
    for each in (twin, model):
        each.unmerge_adapter()
        assert is_base(each, reference)
        torch.testing.assert_close(output(each, X), merged)


@pytest.mark.parametrize("method", CONFIGS)
def test_an_error_while_merging_a_second_adapter_keeps_the_first_merged(method):
    model, reference = adapted(method)
    model.merge_adapter(["default"])
    merged = output(model, X)
    layer = layers_of(model)[0]
    with torch.no_grad():
        for parameter in layer.deltas["other"].parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["other"])
    assert layer.merged_adapters == ["default"] and torch.equal(output(model, X), merged)
    model.unmerge_adapter()
    assert is_base(model, reference)
