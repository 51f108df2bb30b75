"""``sparse-peft train``: TRL's training scripts with a sparse adapter."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers.trainer
import typer
from rich.console import Console
from rich.markup import escape
from transformers import TrainerControl, TrainerState, TrainingArguments

from _sparse_peft_startup.install import install_advice
from _sparse_peft_startup.spelling import did_you_mean

from ..adapters import add_results
from ..constraints import describe, field_hints
from ..planning import PlanOptions, TrainingPlan, plan_training
from ..registry import method_named, methods
from ..report import plot_report
from ..structure import read_model_config
from ..training.callback import SparsityCallback
from ..tuners.base_config import BaseSparseConfig
from ..tuners.delta import Delta
from ..tuners.files.card import name_source
from ..tuners.traversal import configs_of
from ..tuners.unknown_fields import settable_fields
from .fields import METHOD_HELP, parse_value
from .output import bytes_text, console_for_people, count_text, fields_text, refuse, share_text

# {trainer: the task type of its model}
TRAINERS = {"sft": "CAUSAL_LM", "dpo": "CAUSAL_LM", "grpo": "CAUSAL_LM", "kto": "CAUSAL_LM", "reward": "SEQ_CLS"}
# Of the adapter's recommended rate, for a run whose user names none. GRPO was measured with half of it
# (docs/reinforcement_learning.md); the other trainers on preferences take as much.
RATE_SHARES = {"sft": 1.0, "dpo": 0.5, "grpo": 0.5, "kto": 0.5, "reward": 1.0}
# {trainer: the columns of its data}
COLUMNS = {
    "sft": "text, or messages, or prompt and completion",
    "dpo": "prompt, chosen and rejected",
    "grpo": "prompt",
    "kto": "prompt, completion and label",
    "reward": "chosen and rejected",
}
PREFIX = "adapter_"  # of a field whose name is an option of TRL's, too
BYTES_OF = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}


def train(
    context: typer.Context,
    trainer: Annotated[str, typer.Argument(help=f"One of {', '.join(TRAINERS)}.", metavar="TRAINER")],
) -> None:
    """Train an adapter with a script of TRL: its options and YAML files, and --method and the fields of its config."""
    try:
        script = script_of(trainer)
        arguments, config = parse(script, context.args, TRAINERS[trainer])
        plan = plan_of(config, *arguments)
    except (ValueError, TypeError, OSError) as error:
        refuse("train", error)
    report = Report(RATE_SHARES[trainer])
    try:
        folder = run_script(script, arguments, config, plan, report)
    except Exception as error:
        if report.model is not None or context.find_root().params.get("verbose"):
            raise
        refuse("train", ValueError(why_not_started(error, trainer, arguments[0])))
    console_for_people().print(f"[bold]{escape(str(folder))}[/]: the adapter", soft_wrap=True)


# the options behind the trainer are TRL's parser's, --help among them
train.context_settings = {  # type: ignore[attr-defined]
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}


# ------------------------------------------------------------------ options


def script_of(trainer: str) -> Any:
    """A module of TRL's scripts.

    Raises:
        ValueError: TRL is missing, or there is no such trainer.
    """
    if trainer not in TRAINERS:
        raise ValueError(f"{trainer!r}: one of {', '.join(TRAINERS)} is expected")
    if find_spec("trl") is None:
        raise ValueError(f"training needs TRL: {install_advice('trl')}")
    return import_module(f"trl.scripts.{trainer}")


def parse(script: Any, given: Sequence[str], task_type: str) -> tuple[list[Any], BaseSparseConfig]:
    """The arguments of the script's ``main``, and the adapter's config.

    Raises:
        ValueError: an unknown option, a value of another type, options of LoRA, no model or no data.
    """
    name = script.__name__.rpartition(".")[2]
    parser = script.make_parser(prog=f"sparse-peft train {name}")
    parser.usage = f"sparse-peft train {name} [--config FILE.yaml] [options]"
    own_rate = OwnRate(parser.get_default("learning_rate"))
    parser.set_defaults(use_cpu=not torch.accelerator.is_available(), learning_rate=own_rate)
    config_class = method_named(chosen_method(given)).config_class
    names = add_options(parser, config_class)
    *arguments, ours, left = parser.parse_args_and_config(list(given), return_remaining_strings=True)
    refuse_unknown(left, parser)
    data, _, model, mixture = arguments
    refuse_lora(model)
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path: a model's folder, or its name on the Hub, is expected")
    if data.dataset_name is None and not mixture.datasets:
        raise ValueError("--dataset_name: a data set's folder, or its name on the Hub, is expected")
    hints = field_hints(config_class)
    values = {name: getattr(ours, option) for option, name in names.items()}
    chosen = {
        name: parse_value(name, value, hints[name]) if isinstance(value, str) else value
        for name, value in values.items()
        if value is not None
    }
    config = config_class(**{"task_type": task_type, **chosen})
    refuse_looks_at_data(config)
    return arguments, config


class OwnRate(float):
    """A trainer's own learning rate, which is for training whole models and which the user did not ask for."""

    def __str__(self) -> str:
        return "what suits the adapter"


