"""What the methods' authors' own code computed, and the small models it was computed on; see tests/data/golden."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sparse_peft import SparsityController
from sparse_peft.support import Support

DATA = Path(__file__).parents[1] / "data" / "golden"
LAYERS = ("fc1", "fc2")
FILE = "adapter_model.safetensors"


def read(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def under(numbers: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The tensors whose names begin with these, without them."""
    prefix = ".".join(names) + "."
    return {name.removeprefix(prefix): tensor for name, tensor in numbers.items() if name.startswith(prefix)}


class Toy(nn.Module):
    """``fc2(tanh(fc1(x)))`` with given weights."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        for layer in LAYERS:
            rows, cols = weights[f"{layer}.weight"].shape
            self.add_module(layer, nn.Linear(cols, rows, bias=False))
        self.load_state_dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


# ------------------------------------------------------------------ an adapter with given numbers


def positions_in_file(positions: Tensor, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Flat positions as they lie in an adapter's file."""
    support = Support(shape, positions)
    if support.nnz < shape[0]:
        return {"indices": support.indices}
    return {"cols": support.cols.to(torch.uint16), "row_counts": support.row_ptr.diff().to(torch.uint16)}


def adapted(
    base: Callable[[], nn.Module], config: PeftConfig, tensors: dict[str, dict[str, Tensor]], folder: Path
) -> PeftModel:
    """A model whose adapter is loaded from a folder.

    Args:
        base: makes the base model.
        config: of the adapter.
        tensors: ``{layer: {name: tensor}}`` to put into its file; flat ``positions`` are packed.
        folder: to save to and to load from.
    """
    model = get_peft_model(base(), config)
    model.save_pretrained(folder)
    state = load_file(folder / FILE)
    for layer, given in tensors.items():
        container = next(name for name in state if f".{layer}." in name).rpartition(".")[0]
        given = dict(given)
        if "positions" in given:
            shape = tuple(model.peft_config["default"].weight_shapes[layer])
            given |= positions_in_file(given.pop("positions"), shape)
        for name, tensor in given.items():
            assert f"{container}.{name}" in state, f"an adapter's file has no {container}.{name}"
            state[f"{container}.{name}"] = tensor.contiguous()
    save_file(state, folder / FILE, {"format": "pt"})
    return PeftModel.from_pretrained(base(), folder, is_trainable=True)


def parameter(model: PeftModel, layer: str, name: str = "values") -> nn.Parameter:
    """A layer's trained parameter."""
    (found,) = (p for key, p in model.named_parameters() if f".{layer}." in key and key.endswith(f".default.{name}"))
    return found


def positions(model: PeftModel, layer: str) -> Tensor:
    """A layer's trained positions, flat and ascending."""
    return model.get_base_model().get_submodule(layer).support("default").indices


# ------------------------------------------------------------------ training and comparing


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of one batch, after a backward pass from it; and the output."""
    model.zero_grad()
    output = model(x)
    mse_loss(output, y).backward()
    return output.detach()


def train(
    model: nn.Module,
    numbers: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    tolerance: float,
    controller: SparsityController | None = None,
    before_step: Callable[[int], None] = lambda step: None,
) -> Iterator[int]:
    """Train on the file's batches and compare each loss; yields the number of every step once it is taken."""
    for step, (x, y, loss) in enumerate(zip(numbers["inputs"], numbers["targets"], numbers["losses"], strict=True), 1):
        optimizer.zero_grad()
        output = model(x)
        ours = mse_loss(output, y)
        agree(f"loss of step {step}", ours, loss, tolerance)
        ours.backward()
        before_step(step)
        optimizer.step()
        if controller is not None:
            controller.step()
        yield step


def agree(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Compare two tensors; the tolerance is relative to the largest number."""
    ours = ours.detach().reshape(theirs.shape)
    if not theirs.is_floating_point():
        assert torch.equal(ours.to(theirs.dtype), theirs), f"{what}: {ours} is not {theirs}"
        return
    largest = theirs.abs().max().item()
    apart = (ours - theirs).abs().max().item()
    assert apart <= tolerance * largest, f"{what}: {apart / max(largest, 1e-30):.2g} of the largest number apart"


def agree_all(
    numbers: dict[str, Tensor],
    prefix: str,
    ours: Callable[[str, str], Tensor],
    tolerance: float,
    layers: Sequence[str] = LAYERS,
) -> int:
    """Compare every tensor of the file below a prefix, ``LAYER.NAME``, with ``ours(layer, name)``.

    Returns:
        The number of tensors compared.
    """
    found = under(numbers, prefix)
    for key, theirs in found.items():
        layer = next(name for name in layers if key.startswith(f"{name}."))
        agree(f"{prefix}.{key}", ours(layer, key.removeprefix(f"{layer}.")), theirs, tolerance)
    return len(found)
