"""``python -m benchmarks.load``: clients of an HTTP server with many adapters, beside LoRA and merged models.

The server is that of ``sparse-peft serve``, on the loopback address, in this process. Each client sends its next
request once it has the answer to the last. All systems get the same requests, in turns within one run:

- sparse deltas and S²FT: one base, an ``AdapterPool``, mixed batches;
- LoRA of as many parameters: one base, all adapters loaded, PEFT's mixed batches, the same server;
- merged: a model for each adapter, as many as ``--merged-models`` at a time; others are merged when asked for.

Every answer is compared with that of the adapter alone, from ``model.generate``.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any
from urllib.request import Request, urlopen

import torch
import typer
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from sparse_peft.adapters import PoolStatistics
from sparse_peft.serving import Engine, HttpServer, build_app

from .channels import S2FT, Model
from .measure import Ratio
from .report import environment, write_json
from .serving import LORA, SPARSE, served_methods
from .workloads import Workload, random_llama, smollm2

RESULTS = Path(__file__).parent / "results"
MERGED = "merged"
SYSTEMS = (SPARSE, S2FT, LORA, MERGED)
DELTA_STD = 0.02  # of stand-ins for trained adapters: answers differ from the base's
# Gap between the logits of the two likeliest tokens below which rounding may decide.
TIE = 1e-3
TIMEOUT = 600


@dataclass(frozen=True)
class Ask:
    """One request, and the answer of the adapter alone."""

    adapter: str
    prompt: list[int]
    answer: str
    is_tie: bool


@dataclass(frozen=True)
class Sample:
    """One round of one system.

    Attributes:
        wall, cpu: seconds from the first request to the last answer; of this process, clients included.
        latencies: seconds of each request.
        tokens: generated.
        rows: of a batch, on average.
    """

    wall: float
    cpu: float
    latencies: list[float]
    tokens: int
    rows: float


@dataclass(frozen=True)
class System:
    """What one system did in all rounds.

    Attributes:
        name: of the system.
        requests, wrong, lost: numbers of requests, of answers other than the adapter's alone, and of missing ones.
        ties: answers that differ where two tokens are equally likely up to rounding.
        tokens_per_second: by wall time.
        cpu_per_token: seconds.
        p50, p95: of the requests' seconds.
        rows: of a batch, on average.
        versus: ``{other: {"throughput" | "p95" | "cpu": ratio}}``, this system's divided by the other's.
    """

    name: str
    requests: int
    wrong: int
    ties: int
    lost: int
    tokens_per_second: float
    cpu_per_token: float
    p50: float
    p95: float
    rows: float
    versus: dict[str, dict[str, Ratio]]


# ---------------------------------------------------------------------- adapters


def save_adapters(workload: Workload, make: Callable[..., Any], names: Sequence[str], folder: Path) -> None:
    """Stand-ins for trained adapters."""
    base: Any = workload.copy_of_base()
    for seed, name in enumerate(names):
        config = make(seed, target_modules=workload.target_modules, task_type=workload.task_type)
        model = get_peft_model(base, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in key:
                    parameter.normal_(std=DELTA_STD / float(getattr(config, "scale", 1.0)))
        model.save_pretrained(folder / name, save_embedding_layers=False)
        base = model.unload()


@torch.no_grad()
def answer_alone(model: nn.Module, prompt: list[int], tokens: int, decode: Callable[..., str]) -> tuple[str, bool]:
    """The greedy answer, and whether rounding may change it."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    gaps = [float(top[0] - top[1]) for logits in made.logits for top in [logits[0].topk(2).values]]
    return decode(made.sequences[0, len(prompt) :].tolist(), skip_special_tokens=True), min(gaps) < TIE


def references(
    workload: Workload, folder: Path, prompts: dict[str, list[int]], tokens: int, tokenizer: Any
) -> dict[str, Ask]:
    """What each adapter answers alone to its prompt."""
    found, base = {}, workload.copy_of_base()
    for name, prompt in prompts.items():
        model = PeftModel.from_pretrained(base, folder / name).eval()
        text, is_tie = answer_alone(model, prompt, tokens, tokenizer.decode)
        found[name] = Ask(name, prompt, text, is_tie)
        base = model.unload()
    return found


# ---------------------------------------------------------------------- systems


class LoraPool:
    """PEFT's adapters with the methods of an ``AdapterPool`` that an engine calls."""

    def __init__(self, base: nn.Module, folders: dict[str, Path]):
        self.names, self.statistics = list(folders), PoolStatistics()
        self.peft: Any = None
        for name, folder in folders.items():
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                self.peft.load_adapter(folder, name)
        self.peft.eval()

    @property
    def loaded(self) -> list[str]:
        return self.names

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        self.peft.set_adapter(name, inference_mode=True)
        yield self.peft.get_base_model()

    @contextmanager
    def use_batch(self, names: Sequence[str]) -> Iterator[nn.Module]:
        with self.peft.base_model._enable_peft_forward_hooks(adapter_names=list(names)):
            yield self.peft.get_base_model()


