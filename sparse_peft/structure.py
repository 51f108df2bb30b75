"""Models without weights, built from their configs."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants, hf_hub_download, model_info
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

EXPECTED = "a model's folder, its config.json or its name on the Hub is expected"
SECONDS = 10.0  # that the Hub may take to answer
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # of a repository, with or without its owner


def read_model_config(model: str | os.PathLike, revision: str | None = None) -> PretrainedConfig:
    """A model's config from its folder, its ``config.json`` or the Hub; no code of it is run.

    Args:
        model: path of the folder or file; where it does not exist, the model's name on the Hub. Of that only
            ``config.json`` is downloaded, or taken from the cache.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: there is no such file or folder, and the Hub does not have it or is out of reach.
        ValueError: it is no transformers config, or one of an adapter.
    """
    path = Path(model)
    if not path.exists():
        path = _config_on_hub(os.fspath(model), revision)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        is_adapter = (path / "adapter_config.json").is_file()
        raise ValueError(
            f"{path}: no config.json in it; "
            + ("this is an adapter: give the folder of its base model" if is_adapter else "a model's is expected")
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind is None:
        what = "an adapter's config" if isinstance(content, dict) and "peft_type" in content else "no model's config"
        raise ValueError(f"{file} has no model_type: it is {what}; one of a transformers model is expected")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a config's constructor may raise anything
        reason = _first_line(error)
        raise ValueError(f"{file}: transformers {transformers.__version__} cannot use it ({reason})") from error


def _config_on_hub(name: str, revision: str | None) -> Path:
    """The file of a model's config: of the Hub's cache, or else downloaded."""
    if HUB_NAME.fullmatch(name) is None:
        raise FileNotFoundError(f"{name}: no such file or folder; {EXPECTED}")
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        model_info(name, timeout=SECONDS)  # one attempt, where a download makes six
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # of whichever HTTP client huggingface_hub uses
        raise FileNotFoundError(f"{name}: no such folder, and {_why_not(error)}; {EXPECTED}") from error


def _why_not(error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return "not in the Hub's cache, while HF_HUB_OFFLINE forbids downloads"
    if isinstance(error, GatedRepoError):
        return "the Hub gives it on request only: ask for access on its page, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such model, or it is private and needs `hf auth login`"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return "the Hub's model of this name has no config.json"
    return f"the Hub at {constants.ENDPOINT} cannot be reached"


def named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that the config names; None if it names none."""
    for name in config.architectures or []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device: its layers and shapes, without memory for a single weight.

    Args:
        config: the model's; a quantisation in it is left out. Where it names no class, it is a language model if
            transformers has one for it, and else the model's body.
        dtype: of its parameters; by default the config's.

    Raises:
        ValueError: the config's values do not make a model.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    named = named_class(config)
    if named is not None:
        make = named._from_config
    else:
        has_head = type(config) in AutoModelForCausalLM._model_mapping
        make = (AutoModelForCausalLM if has_head else AutoModel).from_config
    try:
        with torch.device("meta"):
            model = make(config, **({} if dtype is None else {"dtype": dtype}))
        model.tie_weights()  # which transformers 5.0 leaves to loading
    except Exception as error:  # a model's constructor may raise anything
        kind = config.model_type
        raise ValueError(f"no model can be built of this config of a {kind} ({_first_line(error)})") from error
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
