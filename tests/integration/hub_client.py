"""What runs in processes of their own against the stand-in: huggingface_hub reads its endpoint at import."""

import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from huggingface_hub import ModelCard, create_repo, upload_folder
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import sparse_peft
from _sparse_peft_startup.commands import app
from sparse_peft.adapters import add_results
from sparse_peft.report import plot_report
from tests.helpers.language_models import llama, make_tokenizer, text
from tests.helpers.methods import METHODS, config

BASE, IDS = "tester/tiny-llama", torch.arange(3, 13).view(2, 5)
METHOD_REPOS = {name: f"tester/{name}-adapter" for name in METHODS}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def push_every_method(folder):
    """Models, by PeftModel.push_to_hub, the first of them twice; what they compute is kept for comparison."""
    llama().push_to_hub(BASE)
    for method, repo in METHOD_REPOS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config(method, init_weights=False))
        torch.save(logits(model), folder / f"{method}.pt")
        model.push_to_hub(repo, private=method == "sora", tags=["mine"], commit_message=f"an adapter of {method}")
        if method == "sparse":
            model.push_to_hub(repo)
            model.push_to_hub(repo, revision="other")


def push_config(_):
    fresh = config("sparse", base_model_name_or_path=BASE)
    fresh.push_to_hub("tester/config-only")


def push_hostile(folder):
    """An adapter whose config claims a size that its layers allow, and its file does not have."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config("snella", r=4))
    model.save_pretrained(folder / "hostile")
    path = folder / "hostile" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 12}))
    create_repo("tester/hostile")
    upload_folder(repo_id="tester/hostile", folder_path=folder / "hostile")


def push_trained(folder):
    """A trained adapter with metrics and plots: its folder, and after that the model again."""
    tokenizer = make_tokenizer()
    data = text().map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE),
        config("sparse", selection="accumulated_gradient", reselect_every=4, accumulate=2),
    )
    callback = sparse_peft.SparsityCallback()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder / "trainer", max_steps=7, use_cpu=True, report_to=[], disable_tqdm=True,
            hub_model_id="tester/by-trainer", save_strategy="no",
        ),
        train_dataset=data, eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    metrics = {"eval_loss": trainer.evaluate()["eval_loss"]}
    adapter = folder / "adapter"
    model.save_pretrained(adapter)
    plots = plot_report(model, callback.history, adapter)
    add_results(adapter, metrics, dataset="foxes", split="train", plots=plots)
    create_repo("tester/with-results")
    upload_folder(repo_id="tester/with-results", folder_path=adapter)
    torch.save({"logits": logits(model), "metrics": metrics}, folder / "trained.pt")
    model.push_to_hub("tester/with-results")  # a later push keeps the results
    trainer.push_to_hub()


def push_by_command(folder):
    """``sparse-peft train sft --push_to_hub``."""
    make_tokenizer().push_to_hub(BASE)
    (folder / "data").mkdir()
    text().to_json(folder / "data" / "train.jsonl")
    where = ["--model_name_or_path", BASE, "--dataset_name", folder / "data", "--output_dir", folder / "by-command"]
    push = ["--push_to_hub", "--hub_model_id", "tester/by-command"]
    short = ["--max_steps", 2, "--report_to", "none", "--use_cpu", "--bf16", "false", "--target_modules", "q_proj"]
    app([*map(str, ("train", "sft", *where, *push, *short))], standalone_mode=False)


def refuse_hostile():
    for load in (PeftModel.from_pretrained, lambda model, name: model.load_adapter(name)):
        try:
            load(AutoModelForCausalLM.from_pretrained(BASE), "tester/hostile")
        except ValueError as refusal:
            assert "r / 2: 6 for layer" in str(refusal) and "the adapter's file has 2" in str(refusal), refusal
            continue
        raise AssertionError("the adapter was loaded")


def load_all(folder):
    """Everything back, in a process that has nothing in its caches, and compared bit for bit."""
    for method, repo in METHOD_REPOS.items():
        wanted = torch.load(folder / f"{method}.pt")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo)
        assert torch.equal(logits(model), wanted), method
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(repo)), wanted), method
        own = AutoModelForCausalLM.from_pretrained(BASE)
        own.load_adapter(repo)
        assert torch.equal(logits(own), wanted), method
    other = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE), METHOD_REPOS["sparse"], revision="other"
    )
    assert torch.equal(logits(other), torch.load(folder / "sparse.pt"))
    refuse_hostile()
    again = PeftConfig.from_pretrained("tester/config-only")
    assert type(again) is sparse_peft.SparseConfig and again.base_model_name_or_path == BASE
    trained = torch.load(folder / "trained.pt")
    for repo in ("tester/with-results", "tester/by-trainer"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo)
        assert torch.equal(logits(model), trained["logits"]), repo


def run_example(_):
    """The example on a card, as it is."""
    (example,) = re.findall(r"```python\n(.*?)```", ModelCard.load(METHOD_REPOS["sparse"]).text, flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert names["adapter"] == METHOD_REPOS["sparse"]
    assert names["model"].peft_config["default"].peft_type.value == "SPARSE_PEFT_DELTA"


def plan(folder):
    """``sparse-peft plan`` of a model on the Hub, and of one that is not there."""
    for name, code in ((BASE, 0), ("tester/no-such-model", 2)):
        with (folder / f"plan-{code}.json").open("w") as file, redirect_stdout(file):
            try:
                app(["plan", name, "--density", "0.1", "--flops", "1e9", "--json"])
            except SystemExit as ended:
                assert (ended.code or 0) == code, ended


if __name__ == "__main__":
    for action in sys.argv[2:]:
        globals()[action](Path(sys.argv[1]))
