"""Reinforcement learning with TRL's GRPO: sums, judged by the verifier of `reasoning-gym`.

`python -m examples.grpo` needs what `make venv` installs and `benchmarks/quality/requirements.txt`.
SmolLM2-135M-Instruct samples several answers to each question; those that are right are reinforced. The smallest
weights train. Unseen questions are answered greedily before and after. `--smoke` takes a random model of some thousand
parameters and rewards digits, in seconds. Exits with 1 if the reward of unseen questions did not rise.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import

import torch
import typer
from datasets import Dataset
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.quality.packages import package
from examples.results import console, report_checks, show_table
from examples.smollm2 import load_model, load_tokenizer
from sparse_peft import SparseConfig, SparsityCallback

NUMBER = re.compile(r"-?\d+")
TRAIN_SEED, TEST_SEED = 0, 1
Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class Task:
    """Questions to learn from, unseen ones, and what an answer to one is worth.

    Attributes:
        train, unseen: rows with `prompt` and what the reward needs.
        reward: `reward(completions=[...], **columns)` in [0, 1], as TRL calls it.
    """

    train: Dataset
    unseen: Dataset
    reward: Reward


def sums(tokenizer: PreTrainedTokenizerBase, questions: int, unseen: int) -> Task:
    """Sums and differences of two digits, in the chat format; the last number of a completion is its answer."""
    gym = package("reasoning_gym")

    def dataset(size: int, seed: int) -> Any:
        return gym.create_dataset(
            "chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=1
        )

    def prompt(question: str) -> str:
        message = {"role": "user", "content": f"{question} Answer with the number only."}
        return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def rows(entries: Iterable[dict]) -> Dataset:
        return Dataset.from_list([{"prompt": prompt(row["question"]), "answer": row["answer"]} for row in entries])

    verifier = dataset(questions, TRAIN_SEED)
    train = list(verifier)
    seen = {row["question"] for row in train}  # there are few sums of digits: other seeds ask the same
    others = islice((row for row in dataset(100 * unseen, TEST_SEED) if row["question"] not in seen), unseen)

    def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
        numbers = [NUMBER.findall(text) for text in completions]
        return [
            float(verifier.score_answer(found[-1] if found else None, {"answer": right}) == 1)
            for found, right in zip(numbers, answer, strict=True)
        ]

    return Task(rows(train), rows(others), reward)


def digits(questions: int, unseen: int) -> Task:
    """A stand-in for tests: the share of digits in a completion."""

    def rows(size: int) -> Dataset:
        return Dataset.from_dict({"prompt": [f"{number} + {number} =" for number in range(size)]})

    def reward(completions: list[str], **_: object) -> list[float]:
        return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]

    return Task(rows(questions), rows(unseen), reward)


def tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama that reads single characters, and its tokenizer."""
    characters = ["<pad>", "<eos>", "<unk>", *"0123456789+= abcdefghij"]
    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer = FastTokenizer(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(characters), pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval(), tokenizer


@torch.no_grad()
def mean_reward(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, length: int, batch: int = 8
) -> float:
    """The mean reward of greedy answers to the unseen questions."""
    model.eval()
    rewards: list[float] = []
    for start in range(0, len(task.unseen), batch):
        rows = task.unseen[start : start + batch]
        inputs = tokenizer(rows["prompt"], return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards += task.reward(completions=texts, **{name: rows[name] for name in rows if name != "prompt"})
    return sum(rewards) / len(rewards)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 30,
    questions: Annotated[int, typer.Option(min=1, help="Questions of a step.")] = 1,
    generations: Annotated[int, typer.Option(min=2, help="Sampled answers to each.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 8,
    unseen: Annotated[int, typer.Option(min=1, help="Unseen questions.")] = 32,
    selection: Annotated[str, typer.Option(help="Which weights train: magnitude_smallest, residual, ...")] = (
        "magnitude_smallest"
    ),
    density: Annotated[float, typer.Option(help="Share of the weights that trains.")] = 0.01,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 6e-5,
    smoke: Annotated[bool, typer.Option(help="A tiny random model and a made-up reward, for tests.")] = False,
) -> None:
    """Reinforce right answers of a small language model."""
    transformers_logging.disable_progress_bar()
    model, tokenizer = tiny_model() if smoke else (load_model(), load_tokenizer())
    make = digits if smoke else lambda *sizes: sums(tokenizer, *sizes)
    task = make(steps * questions, unseen)
    probe = tokenizer(task.unseen[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own = model(probe).logits
    before = mean_reward(model, tokenizer, task, length)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            reward_funcs=task.reward,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=questions * generations,
                num_generations=generations,
                max_completion_length=length,
                learning_rate=learning_rate,
                beta=0.0,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=max(1, steps // 6),
            ),
            train_dataset=task.train,
            processing_class=tokenizer,
            peft_config=SparseConfig(
                selection=selection, density=density, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[SparsityCallback()],
        )
        trainer.train()
    tuned = trainer.model
    after = mean_reward(tuned, tokenizer, task, length)
    show_table(
        f"GRPO, {unseen} unseen questions, {steps} steps",
        ["", "before", "after"],
        [["mean reward, greedy", f"{before:.3f}", f"{after:.3f}"]],
    )
    with torch.no_grad(), tuned.disable_adapter():
        restored = torch.equal(tuned(probe).logits, own)
    console.print(f"{density:.1%} of the linear layers' weights trained, selection={selection!r}")
    report_checks(
        {
            "the reward of unseen questions rose": after > before,
            "adapter disabled: the base's logits, bit for bit": restored,
        }
    )


if __name__ == "__main__":
    typer.run(main)
