"""Whether this installation works: versions, compilers, devices, kernels, and a small adapter trained and merged."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from .ops import BACKENDS, cache_file, kernel_backend, known_crossover
from .registry import method_named, methods
from .tuners.traversal import tuner_layers

OK, ABSENT, BROKEN = "ok", "absent", "broken"
DISTRIBUTION = "sparse-peft"
SHOWN_EXTRAS = ("trl", "bnb", "plot", "cli")
VARIABLES = (
    "SPARSE_PEFT_BACKEND",
    "SPARSE_PEFT_CACHE",
    "SPARSE_PEFT_CALIBRATE",
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
OPS = (
    "support_grad",
    "support_grad_tiles",
    "masked_dw",
    "delta_matmul",
    "scatter_add",
    "write_many",
    "code_gather",
    "code_scatter_add",
)


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        group: ``"packages"``, ``"compilers"``, ``"devices"``, ``"kernels"``, ``"files"``, ``"environment"`` or
            ``"methods"``.
        name: of what was examined.
        status: ``"ok"``, ``"absent"`` (nothing needs it here) or ``"broken"``.
        found: version, path or state.
        note: its purpose, or a cure.
    """

    group: str
    name: str
    status: str
    found: str
    note: str = ""


def examine() -> list[Check]:
    """Run all checks; nothing is raised, a check that fails is ``"broken"``."""
    checks: list[Check] = []
    for group, look in GROUPS.items():
        try:
            checks += look()
        except Exception as error:  # an examination that fails is a finding
            checks.append(Check(group, look.__name__.strip("_"), BROKEN, f"{type(error).__name__}: {error}"))
    return checks


# ------------------------------------------------------------------------------------------------------------ packages


def _requirements() -> Iterator[tuple[Requirement, str | None]]:
    """The package's requirements with their extras, once each."""
    seen = set()
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        extra = None
        if requirement.marker is not None:
            found = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", str(requirement.marker))
            extra = found[1] if found else None
            if not requirement.marker.evaluate({"extra": extra or ""}):
                continue
        shown = extra is None or extra in SHOWN_EXTRAS or requirement.name == "triton"
        if shown and requirement.name not in seen and requirement.name != DISTRIBUTION:
            seen.add(requirement.name)
            yield (_tritons_of_torch(requirement) if requirement.name == "triton" else requirement), extra


def _tritons_of_torch(requirement: Requirement) -> Requirement:
    """The Triton that torch's CUDA builds name, which is older with an older torch; otherwise the one given."""
    try:
        lines = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        lines = []
    return next((wanted for wanted in map(Requirement, lines) if wanted.name == "triton"), requirement)


def _packages() -> list[Check]:
    checks = [Check("packages", "python", OK, platform.python_version())]
    try:
        checks.append(Check("packages", DISTRIBUTION, OK, metadata.version(DISTRIBUTION)))
        wanted = list(_requirements())
    except metadata.PackageNotFoundError:
        note = "its version bounds are not known: pip install it, from a checkout with `pip install -e .`"
        return [*checks, Check("packages", DISTRIBUTION, BROKEN, "not installed", note)]
    for requirement, extra in wanted:
        checks.append(_package(requirement, extra))
    return checks


def _package(requirement: Requirement, extra: str | None) -> Check:
    name, bounds = requirement.name, str(requirement.specifier)
    install = f'pip install "{name}{bounds}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if extra is None:
            return Check("packages", name, BROKEN, "not installed", f"needed: {install}")
        return Check("packages", name, ABSENT, "not installed", f"for [{extra}]: {install}")
    if not requirement.specifier.contains(version, prereleases=True):
        return Check("packages", name, BROKEN, version, f"{bounds} is needed: {install}")
    return Check("packages", name, OK, version, bounds)


# ------------------------------------------------------------------------------------------------- compilers, devices


def _compilers() -> list[Check]:
    checks = []
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    note = "torch.compile and Triton need one"
    checks.append(Check("compilers", "C compiler", OK if compiler else ABSENT, compiler or "none in PATH", note))
    nvcc = shutil.which("nvcc")
    note = "not needed: the CUDA kernels are compiled by the NVRTC of CUDA builds of torch"
    checks.append(Check("compilers", "nvcc", OK if nvcc else ABSENT, _nvcc_version(nvcc) if nvcc else "none", note))
    if torch.version.cuda is None:
        checks.append(Check("compilers", "NVRTC", ABSENT, f"torch {torch.__version__} is no CUDA build"))
        return checks
    try:
        from torch.cuda._utils import _get_nvrtc_library  # noqa: PLC0415  (private, not in every version)

        checks.append(Check("compilers", "NVRTC", OK, str(_get_nvrtc_library()._name)))
    except Exception as error:  # a private function of torch, which loads a library
        status = BROKEN if torch.cuda.is_available() else ABSENT
        checks.append(Check("compilers", "NVRTC", status, str(error), "without it Triton's kernels are used"))
    return checks


def _nvcc_version(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20)
    found = re.search(r"release ([\d.]+)", done.stdout)
    return f"{nvcc} {found[1]}" if found else nvcc


