"""Domains of running text, as blocks of token ids."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from examples.smollm2 import kjv_text, pack_blocks, python_topics, split_paragraphs

Block = list[int]


def library_sources() -> str:
    """The modules of Python's standard library, one after the other."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("[a-z]*.py")))


DOMAINS: dict[str, Callable[[], str]] = {"kjv": kjv_text, "topics": python_topics, "code": library_sources}


def spread(blocks: Sequence[Block], number: int) -> list[Block]:
    """So many of the blocks, evenly spaced."""
    if number > len(blocks):
        raise ValueError(f"number={number} blocks were asked for, the text fills only {len(blocks)}")
    return [blocks[index * len(blocks) // number] for index in range(number)]


class Domain:
    """Blocks of one text: for training, for choosing rates, and for the result.

    Attributes:
        train: the first blocks of the text's first nine tenths.
        validation: blocks of its last tenth, and ``test``: others of it.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, length: int, pool: int, held_out: int):
        text = DOMAINS[name]()
        self.name = name
        self.train = pack_blocks(tokenizer, split_paragraphs(text, "train"), length, pool)
        unseen = spread(pack_blocks(tokenizer, split_paragraphs(text, "heldout"), length), 2 * held_out)
        self.validation, self.test = unseen[::2], unseen[1::2]
