"""Distillation: a loss that compares a model with its teacher, for any trainer that takes a loss function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..constraints import OneOf, Positive, PositiveOrZero, validate_fields
from ..numerics.panels import panels

OFF, BATCH = "adapter_off", "batch"
LOGITS = "teacher_logits"  # what a batch brings them as
IGNORED = -100  # label of tokens that count for nothing, as in transformers
EPSILON = torch.finfo(torch.bfloat16).eps
REDUCTIONS = ("sum", "mean")


@dataclass(eq=False)
class DistillationLoss:
    """``ce * cross entropy + kl * T² * KL(teacher || student) + squarehead * differences of hidden states``.

    Pass it to a trainer as ``compute_loss_func``. The teacher sees the student's own inputs, without gradients. By
    default it is the student with its adapter switched off: it needs one more forward pass and no memory.

    Cross entropy and divergence are sums over the tokens that have a label, divided by their number in the whole
    accumulated batch. SquareHead (https://arxiv.org/abs/2310.06927, section 3) adds for each layer the squared
    difference of the hidden states, divided by the teacher's squares, over tokens that are no padding. All are
    computed in float32. Hidden states of both models stay in memory until the backward pass.

    Args:
        model: the student, as it is given to the trainer; it has hooks until ``close``.
        teacher: ``"adapter_off"``; another model with the same vocabulary, which is not changed; or ``"batch"`` for
            logits computed before, which a batch brings as ``teacher_logits``.
        ce: weight of the cross entropy.
        kl: weight of the divergence.
        squarehead: weight of SquareHead.
        temperature: ``T``, by which both models' logits are divided in the divergence.
        layers: numbers of the layers that SquareHead compares, from 0; None for all. The last one is what the head
            reads.
        reduction: ``"sum"`` of the layers, as in the paper, or their ``"mean"``.

    Raises:
        TypeError: the teacher is none of these.
        ValueError: no part has a weight, a value is out of range, or SquareHead has logits only.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sparse_peft.procedures import DistillationLoss
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), LoraConfig(r=2))
        >>> loss_fn = DistillationLoss(model, ce=0.0, kl=0.5, squarehead=1.0)  # Trainer(compute_loss_func=loss_fn)
        >>> ids = torch.arange(8)[None]
        >>> loss_fn(model(input_ids=ids), labels=ids).item()  # a new adapter changes nothing
        0.0
    """

    model: nn.Module
    teacher: nn.Module | str = OFF
    ce: PositiveOrZero = 1.0
    kl: PositiveOrZero = 1.0
    squarehead: PositiveOrZero = 0.0
    temperature: Positive = 2.0
    layers: Sequence[int] | None = None
    reduction: Annotated[str, OneOf(REDUCTIONS)] = "sum"

    def __post_init__(self) -> None:
        validate_fields(self)
        if not isinstance(self.teacher, nn.Module) and self.teacher not in (OFF, BATCH):
            raise TypeError(f"teacher={self.teacher!r}: {OFF!r}, {BATCH!r} or a model is expected")
        if not (self.ce or self.kl or self.squarehead):
            raise ValueError("ce=0, kl=0, squarehead=0: nothing would train; give one of them a weight")
        if self.squarehead and self.teacher == BATCH:
            raise ValueError(
                f"squarehead={self.squarehead} with teacher='batch': logits have no hidden states; pass a model, or "
                "use kl"
            )
        self._inputs: dict[str, Any] | None = None
        self._is_teaching = False
        self._handle = self.model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    # ------------------------------------------------------------------ both models' passes

    def _note_inputs(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep what the student sees for its teacher, and ask for hidden states."""
        if self._is_teaching:
            return None
        self._inputs = {"args": args, "kwargs": kwargs}
        asked = {name: value for name, value in kwargs.items() if name != LOGITS}
        return args, {**asked, "output_hidden_states": True} if self.squarehead else asked

    @torch.no_grad()
    def _taught(self) -> Any:
        """The teacher's outputs, or its logits, for the last inputs of the student."""
        if self._inputs is None:
            raise ValueError(
                "the model had no forward pass yet: DistillationLoss follows one of the model it was made for"
            )
        args, kwargs = self._inputs["args"], self._inputs["kwargs"]
        self._inputs = None
        if self.teacher == BATCH:
            if kwargs.get(LOGITS) is None:
                raise ValueError(
                    f"teacher='batch': the batch has no {LOGITS}; add them in the data collator, and use "
                    "TrainingArguments(remove_unused_columns=False)"
                )
            return {"logits": kwargs[LOGITS]}
        unknown = ("labels", "num_items_in_batch", LOGITS)
        asked = {name: value for name, value in kwargs.items() if name not in unknown}
        if self.squarehead:
            asked["output_hidden_states"] = True
        with self._teaching() as teacher:
            return teacher(*args, **asked)

    @contextmanager
    def _teaching(self) -> Iterator[nn.Module]:
        """The teacher, in evaluation mode."""
        teacher = self.model if self.teacher == OFF else self.teacher
        assert isinstance(teacher, nn.Module)
        modes = {module: module.training for module in teacher.modules()}
        self._is_teaching = True
        try:
            teacher.eval()
            if self.teacher == OFF:
                with adapters_off(teacher):
                    yield teacher
            else:
                yield teacher
        finally:
            self._is_teaching = False
            for module, mode in modes.items():
                module.training = mode

    # ------------------------------------------------------------------ the loss

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a forward pass that was just made.

        Args:
            outputs: the model's, with ``logits`` and, for SquareHead, ``hidden_states``.
            labels: ``(batch, length)`` of a causal language model, shifted here, or ``(batch,)`` of a classifier.
            num_items_in_batch: number of labels in all micro-batches of the step; by default those of this one.

        Raises:
            ValueError: no labels, teacher's logits of another shape, or no hidden states.
        """
        if labels is None:
            raise ValueError("labels=None: they say which tokens count; give the batch labels")
        mask = None if self._inputs is None else self._inputs["kwargs"].get("attention_mask")
        taught = self._taught() if self.kl or self.squarehead else None
        student, wanted = _aligned(outputs["logits"], labels)
        counts = wanted != IGNORED
        items = counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        total = student.new_zeros((), dtype=torch.float32)
        if self.ce or self.kl:
            teacher = None if taught is None or not self.kl else _aligned(taught["logits"], labels)[0]
            if teacher is not None and teacher.shape != student.shape:
                raise ValueError(
                    f"the teacher's logits have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}; "
                    "both need one vocabulary and the same tokens"
                )
            total = total + self._of_tokens(student, teacher, wanted, counts) / items
        if self.squarehead:
            # of several micro-batches each counts by its tokens
            share = 1.0 if num_items_in_batch is None else counts.sum() / num_items_in_batch
            total = total + self.squarehead * share * self._of_states(outputs, taught, mask)
        return total

    def _of_tokens(self, student: Tensor, teacher: Tensor | None, wanted: Tensor, counts: Tensor) -> Tensor:
        """The sum over tokens, some of them at a time: float32 logits of all would be large."""
        places = counts.nonzero().squeeze(1)
        total = student.new_zeros((), dtype=torch.float32)
        for start, stop in panels(places.numel(), 6 * student.shape[1] * torch.float32.itemsize):
            some = places[start:stop]
            theirs = None if teacher is None else teacher[some].to(student.device)
            part = checkpoint(self._of_some, student[some], theirs, wanted[some], use_reentrant=False)
            assert isinstance(part, Tensor)
            total = total + part
        return total

    def _of_some(self, student: Tensor, teacher: Tensor | None, wanted: Tensor) -> Tensor:
        logits = student.float()
        loss = logits.new_zeros(())
        if self.ce:
            loss = loss + self.ce * F.cross_entropy(logits, wanted, reduction="sum")
        if teacher is not None:
            heat = self.temperature
            mine, theirs = (F.log_softmax(t.float() / heat, dim=-1) for t in (logits, teacher))
            loss = loss + self.kl * heat * heat * F.kl_div(mine, theirs, reduction="sum", log_target=True)
        return loss

    def _of_states(self, outputs: Any, taught: Any, mask: Tensor | None) -> Tensor:
        mine, theirs = (_states(found, self.layers) for found in (outputs, taught))
        seen = mask if mask is not None and mask.ndim == 2 else None
        parts = [_Difference.apply(s, t.to(s.device), seen) for s, t in zip(mine, theirs, strict=True)]
        total = torch.stack(parts).sum()
        return total / len(parts) if self.reduction == "mean" else total


def _aligned(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(tokens, classes)`` logits, and the label that each of them is for."""
    if logits.ndim == 2:
        return logits, labels
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def _states(outputs: Any, layers: Sequence[int] | None) -> list[Tensor]:
    """The hidden states behind the layers, without the embeddings."""
    states = outputs.get("hidden_states")
    if states is None:
        raise ValueError("squarehead: the model returns no hidden_states; use kl, or a model that has them")
    behind = states[1:]
    return list(behind) if layers is None else [behind[number] for number in layers]