class MergedPool:
    """A merged model for each adapter, the most recently used ones in memory; no batch mixes them."""

    def __init__(self, base: nn.Module, folders: dict[str, Path], most: int):
        self.base, self.folders, self.most, self.statistics = base, folders, most, PoolStatistics()
        self.models: OrderedDict[str, nn.Module] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return list(self.folders)

    @property
    def loaded(self) -> list[str]:
        return list(self.models)

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        if name not in self.models:
            while len(self.models) >= self.most:
                self.models.popitem(last=False)
            kept = {id(tensor): tensor for tensor in self.base.get_input_embeddings().parameters()}
            own = copy.deepcopy(self.base, dict(kept))  # what no adapter changes is shared
            self.models[name] = PeftModel.from_pretrained(own, self.folders[name]).merge_and_unload().eval()
        self.models.move_to_end(name)
        yield self.models[name]

    def use_batch(self, names: Sequence[str]) -> Any:
        raise ValueError("merged models have no common batch")  # the engine then serves them one by one


def engine_of(
    system: str, workload: Workload, tokenizer: Any, folders: dict[str, Path], max_batch: int, merged_models: int
) -> Engine:
    base: Any = workload.copy_of_base()
    engine = Engine(base, tokenizer, "base", max_batch=max_batch, check_base_name=False)
    if system == LORA:
        engine.pool = LoraPool(base, folders)  # type: ignore[assignment]
    elif system == MERGED:
        engine.pool = MergedPool(base, folders, merged_models)  # type: ignore[assignment]
    else:
        for name, folder in folders.items():
            engine.load(name, folder)  # as PEFT's are: what is measured is serving
    return engine


# ---------------------------------------------------------------------- load


def send(url: str, ask: Ask, tokens: int) -> tuple[str | None, int, float]:
    """The answer's text (None: there is none), its tokens, and seconds."""
    content = {"model": ask.adapter, "prompt": ask.prompt, "max_tokens": tokens, "temperature": 0}
    request = Request(f"{url}/v1/completions", json.dumps(content).encode(), {"Content-Type": "application/json"})
    began = time.perf_counter()
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:
            found = json.loads(answer.read())
    except OSError:
        return None, 0, time.perf_counter() - began
    return found["choices"][0]["text"], found["usage"]["completion_tokens"], time.perf_counter() - began


class Served:
    """A system behind its server.

    Args:
        engine: of the system.
        asks: ``{adapter: its request}``.
        tokens: of an answer.
    """

    def __init__(self, engine: Engine, asks: dict[str, Ask], tokens: int):
        self.engine, self.asks, self.tokens = engine, asks, tokens
        self.server = HttpServer(build_app(engine))
        self.samples: list[Sample] = []
        self.wrong = self.ties = self.lost = 0

    def round(self, clients: list[list[str]]) -> None:
        """All clients' requests: ``[[adapter, ...] of each client]``."""
        before = self._counts()
        wall, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(len(clients)) as threads:
            done = list(threads.map(self._client, clients))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        batches, rows = (after - old for after, old in zip(self._counts(), before, strict=True))
        found = [one for client in done for one in client]
        self.samples.append(
            Sample(wall, cpu, [seconds for _, seconds in found], sum(n for n, _ in found), rows / max(batches, 1))
        )

    def _counts(self) -> tuple[float, float]:
        counts = self.engine.metrics._counts
        return counts["batches_total", ""], counts["batch_rows_total", ""]

    def _client(self, names: list[str]) -> list[tuple[int, float]]:
        found = []
        for name in names:
            text, tokens, seconds = send(self.server.url, self.asks[name], self.tokens)
            self._check(self.asks[name], text)
            found.append((tokens, seconds))
        return found

    def _check(self, ask: Ask, text: str | None) -> None:
        self.lost += text is None
        differs = text is not None and text != ask.answer
        self.ties += differs and ask.is_tie
        self.wrong += differs and not ask.is_tie

    def throughputs(self) -> list[float]:
        return [sample.tokens / sample.wall for sample in self.samples]

    def cpu(self) -> list[float]:
        return [sample.cpu / max(sample.tokens, 1) for sample in self.samples]

    def p95s(self) -> list[float]:
        return [percentile(sample.latencies, 95) for sample in self.samples]


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def summary(name: str, served: Served, others: dict[str, Served]) -> System:
    latencies = [seconds for sample in served.samples for seconds in sample.latencies]
    versus = {
        other: {
            "throughput": Ratio.of(served.throughputs(), found.throughputs()),
            "p95": Ratio.of(served.p95s(), found.p95s()),
            "cpu": Ratio.of(served.cpu(), found.cpu()),
        }
        for other, found in others.items()
        if other != name
    }
    return System(
        name, len(latencies), served.wrong, served.ties, served.lost, median(served.throughputs()),
        median(served.cpu()), percentile(latencies, 50), percentile(latencies, 95),
        sum(sample.rows for sample in served.samples) / len(served.samples), versus,
    )  # fmt: skip


