"""Publications as bytes: safetensors with a JSON header, for files, HTTP and process groups."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .patches import Kind, PatchError, Publication, WeightPatch

FORMAT = 1  # raised with every change of the layout
HEADER = "sparse_peft"  # key of the header in safetensors' metadata
_TENSORS = ("values", "indices", "given_up")
_FIELDS: dict[str, tuple[type, ...]] = {
    "base": (str,),
    "run": (str,),
    "sequence": (int,),
    "since": (int, type(None)),
    "adapted": (list,),
    "patches": (list,),
}


def to_bytes(publication: Publication) -> bytes:
    """A publication as one safetensors message.

    Tensors are named ``<number>.values``, ``<number>.indices`` and ``<number>.given_up``. The metadata's only entry,
    ``sparse_peft``, is JSON: ``format``, the publication's fields, and ``name``, ``kind`` and ``shape`` of each patch.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> config = SparseConfig(density=0.5, init_weights=False, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> from sparse_peft.sync import Publisher, from_bytes, to_bytes
        >>> publication = Publisher(model).publish()
        >>> from_bytes(to_bytes(publication)).patches[0].name
        '0.weight'
    """
    header = {
        "format": FORMAT,
        "base": publication.base,
        "run": publication.run,
        "sequence": publication.sequence,
        "since": publication.since,
        "adapted": sorted(publication.adapted),
        "patches": [{"name": p.name, "kind": p.kind.value, "shape": list(p.shape)} for p in publication.patches],
    }
    tensors = {
        f"{number}.{part}": tensor.detach().cpu().contiguous()
        for number, patch in enumerate(publication.patches)
        for part in _TENSORS
        if (tensor := getattr(patch, part)) is not None
    }
    return save(tensors, {HEADER: json.dumps(header)})


def from_bytes(message: bytes) -> Publication:
    """A publication from ``to_bytes``.

    Raises:
        PatchError: the message was cut, damaged, or made by a newer version of this package.

    Example:
        >>> from sparse_peft.sync import PatchError, from_bytes
        >>> try:
        ...     from_bytes(b"half a message")
        ... except PatchError as error:
        ...     print("refused")
        refused
    """
    header = _header(message)
    try:
        tensors = load(message)
    except (SafetensorError, ValueError) as error:
        raise PatchError(f"the message is no complete safetensors file: {error}; send it again") from error
    patches = tuple(_patch(number, fields, tensors) for number, fields in enumerate(header["patches"]))
    if tensors:
        raise PatchError(f"the message has unknown tensors, {', '.join(sorted(tensors)[:3])}; send it again")
    return Publication(
        header["base"], header["run"], header["sequence"], header["since"], patches, frozenset(header["adapted"])
    )


def _header(message: bytes) -> dict[str, Any]:
    try:
        (length,) = struct.unpack_from("<Q", message)
        header = json.loads(json.loads(message[8 : 8 + length])["__metadata__"][HEADER])
        version = header["format"]
    except (struct.error, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PatchError("the message is no publication, or was cut; send it again") from error
    if version != FORMAT:
        raise PatchError(
            f"the message has format {version!r} and this version of sparse_peft reads {FORMAT}; upgrade it"
        )
    for name, types in _FIELDS.items():
        if not isinstance(header.get(name, ...), types) or isinstance(header[name], bool):
            raise PatchError(f"the message's header has {name}={header.get(name)!r}; send it again")
    if not all(isinstance(name, str) for name in header["adapted"]):
        raise PatchError("the message's header has adapted= of other things than names; send it again")
    return dict(header)


def _patch(number: int, fields: Any, tensors: dict[str, Tensor]) -> WeightPatch:
    own = {part: tensors.pop(f"{number}.{part}", None) for part in _TENSORS}
    if own["values"] is None or not isinstance(fields, Mapping):
        raise PatchError(f"patch {number} of the message has no values; send it again")
    try:
        name, kind, shape = fields["name"], Kind(fields["kind"]), tuple(fields["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise PatchError(f"patch {number} of the message has the fields {dict(fields)}; send it again") from error
    if not isinstance(name, str) or not shape or any(type(size) is not int or size < 1 for size in shape):
        raise PatchError(f"patch {number} of the message has name {name!r} and shape {shape}; send it again")
    return WeightPatch(name, kind, shape, own["values"], own["indices"], own["given_up"])
