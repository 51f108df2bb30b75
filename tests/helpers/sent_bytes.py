"""What a process hands to ``torch.distributed``, counted."""

from collections import Counter

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_peft.planning.communication import gathered, summed


class SentBytes(TorchDispatchMode):
    """Counts what a process sends, as rings send it."""

    def __init__(self):
        super().__init__()
        self.by_kind = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kind = function._schema.name.removeprefix("c10d::").strip("_")
        if kind in ("allgather_base", "alltoall_base"):
            self.by_kind[kind] += args[1].nbytes
        elif kind == "reduce_scatter_base":
            self.by_kind[kind] += gathered(args[1].nbytes, 2)
        elif kind == "allreduce":
            self.by_kind[kind] += sum(summed(tensor.nbytes, 2) for tensor in args[0])
        elif kind == "broadcast":
            self.by_kind[kind] += sum(gathered(tensor.nbytes, 2) for tensor in args[0])
        elif kind == "allgather":
            self.by_kind[kind] += sum(tensor.nbytes for tensor in args[1])
        return function(*args, **(kwargs or {}))
