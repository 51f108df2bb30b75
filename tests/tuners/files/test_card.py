"""The model card of an adapter: facts, an example that runs, plots, and what others wrote."""

import re

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from _sparse_peft_startup.install import install_command
from sparse_peft import SparseConfig
from sparse_peft.adapters import add_results, compose
from sparse_peft.tuners.files.card import is_blank, new_card, read_card
from sparse_peft.tuners.files.card_sections import LOAD_HEADING, PLOTS_HEADING, TRAINED_HEADING
from tests.helpers.language_models import llama
from tests.helpers.methods import METHODS, config
from tests.helpers.processes import run_code
from tests.helpers.two_layers import TwoLayers, adapted

IDS = torch.arange(3, 13).view(2, 5)
UNFILLED = "[More Information Needed]"


def text_of(folder):
    return ModelCard.load(folder / "README.md").text


def facts_of(folder, column=1):
    """``{label: text}`` of the card's table."""
    rows = re.findall(r"^\| (.*) \|$", text_of(folder), flags=re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows[2:]]
    return {row[0]: row[column] for row in cells}


def example_of(folder):
    (example,) = re.findall(r"```python\n(.*?)```", text_of(folder), flags=re.DOTALL)
    return example


def saved(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model's folder."""
    return saved(llama(), tmp_path_factory.mktemp("base"))


# ------------------------------------------------------------------ facts


@pytest.mark.parametrize("method", METHODS)
def test_facts_of_every_method(tmp_path, method):
    model = get_peft_model(llama(), config(method, init_weights=False))
    facts = facts_of(saved(model, tmp_path))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = model.peft_config["default"].weight_shapes
    weights = sum(rows * cols for rows, cols in shapes.values())
    assert facts["trained parameters"] == (
        f"{trained:,} in {len(shapes)} layers, {100 * trained / weights:.3g} % of their weights"
    )
    assert facts["config"] == f"`{type(model.peft_config['default']).__name__}`"
    assert facts["file"] == f"{(tmp_path / 'adapter_model.safetensors').stat().st_size / 1e3:.3g} kB"
    rate = model.peft_config["default"].recommended_rate
    assert ("learning rate" in facts) == (rate is not None)
    assert rate is None or f"{rate:.1e} with AdamW" in facts["learning rate"]
    assert UNFILLED not in text_of(tmp_path) and len(text_of(tmp_path).splitlines()) < 45


def test_facts_of_a_sparse_delta(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    given = SparseConfig(
        r=4, selection="magnitude_smallest", scale=8.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, given)
    facts = facts_of(saved(model, tmp_path))
    assert facts["base model"] == f"`{base}`"
    assert "`selection='magnitude_smallest'`" in facts["settings"] and "`r=4`" in facts["settings"]
    entries = sum(model.peft_config["default"].num_entries.values())
    assert facts["trained entries"] == f"{entries:,}" and facts["scale"].startswith("8: ")
    assert facts["layers"].count("`") == 14 and "`q_proj`" in facts["layers"]
    assert text_of(tmp_path).strip().startswith(f"# Sparse adapter of {base.name}\n")


def test_what_is_saved_whole_is_named(tmp_path):
    model = get_peft_model(llama(), config(modules_to_save=["lm_head"]))
    facts = facts_of(saved(model, tmp_path))
    assert facts["saved whole"] == "`lm_head.weight`"
    values = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "sparse_peft" in name)
    assert facts["trained parameters"].startswith(f"{values:,} in")


def test_facts_follow_a_second_save(tmp_path):
    model, _ = adapted()
    saved(model, tmp_path)
    model.peft_config["default"].scale, model.peft_config["default"].recommended_rate = 4.0, 5e-4
    for _ in range(2):
        facts, text = facts_of(saved(model, tmp_path)), text_of(tmp_path)
        assert facts["scale"].startswith("4: ") and facts["learning rate"].startswith("5.0e-04 with AdamW")
        assert text.count(TRAINED_HEADING) == text.count(LOAD_HEADING) == text.count(install_command()) == 1


def test_card_of_a_named_adapter_is_the_one_above_it(tmp_path):
    model, _ = adapted(adapter_name="other")
    saved(model, tmp_path)
    assert "import sparse_peft" in text_of(tmp_path) and "subfolder='other'" in example_of(tmp_path)
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "other" / "README.md").exists()


def test_metadata(tmp_path):
    model, _ = adapted()
    card = ModelCard.load(saved(model, tmp_path) / "README.md")
    assert "sparse-peft" in card.data.tags and card.data.library_name == "peft" and card.data.base_model is None


