"""Train a few percent of a real language model's weights on the King James Bible, on a CPU, in a few minutes.

`make quickstart` installs what this needs and runs it; `python -m examples.quickstart --help` lists the options. It
trains with TRL, saves the adapter, loads it again in a fresh process, merges it, and exits with 1 if the held-out loss
did not fall or if any of the models that must agree differ in a single bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes out of installed packages; read on import

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and not __package__:  # `python examples/quickstart.py` has examples/ on the path alone
    sys.path.insert(0, str(ROOT))

from _sparse_peft_startup.quiet import quieten

if "--verbose" not in sys.argv:
    quieten()
    os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import typer
from datasets import Dataset
from peft import PeftConfig, PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from examples.results import console, report_checks
from examples.smollm2 import MODEL_ID, held_out_loss, kjv_blocks, load_model, load_tokenizer
from sparse_peft import (
    S2FTConfig,
    SaRAConfig,
    SketchConfig,
    SLTrainConfig,
    SnellaConfig,
    SoRAConfig,
    SparseConfig,
    SparsityCallback,
)

BLOCK = 128
BATCH = 4
HELD_OUT_BLOCKS = 24
PROMPTS = (
    "In the beginning",
    "And the king said unto his servants,",
    "The best way to learn a language is",
)


class Method(str, Enum):  # noqa: UP042
    sparse = "sparse"
    s2ft = "s2ft"
    sara = "sara"
    sora = "sora"
    sltrain = "sltrain"
    snella = "snella"
    sketch = "sketch"


# How much trains, and the learning rate, where the command line does not say.
DEFAULTS = {
    Method.sparse: (0.01, 2e-4),
    Method.s2ft: (0.03, 2e-4),
    Method.sara: (0.01, 2e-4),
    Method.sora: (0.5, 2e-3),
    Method.sltrain: (0.005, 2e-4),
    Method.snella: (0.1, 3e-3),
    Method.sketch: (1.0, 1e-3),
}
# Methods whose merged weight is a rounded sum; the others' holds the very entries that they computed with.
MERGE_ROUNDS = (Method.sora, Method.sltrain, Method.snella, Method.sketch)
MERGE_TOLERANCE = 1e-3  # of logits, whose size is about 20


def config_of(method: Method, share: float) -> PeftConfig:
    """The adapter's config.

    The share is of the weights; for S2FT of o_proj's and down_proj's channels, for SoRA of the 16 ranks of each layer
    at the start, for SNELL of the delta's entries that are not zero. A sketch's tables reach all weights.
    """
    if method is Method.s2ft:
        return S2FTConfig(ratio=share)
    if method is Method.sora:
        return SoRAConfig(r=16, alpha=32, target_rank=share, report_every=10, target_modules="all-linear")
    if method is Method.sltrain:
        return SLTrainConfig(r=8, density=share, target_modules="all-linear")
    if method is Method.snella:
        # its kernel costs a pass over the whole weight: the attention's are a quarter of all
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return SnellaConfig(r=8, sparsity=1 - share, threshold="hard_ste", target_modules=targets)
    if method is Method.sketch:
        if share != 1:
            raise typer.BadParameter(f"--share {share}: the tables of a sketch reach all weights; leave it out")
        return SketchConfig(bits=4, target_modules="all-linear")
    config = SparseConfig if method is Method.sparse else SaRAConfig
    return config(density=share, target_modules="all-linear")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class StepClock(TrainerCallback):
    """Shows the progress of training and keeps the seconds that each optimizer step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task("training", total=state.max_steps, loss="-")

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)
        self.progress.advance(self.task)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.progress.update(self.task, loss=f"{float(logs['loss']):.3f}")


@torch.no_grad()
def logits_of(model: torch.nn.Module, block: list[int]) -> torch.Tensor:
    """Logits of one block in eval mode, shape (1, length, vocabulary)."""
    model.eval()
    return model(input_ids=torch.tensor([block]), use_cache=False).logits


@torch.no_grad()
def continue_prompts(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, new_tokens: int = 24) -> list[str]:
    """Greedy continuations of PROMPTS, without the prompts."""
    model.eval()
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def check_in_fresh_process(adapter: Path, block: list[int], expected: torch.Tensor) -> dict[str, float | bool]:
    """What `reload` reports about the saved adapter, run as a program of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "expected.safetensors"
        save_file({"block": torch.tensor(block), "logits": expected.contiguous()}, file)
        command = [sys.executable, "-m", "examples.quickstart", "reload", str(adapter.resolve()), str(file)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the fresh process failed with exit status {done.returncode}; its error is printed above")
    return json.loads(done.stdout.splitlines()[-1])


@app.command()
def reload(adapter: Path, expected: Path) -> None:
    """Load a saved adapter and compare its logits, then the merged model's, with those in a file."""
    transformers_logging.disable_progress_bar()
    reference = load_file(expected)
    block = reference["block"].tolist()
    model = PeftModel.from_pretrained(load_model(), str(adapter))
    reloaded = logits_of(model, block)
    merged = logits_of(model.merge_and_unload(), block)
    report = {}
    for name, logits in (("reloaded", reloaded), ("merged", merged)):
        report[name] = torch.equal(logits, reference["logits"])
        report[f"{name}_difference"] = (logits - reference["logits"]).abs().max().item()
    print(json.dumps(report))