def chosen_method(given: Sequence[str]) -> str:
    """The method of the command line or of its YAML file; its fields are options."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    first.add_argument("--config")
    found, _ = first.parse_known_args(given)
    if found.method is not None or found.config is None:
        return found.method or "sparse"
    file = Path(found.config)
    if not file.is_file():
        raise ValueError(f"--config {file}: no such file")
    yaml = import_module("yaml")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file}: not YAML, {' '.join(str(error).split())}") from error
    return str(content.get("method", "sparse")) if isinstance(content, dict) else "sparse"


def add_options(parser: argparse.ArgumentParser, config_class: type[BaseSparseConfig]) -> dict[str, str]:
    """Add ``--method`` and the fields of a config; returns ``{option: field}``."""
    taken = {action.dest for action in parser._actions}
    group = parser.add_argument_group(f"the adapter, a {config_class.__name__}")
    group.add_argument("--method", default="sparse", choices=[method.name for method in methods()], help=METHOD_HELP)
    names = {f"{PREFIX}{name}" if name in taken else name: name for name in settable_fields(config_class)}
    for option, name in names.items():
        group.add_argument(*spellings(option), dest=option, metavar="VALUE", help=option_text(config_class, name))
    return names


def spellings(option: str) -> list[str]:
    return list(dict.fromkeys([f"--{option}", f"--{option.replace('_', '-')}"]))


def option_text(config_class: type[BaseSparseConfig], name: str) -> str:
    """What a field means and may hold, for argparse, to which % is special."""
    text = config_class.__dataclass_fields__[name].metadata["help"]
    return f"{text} ({describe(field_hints(config_class)[name])})".replace("%", "%%")


def refuse_unknown(left: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Refuse what of the command line and the YAML file the parser does not know.

    Raises:
        ValueError: names it, and the options that it may stand for.
    """
    if not left:
        return
    names = [text.partition("=")[0] for text in left if text.startswith("-")]
    if not names:
        raise ValueError(f"{' '.join(left)}: of no option; --model_name_or_path is the model, --dataset_name the data")
    raise ValueError(f"{', '.join(names)}: no such option{did_you_mean(names, parser._option_string_actions)}")


def refuse_lora(model: Any) -> None:
    """Refuse the options that describe a LoRA adapter, which would change nothing.

    Raises:
        ValueError: names them.
    """
    defaults = {field.name: field.default for field in fields(model) if field.default is not MISSING}
    lora = [name for name in defaults if name.startswith(("lora_", "use_peft", "use_rslora", "use_dora"))]
    given = [f"--{name}" for name in lora if getattr(model, name) != defaults[name]]
    if given:
        raise ValueError(f"{', '.join(given)}: options of LoRA; this command trains what --method names")


def refuse_looks_at_data(config: BaseSparseConfig) -> None:
    """Refuse positions that are chosen from data before training.

    Raises:
        ValueError: says how they are chosen.
    """
    if config.selection_needs in ("activation", "gradient"):
        raise ValueError(
            f"selection={getattr(config, 'selection', None)!r} looks at data before training, which this command does "
            "not do: call sparse_peft.select_support in Python, or take positions by weights, or ones that change in "
            "training"
        )


# ------------------------------------------------------------------ running


class Report(SparsityCallback):
    """Drives the adapter, prints what trains at the start, and keeps the model and its loss for the card.

    Args:
        rate_share: the learning rate of a run without one, as a share of the adapter's recommended rate.
    """

    def __init__(self, rate_share: float = 1.0) -> None:
        super().__init__()
        self.model: Any = None
        self.loss: float | None = None
        self.rate_share = rate_share
        self.rate_note = ""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not isinstance(args.learning_rate, OwnRate):
            return
        recommended = [config.recommended_rate for config in configs_of(kwargs["model"]).values()]
        args.learning_rate = float(args.learning_rate)
        if None not in recommended and "adam" in args.optim:
            share = "" if self.rate_share == 1 else f"{self.rate_share:g} of "
            self.rate_note = f", {share}what suits the adapter; --learning_rate sets another"
            args.learning_rate = self.rate_share * min(recommended)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.model = kwargs["model"]
        if state.is_world_process_zero:
            show_start(console_for_people(), self.model, args, self.rate_note)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.loss = next((entry["train_loss"] for entry in reversed(state.log_history) if "train_loss" in entry), None)


