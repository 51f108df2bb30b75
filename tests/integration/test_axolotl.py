"""axolotl's plugin, with a stand-in of axolotl's interface."""

import pytest
import torch
from peft import PeftModel
from transformers import TrainingArguments

from sparse_peft import SoRAConfig, SparseConfig
from tests.helpers.language_models import llama, sequence_classifier
from tests.helpers.processes import run_code
from tests.integration import axolotl_stand_in
from tests.integration.axolotl_stand_in import Run

PLUGIN = "sparse_peft.integrations.axolotl.SparsePlugin"
RIGL = {"selection": "rigl", "density": 0.05, "reselect_every": 2, "accumulate": 1, "target_modules": ["q_proj"]}
X = torch.arange(3, 13).view(2, 5)


@pytest.fixture(autouse=True)
def axolotl(monkeypatch):
    axolotl_stand_in.install(monkeypatch)


def run(section, **more):
    return Run({"plugins": [PLUGIN], "adapter": "sparse_peft", "sparse_peft": section, "sequence_len": 32, **more})


def trained(this, folder, steps=4):
    model, _ = this.load(llama())
    rows = [{"input_ids": row, "labels": row} for row in X.repeat(8, 1)]
    arguments = TrainingArguments(
        folder, max_steps=steps, use_cpu=True, report_to=[], learning_rate=0.05, logging_steps=1, save_strategy="no"
    )
    trainer = this.trainer(model, args=arguments, train_dataset=rows)
    trainer.train()
    return model, trainer


def test_nothing_of_axolotl_is_imported_without_the_plugin():
    done = run_code("import sys, sparse_peft; assert not any('axolotl' in name for name in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_a_yaml_file_trains_and_its_positions_change(tmp_path):
    model, trainer = trained(run(RIGL), tmp_path)
    first = run(RIGL).load(llama())[0].base_model.model.model.layers[0].self_attn.q_proj.support("default").indices
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.support("default").indices, first)
    assert any("sparsity/replaced" in name for entry in trainer.state.log_history for name in entry)


def test_an_adapter_is_continued_and_read(tmp_path):
    model, _ = trained(run(RIGL), tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    this = run(RIGL, lora_model_dir=str(tmp_path / "adapter"))
    for inference in (False, True):
        again, config = this.load(llama(), inference=inference)
        assert isinstance(again, PeftModel) and config.num_entries == model.peft_config["default"].num_entries
        assert any(p.requires_grad for p in again.parameters()) != inference
        assert torch.equal(again.eval()(X).logits, model.eval()(X).logits)


def test_preference_training_gets_the_config_alone():
    base = llama()
    model, config = run({"method": "sora", "r": 4, "target_modules": ["v_proj"]}, rl="dpo").load(base)
    assert model is base and not hasattr(base, "peft_config")
    assert type(config) is SoRAConfig and config.r == 4 and config.task_type == "CAUSAL_LM"


def test_task_types_follow_the_model():
    assert run(RIGL).load(sequence_classifier())[1].task_type == "SEQ_CLS"
    given = run({**RIGL, "task_type": "FEATURE_EXTRACTION"}, rl="dpo").load(llama())[1]
    assert given.task_type == "FEATURE_EXTRACTION"


def test_other_adapters_are_left_to_axolotl():
    this = Run({"plugins": [PLUGIN], "adapter": "lora"})
    plugin = this.plugins[0]
    assert plugin.load_adapter(llama(), this.cfg) is None
    assert plugin.add_callbacks_post_trainer(this.cfg, None) == []


def test_the_dtype_of_values_follows_the_file():
    base = llama().to(torch.bfloat16)
    model, _ = run(RIGL, peft_autocast_adapter_dtype=False).load(base)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"method": "lora"}, "method='lora'"),
        ({"densty": 0.1}, "did you mean 'density'"),
        ({"density": 2}, "density=2"),
        ({"density": "much"}, "density='much'"),
        ({"lora_alpha": 8}, "a field of LoRA"),
    ],
)
def test_a_wrong_section_is_refused_while_the_file_is_read(section, message):
    with pytest.raises(ValueError, match=message):
        run(section)


def test_defaults():
    config = run(None, rl="kto").load(llama())[1]
    assert type(config) is SparseConfig
