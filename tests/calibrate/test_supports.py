"""Supports chosen from data, against dense float64 gradients of ordinary autograd."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from sparse_peft.calibrate import (
    LayerView,
    ModelPass,
    collect_supports,
    gradient_hooks,
    gradient_sums,
    supports_from_gradients,
)
from sparse_peft.numerics import panel_limit
from sparse_peft.support import Budget, Support, get_criterion, resolve_counts

INF = float("inf")
GRADIENT_CRITERIA = ["gradient", "fisher", "movement", "gallop"]


class Net(nn.Module):
    """Linear and Conv1D layers, one used twice, a write into a layer's output, and two layers without data."""

    def __init__(self, width=12, hidden=20, writes=True):
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.act = nn.ReLU(inplace=writes)
        self.shared = nn.Linear(hidden, hidden, bias=False)
        self.conv = Conv1D(width, hidden)
        self.head = nn.Linear(width, 3)
        self.unused = nn.Linear(width, 5)

    def forward(self, x, labels=None, checkpointing=None):
        h = self.act(self.first(x))

        def middle(h):
            return torch.tanh(self.shared(torch.tanh(self.shared(h))))

        h = middle(h) if checkpointing is None else checkpoint(middle, h, use_reentrant=checkpointing)
        logits = self.head(input=self.conv(h))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.reshape(-1, 3), labels.reshape(-1))
        return SimpleNamespace(loss=loss, logits=logits)


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Net(**kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def data(batches=3, shape=(2, 5), width=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(*shape, width, generator=generator),
            "labels": torch.randint(0, 3, shape, generator=generator),
        }
        for _ in range(batches)
    ]


NAMES = ("first", "shared", "conv", "head")


def targets_of(model, names=NAMES):
    return {name: model.get_submodule(name) for name in names}


def layers_of(targets):
    return [LayerView.of(name, module) for name, module in targets.items()]


def collect(model, targets, criterion, budget, batches, *, loss_fn=None, **options):
    return collect_supports(ModelPass(model, batches, loss_fn), layers_of(targets), criterion, budget, **options)


