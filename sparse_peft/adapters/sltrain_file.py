"""Models of SLTrain's authors (andyjm3/SLTrain) as adapters that take the weights' place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import WEIGHTS_NAME
from torch import Tensor

from ..registry import method_named
from ..support import Support
from ..tuners.base_config import BaseSparseConfig
from ..tuners.files.checks import check_values
from .entry_format import named_tensors, sparse_state
from .files import PREFIX, read_tensors, write_adapter
from .foreign import load_pickled

CONFIG = "splora_config.json"
MODEL_PICKLE = "pytorch_model.bin"
# Of a layer, by the names of the authors' tensors; the two last are not always there.
NAMES = {"lora_A": "A", "lora_B": "B", "sparse_value": "values", "sparse_index": "positions", "scaling": "theta"}


def convert_sltrain(source: str | os.PathLike, output: str | os.PathLike) -> BaseSparseConfig:
    """Write a model of SLTrain's authors as a [`SLTrainConfig`][sparse_peft.SLTrainConfig] adapter of mode "pretrain".

    Load it with [`build_for_pretraining`][sparse_peft.build_for_pretraining] and ``load_adapter``, to go on training
    or to ``merge_and_unload`` a dense model (https://arxiv.org/abs/2406.02214).

    Args:
        source: folder that the authors' ``save_pretrained`` wrote: ``splora_config.json``, and the whole model in
            safetensors or in ``pytorch_model.bin``, of which tensors alone are read.
        output: folder; made if need be.

    Returns:
        The new adapter's config.

    Raises:
        ValueError: no such model, or a damaged one; nothing is written then.

    Example:
        >>> import tempfile
        >>> from sparse_peft.adapters import convert_sltrain
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         convert_sltrain(folder, f"{folder}/adapter")
        ...     except ValueError as error:
        ...         print("splora_config.json" in str(error))
        True
    """
    folder = Path(source)
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG} in it; a folder that SLTrain's save_pretrained wrote is expected")
    given = json.loads(path.read_text(encoding="utf-8"))
    layers, rest = _by_layer(_tensors(folder), str(folder))
    made = {name: _layer(name, found) for name, found in layers.items()}
    method, rank = method_named("sltrain"), int(given["r"])
    if any(found["A"].shape[0] != rank for _, found in made.values()):
        raise ValueError(f"{folder}: r={rank} in {CONFIG}, and factors of another rank; the file is damaged")
    make_config: Any = method.config_class
    supports = {name: support for name, (support, _) in made.items()}
    config = make_config(
        mode="pretrain",
        r=rank,
        alpha=given["lora_alpha"],
        trainable_scale=any("theta" in found for _, found in made.values()),
        num_params=sum(support.nnz for support in supports.values()),
        num_entries={name: support.nnz for name, support in supports.items()},
        weight_shapes={name: list(support.shape) for name, support in supports.items()},
        target_modules=sorted(supports),
        task_type="CAUSAL_LM" if (folder / "config.json").is_file() else None,  # which transformers writes
    )
    tensors = named_tensors(method.model_class, {name: found for name, (_, found) in made.items()})
    whole = {f"{PREFIX}{_behind_layers(name, supports)}": tensor for name, tensor in rest.items()}
    write_adapter(output, config, {**tensors, **whole}, "Converted with `sparse_peft.adapters.convert_sltrain`.")
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_tensors(path)
    if found:
        return found
    pickled = next((folder / name for name in (MODEL_PICKLE, WEIGHTS_NAME) if (folder / name).is_file()), None)
    if pickled is None:
        raise ValueError(f"{folder}: neither safetensors nor {MODEL_PICKLE} in it")
    content = load_pickled(pickled)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{pickled}: a state dict of tensors is expected")
    return dict(content)


def _by_layer(tensors: dict[str, Tensor], source: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """``{layer: {our name: tensor}}``, and the tensors of no layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in NAMES:
            layers.setdefault(layer, {})[NAMES[part]] = tensor
        else:
            rest[name] = tensor
    if not layers:
        raise ValueError(f"{source}: no layer with SLTrain's tensors in it")
    for layer, found in layers.items():
        missing = [theirs for theirs, ours in NAMES.items() if ours not in found and theirs != "scaling"]
        if missing:
            raise ValueError(f"{source}: layer {layer} has no {missing[0]}")
    return layers, rest


def _layer(name: str, found: dict[str, Tensor]) -> tuple[Support, dict[str, Tensor]]:
    """One layer's support, and what its adapter has in a file."""
    down, up, values, flat = (found[part] for part in ("A", "B", "values", "positions"))
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or values.shape != flat.shape or flat.ndim != 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (down, up, values, flat))
        raise ValueError(f"layer {name}: factors, values and positions of {shapes} do not fit; the file is damaged")
    for what in ("A", "B", "values"):
        check_values(found[what], f"{name} ({what})", "convert")
    support = Support.from_indices((up.shape[0], down.shape[1]), flat.long(), name=name)
    state = sparse_state(support, values[flat.argsort()].float())
    scale = {"theta": found["theta"].float().view(1)} if "theta" in found else {}
    own = {"A": down.float(), "B": up.float(), "values": state.values.data.to(torch.float32)}
    return support, {**own, **scale, **state.file_tensors()}


def _behind_layers(name: str, layers: dict[str, Support]) -> str:
    """A tensor's name in a model with adapters: a layer's bias is that of the wrapped one."""
    layer, _, part = name.rpartition(".")
    return f"{layer}.base_layer.{part}" if layer in layers else name
