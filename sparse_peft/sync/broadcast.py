"""Publications and patches over a ``torch.distributed`` process group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .messages import from_bytes, to_bytes
from .patches import Kind, Publication, WeightPatch


def broadcast_publication(
    publication: Publication | None, src: int = 0, group: Any = None, device: torch.device | str = "cpu"
) -> Publication:
    """Send a publication from one process to all others of a group, as one message.

    Args:
        publication: on the sender; None on all others.
        src: global rank of the sender.
        group: process group; the default one if None.
        device: where the message lies meanwhile: the GPU for NCCL, the CPU for gloo.

    Returns:
        The publication, on every process.

    Raises:
        PatchError: the message was damaged.
    """
    message = torch.empty(0, dtype=torch.uint8, device=device)
    if publication is not None:
        message = torch.frombuffer(bytearray(to_bytes(publication)), dtype=torch.uint8).to(device)
    size = torch.tensor([message.numel()], device=device)
    dist.broadcast(size, src, group)
    if publication is None:
        message = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(message, src, group)
    return from_bytes(message.cpu().numpy().tobytes()) if publication is None else publication


@dataclass(frozen=True)
class UpdateInfo:
    """What a vLLM engine with the ``sparse_nccl`` backend is told before it receives entries.

    Field names and the order of broadcasts follow vLLM's ``SparseNCCLWeightTransferUpdateInfo`` and its
    ``receive_weights`` (vllm/distributed/weight_transfer/sparse_nccl_engine.py, August 2026): for each parameter
    its int32 indices, then its values.

    Attributes:
        names: of the parameters.
        dtype_names: such as ``"bfloat16"``.
        shapes: of the whole parameters.
        num_updates_list: numbers of entries.
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    num_updates_list: list[int]

    @classmethod
    def of(cls, patches: Iterable[WeightPatch]) -> UpdateInfo:
        """Of patches that list their positions.

        Raises:
            ValueError: a patch lists none, or positions beyond int32.
        """
        info = cls([], [], [], [])
        for patch in patches:
            indices = _explicit(patch)
            info.names.append(patch.name)
            info.dtype_names.append(str(patch.values.dtype).removeprefix("torch."))
            info.shapes.append(list(patch.shape))
            info.num_updates_list.append(indices.numel())
        return info


def _explicit(patch: WeightPatch) -> Tensor:
    if patch.indices is None:
        whole = patch.kind is Kind.WHOLE
        cure = "export the adapter merged" if whole else "publish with explicit=True"
        raise ValueError(f"{patch.name}: a patch of kind {patch.kind.value!r} lists no positions; {cure}")
    if patch.indices.dtype != torch.int32:
        raise ValueError(f"{patch.name}: positions are {patch.indices.dtype}, and vLLM takes int32 only")
    return patch.indices


def broadcast_entries(
    patches: Sequence[WeightPatch], src: int = 0, group: Any = None, device: torch.device | str = "cpu"
) -> None:
    """The sender's half of ``sparse_nccl``: each patch's indices and values, as ``UpdateInfo`` lists them.

    Raises:
        ValueError: see ``UpdateInfo.of``; before anything is sent.
    """
    UpdateInfo.of(patches)
    for patch in patches:
        dist.broadcast(_explicit(patch).to(device), src, group)
        dist.broadcast(patch.values.to(device), src, group)


def receive_entries(
    info: UpdateInfo, src: int = 0, group: Any = None, device: torch.device | str = "cpu"
) -> Iterator[WeightPatch]:
    """The engine's half of ``sparse_nccl``, for engines other than vLLM."""
    for name, dtype, shape, count in zip(
        info.names, info.dtype_names, info.shapes, info.num_updates_list, strict=True
    ):
        indices = torch.empty(count, dtype=torch.int32, device=device)
        values = torch.empty(count, dtype=getattr(torch, dtype), device=device)
        dist.broadcast(indices, src, group)
        dist.broadcast(values, src, group)
        yield WeightPatch(name, Kind.SOME, tuple(shape), values, indices)
