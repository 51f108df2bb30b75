"""A plan: what would train, and the cost of a step beside LoRA and full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..constraints import Count, OneOf, Positive, validate_fields
from ..numerics import panel_bytes
from ..ops import Crossover, known_crossover
from ..registry import method_of
from ..structure import build_on_meta
from ..tuners.base_config import BaseSparseConfig, changed_fields
from .communication import STRATEGIES
from .divided import Division
from .sizes import (
    FORMATS,
    OPTIMIZERS,
    BaseFormat,
    LayerKind,
    LayerSize,
    frozen_bytes,
    kinds_of,
    layer_sizes,
    optimizer_bytes,
    trains_entries,
)
from .step import MEASURED_SIZE, CrossoverOf, Need, Step, Work, measure_flops
from .trace import trace_forward

ADAPTER = "default"
IN_SHARDS = "which has its part of all weights, values and states, and up to three whole blocks at a time"
DIVIDED = {
    "ddp": "which has everything, and gradients twice",
    "fsdp2": IN_SHARDS,
    "zero3": IN_SHARDS,
    "tp": "which has its part of the blocks' weights and all values, and activations as if it had all",
}
LORA_RANK = 16


@dataclass(frozen=True)
class PlanOptions:
    """How the training would be run.

    Args:
        base: format of the frozen weights, one of [`FORMATS`][sparse_peft.planning.FORMATS]; the model config's
            if None.
        optimizer: one of [`OPTIMIZERS`][sparse_peft.planning.OPTIMIZERS].
        batch: rows of a step.
        length: tokens of a row.
        checkpointing: whether activations are recomputed, block by block.
        flops: operations a second of the machine; measured if None.
        device: whose crossover of sparse gradients counts, and whose speed is measured.
        processes: among which the training is divided; memory is that of one of them, with a batch of its own.
        strategy: one of [`STRATEGIES`][sparse_peft.planning.STRATEGIES].

    Raises:
        ValueError: a value that does not exist or is out of range.

    Example:
        >>> from sparse_peft.planning import PlanOptions
        >>> PlanOptions(base="nf4", batch=4, checkpointing=True).optimizer
        'adamw'
    """

    base: Annotated[str, OneOf(FORMATS)] | None = None
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    batch: Count = 1
    length: Count = 1024
    checkpointing: bool = False
    flops: Positive | None = None
    device: str = "cpu"
    processes: Count = 1
    strategy: Annotated[str, OneOf(STRATEGIES)] = "ddp"

    def __post_init__(self) -> None:
        validate_fields(self)
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device={self.device!r}: 'cpu' or 'cuda' is expected") from error
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: 'cpu' or 'cuda' is expected")
        if device.type == "cuda" and not torch.cuda.is_available() and self.flops is None:
            raise ValueError(f"device={self.device!r}: there is no GPU here to measure; give its flops")


@dataclass(frozen=True)
class TrainingPlan:
    """Cost of a training; see [`Need`][sparse_peft.planning.Need] and ``LayerKind``.

    Attributes:
        architecture: the model's class.
        parameters: of the model.
        method: the method's short name.
        config: the config's fields that are not the defaults.
        scale: factor between the trained values and the delta; None where the method has none.
        recommended_rate: learning rate that suits the adapter, with AdamW; None if it is not known.
        base: format of the frozen weights.
        optimizer, batch, length, checkpointing, device, processes, strategy: as in the options.
        flops_per_second: that times are reckoned with.
        kinds: trained parameters by kinds of layers.
        beside: trained parameters outside of the adapted layers.
        needs: of the method, of LoRA and of full fine-tuning, by one process.
        assumptions: behind the figures, in sentences.
    """

    architecture: str
    parameters: int
    method: str
    config: dict[str, Any]
    scale: float | None
    recommended_rate: float | None
    base: str
    optimizer: str
    batch: int
    length: int
    checkpointing: bool
    device: str
    flops_per_second: float | None
    kinds: list[LayerKind]
    beside: int
    needs: list[Need]
    assumptions: list[str] = field(default_factory=list)
    processes: int = 1
    strategy: str = "ddp"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; every need has its ``peak_bytes`` and ``smallest_gpu``."""
        needs = [
            {**asdict(need), "peak_bytes": need.peak_bytes, "smallest_gpu": need.smallest_gpu} for need in self.needs
        ]
        return {**asdict(self), "needs": needs}


def base_format(config: PretrainedConfig, wanted: str | None) -> BaseFormat:
    """The wanted format, or the one in the model's config."""
    if wanted is not None:
        return FORMATS[wanted]
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        found = quantised if isinstance(quantised, dict) else quantised.to_dict()
        if found.get("load_in_8bit"):
            return FORMATS["int8"]
        if found.get("load_in_4bit"):
            return FORMATS["nf4-double" if found.get("bnb_4bit_use_double_quant") else "nf4"]
        raise ValueError(
            f"quantization_config: the plan does not know how much {found.get('quant_method')!r} weights take; give "
            f"base=, one of {', '.join(FORMATS)}"
        )
    dtype = getattr(config, "dtype", None) or torch.float32
    name = str(dtype).removeprefix("torch.")
    return FORMATS.get(name, FORMATS["float32"])


