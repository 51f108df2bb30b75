"""The density up to which a product at the entries is faster than the dense gradient.

On a CPU it depends on the weight's shape: dense products of small matrices stay in the cache. It is measured once per
device, dtype and kind of shape.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..support import Support
from . import cuda_kernels, triton_kernels
from .gradient_paths import grad_by_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """The benchmark for one kind of device.

    Attributes:
        default: the crossover of the largest weight without a measurement.
        sizes: least and most rows and columns of the measured weight.
        tokens: of the activations.
        densities: where the two are compared, ascending, up to the first where the dense one is faster. Above the last
            it is; below the first, in the largest weight, the other one is.
    """

    default: float
    sizes: tuple[int, int]
    tokens: int
    densities: tuple[float, ...]

    def kind(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape that is measured for weights of a shape: the nearest powers of 2 within ``sizes``."""
        least, most = self.sizes
        rows, cols = (min(max(2 ** round(math.log2(max(1, side))), least), most) for side in shape)
        return rows, cols

    def is_largest(self, kind: tuple[int, int]) -> bool:
        """Whether no larger weight is measured."""
        return min(kind) == self.sizes[1]

    def default_of(self, kind: tuple[int, int]) -> float:
        """The crossover without a measurement, which falls faster than the weight: so it does on a server CPU."""
        return self.default * (kind[0] * kind[1] / self.sizes[1] ** 2) ** 1.5


BENCHES = {
    "cpu": Bench(0.12, (16, 1024), 512, (0.002, 0.01, 0.03, 0.08, 0.15, 0.3)),
    "cuda": Bench(0.004, (4096, 4096), 2048, (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)),
}
LARGEST = (2**30, 2**30)
REPEATS = 3
TOLERANCE = 2e-3  # error of a kernel, relative to the largest gradient; errors of a broken kernel are far larger


@dataclass(frozen=True)
class Crossover:
    """The density up to which ``path`` is faster than dense panels.

    Attributes:
        path: ``"sampled"``, ``"triton"`` or ``"cuda"``.
        density: the crossover.
        source: ``"default"``, ``"measured"`` or ``"cached"``.
        ratios: ``{density: time of the path / time of the dense panels}`` as measured.
    """

    path: str
    density: float
    source: str
    ratios: dict[str, float]


def cache_file() -> Path:
    """``calibration.json`` in ``$SPARSE_PEFT_CACHE``, by default ``sparse_peft`` in the user's cache folder."""
    folder = os.environ.get("SPARSE_PEFT_CACHE")
    if folder is not None:
        return Path(folder) / "calibration.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_peft" / "calibration.json"


def _key(device: torch.device, dtype: torch.dtype, kind: tuple[int, int]) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    triton = " + triton" if triton_kernels.installed() else ""
    return f"{name} | {kind[0]} x {kind[1]} {str(dtype).removeprefix('torch.')} | torch {torch.__version__}{triton}"