def _devices() -> list[Check]:
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    checks = [Check("devices", "cpu", OK, cpu)]
    if not torch.cuda.is_available():
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of torch"
        return [*checks, Check("devices", "cuda", ABSENT, f"no GPU; {built}")]
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        words = f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        checks.append(Check("devices", f"cuda:{number}", OK, words))
    return checks


def _kernels() -> list[Check]:
    checks = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in map(torch.device, devices):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{device.type} {str(dtype).removeprefix('torch.')}"
            chosen: dict[str, list[str]] = {}
            for op in OPS:
                chosen.setdefault(kernel_backend(op, dtype, device) or "torch", []).append(op)
            words = "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in chosen.items())
            checks.append(Check("kernels", f"{name} ops", OK, words))
            found = known_crossover(device, dtype)
            words = f"{found.path} up to density {found.density:.3g}, dense panels above"
            checks.append(Check("kernels", f"{name} gradients", OK, words, found.source))
    return checks


# ------------------------------------------------------------------------------------------------- files, environment


def _files() -> list[Check]:
    path = cache_file()
    folder = path.parent
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable = os.access(existing, os.W_OK)
    note = "" if writable else f"{existing} cannot be written: crossovers are measured anew in every process"
    checks = [Check("files", "cache folder", OK if writable else BROKEN, str(folder), note)]
    if not path.is_file():
        return [*checks, Check("files", "calibration", ABSENT, "nothing yet", "it is measured when it first matters")]
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        words = f"{len(entries)} measured" if isinstance(entries, dict) else "no JSON object"
        status = OK if isinstance(entries, dict) else BROKEN
    except (OSError, ValueError) as error:
        words, status = str(error), BROKEN
    note = "" if status == OK else f"delete {path}; it is measured again"
    return [*checks, Check("files", "calibration", status, words, note)]


def _environment() -> list[Check]:
    checks = []
    for name in VARIABLES:
        value = os.environ.get(name)
        if value is None:
            continue
        status, note = OK, ""
        if name == "SPARSE_PEFT_BACKEND" and value not in BACKENDS:
            status, note = BROKEN, f"one of {', '.join(BACKENDS)} is expected"
        if name == "SPARSE_PEFT_CALIBRATE" and value not in ("0", "1"):
            status, note = BROKEN, "0 or 1 is expected"
        if name == "TRITON_INTERPRET" and value == "1":
            note = "for tests: Triton's kernels run in Python, very slowly"
        checks.append(Check("environment", name, status, value, note))
    return checks


# ------------------------------------------------------------------------------------------------------------- methods


def _methods() -> list[Check]:
    checks = []
    for method in methods():
        registered = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        status = OK if registered.get(method.peft_type) is method.config_class else BROKEN
        checks.append(Check("methods", method.name, status, f"{method.config_class.__name__} as {method.peft_type}"))
    return [*checks, _trial()]


def _trial() -> Check:
    """A small adapter is trained one step and compared with dense arithmetic, merged, saved and unloaded."""
    make_config: Callable[..., PeftConfig] = method_named("sparse").config_class
    layer = nn.Linear(48, 40)
    before = layer.weight.detach().clone()
    model = get_peft_model(nn.Sequential(layer), make_config(density=0.2, scale=1.0, target_modules=["0"]))
    faults = [fault for test in (_gradient_fault, _save_fault, _merge_fault) if (fault := test(model)) is not None]
    model.unload()
    if not torch.equal(layer.weight.detach(), before):
        faults.append("the base weight did not come back")
    words = "; ".join(faults) or "gradient, save, merge and unmerge as they should be"
    return Check("methods", "trial", BROKEN if faults else OK, words)


def _batch(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))


def _gradient_fault(model: PeftModel) -> str | None:
    """Take a step, after comparing the values' gradient with the dense one's entries."""
    x, target = _batch(16, 48), _batch(16, 40)
    (model(x) * target).sum().backward()
    (layer,) = tuner_layers(model)
    values, dense = layer.deltas["default"].watched, target.t() @ x
    expected = dense.reshape(-1)[layer.deltas["default"].as_sparse().support.indices.long()]
    gradient = torch.zeros_like(values) if values.grad is None else values.grad
    with torch.no_grad():
        values.add_(gradient, alpha=-0.01)
    agree = torch.allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    return None if agree else "the gradient is not the dense one's entries"


def _save_fault(model: PeftModel) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = (Path(folder) / "adapter_model.safetensors").is_file()
    return None if saved else "the adapter was not saved"


@torch.no_grad()
def _merge_fault(model: PeftModel) -> str | None:
    x = _batch(16, 48)
    trained = model(x).clone()
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    return None if torch.equal(merged, trained) else "the merged model computes something else"


GROUPS: dict[str, Callable[[], list[Check]]] = {
    "packages": _packages,
    "compilers": _compilers,
    "devices": _devices,
    "kernels": _kernels,
    "files": _files,
    "environment": _environment,
    "methods": _methods,
}
