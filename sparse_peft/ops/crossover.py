"""The density up to which a product at the entries is faster than the dense gradient, measured once per device."""

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
        default: the crossover without a measurement.
        size: rows and columns of the weight.
        tokens: of the activations.
        densities: where the two are compared; outside of their range the faster one is known.
    """

    default: float
    size: int
    tokens: int
    densities: tuple[float, ...]


BENCHES = {
    "cpu": Bench(0.12, 1024, 512, (0.04, 0.08, 0.12, 0.16, 0.2, 0.3)),
    "cuda": Bench(0.004, 4096, 2048, (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)),
}
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


def _key(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    triton = " + triton" if triton_kernels.installed() else ""
    return f"{name} | {str(dtype).removeprefix('torch.')} | torch {torch.__version__}{triton}"


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
    """The density where the ratio reaches 1, interpolated on a logarithmic scale; the nearest end if it never does.

    Args:
        ratios: ``{density: time of the path / time of the dense panels}``.
    """
    points = sorted(ratios.items())
    if points[0][1] >= 1:
        return points[0][0]
    for (low, a), (high, b) in itertools.pairwise(points):
        if b >= 1:
            share = (1 - a) / (b - a)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return points[-1][0]


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, bench: Bench | None = None) -> Crossover:
    """Time every path against dense panels; a kernel with a wrong result is left out, with a warning.

    Args:
        device: to measure.
        dtype: of the activations.
        bench: by default that of ``BENCHES`` for the device.
    """
    bench = bench or BENCHES[device.type]
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(bench.tokens, bench.size, generator=generator).to(device=device, dtype=dtype) for _ in range(2)
    )
    shape = (bench.size, bench.size)
    supports = [
        Support.random(shape, max(1, round(density * bench.size**2)), seed=0, name="calibration").to(device)
        for density in bench.densities
    ]

    def seconds(path: str, support: Support) -> float:
        return _seconds(lambda: grad_by_path(path, left, right, support), device)

    dense, expected = seconds("panels", supports[0]), grad_by_path("panels", left, right, supports[0])
    best: Crossover | None = None
    for path in _paths(device, dtype):
        error = (grad_by_path(path, left, right, supports[0]) - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE:
            logger.warning("the %s kernel is wrong on %s (error %.1e) and will not be used", path, device, error)
            continue
        times = [seconds(path, support) for support in supports]
        ratios = {density: time / dense for density, time in zip(bench.densities, times, strict=True)}
        found = Crossover(path, meeting_point(ratios), "measured", {f"{d:g}": round(r, 3) for d, r in ratios.items()})
        if best is None or found.density > best.density:
            best = found
    return best or Crossover("panels", 0.0, "measured", {})


_known: dict[tuple, Crossover] = {}


def _default(device: torch.device, dtype: torch.dtype) -> Crossover:
    return Crossover((_paths(device, dtype) or ["panels"])[-1], BENCHES[device.type].default, "default", {})


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


def known_crossover(device: torch.device, dtype: torch.dtype) -> Crossover:
    """The crossover measured on this device, now or in an earlier process, else the default; measures nothing."""
    found = _known.get((device, dtype, torch.get_num_threads()))
    if found is None and device.type == "cuda" and not torch.cuda.is_available():
        return Crossover("triton", BENCHES["cuda"].default, "default", {})  # of a GPU in another machine
    return found or _stored(_key(device, dtype)) or _default(device, dtype)


def crossover(device: torch.device, dtype: torch.dtype, density: float) -> Crossover:
    """The crossover of a device, measured at the first density within the range of the benchmark.

    ``SPARSE_PEFT_CALIBRATE=0`` disables the measurement.

    Args:
        device: a CPU or a CUDA device.
        dtype: of the activations.
        density: of the support.
    """
    known = (device, dtype, torch.get_num_threads())
    found = _known.get(known)
    if found is not None:
        return found
    bench = BENCHES[device.type]
    if not bench.densities[0] <= density <= bench.densities[-1] or not _may_measure(device):
        return _default(device, dtype)
    key = _key(device, dtype)
    found = _stored(key)
    if found is None:
        logger.info("measuring once up to which density sparse gradients are faster on %s", device)
        found = measure(device, dtype)
        _write(key, found)
    _known[known] = found
    return found