def plan_training(
    model_config: PretrainedConfig, config: BaseSparseConfig, options: PlanOptions | None = None
) -> TrainingPlan:
    """Cost of training a model with an adapter of ``config``. No weight is loaded or allocated.

    The adapter is made by ``get_peft_model`` on a model of the meta device, so its numbers are those of the training.

    Args:
        model_config: the model's, from ``read_model_config``.
        config: of one of this package's methods.
        options: how the training would be run.

    Raises:
        TypeError, ValueError: a config that does not fit the model, or whose sizes depend on the weights.

    Example:
        >>> from transformers import LlamaConfig
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.planning import PlanOptions, plan_training
        >>> llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, dtype="bfloat16")
        >>> config = SparseConfig(density=0.01, target_modules="all-linear")
        >>> plan = plan_training(llama, config, PlanOptions(flops=2e14))
        >>> {need.name: need.smallest_gpu for need in plan.needs}
        {'sparse': 8, 'LoRA r=16': 8, 'full': 16}
    """
    options = options or PlanOptions()
    form = base_format(model_config, options.base)
    counted, notes = config.countable()
    model = build_on_meta(model_config, form.dtype).requires_grad_(False)
    frozen = _Frozen.of(model, options, form)
    division = Division.of(model, options.strategy, options.processes)
    adapted = _Adapted.of(model, counted, form)
    device = torch.device(options.device)
    largest = known_crossover(device, form.dtype)
    method = method_of(config).name
    return TrainingPlan(
        architecture=type(model).__name__,
        parameters=sum(frozen.weights),
        method=method,
        config=changed_fields(config),
        scale=getattr(counted, "scale", None),
        recommended_rate=counted.recommended_rate,
        base=form.name,
        optimizer=options.optimizer,
        batch=options.batch,
        length=options.length,
        checkpointing=options.checkpointing,
        device=options.device,
        flops_per_second=frozen.step.speed,
        kinds=kinds_of(adapted.sizes, options.optimizer),
        beside=sum(tensor.numel() for tensor in adapted.beside.values()),
        needs=[
            division.need(
                _adapter_need(
                    method, frozen, adapted, lambda shape: known_crossover(device, form.dtype, shape).density
                ),
                sum(size.kept_bytes for size in adapted.sizes),
            ),
            division.need(_lora_need(frozen, adapted)),
            division.need(_full_need(frozen)),
        ],
        processes=options.processes,
        strategy=options.strategy,
        assumptions=[
            *notes,
            *frozen.notes,
            *_assumptions(options, form, largest, adapted.sizes),
        ],
    )


@dataclass(frozen=True)
class _Frozen:
    """The model before it has an adapter.

    Attributes:
        options, form: of the training, and of the weights.
        weights: numbers of elements of the parameters.
        base_bytes: of the frozen weights.
        step: activations and operations of a pass.
        notes: unknowns, in sentences.
    """

    options: PlanOptions
    form: BaseFormat
    weights: list[int]
    base_bytes: int
    step: Step
    notes: list[str]

    @classmethod
    def of(cls, model: PreTrainedModel, options: PlanOptions, form: BaseFormat) -> _Frozen:
        step, notes = _step_of(model, options, form)
        weights = [parameter.numel() for parameter in model.parameters()]
        return cls(options, form, weights, frozen_bytes(model, form), step, notes)

    def need(
        self, name: str, counts: list[int], works: dict[str, Work], base_bytes: int, temporary: int, **others: int
    ) -> Need:
        """Cost of one way of training.

        Args:
            name: of the way of training.
            counts: numbers of elements of the trained tensors.
            works: ``{layer name: its addition to a step}``.
            base_bytes: frozen weights.
            temporary: the largest temporary of a step, in bytes.
            others: the remaining fields of ``Need``.
        """
        flops = self.step.flops(works)
        return Need(
            name=name,
            trained=sum(counts),
            share=sum(counts) / sum(self.weights),
            base_bytes=base_bytes,
            trained_bytes=4 * sum(counts),
            gradient_bytes=4 * sum(counts),
            optimizer_bytes=optimizer_bytes(self.options.optimizer, counts),
            activation_bytes=self.step.activations(works),
            temporary_bytes=temporary,
            flops=flops,
            seconds=self.step.seconds(flops),
            **others,
        )


def _step_of(model: PreTrainedModel, options: PlanOptions, form: BaseFormat) -> tuple[Step, list[str]]:
    """The model's step, without activations and times where the model cannot be traced, and a note of that."""
    try:
        trace = trace_forward(model, options.batch, options.length)
    except RuntimeError as error:
        return Step(None, form.dtype.itemsize, options.checkpointing, None), [f"No activations and no time: {error}"]
    speed = options.flops or measure_flops(torch.device(options.device), form.dtype)
    return Step(trace, form.dtype.itemsize, options.checkpointing, speed), []


