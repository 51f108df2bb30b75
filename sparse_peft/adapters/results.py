"""Metrics and plots of an adapter in its folder and model card, before it is pushed to the Hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from peft import PeftConfig

from ..constraints import validated
from ..tuners.files.card import complete_card, insert_section, read_card, section_of, show_plots, write_card
from ..tuners.files.card_sections import images_of

HEADING = "## Results"
# The Hub's names of PEFT's task types.
TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def add_results(
    folder: str | os.PathLike,
    metrics: Mapping[str, float],
    *,
    dataset: str,
    split: str | None = None,
    task: str | None = None,
    plots: Sequence[str | os.PathLike] = (),
) -> Path:
    """Put metrics and plots into an adapter's folder and card; PEFT's saving and pushing keep them.

    The metrics become the card's ``model-index``, which the Hub shows and searches, and a table. Metrics of the same
    name on the same data are replaced, others stay.

    Args:
        folder: of an adapter, as ``save_pretrained`` or [`save_adapter`][sparse_peft.adapters.save_adapter] wrote it.
        metrics: ``{name: value}``, such as ``trainer.evaluate()`` returns.
        dataset: the Hub's name of the data they were measured on, or any name.
        split: of the data.
        task: the Hub's name of the task; from the adapter's config by default.
        plots: image files to show, such as [`plot_report`][sparse_peft.report.plot_report] makes; copied into the
            folder if they lie elsewhere. Other files among them are copied, not shown.

    Returns:
        The card's path.

    Raises:
        ValueError: no adapter in the folder, a metric that is no finite number, a task that is not known, or a plot
            that does not exist.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import add_results
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), SparseConfig(target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     card = add_results(folder, {"accuracy": 0.75}, dataset="foxes", task="text-classification")
        ...     "| accuracy | 0.75 | foxes |" in card.read_text()
        True
    """
    folder = Path(folder)
    config = PeftConfig.from_pretrained(os.fspath(folder))
    task = task or _task_of(config, folder)
    metrics = validated("metrics", metrics, dict[str, float])
    _check_files(plots)
    shown = [_into(folder, Path(plot)) for plot in plots]

    complete_card(folder, set(), config.base_model_name_or_path)
    card = read_card(folder)
    data: Any = card.data
    found = [_result(name, value, dataset, split, task) for name, value in metrics.items()]
    kept = [old for old in data.eval_results or [] if not any(old.is_equal_except_value(new) for new in found)]
    data.model_name = data.model_name or folder.resolve().name
    data.eval_results = kept + found
    earlier = images_of(section_of(card.text, HEADING))  # where version 0.1.0 showed them
    insert_section(card, HEADING, _section(data.eval_results))
    show_plots(card, folder, [*earlier, *shown])
    write_card(card, folder)
    return folder / "README.md"


def _task_of(config: PeftConfig, folder: Path) -> str:
    task = TASKS.get(str(getattr(config.task_type, "value", config.task_type)))
    if task is None:
        raise ValueError(
            f"task: not given, and task_type={config.task_type!r} of {folder} names none; give the Hub's name of it, "
            "such as 'text-generation'"
        )
    return task


def _check_files(plots: Sequence[str | os.PathLike]) -> None:
    missing = [os.fspath(plot) for plot in plots if not Path(plot).is_file()]
    if missing:
        raise ValueError(f"plots: no such file: {', '.join(missing)}")


def _result(name: str, value: float, dataset: str, split: str | None, task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=name,
        metric_name=name,
        metric_value=value,
    )


def _into(folder: Path, file: Path) -> str:
    if file.resolve().parent != folder.resolve():
        staged = folder / f".{file.name}.tmp"
        shutil.copyfile(file, staged)
        staged.replace(folder / file.name)
    return file.name


def _section(results: Sequence[EvalResult]) -> str:
    lines = [HEADING, "", "| metric | value | data |", "|---|---|---|"]
    for result in results:
        data = f"{result.dataset_name} ({result.dataset_split})" if result.dataset_split else result.dataset_name
        value = f"{result.metric_value:.6g}" if isinstance(result.metric_value, float) else result.metric_value
        lines.append(f"| {result.metric_name or result.metric_type} | {value} | {data} |")
    return "\n".join(lines)
