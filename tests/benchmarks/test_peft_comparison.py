"""Experiments for PEFT's own comparison, and the driver of its scripts, on a stand-in for them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peft_comparison.__main__ import main
from benchmarks.peft_comparison.driver import run_experiment
from benchmarks.peft_comparison.experiments import FOLDER, experiments, write
from examples.smollm2 import load_model, load_tokenizer
from sparse_peft import SparseConfig, select_support
from tests.helpers.real_model import skip_without_smollm2

SCRIPTS = Path(__file__).parents[1] / "data" / "peft_comparison"


def folder_of(tmp_path, config, **params):
    """An experiment's folder with this config."""
    folder = tmp_path / "experiments" / "sparse" / "row"
    folder.mkdir(parents=True)
    content = {key: value for key, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SPARSE_PEFT_DELTA", **content}))
    (folder / "training_params.json").write_text(json.dumps(params))
    return folder


def run(tmp_path, experiment, rows=16):
    before = Path.cwd(), list(sys.argv), list(sys.path), set(dir(torch.cpu))
    main(SCRIPTS, experiment, results=tmp_path / "results", verbose=False, cpu=True, made_up=rows)
    assert (Path.cwd(), sys.argv, sys.path, set(dir(torch.cpu))) == before
    assert not {"utils", "data"} & {name for name in sys.modules if str(SCRIPTS) in str(sys.modules[name])}
    (result,) = (tmp_path / "results").iterdir()
    return json.loads(result.read_text())


def test_the_folders_are_those_of_the_experiments(tmp_path):
    write(tmp_path)
    for task in ("MetaMathQA", "image-gen"):
        files = {path.relative_to(tmp_path): path.read_text() for path in (tmp_path / task).rglob("*.json")}
        kept = {path.relative_to(FOLDER): path.read_text() for path in (FOLDER / task).rglob("*.json")}
        assert files == kept, "run `python -m benchmarks.peft_comparison.experiments`"


@pytest.mark.parametrize("experiment", experiments(), ids=lambda one: f"{one.task}-{one.method}-{one.name}")
def test_every_config_reads_as_it_was_written(experiment):
    loaded = PeftConfig.from_pretrained(FOLDER / experiment.path)
    ours, theirs = experiment.config.to_dict(), loaded.to_dict()
    assert {key: value for key, value in ours.items() if theirs[key] != value} == {}
    params = json.loads((FOLDER / experiment.path / "training_params.json").read_text())
    assert set(params) <= {"optimizer_kwargs"} and params == experiment.params


def test_there_are_twelve_rows_for_language_with_both_anchors():
    rows = [one for one in experiments() if one.task == "MetaMathQA"]
    assert len(rows) == 12 and {"lora", "shira"} < {one.method for one in rows}
    # one set of positions at three rates, and three rates at which other positions train
    random = [one for one in rows if one.config.to_dict().get("selection") == "random" and one.config.r == 32]
    assert len({json.dumps(one.params) for one in random}) == len(random) == 3
    assert all(one.config.scale == 1.0 for one in rows if one.method in ("sparse", "s2ft"))


CASES = {
    "random": {"selection": "random"},
    "spiel": {"selection": "accumulated_gradient", "reselect_every": 2, "accumulate": 1},
    "lift": {"selection": "principal", "reselect_every": 1, "principal_rank": 4},
    "gallop": {"selection": "gallop"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_row_runs_with_the_scripts(stand_in, tmp_path, case):
    config = {"density": 0.1, "scale": 1.0, "target_modules": ["q_proj", "v_proj"], **CASES[case]}
    experiment = folder_of(tmp_path, config, model_id=str(stand_in), optimizer_kwargs={"lr": 0.05}, max_steps=6)
    result = run(tmp_path, experiment)
    assert result["branch"] == "sparse-peft" and result["experiment"] == "sparse/row" and result["wiki"] == 2
    assert len(result["losses"]) == 6 and result["losses"][-1] < result["losses"][0]
    found = {name: torch.tensor(positions) for name, positions in result["supports"].items()}
    assert sum(map(len, found.values())) == result["trained"]

    config = SparseConfig(**config)
    base = AutoModelForCausalLM.from_pretrained(stand_in)
    if case == "gallop":
        tokenizer = AutoTokenizer.from_pretrained(stand_in)
        config = select_support(base, config, training_batches(tokenizer))
    states = dict(get_peft_model(base, config).named_modules())
    moved = [name for name in found if not torch.equal(states[name].support.indices.long(), found[name])]
    assert bool(moved) == (case in ("spiel", "lift"))


def training_batches(tokenizer):
    """The made-up sums as the scripts tokenise them."""
    from benchmarks.peft_comparison.offline import _sums  # noqa: PLC0415

    rows = _sums(16, 0, "query", "response", "The answer is: ", type="made up")
    for start in range(0, 16, 2):
        part = rows[start : start + 2]
        texts = [f"Question: {q} Think step by step.\nAnswer:{a}"
                 for q, a in zip(part["query"], part["response"], strict=True)]  # fmt: skip
        ids = [tokenizer(text)["input_ids"][:64] for text in texts]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        yield {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def test_folders_that_are_none_of_peft(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no run.py: pass a task's folder in PEFT's method_comparison"):
        run_experiment(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"experiments/<method>/<name> is expected"):
        run_experiment(SCRIPTS, tmp_path)


def test_without_a_gpu_the_scripts_refuse_as_peft_does(stand_in, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    experiment = folder_of(tmp_path, {"density": 0.1}, model_id=str(stand_in))
    with pytest.raises(RuntimeError, match="CUDA or XPU is not available"):
        main(SCRIPTS, experiment, results=tmp_path / "results", made_up=8)
    assert "utils" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank32-random-lr_0.001", "rank32-lift-lr_0.0003", "rank32-spiel_ag-lr_0.0003"])
def test_rows_on_smollm2(tmp_path, name):
    skip_without_smollm2()
    load_model().save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    config = json.loads(next(FOLDER.rglob(f"*{name}/adapter_config.json")).read_text())
    config |= {"reselect_every": 3, "accumulate": min(1, config.get("accumulate", 0))} if "lift" in name or (
        "spiel" in name) else {}  # fmt: skip
    experiment = folder_of(
        tmp_path, config, model_id=str(tmp_path / "model"), max_steps=8, optimizer_kwargs={"lr": 1e-3}
    )
    result = run(tmp_path, experiment, rows=32)
    assert result["losses"][-1] < result["losses"][0]
