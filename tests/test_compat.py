"""Parts for older versions of PEFT do what the newest one does; ``make test-oldest`` runs them with an old one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft.utils import save_and_load
from torch import nn

from sparse_peft import SoRAConfig, SparseConfig, compat
from sparse_peft.compat import HAS_FILE_HOOKS, FileHooks
from sparse_peft.tuners.base_model import BaseSparseModel
from tests.helpers.language_models import llama

CONFIGS = {
    "lora": lambda **k: LoraConfig(r=2, **k),
    "sparse": lambda **k: SparseConfig(density=0.1, **k),
    "sora": lambda **k: SoRAConfig(r=2, **k),
}
FIELDS = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 3]},
]
newest = pytest.mark.skipif(not HAS_FILE_HOOKS, reason="this PEFT has no hooks to compare with")


def model_with_two(method, fields):
    model = get_peft_model(llama(), CONFIGS[method](**fields))
    model.add_adapter("other", CONFIGS[method](target_modules=["q_proj"]))
    return model


@newest
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_hooks_select_and_name_as_pefts_own_do(method, fields):
    model = model_with_two(method, fields)
    tensors, peft = model.state_dict(), compat.BaseTuner
    wanted = {name: tensor for name, tensor in tensors.items() if ".other" not in name}
    arguments = (model, model.peft_config["default"], "default")
    theirs = peft._get_adapter_state_dict.__func__(LoraModel, *arguments, wanted, ["other"])
    ours = FileHooks._get_adapter_state_dict.__func__(LoraModel, *arguments, wanted, ["other"])
    assert theirs and ours.keys() == theirs.keys()
    in_file = [FileHooks._remove_adapter_name_from_key(name, "default") for name in ours]
    assert in_file == [peft._remove_adapter_name_from_key(name, "default") for name in ours]
    file = dict(zip(in_file, ours.values(), strict=True))
    renamed = FileHooks._remap_adapter_state_dict_for_load.__func__(FileHooks, *arguments, file)
    assert renamed.keys() == ours.keys()


@newest
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_hooks_find_the_biases_that_peft_finds(bias):
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), LoraConfig(r=1, target_modules=["0"]))
    config = LoraConfig(bias=bias)
    theirs = LoraModel._get_learnable_bias_state_dict(model, model.state_dict(), config)
    assert FileHooks._get_learnable_bias_state_dict(model, model.state_dict(), config).keys() == theirs.keys()


@pytest.mark.parametrize("adapter", ["default", "q", "model"])
@pytest.mark.parametrize("key", ["x.q.w", "x.q.default", "x.model.default.w", "q", "default.w", "x.q_proj.A.q.weight"])
def test_names_in_files(key, adapter):
    if HAS_FILE_HOOKS:
        expected = compat.BaseTuner._remove_adapter_name_from_key(key, adapter)
        assert FileHooks._remove_adapter_name_from_key(key, adapter) == expected
    assert FileHooks._remove_adapter_name_from_key("a.B.default.values", "default") == "a.B.values"


def test_functions_imported_by_name_ask_the_tuners():
    """Both were imported above before sparse_peft was."""
    model = get_peft_model(llama(), SparseConfig(density=0.1, target_modules=["q_proj"], save_dtype="bfloat16"))
    tensors = get_peft_model_state_dict(model)
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".values")} == {torch.bfloat16}
    damaged = {name: tensor * torch.nan if name.endswith(".values") else tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match="NaN or infinite"):
        set_peft_model_state_dict(model, damaged)


def test_nothing_is_replaced_where_peft_has_the_hooks():
    function = save_and_load.set_peft_model_state_dict
    compat.call_file_hooks()
    assert save_and_load.set_peft_model_state_dict is function  # not twice, either
    assert hasattr(function, "__wrapped__") != HAS_FILE_HOOKS
    assert issubclass(BaseSparseModel, FileHooks) != HAS_FILE_HOOKS
