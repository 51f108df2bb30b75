"""``python -m benchmarks.grpo``: GRPO whose answers come from an engine in another process, synced after each step.

SmolLM2-135M-Instruct learns sums of two digits. TRL's ``GRPOTrainer`` trains; the engine of ``benchmarks.rollouts``
answers. A sparse adapter's engine gets publications, LoRA's the whole merged model. After each step both processes
compute the log-probabilities of the last answers. The reward is 1 if the last number of an answer is right, as
``reasoning-gym`` judges it, else 0.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Annotated, Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func may change in TRL

import torch
import typer
from peft import LoraConfig, PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from examples.grpo import Task, mean_reward, sums
from examples.smollm2 import load_model, load_tokenizer
from sparse_peft import SparseConfig, SparsityCallback
from sparse_peft.sync import WeightSyncCallback

from .report import environment, write_json
from .rollouts import EngineProcess, Load, padded, token_log_probabilities
from .sync import merged_weights

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPARED = 4  # answers of a step
TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "magnitude_smallest": lambda: SparseConfig(selection="magnitude_smallest", density=0.01, **TARGETS),
    "residual": lambda: SparseConfig(selection="residual", density=0.01, **TARGETS),
    "lora": lambda: LoraConfig(r=16, lora_alpha=32, **TARGETS),
}


@dataclass(frozen=True)
class Plan:
    """What one run trains.

    Attributes:
        method: one of ``METHODS``.
        dtype: of the base model, in both processes.
        seed: of the adapter, the order of questions and the answers.
        learning_rate: of AdamW, constant.
        steps: of the optimizer.
        questions: of a step.
        generations: answers to each.
        length: tokens of an answer.
        unseen: questions that are answered greedily before and after.
    """

    method: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    learning_rate: float = 6e-5
    steps: int = 40
    questions: int = 2
    generations: int = 8
    length: int = 8
    unseen: int = 64


@dataclass
class Step:
    """What one step cost and gave.

    Attributes:
        bytes: of the sync after it, as sent.
        seconds: of this sync, from the trainer's weights to the engine's.
        equal: whether trainer and engine give the answers' tokens the same log-probabilities, bit for bit.
        difference: the largest one between these log-probabilities.
        full_seconds: of sending the whole merged model instead; None where that was not measured.
        reward: mean over the answers that the step trained on.
    """

    bytes: int
    seconds: float
    equal: bool
    difference: float
    full_seconds: float | None = None
    reward: float = float("nan")


@dataclass
class Run:
    """One trained adapter.

    Attributes:
        plan: its fields.
        steps: each step's.
        first: bytes and seconds of the sync before the first step.
        full_bytes: of the whole merged model.
        before: mean reward of greedy answers to unseen questions before training.
        after: likewise after training.
        seconds: of training, everything included.
    """

    plan: dict[str, Any]
    steps: list[Step]
    first: tuple[int, float]
    full_bytes: int
    before: float
    after: float
    seconds: float


@dataclass
class Rollouts:
    """TRL's ``rollout_func``: answers from the engine.

    Attributes:
        last: prompts and answers of the last call, as tokens.
    """

    engine: EngineProcess
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    calls: int = 0
    last: list[list[int]] = field(default_factory=list)

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        seed = 1000 * self.plan.seed + self.calls
        found = self.engine.sample(ids, self.plan.length, seed, self.tokenizer.eos_token_id)
        self.calls += 1
        self.last = [p + c for p, c in zip(ids, found["completions"], strict=True)]
        return {"prompt_ids": ids, "completion_ids": found["completions"], "logprobs": found["log_probabilities"]}


class FullSync(TrainerCallback):
    """Sends the merged model after each step, as trainers without sparse sync do.

    Args:
        engine: takes it.
        names: of the base model's parameters.

    Attributes:
        bytes_sent: of all messages.
        size: bytes of one.
    """

    def __init__(self, engine: EngineProcess, names: Sequence[str]):
        self.engine, self.names, self.bytes_sent, self.size = engine, names, 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Send the model as it is."""
        self.on_step_end(args, state, control, model=model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Send what the step made of it."""
        message = merged_weights(model, self.names)
        self.engine.replace_weights(message)
        self.size = len(message)
        self.bytes_sent += self.size


class Measured(TrainerCallback):
    """Times a callback's syncs, and compares trainer and engine after each.

    Args:
        sync: the callback.
        full: what the engine would be sent without sparse sync; every ``every`` steps it is, to time it.
        rollouts: whose last answers are compared.
        every: steps between two full syncs; the sparse one before has given the engine the same bits.
    """

    def __init__(self, sync: TrainerCallback, full: FullSync, rollouts: Rollouts, every: int = 5):
        self.sync, self.full, self.rollouts, self.every = sync, full, rollouts, every
        self.first: tuple[int, float] = (0, 0.0)
        self.steps: list[Step] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first sync."""
        self.first = self._timed(self.sync.on_train_begin, *args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The sync after a step."""
        sent, seconds = self._timed(self.sync.on_step_end, *args, **kwargs)
        equal, difference = compare(kwargs["model"], self.rollouts)
        step = Step(sent, seconds, equal, difference)
        if isinstance(self.sync, FullSync):
            step.full_seconds = seconds
        elif len(self.steps) % self.every == 0:
            _, step.full_seconds = self._timed(self.full.on_step_end, *args, **kwargs)
        self.steps.append(step)

    def _sent(self) -> int:
        """Bytes of all messages until now."""
        return self.full.bytes_sent + self.rollouts.engine.patches.bytes_sent

    def _timed(self, send: Callable[..., None], *args: Any, **kwargs: Any) -> tuple[int, float]:
        before, began = self._sent(), perf_counter()
        send(*args, **kwargs)
        return self._sent() - before, perf_counter() - began


def compare(model: PeftModel, rollouts: Rollouts) -> tuple[bool, float]:
    """Whether trainer and engine give the last answers' tokens equal log-probabilities, and how far they differ."""
    tokens = padded(rollouts.last[:COMPARED], rollouts.tokenizer.eos_token_id)
    own, engines = token_log_probabilities(model, tokens), rollouts.engine.token_log_probabilities(tokens)
    return torch.equal(own, engines), float((own - engines).abs().max())


def settings(plan: Plan, folder: str) -> GRPOConfig:
    """TRL's."""
    return GRPOConfig(
        output_dir=folder,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.questions * plan.generations,
        num_generations=plan.generations,
        max_completion_length=plan.length,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        seed=plan.seed,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )


class Rewards:
    """TRL's reward function, which keeps the mean reward of each step's answers.

    Args:
        task: whose reward.
    """

    def __init__(self, task: Task):
        self.task, self.means = task, list[float]()
        self.__name__ = "reward"

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        found = self.task.reward(completions=completions, **columns)
        self.means.append(mean(found))
        return found


def train(
    plan: Plan, config: PeftConfig, load: Load, tokenizer: PreTrainedTokenizerBase, task: Task, context: Any = None
) -> Run:
    """One run: an engine's process, and training in this one.

    Args:
        plan: what to train.
        config: the adapter's.
        load: makes the base model, here and in the engine's process.
        tokenizer: the model's.
        task: questions and reward.
        context: how the engine's process is started.
    """
    with EngineProcess(load, context) as engine, tempfile.TemporaryDirectory() as folder:
        model = load()
        before, names = mean_reward(model, tokenizer, task, plan.length), [n for n, _ in model.named_parameters()]
        rollouts, rewards, full = Rollouts(engine, tokenizer, plan), Rewards(task), FullSync(engine, names)
        sync = full if isinstance(config, LoraConfig) else WeightSyncCallback(engine.patches)
        measured = Measured(sync, full, rollouts)
        torch.manual_seed(plan.seed)
        trainer = GRPOTrainer(
            model,
            reward_funcs=rewards,
            args=settings(plan, folder),
            train_dataset=task.train,
            processing_class=tokenizer,
            peft_config=config,
            rollout_func=rollouts,
            callbacks=[SparsityCallback(), measured],
        )
        began = perf_counter()
        trainer.train()
        seconds = perf_counter() - began
        for step, reward in zip(measured.steps, rewards.means, strict=True):
            step.reward = reward
        after = mean_reward(trainer.model, tokenizer, task, plan.length)
        return Run(asdict(plan), measured.steps, measured.first, full.size, before, after, seconds)


# ------------------------------------------------------------------------------------------------------------- results


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file; none if it is not there."""
    return json.loads(path.read_text())["runs"] if path.is_file() else []


def row(run: dict[str, Any]) -> list[str]:
    """A run in the table."""
    plan, steps = run["plan"], run["steps"]
    fifth, rewards = max(1, len(steps) // 5), [step["reward"] for step in steps]
    full = [step for step in steps if step["full_seconds"] is not None]
    share = median(step["seconds"] / step["full_seconds"] for step in full)
    return [
        plan["method"],
        plan["dtype"],
        f"{plan['learning_rate']:g}",
        str(plan["seed"]),
        f"{mean(rewards[:fifth]):.2f} -> {mean(rewards[-fifth:]):.2f}",
        f"{run['before']:.2f} -> {run['after']:.2f}",
        f"{median(step['bytes'] for step in steps) / 1e6:.2f}",
        f"{median(step['bytes'] for step in steps) / run['full_bytes']:.2%}",
        f"{median(step['seconds'] for step in steps):.2f}",
        f"{share:.2f}",
        f"{sum(step['equal'] for step in steps)}/{len(steps)}",
        f"{max(step['difference'] for step in steps):.1e}",
        f"{run['seconds'] / 60:.1f}",
    ]


TITLES = (
    *("method", "base", "rate", "seed", "reward, first -> last fifth", "unseen, greedy", "sync, MB", "of full"),
    *("seconds", "/ full", "equal steps", "largest difference", "minutes"),
)


def table(runs: list[dict[str, Any]]) -> Table:
    """All runs of a results file."""
    found = Table(title="GRPO with an engine in another process, SmolLM2-135M-Instruct, sums of two digits")
    for title in TITLES:
        found.add_column(title, justify="right")
    for run in runs:
        found.add_row(*row(run))
    return found


def main(
    method: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(METHODS)}; default all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default 0.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the base model.")] = "float32",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    questions: Annotated[int, typer.Option(min=1, help="Questions of a step.")] = 2,
    generations: Annotated[int, typer.Option(min=2, help="Sampled answers to each.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 6e-5,
    unseen: Annotated[int, typer.Option(min=1, help="Unseen questions.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads, in each process.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON file; runs that it has are not repeated.")] = (
        RESULTS / "grpo-smollm2-cpu.json"
    ),
) -> None:
    """Reward, and bytes and seconds of each sync, run after run."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer, console = load_tokenizer(), Console(width=180)
    task = sums(tokenizer, steps * questions, unseen)
    load = partial(load_model, DTYPES[dtype])
    for name in method or METHODS:
        for number in seed or [0]:
            plan = Plan(name, dtype, number, learning_rate, steps, questions, generations, unseen=unseen)
            if asdict(plan) in [run["plan"] for run in read_runs(output)]:
                continue
            run = asdict(train(plan, METHODS[name](), load, tokenizer, task))
            machine, runs = environment(torch.device("cpu")), [*read_runs(output), run]  # others may run at once
            write_json(output, {"format": 1, **machine, "runs": runs})
            console.print(f"[dim]{name}, seed {number}: {run['seconds']:.0f} s")
    console.print(table(read_runs(output)))
    console.print(f"in {output}")


if __name__ == "__main__":
    typer.run(main)
