"""The command train: TRL's scripts with a sparse adapter."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")
from typer.testing import CliRunner

from _sparse_peft_startup.commands import app
from sparse_peft.cli.train import TRAINERS, parse, script_of
from sparse_peft.tuners.unknown_fields import settable_fields
from tests.helpers.methods import METHODS, MOVING

ROWS = {
    "sft": {"text": "to be or not to be"},
    "dpo": {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    "grpo": {"prompt": "Count: 1, 2, 3,"},
    "kto": {"prompt": "2 + 2 =", "completion": " 4", "label": True},
    "reward": {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
}
EXTRA = {
    "grpo": ["--reward_funcs", f"{__name__}.spaces", "--num_generations", "2", "--max_completion_length", "4"],
    "kto": ["--per_device_train_batch_size", "2"],
}
ON_CPU = ["--use_cpu", "--bf16", "false"]
MODEL = ["--model_name_or_path", "m", "--dataset_name", "d", *ON_CPU]
SHORT = ["--max_steps", "2", "--report_to", "none", *ON_CPU]


def spaces(completions, **_):
    """A reward, which TRL imports by name."""
    return [float(completion.count(" ")) for completion in completions]


@pytest.fixture
def data(tmp_path):
    """``folder(trainer)`` of a few rows as the trainer wants them."""

    def write(trainer):
        folder = tmp_path / "data"
        folder.mkdir()
        rows = [ROWS[trainer] | ({"label": i % 2 == 0} if trainer == "kto" else {}) for i in range(8)]
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    return write


SLOW = [pytest.param(trainer, marks=() if trainer == "sft" else pytest.mark.slow) for trainer in TRAINERS]


@pytest.mark.parametrize("trainer", SLOW)
def test_every_trainer_trains_and_saves_an_adapter(run, stand_in, data, tmp_path, trainer):
    out = tmp_path / "out"
    moving = ["--selection", "rigl", "--reselect-every", "1", "--accumulate", "1", "--density", "0.05"]
    where = ["--model_name_or_path", stand_in, "--dataset_name", data(trainer), "--output_dir", out]
    done = run("train", trainer, *where, *moving, *SHORT, *EXTRA.get(trainer, []), "--target_modules", "q_proj,v_proj")
    said = done.out + done.err
    assert "peak memory" in said and "learning rate" in said and "trains" in said and "scale" in said
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["density"] == 0.05 and config["selection"] == "rigl"
    assert config["task_type"] == TRAINERS[trainer]
    assert (out / "supports.png").stat().st_size > 1000 and (out / "turnover.png").exists(), "positions changed"
    card = (out / "README.md").read_text()
    assert "train_loss" in card and "PeftModel.from_pretrained(base, adapter)" in card
    assert "None" not in card and "trl" in card.partition("# ")[0]
    if trainer != "reward":
        base = AutoModelForCausalLM.from_pretrained(stand_in)
        before = base(torch.arange(6)[None]).logits.detach()
        model = PeftModel.from_pretrained(base, out)
        assert not torch.equal(model(torch.arange(6)[None]).logits, before)


@pytest.mark.parametrize(
    ("trainer", "options", "shown", "used"),
    [
        ("sft", [], "0.0002, what suits the adapter; --learning_rate sets another", 2e-4),
        ("sft", ["--scale", "1"], "0.0032, what suits", 16 * 2e-4),
        ("sft", ["--method", "snella"], "0.002, what suits", 2e-3),
        ("dpo", [], "0.0001, 0.5 of what suits", 1e-4),
        ("sft", ["--learning_rate", "2e-5"], "2e-05\n", 2e-5),
        ("sft", ["--config", "rate.yaml"], "0.001\n", 1e-3),
        ("sft", ["--optim", "adafactor"], "2e-05\n", 2e-5),  # nothing is known of others than Adam
    ],
)
def test_the_learning_rate_is_the_adapter_s_unless_one_is_given(
    run, stand_in, data, tmp_path, monkeypatch, trainer, options, shown, used
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rate.yaml").write_text("learning_rate: 0.001\n")
    where = ["--model_name_or_path", stand_in, "--dataset_name", data(trainer), "--output_dir", tmp_path / "out"]
    steady = ["--lr_scheduler_type", "constant", "--logging_steps", "1", "--save_steps", "2"]
    said = run("train", trainer, *where, *steady, *SHORT, "--target_modules", "q_proj,v_proj", *options)
    assert f"learning rate {shown}" in said.out + said.err
    (state,) = (tmp_path / "out").rglob("trainer_state.json")
    logged = [entry["learning_rate"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert logged == pytest.approx([used] * 2)


TRAINED_ELSEWHERE = ("sparse", "sara", "s2ft", "sora", "sltrain")  # which take seconds, and of which other tests train


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name in TRAINED_ELSEWHERE else ()) for name in METHODS]
)
def test_every_method_trains_and_saves_its_adapter(run, stand_in, data, tmp_path, method):
    where = ["--model_name_or_path", stand_in, "--dataset_name", data("sft"), "--output_dir", tmp_path / "out"]
    fields = {**METHODS[method][1], **MOVING.get(method, {})}
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    run("train", "sft", *where, *SHORT, "--method", method, *options)
    assert "train_loss" in (tmp_path / "out" / "README.md").read_text()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stand_in), tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_options_are_the_fields_of_the_method(method, tmp_path):
    config_class = METHODS[method][0]
    given = [*MODEL, "--output_dir", str(tmp_path), "--target_modules", "q_proj"]
    seeded = "seed" in settable_fields(config_class)
    given += ["--seed", "5", *(["--adapter_seed", "7"] if seeded else [])]  # the first is TRL's
    (_, training, *_), config = parse(script_of("sft"), [*given, "--method", method], "CAUSAL_LM")
    assert type(config) is config_class and config.task_type == "CAUSAL_LM" and config.target_modules == {"q_proj"}
    assert training.seed == 5 and getattr(config, "seed", 7) == 7


def test_a_yaml_file_has_options_of_both(tmp_path):
    content = {"model_name_or_path": "m", "output_dir": str(tmp_path), "learning_rate": 0.003, "method": "s2ft"}
    content |= {"use_cpu": True, "bf16": False, "dataset_name": "d"}
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({**content, "ratio": 0.1, "target_modules": ["v_proj", "o_proj"], "seed": 3}))
    arguments, config = parse(script_of("dpo"), ["--config", str(file), "--ratio", "0.2"], "CAUSAL_LM")
    assert (type(config).__name__, config.ratio) == ("S2FTConfig", 0.2)
    assert config.target_modules == {"v_proj", "o_proj"}
    assert arguments[1].learning_rate == 0.003 and arguments[1].seed == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ppo"], "'ppo': one of sft, dpo, grpo, kto, reward"),
        (["sft", "--method", "spars"], "did you mean 'sparse'?"),
        (["sft", "--densty", "0.1", *MODEL], "--densty: no such option; did you mean '--density'?"),
        (["sft", "--density", "3", *MODEL], "density=3.0: a share in (0, 1]"),
        (["sft", "--lora_r", "8", *MODEL], "--lora_r: options of LoRA"),
        (["sft"], "--model_name_or_path: a model's folder"),
        (["sft", "--model_name_or_path", "m"], "--dataset_name: a data set's folder"),
        (["sft", *MODEL], "m: no such folder"),
        (["sft", "--config", "no.yaml"], "no.yaml: no such file"),
        (["sft", "m", "d"], "m d: of no option; --model_name_or_path is the model"),
        (["sft", "--method", "shira"], "'shira': no such method; use SparseConfig(selection='random')"),
        (["sft", "--selection", "fisher", *MODEL], "selection='fisher' looks at data before training"),
    ],
)
def test_invalid_requests(run, arguments, words):
    assert words in run("train", *arguments, expect=2).err.replace("\n", " ")


def test_a_file_of_data_is_refused_with_its_folder(run, stand_in, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "fox"}\n')
    where = ["--model_name_or_path", stand_in, "--dataset_name", tmp_path / "train.jsonl", "--output_dir", tmp_path]
    said = run("train", "sft", *where, *SHORT, "--target_modules", "q_proj", expect=2).err.replace("\n", " ")
    assert "train.jsonl: a file; the folder that it is in is expected" in said


@pytest.mark.parametrize(
    ("trainer", "options", "words"),
    [
        ("sft", [], "'completion' is not in the data, whose rows have text, or messages"),
        ("dpo", ["--dataset_train_split", "valid"], "'valid': no such split of the data"),
        ("dpo", ["--selection", "given"], "selection='given'"),
        ("dpo", ["--dataset_name", "nodata"], "--dataset_name nodata: no such folder. "),
    ],
)
def test_what_trl_does_not_start_with(run, stand_in, data, tmp_path, trainer, options, words):
    where = ["--model_name_or_path", stand_in, "--dataset_name", data("dpo"), "--output_dir", tmp_path / "out"]
    command = ["train", trainer, *where, *SHORT, "--target_modules", "q_proj", *options]
    assert words in run(*command, expect=2).err.replace("\n", " ")
    with pytest.raises((KeyError, ValueError, OSError)):
        CliRunner().invoke(app, ["--verbose", *map(str, command)], catch_exceptions=False)


def test_weights_that_decide_how_much_trains_are_no_obstacle(run, stand_in, data, tmp_path):
    where = ["--model_name_or_path", stand_in, "--dataset_name", data("sft"), "--output_dir", tmp_path / "out"]
    below = ["--selection", "threshold", "--threshold", "0.005", "--target_modules", "q_proj"]
    assert "learning rate" in run("train", "sft", *where, *SHORT, *below).out


def test_a_damaged_yaml_file_is_refused(run, tmp_path):
    (tmp_path / "train.yaml").write_text("density: [0.1\n")
    said = run("train", "sft", "--config", tmp_path / "train.yaml", expect=2).err.replace("\n", " ")
    assert "train.yaml: not YAML, while parsing a flow sequence" in said


def test_a_wrong_key_of_a_yaml_file_is_refused(tmp_path):
    (tmp_path / "train.yaml").write_text("model_name_or_path: m\ndataset_name: d\ndensty: 0.1\n")
    with pytest.raises(ValueError, match="--densty: no such option; did you mean '--density'"):
        parse(script_of("sft"), ["--config", str(tmp_path / "train.yaml")], "CAUSAL_LM")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_without_a_trainer(run, option):
    assert "sft, dpo, grpo, kto, reward" in run("train", option).out


@pytest.mark.parametrize(("target", "words"), [("q_prj", "did you mean 'q_proj'?"), ("q_proj", "nodata")])
def test_requests_that_do_not_fit_the_model_or_the_data(run, stand_in, tmp_path, target, words):
    where = ["--model_name_or_path", stand_in, "--dataset_name", tmp_path / "nodata", "--output_dir", tmp_path]
    assert words in run("train", "sft", *where, "--target_modules", target, *SHORT, expect=2).err.replace("\n", " ")