@app.callback(invoke_without_command=True)
def quickstart(
    context: typer.Context,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 4 x 128 tokens.")] = 40,
    method: Annotated[
        Method,
        typer.Option(
            help="Single entries, channels, the smallest entries, gated ranks, entries and ranks, competing entries "
            "of a kernel, or tables."
        ),
    ] = Method.sparse,
    share: Annotated[
        float | None,
        typer.Option(
            help="Of the weights (sparse, sara, sltrain), of channels (s2ft), of ranks to keep (sora), or of entries "
            "to keep (snella)."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of AdamW, falling linearly to 0; by default the method's.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("quickstart-output"),
    verbose: Annotated[bool, typer.Option("--verbose", help="Print other packages' notices, too.")] = False,
) -> None:
    """Train, save, reload and merge an adapter of SmolLM2-135M-Instruct on the King James Bible."""
    if context.invoked_subcommand is not None:
        return
    usual_share, usual_rate = DEFAULTS[method]
    share, learning_rate = share or usual_share, learning_rate or usual_rate
    transformers_logging.disable_progress_bar()
    with console.status("loading the model and the text"):
        model, tokenizer = load_model(), load_tokenizer()
        train = kjv_blocks(tokenizer, BLOCK, "train")
        held_out = kjv_blocks(tokenizer, BLOCK, "heldout", HELD_OUT_BLOCKS)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{MODEL_ID}: {base_parameters:,} parameters; {len(train):,} training blocks of {BLOCK} tokens")
    with console.status("measuring the base model"):
        loss_before = held_out_loss(model, held_out)
        texts_before = continue_prompts(model, tokenizer)
        base_logits = logits_of(model, held_out[0])

    clock = StepClock()
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            warmup_steps=min(5, steps // 2),
            logging_steps=1,
            max_length=BLOCK,
            gradient_checkpointing=False,  # the model is small: memory is no concern, time is
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": train}),
        processing_class=tokenizer,
        peft_config=config_of(method, share),
        callbacks=[clock, SparsityCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    with clock.progress:
        trainer.train()
    model = trainer.model

    with console.status("measuring the trained model"):
        loss_after = held_out_loss(model, held_out)
        texts_after = continue_prompts(model, tokenizer)
        trained_logits = logits_of(model, held_out[0])
        with model.disable_adapter():
            base_restored = torch.equal(logits_of(model, held_out[0]), base_logits)
    model.save_pretrained(output, save_embedding_layers=False)
    with console.status("loading the saved adapter in a fresh process, merging it there"):
        fresh = check_in_fresh_process(output, held_out[0], trained_logits)

    entries = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    file_bytes = (output / "adapter_model.safetensors").stat().st_size
    results = Table(title=f"{method.value}: SmolLM2-135M-Instruct on the King James Bible", show_header=False)
    results.add_row("held-out loss before", f"{loss_before:.4f}")
    results.add_row("held-out loss after", f"{loss_after:.4f}  ({loss_after - loss_before:+.4f}, {steps} steps)")
    results.add_row("trained entries", f"{entries:,}  ({entries / base_parameters:.2%} of the model)")
    results.add_row("adapter file", f"{file_bytes / 1e6:.2f} MB  ({file_bytes / entries:.2f} bytes an entry)")
    results.add_row("time of a step (median)", f"{median(clock.seconds):.2f} s  ({BATCH} x {BLOCK} tokens)")
    console.print(results)

    texts = Table(title="Greedy continuations", show_lines=True)
    for heading in ("prompt", "before", "after"):
        texts.add_column(heading)
    for row in zip(PROMPTS, texts_before, texts_after, strict=True):
        texts.add_row(*row)
    console.print(texts)

    rounds = method in MERGE_ROUNDS
    how = "up to rounding" if rounds else "bit for bit"
    merged = fresh["merged_difference"] < MERGE_TOLERANCE if rounds else fresh["merged"]
    checks = {
        "the held-out loss fell": loss_after < loss_before,
        "adapter disabled: logits of the base model, bit for bit": base_restored,
        f"fresh process: the same logits, bit for bit (largest difference {fresh['reloaded_difference']:.1e})": (
            fresh["reloaded"]
        ),
        f"merged: the same logits, {how} (largest difference {fresh['merged_difference']:.1e})": merged,
    }
    console.print(f"The adapter is in {output}", highlight=False)
    report_checks(checks)


if __name__ == "__main__":
    app()
