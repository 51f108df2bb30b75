"""What makes PEFT's MetaMathQA scripts run without a GPU and without a network: to try the driver, not to compare."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import peft.utils
import torch
from datasets import Dataset, DatasetDict

PROSE = [
    "A sum is the result of an addition. Its terms may be taken in any order.",
    "The King James Bible is a translation that was finished in the year 1611.",
]
# Functions that the scripts call on the accelerator's module and that torch.cpu does not have.
UNMEASURED = ("max_memory_reserved", "memory_allocated", "memory_reserved", "reset_peak_memory_stats")


def _nothing(*_: Any) -> int:
    return 0


@contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """PEFT's scripts refuse to be imported without a GPU, and then take whatever device there is.

    Memory is not measured: its figures are zero.
    """
    functions = {name: _nothing for name in (*UNMEASURED, "manual_seed_all", "empty_cache")}
    functions["get_device_name"] = lambda *_: "cpu"
    added = [name for name in functions if not hasattr(torch.cpu, name)]
    for name in added:
        setattr(torch.cpu, name, functions[name])
    infer_device = peft.utils.infer_device
    peft.utils.infer_device = lambda: "cuda"
    try:
        yield
    finally:
        peft.utils.infer_device = infer_device
        for name in added:
            delattr(torch.cpu, name)


def use_cpu(utils: ModuleType) -> None:
    """The imported scripts compute on the CPU."""
    utils.device = "cpu"
    utils.infer_device = peft.utils.infer_device = lambda: "cpu"


def made_up_arithmetic(data: ModuleType, rows: int) -> None:
    """Sums in place of MetaMathQA and GSM8K, and two sentences in place of Wikipedia.

    Args:
        data: PEFT's module.
        rows: of the training set; the others have an eighth of them.
    """
    few = max(2, rows // 8)

    def load(name: str, *_: Any) -> DatasetDict:
        if "MetaMathQA" in name:
            return DatasetDict(train=_sums(rows, 0, "query", "response", "The answer is: ", type="made up"))
        sets = {split: _sums(few, seed, "question", "answer", "#### ") for split, seed in (("train", 1), ("test", 2))}
        return DatasetDict(sets)

    data.load_dataset = load
    data.get_wiki_small = lambda: PROSE
    data.VALID_SIZE = few


def _sums(rows: int, seed: int, question: str, answer: str, mark: str, **more: str) -> Dataset:
    numbers = random.Random(seed)
    terms = [(numbers.randrange(100), numbers.randrange(100)) for _ in range(rows)]
    columns = {
        question: [f"What is {a} plus {b}?" for a, b in terms],
        answer: [f"{a} plus {b} is {a + b}.\n{mark}{a + b}" for a, b in terms],
    }
    columns |= {name: [value] * rows for name, value in more.items()}
    if more:
        columns["original_question"] = columns[question]
    return Dataset.from_dict(columns)
