"""Which embeddings are saved beside an adapter that trains entries of one."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sparse_peft import SparseConfig
from tests.helpers.language_models import llama

IDS = torch.tensor([[1, 2, 33, 22], [5, 0, 34, 2]])


def weights_in(folder):
    return {name for name in load_file(folder / "adapter_model.safetensors") if name.endswith("weight")}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["q_proj"]])
def test_a_resized_vocabulary_is_saved_whole(tmp_path, tied, names):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def resized(seed):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        base.resize_token_embeddings(40, mean_resizing=False)
        return base.eval()

    config = SparseConfig(target_modules=names, density=0.1, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(resized(0), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert len(weights_in(tmp_path / "adapter")) == 2
    again = PeftModel.from_pretrained(resized(1), tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("given", ["auto", True, False])
def test_what_is_asked_for_is_saved(tmp_path, given):
    model = get_peft_model(llama(), SparseConfig(target_modules=["embed_tokens"], density=0.1, init_weights=False))
    model.save_pretrained(tmp_path, save_embedding_layers=given)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert weights_in(tmp_path) == ({name} if given is True else set())
