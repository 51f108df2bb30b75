"""Sparse weight sync: sending an inference engine the entries that an adapter changed, and nothing else.

``Publisher`` makes publications of an adapter in training, ``Receiver`` applies them to an engine's weights.
``to_bytes``, ``PatchFolder`` and ``broadcast_publication`` carry them. No engine is imported.
"""

from .broadcast import UpdateInfo, broadcast_entries, broadcast_publication, receive_entries
from .fingerprint import fingerprint
from .folder import PatchFolder
from .http import HttpEngine, PatchServer
from .layouts import FusedLayout, Layout, Place, PlainLayout, checkpoint_shapes
from .messages import from_bytes, to_bytes
from .patches import Kind, PatchError, Publication, WeightPatch
from .publish import Publisher, named_patches
from .receive import Receiver, apply_patches_
from .snapshot import AdapterSource, Held
from .weight_transfer import Engine, SparseWeightTransfer, WeightSyncCallback, sync

__all__ = [
    "AdapterSource",
    "Engine",
    "FusedLayout",
    "Held",
    "HttpEngine",
    "Kind",
    "Layout",
    "PatchError",
    "PatchFolder",
    "PatchServer",
    "Place",
    "PlainLayout",
    "Publication",
    "Publisher",
    "Receiver",
    "SparseWeightTransfer",
    "UpdateInfo",
    "WeightPatch",
    "WeightSyncCallback",
    "apply_patches_",
    "broadcast_entries",
    "broadcast_publication",
    "checkpoint_shapes",
    "fingerprint",
    "from_bytes",
    "named_patches",
    "receive_entries",
    "sync",
    "to_bytes",
]