def dense_scores(model, batches, criterion, names=NAMES):
    """The definition: whole gradients, batch by batch, in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    weights = {name: model.get_submodule(name).weight for name in names}
    grads = []
    for batch in batches:
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append({name: weight.grad.clone() for name, weight in weights.items()})
    return {
        name: {
            "gradient": lambda g, w: (sum(g) / len(g)).abs(),
            "fisher": lambda g, w: sum(x**2 for x in g) / len(g),
            "movement": lambda g, w: -w.detach() * sum(g),
            "gallop": lambda g, w: (sum(g) / len(g)).abs() / (w.detach().abs() + 1e-8),
        }[criterion]([batch[name] for batch in grads], weight)
        for name, weight in weights.items()
    }


def assert_chosen(supports, scores, counts):
    """The supports are a top-k of the scores, up to rounding of float32 at the border."""
    assert list(supports) == list(scores)
    for name, support in supports.items():
        flat = scores[name].reshape(-1)
        assert support.shape == tuple(scores[name].shape) and support.name == name
        assert support.nnz == counts[name], name
        assert Support(support.shape, support.indices) == support  # sorted, unique, in range
        border = flat.sort(descending=True).values[support.nnz - 1]
        assert (flat[support.indices.long()] >= border - 1e-5 * flat.abs().max()).all(), name


@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
@pytest.mark.parametrize("allocation", ["numel", "erk", "uniform", "global"])
@pytest.mark.parametrize("batches", [1, 3])
def test_exact_supports(criterion, allocation, batches):
    model, batches = build(), data(batches)
    budget = Budget(density=0.1, allocation=allocation)
    with panel_limit(512):
        supports = collect(model, targets_of(model), get_criterion(criterion), budget, iter(batches), oversample=INF)
    scores = dense_scores(model, batches, criterion)
    counts = resolve_counts({n: tuple(s.shape) for n, s in scores.items()}, budget, scores.__getitem__)
    assert_chosen(supports, scores, counts)


@pytest.mark.parametrize("limit", [1, 200, 1000, 2**26])
@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
def test_panels_change_nothing(criterion, limit):
    model, batches = build(), data(2)
    with panel_limit(limit):
        supports = collect(model, targets_of(model), get_criterion(criterion), Budget(density=0.2), batches)
    scores = dense_scores(model, batches, criterion)
    counts = resolve_counts({n: tuple(s.shape) for n, s in scores.items()}, Budget(density=0.2))
    assert_chosen(supports, scores, counts)  # 8 * 0.2 > 1: all entries are summed


@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
@pytest.mark.parametrize("allocation", ["numel", "global"])
@pytest.mark.parametrize("oversample", [1.0, 3.0])
def test_later_batches_are_summed_at_the_first_batchs_candidates(criterion, allocation, oversample):
    model, batches = build(), data(4)
    budget = Budget(density=0.05, allocation=allocation, density_pattern={"head": 0.25})
    with panel_limit(1500):
        supports = collect(model, targets_of(model), get_criterion(criterion), budget, batches, oversample=oversample)
    first, all_batches = (dense_scores(model, part, criterion) for part in (batches[:1], batches))
    shapes = {name: tuple(scores.shape) for name, scores in first.items()}
    counts = resolve_counts(shapes, budget, first.__getitem__)
    if allocation == "global":
        # the best of the sharing layers together, and the best one of a layer that has none among them
        sharing = [name for name in NAMES if name != "head"]
        total = sum(counts[name] for name in sharing)
        joined = torch.cat([first[name].reshape(-1) for name in sharing])
        border = joined.sort(descending=True).values[math.ceil(oversample * total) - 1]
        masks = {name: first[name] >= min(border, first[name].max()) for name in sharing}
        border = first["head"].reshape(-1).sort(descending=True).values[math.ceil(oversample * counts["head"]) - 1]
        masks["head"] = first["head"] >= border
    else:
        borders = {
            name: first[name].reshape(-1).sort(descending=True).values[math.ceil(oversample * counts[name]) - 1]
            for name in NAMES
        }
        masks = {name: first[name] >= borders[name] for name in NAMES}
    scores = {name: all_batches[name].masked_fill(~masks[name], -INF) for name in NAMES}
    counts = resolve_counts(shapes, budget, scores.__getitem__)
    for name, support in supports.items():
        expected = scores[name].reshape(-1).topk(counts[name]).indices.sort().values
        assert support.indices.tolist() == expected.tolist(), name


def test_one_batch_keeps_no_more_candidates_than_entries(monkeypatch):
    limits = []
    original = gradient_sums.RunningTopK

    def record(k, largest):
        limits.append(k)
        return original(k, largest)

    monkeypatch.setattr(gradient_sums, "RunningTopK", record)
    model = build()
    collect(model, targets_of(model), get_criterion("fisher"), Budget(num_params=40), iter(data(1)))
    assert max(limits) < 40


# ---------------------------------------------------------------------- nothing changes


def snapshot(model):
    return (
        {name: (p.detach().clone(), p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
            for m in model.modules()
        ],
    )


def assert_unchanged(model, before):
    parameters, modes, hooks = before
    for name, p in model.named_parameters():
        value, flag, grad, version = parameters[name]
        assert torch.equal(p, value) and p.requires_grad == flag and p.grad is grad and p._version == version, name
    assert snapshot(model)[1:] == (modes, hooks)


@pytest.mark.parametrize("criterion", [*GRADIENT_CRITERIA, "wanda"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(criterion, training):
    model = build().train(training)
    model.head.eval()
    model.first.weight.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before, batches = snapshot(model), data()
    collect(model, targets_of(model), get_criterion(criterion), Budget(density=0.1), batches)
    assert_unchanged(model, before)
    for batch, untouched in zip(batches, data(), strict=True):
        assert all(torch.equal(batch[key], untouched[key]) for key in untouched)


@pytest.mark.parametrize("criterion", ["gradient", "wanda"])
@pytest.mark.parametrize("where", ["forward", "loss", "backward", "data"])
def test_the_model_is_left_as_it_was_after_an_exception(criterion, where):
    model = build()
    before = snapshot(model)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == "forward":
                raise ZeroDivisionError
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    def loss_fn(model, batch):
        loss = Broken.apply(model(**batch).loss)
        if where == "loss" or (criterion == "wanda" and where == "backward"):
            raise ZeroDivisionError
        return loss

    def batches():
        yield from data(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(
            model,
            targets_of(model),
            get_criterion(criterion),
            Budget(density=0.1),
            batches() if where == "data" else data(1),
            loss_fn=None if where == "data" else loss_fn,
        )
    assert_unchanged(model, before)


def test_callers_modes_do_not_matter():
    model, batches = build(), data(2)
    arguments = (model, targets_of(model), get_criterion("gradient"), Budget(density=0.1), batches)
    expected = collect(*arguments)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert collect(*arguments) == expected
            assert not torch.is_grad_enabled()
    # the supports can be trained on afterwards
    assert not any(support.indices.is_inference() for support in expected.values())


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_does_not_round_the_sums(inside):
    model, batches = build(), data(2)
    arguments = (model, targets_of(model), get_criterion("fisher"), Budget(density=0.3), batches)
    seen = []

    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return model(**batch).loss

    original = gradient_hooks.gradient_panels

    def spy(pairs, *rest):
        for panel in original(pairs, *rest):
            exact = sum(left.double().T @ right.double() for left, right in pairs)
            seen.append((panel[2] - exact[panel[0] : panel[1]]).abs().max() / exact.abs().max())
            yield panel

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(gradient_hooks, "gradient_panels", spy)
        collect(*arguments, loss_fn=loss_fn)
        assert torch.is_autocast_enabled("cpu")
    assert len(seen) == 8 and max(seen) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model, batches = build().to(dtype), data(2)
    batches = [{key: v.to(dtype) if v.is_floating_point() else v for key, v in batch.items()} for batch in batches]
    budget = Budget(density=0.1)
    supports = collect(model, targets_of(model), get_criterion("gradient"), budget, batches, oversample=INF)
    scores = dense_scores(model, batches, "gradient")
    for name, support in supports.items():
        flat = scores[name].reshape(-1)
        border = flat.sort(descending=True).values[support.nnz - 1]
        # activations of bfloat16 carry 8 bits
        slack = 0.05 if dtype == torch.bfloat16 else 1e-6
        assert (flat[support.indices.long()] >= border - slack * flat.max()).all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("criterion", ["gradient", "fisher"])
def test_gradient_checkpointing(reentrant, criterion):
    model, batches = build().train(), data(2)
    expected = collect(
        model, targets_of(model), get_criterion(criterion), Budget(density=0.1), batches, oversample=INF
    )
    for batch in batches:
        batch["checkpointing"] = reentrant
    found = collect(model, targets_of(model), get_criterion(criterion), Budget(density=0.1), batches, oversample=INF)
    assert found == expected


def test_checkpointing_still_frees_the_activations(monkeypatch):
    kept, waiting = [], []
    fold = gradient_sums.GradientSums._fold

    def spy(self, name):
        waiting.append(len(self._batch.pairs))
        fold(self, name)

    monkeypatch.setattr(gradient_sums.GradientSums, "_fold", spy)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x):
            h = torch.tanh(self.up(x))
            kept.append(weakref.ref(h))
            return self.down(h)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            x = x.clone().requires_grad_()
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            assert sum(ref() is not None for ref in kept) == 0
            return SimpleNamespace(loss=x.square().mean())

    model = Stack()
    targets = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    supports = collect(model, targets, get_criterion("gradient"), Budget(density=0.1), [{"x": torch.randn(4, 8)}])
    assert len(supports) == 8
    # each layer is done with before the next one's turn
    assert waiting == [1] * 8


def test_a_write_to_a_layers_input_is_noticed():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            h = x * 2
            y = self.lin(h)
            h += y
            return SimpleNamespace(loss=h.sum())

    model = Residual()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        collect(model, {"lin": model.lin}, get_criterion("gradient"), Budget(density=0.5), [{"x": torch.randn(2, 4)}])


# ---------------------------------------------------------------------- memory


class NewTensors(TorchDispatchMode):
    """Sizes of tensors with storage of their own, and how many large ones live at the same time."""

    def __init__(self, model, large):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.large, self.alive, self.most_alive, self.largest = large, [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.untyped_storage().data_ptr() not in self.known and not func.is_view:
                size = tensor.numel() * tensor.element_size()
                self.largest = max(self.largest, size)
                if size >= self.large:
                    self.alive.append(weakref.ref(tensor))
                    self.alive = [ref for ref in self.alive if ref() is not None]
                    storages = {ref().untyped_storage().data_ptr() for ref in self.alive}
                    self.most_alive = max(self.most_alive, len(storages))
        return result


class Deep(nn.Module):
    def __init__(self, layers=6, width=256):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return SimpleNamespace(loss=x.square().mean())


@pytest.mark.parametrize("criterion", [*GRADIENT_CRITERIA])
@pytest.mark.parametrize("allocation", ["numel", "global"])
def test_no_temporary_is_larger_than_a_panel(criterion, allocation):
    model, panel = Deep(), 32 * 1024
    batches = [{"x": torch.randn(16, 256)} for _ in range(3)]
    targets = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    weight = 256 * 256 * 4
    with NewTensors(model, large=weight) as seen, panel_limit(panel):
        collect(
            model,
            targets,
            get_criterion(criterion),
            # the candidates of all layers together, which "global" ranks at once, fit a panel as well
            Budget(density=0.0002, allocation=allocation),
            batches,
        )
    assert 16 * 256 * 4 <= seen.largest <= panel < weight
    assert seen.most_alive == 0


@pytest.mark.parametrize("criterion", [*GRADIENT_CRITERIA])
def test_at_most_one_layers_dense_gradient_is_alive(criterion):
    model = Deep()
    batches = [{"x": torch.randn(16, 256)} for _ in range(3)]
    targets = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with NewTensors(model, large=256 * 256 * 4) as seen:
        collect(model, targets, get_criterion(criterion), Budget(density=0.001), batches)
    # the gradient, its scores and the buffers of their ranking
    assert 1 <= seen.most_alive <= 4


# ---------------------------------------------------------------------- batches


def test_bad_batches_are_skipped_whole():
    model, good = build(), data(3)
    bad_loss = {key: value.clone() for key, value in good[0].items()}
    bad_loss["x"][0, 0, 0] = float("nan")
    arguments = (model, targets_of(model), get_criterion("gradient"), Budget(density=0.05))
    expected = collect(*arguments, good, oversample=2)
    for position in range(4):
        batches = [*good[:position], bad_loss, *good[position:]]
        with pytest.warns(RuntimeWarning, match=f"batch {position} is skipped: its loss is nan"):
            assert collect(*arguments, batches, oversample=2) == expected


@pytest.mark.parametrize("oversample", [2, INF])
@pytest.mark.parametrize("layer", ["first", "head"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_batches_with_bad_gradients_are_skipped_whole(oversample, layer, position):
    model, good = build(), data(3)
    arguments = (model, targets_of(model), get_criterion("fisher"), Budget(density=0.05))
    expected = collect(*arguments, good, oversample=oversample)

    def overflow(module, args, output):
        # with a finite loss; layers that come later in the model have been summed by then
        output = (output if output.requires_grad else output.detach().requires_grad_()) * 1.0
        output.register_hook(lambda grad: grad * INF)
        return output

    def loss_fn(model, batch):
        batch = dict(batch)
        handle = model.get_submodule(layer).register_forward_hook(overflow) if batch.pop("bad", False) else None
        loss = model(**batch).loss
        if handle is not None:
            handle.remove()
        return loss

    batches = [*good[:position], {**good[0], "bad": True}, *good[position:]]
    message = f"batch {position} is skipped: the weight gradient of layer .* is not finite"
    with pytest.warns(RuntimeWarning, match=message):
        assert collect(*arguments, batches, oversample=oversample, loss_fn=loss_fn) == expected


def test_all_batches_bad():
    model, batches = build(), data(2)
    for batch in batches:
        batch["x"].fill_(INF)
    for criterion in ("gradient", "wanda"):
        with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="all 2 batches were skipped"):
            collect(model, targets_of(model), get_criterion(criterion), Budget(density=0.1), batches)


@pytest.mark.parametrize("criterion", ["gradient", "wanda"])
def test_no_batches(criterion):
    model = build()
    with pytest.raises(ValueError, match="no batches"):
        collect(model, targets_of(model), get_criterion(criterion), Budget(density=0.1), iter([]))


@pytest.mark.parametrize("criterion", ["gradient", "wanda"])
def test_a_layer_that_is_never_reached_is_named(criterion):
    model = build()
    targets = targets_of(model, ["first", "unused"])
    with pytest.raises(ValueError, match=r"layer unused: no .*exclude_modules"):
        collect(model, targets, get_criterion(criterion), Budget(density=0.1), data())


def test_a_loss_that_depends_on_no_target():
    model = build()
    with pytest.raises(ValueError, match="layer first: no batch gave its weight a gradient"):
        collect(
            model,
            targets_of(model, ["first"]),
            get_criterion("gradient"),
            Budget(density=0.1),
            data(1),
            loss_fn=lambda model, batch: model.head(batch["x"]).sum(),
        )


@pytest.mark.parametrize("allocation", ["numel", "global"])
def test_a_layer_that_is_first_reached_later(allocation):
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x, use):
            chosen = getattr(self, use)
            # a router may also hand a layer an empty batch
            return SimpleNamespace(loss=chosen(x).square().mean() + self.c(x[:0]).sum() + self.a(x).mean())

    torch.manual_seed(0)
    model = Router()
    batches = [{"x": torch.randn(3, 6), "use": use} for use in "abbc"]
    targets = {name: getattr(model, name) for name in "abc"}
    supports = collect(
        model, targets, get_criterion("gradient"), Budget(density=0.2, allocation=allocation), batches, oversample=2
    )
    assert sum(support.nnz for support in supports.values()) == round(0.2 * 108)
    assert all(support.nnz >= 1 for support in supports.values())


def test_batches_of_other_kinds():
    model, batches = build(), data(2)
    targets = targets_of(model)
    expected = collect(model, targets, get_criterion("fisher"), Budget(density=0.1), batches)
    as_encoding = [BatchEncoding(dict(batch)) for batch in batches]
    assert collect(model, targets, get_criterion("fisher"), Budget(density=0.1), as_encoding) == expected
    as_pairs = [(batch["x"], [batch["labels"]]) for batch in batches]
    assert (
        collect(
            model,
            targets,
            get_criterion("fisher"),
            Budget(density=0.1),
            as_pairs,
            loss_fn=lambda model, batch: model(batch[0], batch[1][0]).loss,
        )
        == expected
    )
    for criterion in ("fisher", "wanda"):
        with pytest.raises(TypeError, match=r"a batch of type tuple .* loss_fn="):
            collect(model, targets, get_criterion(criterion), Budget(density=0.1), as_pairs)


def test_losses_that_are_none():
    model = build()
    arguments = (model, targets_of(model), get_criterion("gradient"), Budget(density=0.1))
    with pytest.raises(ValueError, match="Net returned no loss for a batch with x; add labels"):
        collect(*arguments, [{"x": torch.randn(2, 12)}])
    with pytest.raises(ValueError, match=r"the loss is of shape \(2, 3\); a tensor with one number"):
        collect(*arguments, data(1, (2,)), loss_fn=lambda model, batch: model(**batch).logits)
    with pytest.raises(ValueError, match="the loss is a float"):
        collect(*arguments, data(1), loss_fn=lambda model, batch: model(**batch).loss.item())


@pytest.mark.parametrize("oversample", [0.5, math.nan, True, "8"])
def test_oversample_is_checked(oversample):
    model = build()
    with pytest.raises((TypeError, ValueError), match=f"oversample={oversample!r}"):
        collect(model, targets_of(model), get_criterion("fisher"), Budget(density=0.1), data(1), oversample=oversample)


def test_other_arguments_are_checked():
    model = build()
    for name, message in (("random", "a seed and no data"), ("magnitude", "the weights and no data: use select")):
        with pytest.raises(ValueError, match=f"selection='{name}' is computed from {message}.*gradient, fisher"):
            collect(model, targets_of(model), get_criterion(name), Budget(density=0.1), data(1))

    def never():
        raise AssertionError("the data was read before the budget was checked")
        yield

    for criterion in ("gradient", "wanda"):
        with pytest.raises(ValueError, match="num_params=100000"):
            collect(model, targets_of(model), get_criterion(criterion), Budget(num_params=100_000), never())
        with pytest.raises(ValueError, match="no target layers"):
            collect(model, {}, get_criterion(criterion), Budget(density=0.1), never())


# ---------------------------------------------------------------------- wanda


@pytest.mark.parametrize("allocation", ["numel", "global"])
@pytest.mark.parametrize("masked", [True, False])
def test_wanda(allocation, masked):
    model, batches = build(), data(3)
    if masked:
        for i, batch in enumerate(batches):
            batch["attention_mask"] = torch.arange(5).expand(2, 5) <= torch.tensor([[4], [i]])
            batch["attention_mask"] = batch["attention_mask"].long()
    seen = {name: [] for name in NAMES}
    oracle = copy.deepcopy(model).double()
    for name in NAMES:

        def keep(module, args, kwargs, name=name):
            seen[name].append((args[0] if args else kwargs["input"]).detach())

        oracle.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        oracle(batch["x"].double())
    scores = {}
    for name, inputs in seen.items():
        per_batch = len(inputs) // len(batches)
        total = 0
        for i, x in enumerate(inputs):
            keep = batches[i // per_batch].get("attention_mask", torch.ones(2, 5))
            total = total + (x.square() * keep[..., None]).sum((0, 1))
        norms = total.sqrt()
        weight = oracle.get_submodule(name).weight.abs()
        scores[name] = weight * (norms[:, None] if name == "conv" else norms)

    def loss_fn(model, batch):
        assert not torch.is_grad_enabled()
        return model(batch["x"]).logits.sum()

    budget = Budget(density=0.1, allocation=allocation)
    with panel_limit(100):
        supports = collect(model, targets_of(model), get_criterion("wanda"), budget, batches, loss_fn=loss_fn)
    counts = resolve_counts({n: tuple(s.shape) for n, s in scores.items()}, budget, scores.__getitem__)
    assert_chosen(supports, scores, counts)


def test_wanda_skips_bad_batches_whole():
    model, good = build(), data(2)
    bad = {key: value.clone() for key, value in good[0].items()}
    bad["x"][0, 0, 0] = INF
    arguments = (model, targets_of(model), get_criterion("wanda"), Budget(density=0.05))
    expected = collect(*arguments, good)
    with pytest.warns(RuntimeWarning, match="batch 1 is skipped: the inputs of layer first are not finite"):
        assert collect(*arguments, [good[0], bad, good[1]]) == expected


# ---------------------------------------------------------------------- gradients that are known


@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_supports_from_gradients_are_those_of_one_batch(criterion, suffix):
    model, batches = build(), data(1)
    budget = Budget(density=0.1, allocation="global")
    expected = collect(model, targets_of(model), get_criterion(criterion), budget, batches)
    model(**batches[0]).loss.backward()
    gradients = {f"{name}{suffix}": model.get_submodule(name).weight.grad for name in NAMES}
    gradients["head.bias"] = model.head.bias.grad
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    found = supports_from_gradients(layers_of(targets_of(model)), get_criterion(criterion), budget, gradients)
    assert found == expected
    assert all(torch.equal(gradients[name], before[name]) for name in gradients)


def test_bad_gradients():
    model = build()
    gradients = {name: torch.ones_like(module.weight) for name, module in targets_of(model).items()}
    arguments = (layers_of(targets_of(model)), get_criterion("gradient"), Budget(density=0.1))
    with pytest.raises(ValueError, match=r"layer head: gradients has neither 'head' nor 'head.weight'; its names are"):
        supports_from_gradients(*arguments, {name: g for name, g in gradients.items() if name != "head"})
    with pytest.raises(
        ValueError, match=r"layer head: a gradient of shape \(12, 3\) for a weight stored as \(3, 12\)"
    ):
        supports_from_gradients(*arguments, {**gradients, "head": gradients["head"].T})
    with pytest.raises(ValueError, match="layer head: its gradient has NaN"):
        supports_from_gradients(*arguments, {**gradients, "head": gradients["head"] * math.nan})
    with pytest.raises(ValueError, match=r"selection='wanda' is computed from activations.*use gradient, fisher"):
        supports_from_gradients(layers_of(targets_of(model)), get_criterion("wanda"), Budget(density=0.1), gradients)


# ---------------------------------------------------------------------- real architectures


def tiny_llama():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config), ("q_proj", "v_proj", "down_proj")


def tiny_gpt2():
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config), ("c_attn", "c_proj", "c_fc")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers(make, checkpointing):
    torch.manual_seed(0)
    model, suffixes = make()
    model.eval()
    targets = {name: m for name, m in model.named_modules() if name.endswith(suffixes)}
    assert len(targets) > 5
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(2):
        ids = torch.randint(0, 50, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    scores = dense_scores(model, batches, "fisher", list(targets))
    budget = Budget(r=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
    supports = collect(model, targets, get_criterion("fisher"), budget, batches, oversample=INF)
    counts = resolve_counts({n: tuple(s.shape) for n, s in scores.items()}, budget)
    assert sum(counts.values()) == sum(sum(s.shape) for s in scores.values())
    assert_chosen(supports, scores, counts)
    supports = collect(model, targets, get_criterion("wanda"), budget, batches)
    assert {name: support.nnz for name, support in supports.items()} == counts


@pytest.mark.gpu
@pytest.mark.parametrize("criterion", [*GRADIENT_CRITERIA, "wanda"])
@pytest.mark.parametrize("allocation", ["numel", "global"])
def test_on_cuda(criterion, allocation):
    model, batches = build().double(), data(3)
    batches = [{key: v.double() if v.is_floating_point() else v for key, v in batch.items()} for batch in batches]
    arguments = (get_criterion(criterion), Budget(density=0.05, allocation=allocation), batches)
    expected = collect(model, targets_of(model), *arguments)
    model.cuda()
    found = collect(model, targets_of(model), *arguments)
    assert all(support.device.type == "cuda" for support in found.values())
    assert {name: support.to("cpu") for name, support in found.items()} == expected
