"""``sparse-peft eval``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.markup import escape
from transformers import AutoModelForCausalLM, AutoTokenizer

from _sparse_peft_startup.install import install_advice

from ..structure import read_model_config
from .folders import adapter_folder
from .output import JsonOption, UsageError, answering, asked, show_table, table
from .texts import DeviceOption, DtypeOption, check_place


def eval(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder.", metavar="ADAPTER")],
    tasks: Annotated[str, typer.Option(help="lm-eval's names of what was trained for, with commas.")],
    keep: Annotated[str, typer.Option(help="Names of tasks that must not be forgotten, with commas.")] = "",
    base: Annotated[str | None, typer.Option(help="The base model; by default the adapter's own.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder of tasks of your own.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in each prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measure a model before and after its adapter with lm-eval, and what it forgot."""
    with answering("eval", as_json) as answer:
        if find_spec("lm_eval") is None:
            raise UsageError(f"eval needs lm-eval: {install_advice('eval')}")
        folder = adapter_folder(adapter)
        learnt, kept = names_in(tasks), names_in(keep)
        if not (learnt or kept):
            raise UsageError(f"--tasks {tasks!r}: the name of a task of lm-eval's is expected")
        if include_path is not None and not include_path.is_dir():
            raise UsageError(f"--include-path {include_path}: no such folder")
        check_place(dtype, device)
        model, tokenizer = load(folder, base, dtype, device)
        options = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
        with model.disable_adapter():
            before = measure(model, tokenizer, [*learnt, *kept], include_path, options)
        after = measure(model, tokenizer, [*learnt, *kept], include_path, options)
        scores = compared(before, after, kept)
        answer.content = {"adapter": str(folder), "scores": [asdict(score) for score in scores]}
        answer.show = lambda console: show(console, str(folder), scores)


def names_in(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def load(folder: Path, base: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """The model with the adapter, and its tokenizer: the adapter's own if it has one.

    Raises:
        UsageError: the adapter names no base model, or one that is not there.
    """
    name = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise UsageError(f"{folder}: the adapter names no base model; give --base")
    with asked():
        read_model_config(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    own = (folder / "tokenizer_config.json").is_file()
    return PeftModel.from_pretrained(model.to(device), folder).eval(), AutoTokenizer.from_pretrained(
        folder if own else name
    )


# ------------------------------------------------------------------ lm-eval


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task, metric: lm-eval's names.
        kept: whether the task is one that must not be forgotten.
        before, after: without the adapter, and with it.
        error: standard error of ``after``, if lm-eval gives one.
        forgotten: by how much a kept task got worse, at least 0; None for other tasks.
    """

    task: str
    metric: str
    kept: bool
    before: float
    after: float
    error: float | None
    forgotten: float | None


def measure(model: Any, tokenizer: Any, tasks: list[str], include: Path | None, options: dict[str, Any]) -> Any:
    """lm-eval's results of a model.

    Raises:
        UsageError: lm-eval does not know a task.
    """
    from lm_eval import simple_evaluate  # noqa: PLC0415  (an optional package)
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415  (an optional package)
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  (an optional package)

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-eval has no task {', '.join(unknown)}; --include-path names a folder of your own")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options["batch_size"])
    return simple_evaluate(model=lm, tasks=tasks, task_manager=manager, **options)


def compared(before: Any, after: Any, kept: list[str]) -> list[Score]:
    """Scores of two of lm-eval's results; groups and their tasks each have their own."""
    scores = []
    for task, found in after["results"].items():
        for key, value in found.items():
            metric, _, _ = key.partition(",")
            if isinstance(value, (int, float)) and not metric.endswith("_stderr") and "," in key:
                old, error = float(before["results"][task][key]), found.get(key.replace(",", "_stderr,", 1))
                rises = after["higher_is_better"].get(task, {}).get(metric, True)
                drop = max(0.0, old - value if rises else value - old)
                known = error if isinstance(error, (int, float)) else None
                forgotten = drop if task in kept else None
                scores.append(Score(task, metric, task in kept, old, float(value), known, forgotten))
    return scores


def show(console: Console, folder: str, scores: list[Score]) -> None:
    """Scores for people."""
    console.print(f"[bold]{escape(folder)}[/]", soft_wrap=True)
    rows = [
        [
            score.task,
            score.metric,
            f"{score.before:.4g}",
            f"{score.after:.4g}",
            "" if score.error is None else f"{score.error:.2g}",
            f"{score.after - score.before:+.4g}",
            "" if score.forgotten is None else f"{score.forgotten:.4g}",
        ]
        for score in scores
    ]
    columns = ["task", "metric", "before", "after", "± error", "change", "forgotten"]
    show_table(console, table(columns, rows))
    forgotten = [score.forgotten for score in scores if score.forgotten is not None]
    if forgotten:
        console.print(f"[bold]forgotten[/], mean of {len(forgotten)}: {sum(forgotten) / len(forgotten):.4g}")
