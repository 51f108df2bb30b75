"""Sections of a model card about the adapters in its folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _sparse_peft_startup.install import install_command

from .saved_adapter import SavedAdapter

TRAINED_HEADING = "## What it trains"
LOAD_HEADING = "## How to load this adapter"
PLOTS_HEADING = "## Plots"
# transformers' loaders of PEFT's task types
LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
HEADS = (".score.", ".classifier.")  # of models that classify
# Fields with a row of their own, and those that say nothing about what was trained.
NO_SETTINGS = frozenset(("target_modules", "task_type", "scale", "init_weights", "modules_to_save", "save_dtype"))
ALWAYS_SHOWN = ("selection", "density")
MOST_NAMES = 12
SOURCE = 'adapter = "."  # this folder, or its name on the Hub'


# ------------------------------------------------------------------ what trains


def trained_section(adapters: Sequence[SavedAdapter]) -> str:
    """A table of facts, with a column for each adapter."""
    columns = [_facts(adapter) for adapter in adapters]
    labels = list(dict.fromkeys(label for facts in columns for label in facts))
    names = [f"`{adapter.name}`" for adapter in adapters] if len(adapters) > 1 else [""]
    rows = [["", *names], ["---"] * (1 + len(adapters))]
    rows += [[label, *(facts.get(label, "") for facts in columns)] for label in labels]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([TRAINED_HEADING, "", *lines])


def _facts(adapter: SavedAdapter) -> dict[str, str]:
    """``{what: text}``; what is not known is left out."""
    config, settings = adapter.config, _settings(adapter)
    found = {
        "base model": _model_link(config.get("base_model_name_or_path")),
        "config": f"`{adapter.config_class.__name__}`",
        "settings": ", ".join(f"`{name}={value!r}`" for name, value in settings.items()),
        "layers": _names(layer.rpartition(".")[2] for layer in adapter.layers),
        "trained parameters": _parameters(adapter),
        "trained entries": "" if adapter.entries is None else f"{adapter.entries:,}",
        "saved whole": _names(name.removeprefix("base_model.model.") for name in adapter.saved_whole),
        "scale": _scale(config.get("scale")),
        "learning rate": _rate(config.get("recommended_rate")),
        "file": _file(adapter),
        "version": f"sparse_peft {config.get('sparse_peft_version') or '0.1.0'}",
    }
    return {label: text for label, text in found.items() if text}


def _settings(adapter: SavedAdapter) -> dict[str, Any]:
    always = {name: adapter.config[name] for name in ALWAYS_SHOWN if adapter.config.get(name) is not None}
    shown = {**always, **adapter.settings}
    return {name: value for name, value in shown.items() if name not in NO_SETTINGS and len(repr(value)) < 100}


def _parameters(adapter: SavedAdapter) -> str:
    if not adapter.values:
        return ""
    share = f", {100 * adapter.parameters / adapter.weights:.3g} % of their weights" if adapter.weights else ""
    return f"{adapter.parameters:,} in {len(adapter.layers) or len(adapter.values)} layers{share}"


def _scale(scale: object) -> str:
    return f"{scale:.4g}: the delta is the trained values times this" if isinstance(scale, (int, float)) else ""


def _rate(rate: object) -> str:
    return f"{rate:.1e} with AdamW suits further training" if isinstance(rate, float) else ""


def _file(adapter: SavedAdapter) -> str:
    size = adapter.file_bytes
    if size is None:
        return ""
    return f"{size / 1e6:,.3g} MB" if size >= 1e6 else f"{size / 1e3:,.3g} kB"


def _names(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return ", ".join(f"`{name}`" for name in found[:MOST_NAMES]) + more


def _model_link(name: object) -> str:
    if not isinstance(name, str) or not name:
        return ""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return f"[`{name}`](https://huggingface.co/{name})" if on_hub else f"`{name}`"


# ------------------------------------------------------------------ how to load it


def load_section(adapters: Sequence[SavedAdapter]) -> str:
    """Installation and an example that loads the first adapter, and the others beside it."""
    return f"""{LOAD_HEADING}

The adapter needs [PEFT](https://github.com/huggingface/peft) and the plugin `sparse_peft`. In a checkout of it:

```bash
{install_command()}
```

```python
{_example(adapters)}
```"""


def _example(adapters: Sequence[SavedAdapter]) -> str:
    imports, base = _base_of(adapters[0])
    return "\n".join(
        [
            "import sparse_peft  # registers the methods with PEFT",
            "from peft import PeftModel",
            *imports,
            "",
            SOURCE,
            f"base = {base}" if base else "# base: the model that the adapter was trained on",
            *(_load_line(adapter, adapter is adapters[0]) for adapter in adapters),
        ]
    )


def _load_line(adapter: SavedAdapter, is_first: bool) -> str:
    named = adapter.name != "default"
    if is_first:
        options = f", adapter_name={adapter.name!r}, subfolder={adapter.name!r}" if named else ""
        return f"model = PeftModel.from_pretrained(base, adapter{options})"
    return f"model.load_adapter(adapter, {adapter.name!r}, subfolder={adapter.name!r})"


def _base_of(adapter: SavedAdapter) -> tuple[list[str], str]:
    """Imports, and the expression that loads the base model; empty where the config does not say which."""
    name, (library, loader) = adapter.config.get("base_model_name_or_path"), _loader_of(adapter.config)
    if not name or not loader:
        return [], ""
    labels = _labels(adapter)
    options = f", num_labels={labels}" if labels is not None else ""
    return [f"from {library} import {loader}"], f"{loader}.from_pretrained({name!r}{options})"


def _loader_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """``(library, class)`` that load the base model; empty if unknown."""
    task, mapping = config.get("task_type"), config.get("auto_mapping") or {}
    if task in LOADERS:
        return "transformers", LOADERS[task]
    library = str(mapping.get("parent_library", "")).partition(".")[0]
    return (
        (library, str(mapping.get("base_model_class", ""))) if library in ("transformers", "diffusers") else ("", "")
    )


def _labels(adapter: SavedAdapter) -> int | None:
    """Number of classes of the head that is saved with the adapter; None without one."""
    matrices = [t for n, t in adapter.saved_whole.items() if len(t.shape) == 2 and any(head in n for head in HEADS)]
    return min((tensor.shape[0] for tensor in matrices), default=None)


def with_source(text: str, source: str) -> str:
    """The card with this name of the adapter in its example, in place of the folder that it was saved in."""
    return text.replace(SOURCE, f'adapter = "{source}"')


# ------------------------------------------------------------------ plots


def plots_section(images: Mapping[str, str]) -> str:
    """Images of the folder.

    Args:
        images: ``{file: caption}``.
    """
    return "\n\n".join([PLOTS_HEADING, *(f"![{caption}]({name})" for name, caption in images.items())])


def images_of(text: str) -> dict[str, str]:
    """``{file: caption}`` of the images that a card shows on lines of their own."""
    return {name: caption for caption, name in re.findall(r"^!\[(.*)\]\((.+)\)$", text, flags=re.MULTILINE)}