@dataclass(frozen=True)
class _Adapted:
    """The model with its adapter.

    Attributes:
        sizes: of the adapted layers.
        beside: ``{name: trained tensor}`` outside of these.
        base_bytes: frozen weights.
    """

    sizes: list[LayerSize]
    beside: Mapping[str, Tensor]
    base_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel, config: BaseSparseConfig, form: BaseFormat) -> _Adapted:
        tuner = method_of(config).model_class
        tuner.resolve_sizes(config, model)
        get_peft_model(model, config, adapter_name=ADAPTER)
        trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        beside = {name: tensor for name, tensor in trained.items() if f".{tuner.prefix}" not in name}
        return cls(layer_sizes(model, config, ADAPTER, form), beside, frozen_bytes(model, form))

    @property
    def modules_beside(self) -> set[str]:
        """Names of the modules that train whole."""
        return {name.split(".modules_to_save.")[0].removesuffix(".weight") for name in self.beside}

    def unpacked_bytes(self, form: BaseFormat) -> int:
        """The largest weight while it is unpacked for a product, which every method does with a quantised one."""
        return self._largest * form.dtype.itemsize if form.is_quantised else 0

    @property
    def panel_bytes(self) -> int:
        """The largest panel of a dense gradient, of which single entries are taken."""
        return min(panel_bytes(), 4 * self._largest) if trains_entries(self.sizes) else 0

    @property
    def _largest(self) -> int:
        return max(size.weights for size in self.sizes)


def _adapter_need(method: str, frozen: _Frozen, adapted: _Adapted, crossover: CrossoverOf) -> Need:
    step, sizes, beside = frozen.step, adapted.sizes, adapted.beside.values()
    return frozen.need(
        method,
        [n for size in sizes for n in size.state.parameters] + [tensor.numel() for tensor in beside],
        {**step.dense(adapted.modules_beside), **step.sparse(sizes, crossover)},
        adapted.base_bytes,
        adapted.unpacked_bytes(frozen.form) + adapted.panel_bytes,
        position_bytes=sum(size.position_bytes for size in sizes),
        file_bytes=sum(size.state.file_bytes for size in sizes) + sum(t.numel() * t.element_size() for t in beside),
    )


def _lora_need(frozen: _Frozen, adapted: _Adapted) -> Need:
    counts = [LORA_RANK * side for size in adapted.sizes for side in size.shape]
    return frozen.need(
        f"LoRA r={LORA_RANK}",
        counts,
        frozen.step.lora(adapted.sizes, LORA_RANK),
        frozen.base_bytes,
        adapted.unpacked_bytes(frozen.form),
        position_bytes=0,
        file_bytes=4 * sum(counts),
    )


def _full_need(frozen: _Frozen) -> Need:
    works = frozen.step.dense(frozen.step.layers)
    return frozen.need("full", frozen.weights, works, 0, 0, position_bytes=0, file_bytes=4 * sum(frozen.weights))


def _precision(options: PlanOptions, dtype: str) -> str:
    states = (
        " (adamw8bit: two bytes a parameter in tensors of 4,096 or more)" if options.optimizer == "adamw8bit" else ""
    )
    return (
        f"Layers compute in {dtype}; trained parameters, gradients and optimizer states are float32{states}; full "
        "fine-tuning trains float32 weights under autocast."
    )


def _assumptions(options: PlanOptions, form: BaseFormat, crossover: Crossover, sizes: list[LayerSize]) -> list[str]:
    dtype = str(form.dtype).removeprefix("torch.")
    sentences = [
        _precision(options, dtype),
        "Peak: everything in the table at once, as at the start of a backward pass with gradients of earlier ones; "
        "fragmentation, the CUDA context and libraries' workspaces come on top. A GPU is counted with 10⁹ bytes a GB, "
        "which leaves 7 % for these.",
        "Activations: what one forward pass keeps for backward, with fused attention"
        + (", every block recomputed from its input." if options.checkpointing else ", nothing recomputed."),
    ]
    if options.processes > 1:
        sentences.append(
            f"Memory: of one of {options.processes} processes ({options.strategy}), {DIVIDED[options.strategy]}."
        )
    if trains_entries(sizes):
        sentences.append(
            f"Gradients at single entries of large weights take as long as dense ones from a density of "
            f"{crossover.density:.2g} ({crossover.source}, {options.device}), below it in proportion."
        )
    unknown = next((size.name for size in sizes if not size.is_known), None)
    if unknown is not None:
        sentences.append(f"Layers such as {unknown} are taken to keep their input and to form a dense gradient.")
    speed = "as given" if options.flops else f"as measured here in products of {MEASURED_SIZE} x {MEASURED_SIZE}"
    sentences.append(
        f"Time: operations at the machine's speed in {dtype} matrix products ({speed}); a real step adds norms, "
        "activation functions, the optimizer and launches. An estimate for comparing, not a measurement."
    )
    return sentences
