"""Registration: once, in one place, and never over somebody else's method."""

import ast
import copy
import importlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import sparse_peft
from sparse_peft import registry, tuners
from sparse_peft.other_names import OTHER_NAMES
from sparse_peft.registry import extend_peft_type, method_folders, method_named, method_of, methods, register_method
from sparse_peft.tuners.method import Method


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_every_method_is_registered_under_its_own_prefix(method):
    member = PeftType[method.peft_type]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is method.config_class
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is method.model_class
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == method.prefix == f"{method.peft_type.lower()}_"
    assert list(PEFT_TYPE_TO_PREFIX_MAPPING.values()).count(method.prefix) == 1
    config = method.config_class()
    assert config.peft_type is member and pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert method_of(config) is method
    names = method.name, method.peft_type, method.config_class.__name__
    assert all(method_named(name) is method for name in names)


def test_a_method_is_found_by_its_folder():
    folders = {folder.__name__.rpartition(".")[2]: folder for folder in method_folders(tuners)}
    own = [method for method in methods() if method.model_class.__module__.startswith("sparse_peft.")]
    assert list(folders) == [method.name for method in own]
    assert all(folder.METHOD.name == name for name, folder in folders.items())


def test_top_level_names_are_those_of_the_methods_and_of_the_stub():
    stub = ast.parse(Path(sparse_peft.__file__).with_suffix(".pyi").read_text())
    names = {"__version__"}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(f"sparse_peft.{node.module}")
            for alias in node.names:
                assert alias.asname == alias.name, "a stub's import is public in this form only"
                assert getattr(module, alias.name) is getattr(sparse_peft, alias.name)
                names.add(alias.name)
    assert names == set(sparse_peft.__all__) and names <= set(dir(sparse_peft))
    of_methods = {name for folder in method_folders(tuners) for name in folder.__all__}
    assert of_methods <= names
    folders = [folder.METHOD for folder in method_folders(tuners)]
    assert {kind.__name__ for method in folders for kind in (method.config_class, method.model_class)} <= of_methods


def test_registering_again_and_reloading_change_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType), methods()
    for method in methods():
        register_method(method)
    importlib.reload(registry)
    importlib.reload(sparse_peft)
    assert before == (dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType), registry.methods())


def test_the_member_behaves_like_the_built_in_ones():
    member = PeftType("SPARSE_PEFT_DELTA")
    assert member is PeftType.SPARSE_PEFT_DELTA is extend_peft_type("SPARSE_PEFT_DELTA")
    assert member in PeftType and "SPARSE_PEFT_DELTA" in list(PeftType) and member == "SPARSE_PEFT_DELTA"
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps(member) == '"SPARSE_PEFT_DELTA"' and hash(member) == hash("SPARSE_PEFT_DELTA")
    assert str(member).partition(".")[-1] == "SPARSE_PEFT_DELTA" and member.value == member.name


def method_like(**parts):
    """A method of the given type and name."""
    config = type("OtherConfig", (sparse_peft.SparseConfig,), {"method": parts.get("method", "SPARSE_PEFT_X")})
    layer = type("OtherLinear", (sparse_peft.SparseLinear,), {"config_cls": config})
    model = type("OtherModel", (sparse_peft.SparseModel,), {"layer_cls": layer})
    return Method(parts.get("name", "other"), model)


def test_a_type_a_name_or_a_prefix_that_is_taken_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match=r"'LORA' is already registered by peft\.tuners\.lora\.config\.LoraConfig"):
        register_method(method_like(method="LORA"))
    taken = dict(PEFT_TYPE_TO_PREFIX_MAPPING)
    taken[PeftType.LORA] = "sparse_peft_x_"
    monkeypatch.setattr(registry, "PEFT_TYPE_TO_PREFIX_MAPPING", taken)
    monkeypatch.setattr(registry, "extend_peft_type", lambda value: value)
    with pytest.raises(RuntimeError, match="prefix 'sparse_peft_x_' of SPARSE_PEFT_X is already used by"):
        register_method(method_like())
    with pytest.raises(RuntimeError, match="method 'sara' of SPARSE_PEFT_X: SPARSE_PEFT_SARA has this name already"):
        register_method(method_like(name="sara"))
    with pytest.raises(ValueError, match="peft_type='LORA': the sparse methods are SPARSE_PEFT_MONARCH"):
        method_of(LoraConfig())


def test_import_needs_neither_compiler_nor_gpu_nor_optional_packages():
    code = (
        "import sys\n"
        "for name in ('triton', 'bitsandbytes', 'trl', 'matplotlib', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "import sparse_peft; sparse_peft.SparseConfig(density=0.1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_of_other_projects_say_what_they_are_here(name):
    with pytest.raises(ImportError, match=f"no '{name.upper()}Config': use ") as caught:
        exec(f"from sparse_peft import {name.upper()}Config")
    with pytest.raises(ImportError, match=re.escape(str(caught.value))):
        getattr(sparse_peft, f"{name.upper()}Config")
    advice = str(caught.value).partition(": use ")[2]
    if advice == "LoraConfig of peft":
        return
    config, arguments = re.match(r"(\w+)(?:\((.*?)\))?", advice).groups()
    given = dict(re.findall(r"(\w+)='(\w+)'", arguments or ""))
    made = getattr(sparse_peft, config)(**given)
    assert all(getattr(made, field) == value for field, value in given.items())


def test_other_attributes_have_the_usual_error():
    with pytest.raises(AttributeError, match=r"module 'sparse_peft' has no attribute 'nothing'$"):
        _ = sparse_peft.nothing
    with pytest.raises(AttributeError, match=r"no attribute 'SparsConfig'; did you mean 'SparseConfig'\?$"):
        _ = sparse_peft.SparsConfig
    assert not hasattr(sparse_peft, "__wrapped__") and sparse_peft.other_name("SHiRA-config") is not None