# ---------------------------------------------------------------------- the command


def word_tokenizer(size: int) -> Any:
    """For random models: a word for each token."""
    words = {f"t{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), pad_token="t0")


def prepared(model: Model, d: int, depth: int) -> tuple[Workload, Any]:
    device = torch.device("cpu")
    if model is Model.llama:
        workload = random_llama(d, depth, 32, device, torch.float32, False)
        tokenizer = word_tokenizer(workload.base.config.vocab_size)
    else:
        from examples.smollm2 import load_tokenizer  # noqa: PLC0415  (an optional package)

        workload, tokenizer = smollm2(32, device, torch.float32, False), load_tokenizer()
    workload.base.config.use_cache = True
    return workload, tokenizer


def show(console: Console, systems: list[System]) -> None:
    drawn = Table(title="Clients of one server")
    for title in ("system", "tokens/s", "CPU s/token", "p50 s", "p95 s", "rows", "requests", "wrong", "lost"):
        drawn.add_column(title, justify="left" if title == "system" else "right")
    for found in systems:
        numbers = (found.tokens_per_second, found.cpu_per_token, found.p50, found.p95, found.rows)
        counts = (found.requests, found.wrong, found.lost)
        drawn.add_row(found.name, *(f"{number:.3g}" for number in numbers), *map(str, counts))
    console.print(drawn)


def main(
    model: Annotated[Model, typer.Option(help="A random Llama, or SmolLM2-135M.")] = Model.smollm2,
    d: Annotated[int, typer.Option(help="Hidden size (llama).")] = 192,
    depth: Annotated[int, typer.Option(min=1, help="Layers (llama).")] = 30,
    adapters: Annotated[int, typer.Option(min=1, help="Of each method.")] = 20,
    clients: Annotated[int, typer.Option(min=1, help="At once.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Of each client in a round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="In turns, all systems in each.")] = 3,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 24,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 10,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA; sets the budget of all.")] = 4,
    system: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(SYSTEMS)}; repeat it.")] = None,
    merged_models: Annotated[int, typer.Option(min=1, help="Merged models in memory.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file; default in benchmarks/results.")] = None,
) -> None:
    """Serve many adapters to clients over HTTP, and compare with LoRA and merged models."""
    torch.set_num_threads(threads)
    console = Console(width=140)
    workload, tokenizer = prepared(model, d, depth)
    methods, chosen = served_methods(workload, rank), system or list(SYSTEMS)
    if unknown := set(chosen) - set(SYSTEMS):
        raise typer.BadParameter(f"--system {', '.join(unknown)}: {', '.join(SYSTEMS)} are known")
    draw, names = random.Random(0), [f"adapter{n}" for n in range(adapters)]
    words = workload.base.config.vocab_size
    prompts = {name: [draw.randrange(3, words) for _ in range(draw.randint(1, prompt))] for name in names}
    served: dict[str, Served] = {}
    with tempfile.TemporaryDirectory() as staging, ExitStack() as servers:
        asks: dict[str, dict[str, Ask]] = {}
        for name in chosen:
            kind = SPARSE if name == MERGED else name
            folder = Path(staging, kind)
            if kind not in asks:
                console.print(f"[dim]{kind}: adapters and their answers alone")
                save_adapters(workload, methods[kind].config, names, folder)
                asks[kind] = references(workload, folder, prompts, tokens, tokenizer)
            folders = {adapter: folder / adapter for adapter in names}
            engine = engine_of(name, workload, tokenizer, folders, clients, merged_models)
            served[name] = Served(engine, asks[kind], tokens)
            servers.enter_context(served[name].server)
        for number in range(rounds):
            plan = [[draw.choice(names) for _ in range(requests)] for _ in range(clients)]
            for name, one in served.items():
                console.print(f"[dim]round {number + 1}: {name}")
                one.round(plan)
        systems = [summary(name, one, served) for name, one in served.items()]
    show(console, systems)
    content = {
        "format": 1,
        "environment": environment(torch.device("cpu")),
        "options": {
            "model": workload.name, "adapters": adapters, "clients": clients, "requests": requests, "rounds": rounds,
            "prompt": prompt, "tokens": tokens, "rank": rank, "merged_models": merged_models,
        },
        "systems": [asdict(found) for found in systems],
        "samples": {name: [asdict(sample) for sample in one.samples] for name, one in served.items()},
    }  # fmt: skip
    path = output or RESULTS / f"load-{model.value}-cpu.json"
    write_json(path, content)
    console.print(f"written: {path}")
    if any(found.wrong or found.lost for found in systems):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
