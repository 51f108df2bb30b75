"""Model cards that say what a sparse adapter is and needs, however they come about."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from ...dynamics.records import plot_captions
from ...staging import when_saved
from .card_sections import (
    LOAD_HEADING,
    PLOTS_HEADING,
    TRAINED_HEADING,
    images_of,
    load_section,
    plots_section,
    trained_section,
    with_source,
)
from .saved_adapter import adapters_in
from .wrapped import wrap_once
from .writes import is_sparse

TAG = "sparse-peft"
FRAMEWORK_HEADING = "### Framework versions"
# transformers' sentence in the template, when it pushes a model
BLANK_DESCRIPTION = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
UNFILLED = "[More Information Needed]"
SUPPORTS_CAPTION = {"supports.png": "Where the trained entries are"}


def new_card(
    base_model: str | None = None, data: ModelCardData | None = None, kind: str = "Sparse adapter"
) -> ModelCard:
    """A card without sections.

    Args:
        base_model: name of the base model, for the title.
        data: metadata.
        kind: what the card is of.
    """
    of_base = f" of {base_model.rstrip('/').rpartition('/')[2]}" if base_model else ""
    return ModelCard(f"---\n{(data or ModelCardData()).to_yaml()}\n---\n\n# {kind}{of_base}\n")


def read_card(folder: Path) -> ModelCard:
    """The card in a folder; a new one if there is none."""
    path = folder / "README.md"
    return ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else new_card()


def is_blank(card: ModelCard) -> bool:
    """Whether nobody has filled in the Hub's template, which PEFT and transformers start cards with."""
    if UNFILLED not in card.text:
        return False
    known = set(ModelCard.from_template(_data_of(card)).text.splitlines())
    lines = [line for line in card.text.partition(FRAMEWORK_HEADING)[0].splitlines() if line.strip()]
    return all(line in known or line.startswith(BLANK_DESCRIPTION) for line in lines)


def write_card(card: ModelCard, folder: Path) -> None:
    """Write a folder's card, whole or not at all."""
    staged = folder / ".README.md.tmp"
    card.save(staged)
    staged.replace(folder / "README.md")


def section_of(text: str, heading: str) -> str:
    """A section of a card, up to the next heading of any level; empty if it is not there."""
    _, _, rest = text.partition(f"{heading}\n")
    return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]


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


def complete_card(directory: str | os.PathLike, tags: set[str], base_model: str | None) -> None:
    """Turn the card in a folder into an adapter's: metadata, and sections on what trains, plots and loading.

    What stands in other sections stays, and so does the example, once it is there.

    Args:
        directory: of the adapters; its card is made if need be.
        tags: besides those of the card.
        base_model: name of the base model; the card's if None.
    """
    folder = Path(directory)
    card = read_card(folder)
    data = _data_of(card)
    data.library_name = "peft"
    # PEFT's tag for a base model without a name has nothing behind its last colon
    data.tags = sorted(tag for tag in {*(data.tags or []), TAG, *tags} if not tag.endswith(":"))
    data.base_model = base_model or data.base_model or None
    if adapters := adapters_in(folder):
        insert_section(card, TRAINED_HEADING, trained_section(adapters))
        if LOAD_HEADING not in card.text:
            insert_section(card, LOAD_HEADING, load_section(adapters))
    show_plots(card, folder)
    write_card(card, folder)


def show_plots(card: ModelCard, folder: Path, names: Iterable[str] = ()) -> None:
    """Show images in a card: those of training and those named, besides the ones that it has.

    Args:
        card: changed in place.
        folder: the card's.
        names: of image files in the folder.
    """
    captions = SUPPORTS_CAPTION | plot_captions()
    shown = images_of(card.text)
    drawn = [name for name in (*captions, *names) if name.endswith(".png") and (folder / name).is_file()]
    new = {name: captions.get(name, name) for name in drawn if name not in shown}
    if new:
        own = images_of(section_of(card.text, PLOTS_HEADING))
        insert_section(card, PLOTS_HEADING, plots_section(own | new))


def guard_model_cards() -> None:
    """Let the card of a sparse adapter say what it needs where PEFT's own card is written anew, or lost.

    transformers' ``Trainer`` rewrites its folder's card and calls PEFT for its part of it. ``PeftModel.push_to_hub``
    is transformers' too: it replaces PEFT's card by one for transformers models, without the base
    model and the tags. PEFT offers no hook for either; other adapters are left alone.
    """
    wrap_once(PeftModel, "create_or_update_model_card", _write_card)
    wrap_once(PeftModel, "_upload_modified_files", _upload_with_card)


def _write_card(write: Callable[..., None], model: PeftModel, output_dir: str) -> None:
    """Say in the card of a sparse adapter what trained and how to load it, and keep its tags."""
    if not is_sparse(model):
        write(model, output_dir)
        return
    folder = Path(output_dir)
    card = read_card(folder)
    # PEFT drops the tags that were there; those that name a base model may be of another one
    kept = {tag for tag in _data_of(card).tags or [] if not tag.startswith("base_model:")}
    if is_blank(card) or not (folder / "README.md").is_file():
        write_card(new_card(getattr(model.get_base_model(), "name_or_path", None), _data_of(card)), folder)
    write(model, output_dir)
    when_saved(lambda: complete_card(folder, kept, None))


def _upload_with_card(
    upload: Callable[..., Any], model: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    """Upload a sparse adapter with PEFT's card."""
    if is_sparse(model):
        model.create_or_update_model_card(working_dir)
        name_source(Path(working_dir), repo_id)
    return upload(model, working_dir, repo_id, *args, **kwargs)


def name_source(folder: Path, repo_id: str) -> None:
    """Let the example in a card load the adapter from the Hub."""
    card = read_card(folder)
    card.text = with_source(card.text, repo_id)
    write_card(card, folder)
