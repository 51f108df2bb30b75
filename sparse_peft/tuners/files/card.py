"""Model cards that say what a sparse adapter needs, however they come about."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from peft.utils import CONFIG_NAME

from _sparse_peft_startup.install import install_command

from .checks import read_config_file
from .wrapped import wrap_once

TAG = "sparse-peft"
CARD_HEADING = "## How to load this adapter"
CARD_PARAGRAPH = f"""{CARD_HEADING}

This is a sparse adapter for [PEFT](https://github.com/huggingface/peft), trained with the plugin `sparse_peft`.
Install the plugin, in a checkout of it, and import it before the adapter is loaded:

```bash
{install_command()}
```

```python
import sparse_peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "<this adapter>")
```
"""
RATE_HEADING = "## Scale and learning rate"
FRAMEWORK_HEADING = "### Framework versions"


def read_card(folder: Path) -> ModelCard:
    """The card in a folder; an empty one from the usual template if there is none."""
    path = folder / "README.md"
    if not path.is_file():
        return ModelCard.from_template(ModelCardData())
    return ModelCard.load(path, ignore_metadata_errors=True)


def write_card(card: ModelCard, folder: Path) -> None:
    """Write a folder's card, whole or not at all."""
    staged = folder / ".README.md.tmp"
    card.save(staged)
    staged.replace(folder / "README.md")


def insert_section(card: ModelCard, heading: str, section: str) -> None:
    """Put a section before the card's list of versions, in place of the one that has this heading already."""
    head, _, rest = card.text.partition(f"{heading}\n")
    if rest:
        # a section ends where the next heading of any level stands
        lines = rest.splitlines()
        following = next((i for i, line in enumerate(lines) if line.startswith("#")), len(lines))
        tail = "\n".join(lines[following:])
    else:
        head, versions, tail = card.text.partition(FRAMEWORK_HEADING)
        tail = versions + tail
    card.text = f"{head.rstrip()}\n\n{section.strip()}\n\n{tail}"


def _data_of(card: ModelCard) -> ModelCardData:
    """The card's metadata, which huggingface_hub annotates as those of any repository."""
    return cast("ModelCardData", card.data)


def update_model_card(directory: str | os.PathLike, config: Mapping[str, Any] | None = None) -> None:
    """Add the paragraphs on the plugin, and on scale and learning rate, to the card PEFT wrote, once.

    PEFT writes one card, into the folder given to ``save_pretrained``; adapters other than ``default`` lie in a folder
    below it. A README that is no PEFT card is left alone.

    Args:
        directory: that the adapter is saved in.
        config: its config's fields; those of the file in the directory if None.
    """
    for folder in (Path(directory), Path(directory).parent):
        if (folder / "README.md").is_file():
            card = read_card(folder)
            if _data_of(card).library_name == "peft":
                before = card.text
                if CARD_HEADING not in before:
                    insert_section(card, CARD_HEADING, CARD_PARAGRAPH)
                if folder == Path(directory) and (section := _rate_section(folder, config)):
                    insert_section(card, RATE_HEADING, section)
                if card.text != before:
                    write_card(card, folder)
            return


def _rate_section(folder: Path, config: Mapping[str, Any] | None) -> str | None:
    """The section on scale and learning rate; None where the config has no rate."""
    path = folder / CONFIG_NAME
    if config is None:
        config = read_config_file(path) if path.is_file() else {}
    rate, scale = config.get("recommended_rate"), config.get("scale")
    if not isinstance(rate, float):
        return None
    factor = f"The delta is {scale:g} times the trained values. " if isinstance(scale, (int, float)) else ""
    return f"{RATE_HEADING}\n\n{factor}A learning rate of {rate:.1e} with AdamW suits further training.\n"


def complete_card(directory: str | os.PathLike, tags: set[str], base_model: str | None) -> None:
    """Turn whatever card transformers has written into an adapter's, with these tags besides its own."""
    card = read_card(Path(directory))
    data = _data_of(card)
    data.library_name = "peft"
    data.tags = sorted({*(data.tags or []), TAG, *tags})
    if base_model:
        data.base_model = base_model
    write_card(card, Path(directory))
    update_model_card(directory)


def is_sparse(model: PeftModel) -> bool:
    """Whether any adapter of the model is one of this package's methods."""
    types = [getattr(config.peft_type, "value", config.peft_type) for config in model.peft_config.values()]
    return any(str(kind).startswith("SPARSE_PEFT_") for kind in types)


def guard_model_cards() -> None:
    """Let the card of a sparse adapter say what it needs where PEFT's own card is written anew, or lost.

    transformers' ``Trainer`` rewrites its folder's card and calls PEFT for its part of it. ``PeftModel.push_to_hub``
    is transformers' too: it replaces PEFT's card by one for transformers models, without the base
    model and the tags. PEFT offers no hook for either; other adapters are left alone.
    """
    wrap_once(PeftModel, "create_or_update_model_card", _write_card)
    wrap_once(PeftModel, "_upload_modified_files", _upload_with_card)


def _write_card(write: Callable[..., None], model: PeftModel, output_dir: str) -> None:
    """Say in the card of a sparse adapter how to load it, and keep its tags."""
    tags = _data_of(read_card(Path(output_dir))).tags
    write(model, output_dir)
    if is_sparse(model):
        # PEFT drops the tags that were there; those that name a base model may be of another one
        kept = {tag for tag in tags or [] if not tag.startswith("base_model:")}
        complete_card(output_dir, kept, None)


def _upload_with_card(
    upload: Callable[..., Any], model: PeftModel, working_dir: str, *args: Any, **kwargs: Any
) -> Any:
    """Upload a sparse adapter with PEFT's card."""
    if is_sparse(model):
        model.create_or_update_model_card(working_dir)
    return upload(model, working_dir, *args, **kwargs)
