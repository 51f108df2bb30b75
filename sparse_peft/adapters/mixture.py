"""Learnt mixtures: weights of frozen adapters on one base, trained on few examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..calibrate.model_pass import model_loss, to_device
from ..constraints import Count, Positive, validated
from ..tuners.base_layer import TunerLayer
from ..tuners.traversal import configs_of, tuner_layers


@dataclass(frozen=True)
class Mixture:
    """Weights of adapters.

    Attributes:
        weights: ``{adapter name: weight}``; ``compose(folders, output, weights=[...])`` makes one adapter of them.
        losses: of the training steps, oldest first.
    """

    weights: dict[str, float]
    losses: list[float]


def learn_mixture(
    model: PeftModel,
    batches: Iterable[Any],
    *,
    adapters: Sequence[str] | None = None,
    steps: int = 50,
    rate: float = 0.05,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Mixture:
    """Learn how much of each adapter a new task needs: one number for each, with the adapters frozen.

    The mixture ``base + sum w_k delta_k`` starts at the average. Adam trains the ``w_k``, which may become negative.
    Modular transfer and Master-ASR (https://arxiv.org/abs/2306.15686) assemble models of such parts; a few examples
    suffice for a few numbers. The model and its adapters are the same afterwards.

    Args:
        model: with several adapters of this package.
        batches: of the new task; read again as often as the steps need.
        adapters: names of the adapters; all by default.
        steps: of Adam, each on one batch.
        rate: learning rate of the weights.
        loss_fn: ``loss_fn(model, batch) -> scalar``; by default ``model(**batch).loss``.

    Raises:
        ValueError: fewer than two adapters, an unknown one, or no batches.
        TypeError: an adapter of another package's method.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import learn_mixture
        >>> config = SparseConfig(density=0.1, init_weights=False, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config, adapter_name="a")
        >>> model.add_adapter("b", SparseConfig(density=0.1, seed=1, init_weights=False, target_modules=["0"]))
        >>> found = learn_mixture(model, [torch.ones(2, 64)], steps=3, loss_fn=lambda m, x: m(x).square().mean())
        >>> sorted(found.weights), len(found.losses)
        (['a', 'b'], 3)
    """
    steps, rate = validated("steps", steps, Count), validated("rate", rate, Positive)
    names = _checked(model, adapters)
    data = list(batches)
    if not data:
        raise ValueError("learn_mixture: batches has none; pass a few examples of the new task")
    device = next(model.parameters()).device
    weights = torch.full((len(names),), 1 / len(names), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=rate)
    losses = []
    with _mixed(model, names, weights):
        for batch in islice(cycle(data), steps):
            loss = (loss_fn or model_loss)(model, to_device(batch, device))
            (weights.grad,) = torch.autograd.grad(loss, [weights])
            optimizer.step()
            losses.append(float(loss.detach()))
    return Mixture(dict(zip(names, weights.tolist(), strict=True)), losses)


def _checked(model: PeftModel, adapters: Sequence[str] | None) -> list[str]:
    """The adapters' names.

    Raises:
        ValueError, TypeError: as ``learn_mixture``.
    """
    known = list(configs_of(model))
    names = known if adapters is None else list(adapters)
    missing = [name for name in names if name not in known]
    if missing or len(set(names)) < 2:
        raise ValueError(f"adapters={names}: at least two of the model's adapters are expected, which are {known}")
    ours = {name for layer in tuner_layers(model) for name in layer.deltas}
    foreign = [name for name in names if name not in ours]
    if foreign:
        raise TypeError(
            f"adapter {foreign[0]!r} is of another package's method; mixtures are of this package's adapters: "
            "sparse_peft.adapters.convert makes one of LoRA's files"
        )
    return names


@contextmanager
def _mixed(model: PeftModel, names: Sequence[str], weights: Tensor) -> Iterator[None]:
    """Let the model compute with the weighted sum of frozen adapters, in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    with ExitStack() as stack:
        try:
            stack.enter_context(model.disable_adapter())
            model.requires_grad_(False)
            for layer in model.modules():
                if isinstance(layer, TunerLayer):
                    handle = layer.register_forward_hook(_added(names, weights))
                    stack.callback(handle.remove)
            yield
        finally:
            stack.close()
            for module, mode in modes.items():
                module.training = mode
            for parameter, trains in trained:
                parameter.requires_grad_(trains)


def _added(names: Sequence[str], weights: Tensor) -> Callable[..., Tensor]:
    """A hook that adds the weighted adapters to a layer's output."""

    def hook(layer: TunerLayer[Any], inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        for name, weight in zip(names, weights, strict=True):
            if name in layer.deltas:
                output = output + (weight * layer.adapter_output(inputs[0], name)).to(output.dtype)
        return output

    return hook
