"""Registration: once, in one place, and never over somebody else's method."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import sparse_peft
from sparse_peft import registry
from sparse_peft.registry import METHODS, Method, extend_peft_type, register, register_all


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.peft_type)
def test_every_method_is_registered_under_its_own_prefix(method):
    member = PeftType[method.peft_type]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is getattr(sparse_peft, method.config)
    assert PEFT_TYPE_TO_TUNER_MAPPING[member].prefix == PEFT_TYPE_TO_PREFIX_MAPPING[member] == method.prefix
    assert list(PEFT_TYPE_TO_PREFIX_MAPPING.values()).count(method.prefix) == 1
    config = PEFT_TYPE_TO_CONFIG_MAPPING[member]()
    assert config.peft_type is member and pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_registering_again_and_reloading_change_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)
    register_all()
    importlib.reload(registry)
    registry.register_all()
    importlib.reload(sparse_peft)
    assert before == (dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType))


def test_the_member_behaves_like_the_built_in_ones():
    member = PeftType("SPARSE_PEFT_DELTA")
    assert member is PeftType.SPARSE_PEFT_DELTA is extend_peft_type("SPARSE_PEFT_DELTA")
    assert member in PeftType and "SPARSE_PEFT_DELTA" in list(PeftType) and member == "SPARSE_PEFT_DELTA"
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps(member) == '"SPARSE_PEFT_DELTA"' and hash(member) == hash("SPARSE_PEFT_DELTA")
    assert str(member).partition(".")[-1] == "SPARSE_PEFT_DELTA" and member.value == member.name


def test_a_type_or_prefix_that_is_taken_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="'LORA' is already registered by peft.tuners.lora.config.LoraConfig"):
        register(Method("LORA", "sparse_peft.tuners.sparse", "SparseConfig", "SparseModel"))
    taken = dict(PEFT_TYPE_TO_PREFIX_MAPPING)
    taken[PeftType.LORA] = "sparse_peft_x_"
    monkeypatch.setattr(registry, "PEFT_TYPE_TO_PREFIX_MAPPING", taken)
    monkeypatch.setattr(registry, "extend_peft_type", lambda value: value)
    with pytest.raises(RuntimeError, match="prefix 'sparse_peft_x_' of SPARSE_PEFT_X is already used by"):
        register(Method("SPARSE_PEFT_X", "sparse_peft.tuners.sparse", "SparseConfig", "SparseModel"))


def test_import_needs_neither_compiler_nor_gpu_nor_optional_packages():
    code = (
        "import sys\n"
        "for name in ('triton', 'bitsandbytes', 'trl', 'matplotlib', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "import sparse_peft; sparse_peft.SparseConfig(density=0.1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
