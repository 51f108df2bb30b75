"""Memory that a pass keeps for backward, and that operations take."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import saved_bytes as bytes_of_graph


def saved_bytes(model, x):
    """Bytes kept for backward, each storage once, parameters and the input not counted; and the output."""
    outputs = []

    def forward():
        outputs.append(model(x))
        return outputs[0]

    nbytes = bytes_of_graph(forward, [*model.parameters(), x])
    return nbytes, outputs[0]


class LiveBytes(TorchDispatchMode):
    """The bytes of the storages that operations made inside and that still live.

    Attributes:
        now: at present.
        peak: the most so far.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._see((args, kwargs), counts=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, counts=True)
        return result

    def _see(self, tree, counts):
        for tensor in tree_leaves(tree):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                size = storage.nbytes() if counts else 0
                self._known.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key, nbytes):
        self._known.discard(key)
        self.now -= nbytes
