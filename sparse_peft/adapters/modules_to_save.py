"""What changed besides the weights that deltas are for, stored whole with an adapter: ``modules_to_save``, biases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import Tensor, nn

from .files import PREFIX

# What can be done about such tensors.
OTHERS = ("leave_out", "save", "refuse")


def save_whole(
    structure: nn.Module,
    names: Iterable[str],
    adapted: Collection[str],
    read: Callable[[str], Tensor],
    shapes: dict[str, tuple[int, ...]],
) -> tuple[dict[str, Tensor], list[str], str]:
    """Tensors that are stored whole: ``({name in the file: tensor}, modules_to_save, bias)``.

    Args:
        structure: the model.
        names: the tensors that must be among them; whatever shares or surrounds them comes along.
        adapted: the layers with deltas, whose biases are stored by PEFT's ``bias`` and not as modules.
        read: gives a tensor of the model by name.
        shapes: of the tensors ``names``.

    Raises:
        ValueError: tensors of another shape than the model's, or of a module with others inside.
    """
    own = structure.state_dict()
    for name in names:
        if name not in own or tuple(own[name].shape) != tuple(shapes[name]):
            shape = tuple(own[name].shape) if name in own else "no such tensor"
            raise ValueError(
                f"{name}: of shape {tuple(shapes[name])}, and the base model has {shape}; what was added or resized "
                "cannot be stored with an adapter: prepare the base model in the same way first"
            )
    twins: dict[int, list[str]] = {}
    for name, parameter in structure.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    tied = {name: group for group in twins.values() for name in group}
    wanted = {twin for name in names for twin in tied.get(name, [name])}
    modules, rest, bias = [], {}, "none"
    for module in dict.fromkeys(name.rpartition(".")[0] for name in sorted(wanted)):
        if module in adapted:
            bias = "sparse_peft_delta_only"
            continue
        found = structure.get_submodule(module)
        if any(True for _ in found.children()):
            raise ValueError(f"{module}: it has other layers inside and cannot be stored whole beside their deltas")
        clash = [layer for layer in adapted if layer.endswith(module)]
        if clash:
            raise ValueError(
                f"{module}: PEFT takes names in modules_to_save for ends of names, and the adapted layer {clash[0]} "
                "ends like this; pass others='leave_out', or keep it out of target_modules"
            )
        modules.append(module)
        for leaf in found.state_dict():
            rest[f"{PREFIX}{module}.{leaf}"] = _read_tied(f"{module}.{leaf}", tied, read)
    if bias != "none":
        for layer in adapted:
            if f"{layer}.bias" in own:
                rest[f"{PREFIX}{layer}.base_layer.bias"] = read(f"{layer}.bias")
    return rest, modules, bias


def _read_tied(name: str, tied: dict[str, list[str]], read: Callable[[str], Tensor]) -> Tensor:
    """A tensor, by whichever of the names that share it the file has."""
    for candidate in (name, *tied.get(name, [])):
        try:
            return read(candidate).clone()
        except KeyError:
            continue
    raise ValueError(f"{name}: the fine-tuned model's file has no such tensor")