class _Difference(torch.autograd.Function):
    """``mean (s - t)² / (mean t² + eps)`` over the tokens of a mask, with nothing saved but the two states."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        weights = torch.ones(student.shape[:-1], device=student.device) if mask is None else mask.to(torch.float32)
        numel = weights.sum().clamp(min=1) * student.shape[-1]
        distance = square = student.new_zeros((), dtype=torch.float32)
        for mine, theirs, weight in zip(student, teacher, weights, strict=True):
            theirs = theirs.float()
            distance = distance + ((mine.float() - theirs).square().sum(-1) * weight).sum()
            square = square + (theirs.square().sum(-1) * weight).sum()
        ctx.save_for_backward(student, teacher, weights)
        ctx.rate = 2 / (numel * (square / numel + EPSILON))
        return distance / numel / (square / numel + EPSILON)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, weights = ctx.saved_tensors
        rate, found = grad * ctx.rate, torch.empty_like(student)
        for place, (mine, theirs, weight) in enumerate(zip(student, teacher, weights, strict=True)):
            found[place] = ((mine.float() - theirs.float()) * (weight * rate)[:, None]).to(found.dtype)
        return found, None, None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters.

    Raises:
        TypeError: a model that has none.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if isinstance(inner, PeftModel):
        with inner.disable_adapter():
            yield
        return
    if not getattr(inner, "_hf_peft_config_loaded", False):
        raise TypeError(
            f"teacher='adapter_off': {type(inner).__name__} has no adapter to switch off; make one with "
            "get_peft_model, or pass another model as the teacher"
        )
    inner.disable_adapters()  # type: ignore[operator]
    try:
        yield
    finally:
        inner.enable_adapters()  # type: ignore[operator]