def test_a_config_alone_writes_no_card(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    SparseConfig().save_pretrained(tmp_path / "adapter")
    SparseConfig().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert not (tmp_path / "adapter" / "README.md").exists()


def test_each_adapter_has_a_column(tmp_path):
    model, _ = adapted()
    model.add_adapter("other", SparseConfig(target_modules=["first"], density=0.5, init_weights=False))
    saved(model, tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    saved(model, tmp_path / "checkpoint-1")  # a card of its own
    counts = [int(facts_of(tmp_path, column)["trained entries"].replace(",", "")) for column in (1, 2)]
    assert counts == [sum(model.peft_config[name].num_entries.values()) for name in ("default", "other")]
    assert "checkpoint-1" not in text_of(tmp_path)


# ------------------------------------------------------------------ the example


def run(folder, check):
    """Run the card's example as it is, in the adapter's folder and a fresh process, and then a check."""
    done = run_code(f"{example_of(folder)}\n{check}", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]


LOGITS = """
import torch
with torch.no_grad():
    found = model.eval()(torch.arange(3, 13).view(2, 5)).logits
assert torch.equal(found, torch.load("logits.pt")), "the saved model computes something else"
"""


def test_the_example_runs_as_it_is(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, config("sparse", init_weights=False))
    model.add_adapter("other", config("sparse", init_weights=False, seed=1))
    saved(model, tmp_path)
    model.set_adapter("other")
    with torch.no_grad():
        torch.save(model.eval()(IDS).logits, tmp_path / "logits.pt")
    run(tmp_path, f"model.set_adapter('other')\n{LOGITS}")


def test_the_example_of_a_classifier_runs_as_it_is(tmp_path, base):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    model = get_peft_model(model, config("sparse", task_type="SEQ_CLS", init_weights=False), adapter_name="votes")
    saved(model, tmp_path / "adapter")
    assert "num_labels=5" in example_of(tmp_path / "adapter")
    with torch.no_grad():
        torch.save(model.eval()(IDS).logits, tmp_path / "adapter" / "logits.pt")
    run(tmp_path / "adapter", LOGITS)


def test_the_example_of_a_model_without_a_task(tmp_path, base):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config("sparse", task_type=None))
    example = example_of(saved(model, tmp_path))
    assert "from transformers import LlamaForCausalLM\n" in example
    assert f"base = LlamaForCausalLM.from_pretrained({str(base)!r})\n" in example
    other, _ = adapted()
    example = example_of(saved(other, tmp_path / "own"))
    assert "# base: the model that the adapter was trained on\n" in example, "nothing is known of how it is made"


# ------------------------------------------------------------------ plots


def test_plots_of_training_are_shown_once(tmp_path):
    model, _ = adapted()
    for name in ("turnover.png", "supports.png", "mine.png", "other.png"):
        (tmp_path / name).write_bytes(b"image")
    text = text_of(saved(model, tmp_path))
    assert text.count(PLOTS_HEADING) == 1 and "other.png" not in text
    assert text.count("](turnover.png)") == text.count("](supports.png)") == 1
    for _ in range(2):
        add_results(tmp_path, {"loss": 1.5}, dataset="foxes", task="text-generation", plots=[tmp_path / "mine.png"])
        text = text_of(saved(model, tmp_path))
        assert [text.count(f"]({name}.png)") for name in ("turnover", "supports", "mine")] == [1, 1, 1]
        assert text.count("| loss | 1.5 | foxes |") == 1


# ------------------------------------------------------------------ what others wrote


def test_what_users_wrote_stays(tmp_path):
    model, _ = adapted()
    saved(model, tmp_path)
    path = tmp_path / "README.md"
    mine = path.read_text().replace("# Sparse adapter\n", "# My adapter\n\nIt speaks like foxes.\n")
    mine = mine.replace('adapter = "."', 'adapter = "me/foxes"').replace(
        "### Framework", "## Thanks\n\nAll.\n\n### Framework"
    )
    path.write_text(mine)
    saved(model, tmp_path)
    assert path.read_text() == mine


def test_a_project_s_readme_keeps_its_text(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# My project\n\nAbout foxes.\n")
    model, _ = adapted()
    card = ModelCard.load(saved(model, tmp_path) / "README.md")
    assert card.text.strip().startswith("# My project\n\nAbout foxes.\n") and TRAINED_HEADING in card.text
    assert card.data.license == "mit" and card.data.library_name == "peft"


@pytest.mark.parametrize(
    "description", ["", "This is the model card of a 🤗 transformers model that has been pushed on the Hub. Etc."]
)
def test_a_blank_template_is_replaced_and_its_metadata_kept(tmp_path, description):
    data = ModelCardData(tags=["mine"], license="mit")
    ModelCard.from_template(data, model_description=description).save(tmp_path / "README.md")
    assert is_blank(read_card(tmp_path))
    model, _ = adapted()
    card = ModelCard.load(saved(model, tmp_path) / "README.md")
    assert UNFILLED not in card.text and TRAINED_HEADING in card.text
    assert card.data.license == "mit" and {"mine", "sparse-peft"} <= set(card.data.tags)


def test_a_template_that_somebody_filled_in_is_kept(tmp_path):
    ModelCard.from_template(ModelCardData(), developers="the fox").save(tmp_path / "README.md")
    assert not is_blank(read_card(tmp_path)) and not is_blank(new_card())
    model, _ = adapted()
    text = text_of(saved(model, tmp_path))
    assert "**Developed by:** the fox" in text and UNFILLED in text and TRAINED_HEADING in text


def test_other_methods_have_peft_s_card(tmp_path):
    saved(get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["first"])), tmp_path)
    assert UNFILLED in text_of(tmp_path) and "sparse" not in text_of(tmp_path)


def test_no_card_where_another_process_writes_it(tmp_path):
    model, _ = adapted()
    saved(model, tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_composed_adapter_has_the_facts_and_its_origin(tmp_path):
    for seed in (0, 1):
        saved(get_peft_model(llama(), config("sparse", seed=seed, init_weights=False)), tmp_path / str(seed))
    compose([tmp_path / "0", tmp_path / "1"], tmp_path / "both", combination_type="linear")
    facts = facts_of(tmp_path / "both")
    model = PeftModel.from_pretrained(llama(), tmp_path / "both")
    assert facts["trained entries"] == f"{sum(model.peft_config['default'].num_entries.values()):,}"
    assert "`linear`: 1 x `0`, 1 x `1`" in text_of(tmp_path / "both").partition(TRAINED_HEADING)[0]
