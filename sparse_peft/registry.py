"""Registration of the sparse methods with PEFT: one line a method, done once, on ``import sparse_peft``."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType, register_peft_method


@dataclass(frozen=True)
class Method:
    """One sparse method: its PEFT type and where its trio of classes lives.

    The type carries the package's name, so that the bare ``KeyError`` that PEFT raises where the plugin was not
    imported says what is missing, and so that no method added to PEFT later can collide with it.

    ``dynamics`` is the full name of the class that acts during training (``sparse_peft.training.dynamics``).
    """

    peft_type: str
    module: str
    config: str
    model: str
    dynamics: str | None = None

    @property
    def name(self) -> str:
        return self.peft_type.lower()

    @property
    def prefix(self) -> str:
        return f"{self.name}_"

    @property
    def short_name(self) -> str:
        """What the method is called on a command line: its folder's name."""
        return self.module.rpartition(".")[2]

    @property
    def config_class(self) -> type:
        return getattr(import_module(self.module), self.config)


METHODS = (
    Method(
        "SPARSE_PEFT_DELTA",
        "sparse_peft.tuners.sparse",
        "SparseConfig",
        "SparseModel",
        dynamics="sparse_peft.tuners.sparse.dynamics.ReselectionDynamics",
    ),
    Method(
        "SPARSE_PEFT_SARA",
        "sparse_peft.tuners.sara",
        "SaRAConfig",
        "SaRAModel",
        dynamics="sparse_peft.tuners.sara.dynamics.SmallestDynamics",
    ),
    Method(
        "SPARSE_PEFT_SORA",
        "sparse_peft.tuners.sora",
        "SoRAConfig",
        "SoRAModel",
        dynamics="sparse_peft.tuners.sora.dynamics.ProximalDynamics",
    ),
    Method(
        "SPARSE_PEFT_SLTRAIN",
        "sparse_peft.tuners.sltrain",
        "SLTrainConfig",
        "SLTrainModel",
        dynamics="sparse_peft.tuners.sparse.dynamics.ReselectionDynamics",
    ),
    Method(
        "SPARSE_PEFT_SNELLA",
        "sparse_peft.tuners.snella",
        "SnellaConfig",
        "SnellaModel",
        dynamics="sparse_peft.tuners.snella.dynamics.AllocationDynamics",
    ),
    Method("SPARSE_PEFT_S2FT", "sparse_peft.tuners.s2ft", "S2FTConfig", "S2FTModel"),
    Method("SPARSE_PEFT_SKETCH", "sparse_peft.tuners.sketch", "SketchConfig", "SketchModel"),
)


def extend_peft_type(value: str) -> PeftType:
    """Add ``value`` to PEFT's enum in place and return the member; a member that exists is returned as it is.

    PEFT, transformers and diffusers read ``.value`` and compare identities, so a plain string is not enough.
    """
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.12 and later look values up there
        PeftType._hashable_values_.append(value)
    type.__setattr__(PeftType, value, member)  # EnumType.__setattr__ refuses to set a member again
    return member


def register(method: Method) -> None:
    """Register one method; registering it again changes nothing.

    Raises:
        RuntimeError: PEFT, or another plugin, already has a method of this type or with this prefix.
    """
    peft_type = extend_peft_type(method.peft_type)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is not None:
        if registered.__module__.startswith(f"{method.module}."):
            return
        raise RuntimeError(
            f"PEFT type {method.peft_type!r} is already registered by {registered.__module__}.{registered.__name__}; "
            "sparse_peft cannot be used beside it. Please report this to sparse_peft with the output of `pip list`."
        )
    # register_peft_method compares the prefix with the mapping's keys, not its values, and so never sees a clash
    clash = [other for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == method.prefix]
    if clash:
        raise RuntimeError(
            f"the parameter prefix {method.prefix!r} of {method.peft_type} is already used by PEFT type {clash[0]!s}"
        )
    module = import_module(method.module)
    register_peft_method(
        name=method.name,
        config_cls=method.config_class,
        model_cls=getattr(module, method.model),
        prefix=method.prefix,
    )


def method_named(name: str) -> Method:
    """The method of this name: its folder's, its PEFT type's or its config's.

    Raises:
        ValueError: there is none; the closest one is named.
    """
    wanted = name.lower()
    for method in METHODS:
        if wanted in (method.short_name, method.name, method.config.lower()):
            return method
    known = [method.short_name for method in METHODS]
    close = get_close_matches(wanted, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"method={name!r}: {hint}The methods are {', '.join(known)}")


def register_all() -> None:
    for method in METHODS:
        register(method)
