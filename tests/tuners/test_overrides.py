"""A method's classes override the members of the table in CONTRIBUTING.md, and no others."""

import inspect
import re
from pathlib import Path

import pytest
from torch import nn

from sparse_peft.dynamics.protocol import Dynamics
from sparse_peft.dynamics.records import Record
from sparse_peft.registry import methods
from sparse_peft.tuners.base_config import BaseSparseConfig
from sparse_peft.tuners.base_layer import TunerLayer
from sparse_peft.tuners.base_model import BaseSparseModel
from sparse_peft.tuners.base_state import TrainedState
from sparse_peft.tuners.delta import Delta
from sparse_peft.tuners.delta_config import DeltaConfig
from sparse_peft.tuners.delta_layer import SparseTunerLayer
from sparse_peft.tuners.entry_config import EntryConfig
from sparse_peft.tuners.low_rank import LowRankState

ROOTS = (BaseSparseConfig, TrainedState, TunerLayer, BaseSparseModel, Dynamics, Record)
BASES = {kind.__name__: kind for kind in (*ROOTS, DeltaConfig, EntryConfig, Delta, LowRankState, SparseTunerLayer)}
# Of every torch module: how it is printed, copied, moved and loaded.
TORCH = {"extra_repr", "train", "_apply", "_save_to_state_dict", "_load_from_state_dict"}
# Set by the base classes themselves.
DERIVED = {"_abc_impl", "adapter_layer_names", "delta_container", "event", "plural", "prefix", "tuner_layer_cls"}


def table():
    """``{base class: names that its heirs may define}`` and ``{base class: names that they must}``."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    allowed, wanted = {}, {}
    for line in re.findall(r"^\| [^|]+ \| `\w+` \|.*$", text, flags=re.MULTILINE):
        _, _, base, must, may, rarely, _ = line.split("|")
        name = base.strip(" `")
        wanted[name] = re.findall(r"`(\w+)`", must)
        allowed[name] = {*wanted[name], *re.findall(r"`(\w+)`", may + rarely)}
    return allowed, wanted


ALLOWED, WANTED = table()


def heirs(kind):
    """The classes of methods that inherit from a base class."""
    folders = tuple(method.model_class.__module__.rpartition(".")[0] for method in methods())
    for other in kind.__subclasses__():
        if other.__module__.startswith(folders):
            yield other
        yield from heirs(other)


HEIRS = list(dict.fromkeys(heir for root in ROOTS for heir in heirs(root)))


def test_the_table_has_every_base_class():
    assert set(ALLOWED) == set(BASES)


@pytest.mark.parametrize("heir", HEIRS, ids=lambda heir: heir.__name__)
def test_overridden_members_are_in_the_table(heir):
    bases = [kind for kind in heir.__mro__[1:] if kind.__module__.startswith("sparse_peft.")]
    allowed = {name for base in bases for name in ALLOWED.get(base.__name__, ())} | TORCH
    shared = {name for base in heir.__mro__[1:] if base not in (nn.Module, object) for name in vars(base)}
    fields = {name for base in heir.__mro__ for name in getattr(base, "__dataclass_fields__", {})}
    overridden = {name for name in vars(heir) if name in shared and not name.startswith("__")}
    assert overridden - fields - DERIVED <= allowed


@pytest.mark.parametrize("base", WANTED)
def test_wanted_members_have_no_default(base):
    kind = BASES[base]
    for name in WANTED[base]:
        default = getattr(kind, name, None)
        assert default in (None, ()) or getattr(default, "__isabstractmethod__", False), name
        assert all(getattr(heir, name, None) is not None for heir in heirs(kind)), name


@pytest.mark.parametrize("base", ALLOWED)
def test_names_in_the_table_exist(base):
    kind = BASES[base]
    known = {name for parent in kind.__mro__ for name in (*vars(parent), *inspect.get_annotations(parent))}
    assert ALLOWED[base] <= known