def _read() -> dict[str, dict]:
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(key: str, found: Crossover) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({**_read(), key: asdict(found)}, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        logger.info("the measured crossover is not kept, %s cannot be written: %s", path, error)


def _paths(device: torch.device, dtype: torch.dtype) -> list[str]:
    if device.type == "cpu":
        return ["sampled"]
    kernels = []
    if dtype in cuda_kernels.FLOATS:
        if triton_kernels.usable(device):
            kernels.append("triton")
        if cuda_kernels.usable("support_grad", dtype, torch.int32, device):
            kernels.append("cuda")
    return kernels


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run()
    return min(run() for _ in range(REPEATS))


def meeting_point(ratios: dict[float, float]) -> float:
    """The density where the ratio reaches 1, interpolated on a logarithmic scale; 0 or the last if it never does.

    Args:
        ratios: ``{density: time of the path / time of the dense panels}``.
    """
    points = sorted(ratios.items())
    if points[0][1] >= 1:
        return 0.0
    for (low, a), (high, b) in itertools.pairwise(points):
        if b >= 1:
            share = (1 - a) / (b - a)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return points[-1][0]


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, shape: tuple[int, int] = LARGEST) -> Crossover:
    """Time every path against dense panels; a kernel with a wrong result is left out, with a warning.

    Args:
        device: to measure.
        dtype: of the activations.
        shape: ``(rows, cols)`` of the weight, of which the kind counts.
    """
    bench = BENCHES[device.type]
    rows, cols = bench.kind(shape)
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(bench.tokens, size, generator=generator).to(device=device, dtype=dtype) for size in (rows, cols)
    )
    entries = {density: max(1, round(density * rows * cols)) for density in bench.densities}
    supports = {
        density: Support.random((rows, cols), count, seed=0, name="calibration").to(device).compact()
        for density, count in entries.items()
    }

    def seconds(path: str, support: Support) -> float:
        return _seconds(lambda: grad_by_path(path, left, right, support), device)

    def ratios_of(path: str) -> dict[float, float]:
        found: dict[float, float] = {}
        for density, support in supports.items():
            found[density] = seconds(path, support) / dense
            if found[density] >= 1:
                break
        return found

    first = supports[bench.densities[0]]
    dense, expected = seconds("panels", first), grad_by_path("panels", left, right, first)
    best: Crossover | None = None
    for path in _paths(device, dtype):
        error = (grad_by_path(path, left, right, first) - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE:
            logger.warning("the %s kernel is wrong on %s (error %.1e) and will not be used", path, device, error)
            continue
        ratios = ratios_of(path)
        found = Crossover(path, meeting_point(ratios), "measured", {f"{d:g}": round(r, 3) for d, r in ratios.items()})
        if best is None or found.density > best.density:
            best = found
    return best or Crossover("panels", 0.0, "measured", {})


_known: dict[tuple, Crossover] = {}


def _default(device: torch.device, dtype: torch.dtype, kind: tuple[int, int]) -> Crossover:
    density = BENCHES[device.type].default_of(kind)
    return Crossover((_paths(device, dtype) or ["panels"])[-1], density, "default", {})


def _may_measure(device: torch.device) -> bool:
    if os.environ.get("SPARSE_PEFT_CALIBRATE", "1") == "0":
        return False
    return device.type == "cpu" or not torch.cuda.is_current_stream_capturing()


def _stored(key: str) -> Crossover | None:
    found = _read().get(key)
    if found is None:
        return None
    try:
        return Crossover(str(found["path"]), float(found["density"]), "cached", dict(found["ratios"]))
    except (KeyError, TypeError, ValueError):
        logger.info("%s is damaged and will be written anew", cache_file())
        return None


def known_crossover(device: torch.device, dtype: torch.dtype, shape: tuple[int, int] = LARGEST) -> Crossover:
    """The crossover measured on this device, now or in an earlier process, else the default; measures nothing."""
    kind = BENCHES[device.type].kind(shape)
    found = _known.get((device, dtype, kind, torch.get_num_threads()))
    if found is None and device.type == "cuda" and not torch.cuda.is_available():
        return Crossover("triton", BENCHES["cuda"].default, "default", {})  # of a GPU in another machine
    return found or _stored(_key(device, dtype, kind)) or _default(device, dtype, kind)


def crossover(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], density: float) -> Crossover:
    """The crossover of a device and a kind of shape, measured at the first density where the answer is not known.

    ``SPARSE_PEFT_CALIBRATE=0`` disables the measurement.

    Args:
        device: a CPU or a CUDA device.
        dtype: of the activations.
        shape: ``(rows, cols)`` of the weight.
        density: of the support.
    """
    bench = BENCHES[device.type]
    kind = bench.kind(shape)
    known = (device, dtype, kind, torch.get_num_threads())
    found = _known.get(known)
    if found is not None:
        return found
    is_clear = density > bench.densities[-1] or (density < bench.densities[0] and bench.is_largest(kind))
    if is_clear or not _may_measure(device):
        return _default(device, dtype, kind)
    key = _key(device, dtype, kind)
    found = _stored(key)
    if found is None:
        logger.info("measuring once up to which density sparse gradients of %s are faster on %s", kind, device)
        found = measure(device, dtype, kind)
        _write(key, found)
    _known[known] = found
    return found