def show_start(console: Console, model: Any, args: TrainingArguments, rate_note: str) -> None:
    """What trains, with which rate and scale."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"[bold]trains[/] {count_text(trained)} parameters, {share_text(trained / total)} of the model")
    console.print(f"[bold]learning rate[/] {args.learning_rate:g}{rate_note}")
    scales = sorted({float(scale) for scale in scales_of(model)})
    if scales:
        span = f"{scales[0]:.4g}" + (f" to {scales[-1]:.4g}" if len(scales) > 1 else "")
        console.print(f"[bold]scale[/] {span}")


def scales_of(model: Any) -> Iterator[float]:
    """The factors between trained values and sparse deltas."""
    for module in model.modules():
        if isinstance(module, Delta):
            yield module.value_scale


def why_not_started(error: Exception, trainer: str, data: Any) -> str:
    """What stopped a run before its first step: mostly the data, which TRL looks at without a word of its own."""
    named = data.dataset_name
    text = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    if isinstance(error, (FileNotFoundError, ConnectionError)) and named is not None:
        what = "a file; the folder that it is in is expected" if Path(named).is_file() else "no such folder"
        return text if Path(named).is_dir() else f"--dataset_name {named}: {what}. {text}"
    if isinstance(error, KeyError):
        key = error.args[0]
        if key in (data.dataset_train_split, data.dataset_test_split):
            return f"{key!r}: no such split of the data"
        text = f"{key!r} is not in the data, whose rows have {COLUMNS[trainer]} for {trainer}"
    return f"{text}; `sparse-peft --verbose train {trainer} ...` shows where"


def show_plan(console: Console, plan: TrainingPlan) -> None:
    """A plan in three lines."""
    console.print(f"[bold]{plan.architecture}[/], {count_text(plan.parameters)} parameters, {plan.base} weights")
    console.print(f"[bold]{plan.method}[/]: {escape(fields_text(plan.config))}")
    needs = ", ".join(f"{need.name} {bytes_text(need.peak_bytes)}" for need in plan.needs)
    console.print(f"[bold]peak memory[/] of a step (estimate): {needs}")


def plan_of(config: BaseSparseConfig, _: Any, training: Any, model: Any, *__: Any) -> TrainingPlan | None:
    """What the first step takes; the longest row counts where the trainer limits it.

    Returns:
        None on processes that print nothing, for a model with code of its own, and where the weights decide how much
        trains.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it has no such layers.
    """
    own_code = any(getattr(part, "trust_remote_code", False) for part in (training, model))
    if own_code or training.process_index != 0:
        return None
    try:
        config.countable()
    except ValueError:
        return None
    model_config = read_model_config(model.model_name_or_path, model.model_revision)
    options = PlanOptions(
        base=BYTES_OF.get(str(model.dtype)),
        batch=training.per_device_train_batch_size,
        length=getattr(training, "max_length", None) or 1024,
        checkpointing=bool(training.gradient_checkpointing),
        flops=1.0,  # no time is shown, so nothing is measured
    )
    return plan_training(model_config, config, options)


def run_script(
    script: Any, arguments: list[Any], config: BaseSparseConfig, plan: TrainingPlan | None, report: Report
) -> Path:
    """Train, save and draw; returns the adapter's folder."""
    scripted, training, *_ = arguments
    if plan is not None:
        show_plan(console_for_people(), plan)
    folder = Path(training.output_dir)

    def write_card(trainer: Any, *_: Any, **__: Any) -> None:
        # TRL asks for a card with each checkpoint, and before it uploads the finished adapter
        if report.loss is not None and trainer.is_world_process_zero():
            complete(folder, report, scripted)
            name_source(folder, trainer.hub_model_id)

    with adapted(config, report, write_card):
        script.main(*arguments)
    if training.process_index == 0 and not training.push_to_hub:
        complete(folder, report, scripted)
    return folder


@contextmanager
def adapted(config: BaseSparseConfig, callback: SparsityCallback, write_card: Callable[..., None]) -> Iterator[None]:
    """Inside, TRL's scripts train this adapter, and every trainer has the callback; they offer no argument for it.

    TRL's own card begins with an example for a whole model of its own.
    """
    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, callback]
    trainer = import_module("trl.trainer.base_trainer")._BaseTrainer
    with ExitStack() as stack:
        stack.enter_context(replaced(import_module("trl"), "get_peft_config", lambda _: config))
        stack.enter_context(replaced(transformers.trainer, "DEFAULT_CALLBACKS", callbacks))
        stack.enter_context(replaced(trainer, "create_model_card", write_card))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def complete(folder: Path, report: Report, scripted: Any) -> None:
    """Put plots and the last losses into the adapter's folder and card."""
    drawn = plot_report(report.model, report.history, folder) if find_spec("matplotlib") is not None else []
    metrics = {} if report.loss is None else {"train_loss": report.loss}
    data = Path(scripted.dataset_name or "a mixture")
    add_results(folder, metrics, dataset=data.name if data.exists() else str(data), plots=drawn)
