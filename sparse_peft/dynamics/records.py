"""Records of what happened in training besides steps: for logs and plots, and kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_kinds: dict[str, type[Record]] = {}


@dataclass(frozen=True)
class Record:
    """One event of one adapter's training.

    A subclass is a frozen dataclass and names its event, which registers it::

        @dataclass(frozen=True)
        class Shift(Record, event="shift"):
            offset: int

    Its fields are numbers, strings, tuples of them, and dicts of names to dataclasses of such fields; checkpoints and
    history files keep them. The base class writes and reads these files.

    Attributes:
        event: the kind's name in files.
        plural: what several of them are called, in messages.
        plot_name: file name of the kind's plot; None without one.
        plot_caption: of the plot, on an adapter's card.
        plot_size: ``(width, height)`` of the plot in inches.
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.

    Raises:
        ValueError: another class has the event's name.
    """

    event: ClassVar[str]
    plural: ClassVar[str]
    plot_name: ClassVar[str | None] = None
    plot_caption: ClassVar[str] = ""
    plot_size: ClassVar[tuple[float, float]] = (8.0, 4.5)

    step: int
    adapter: str

    def __init_subclass__(cls, *, event: str, plural: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.event, cls.plural = event, plural or f"{event}s"
        other = _kinds.setdefault(event, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"event={event!r} of {cls.__module__}.{cls.__qualname__}: {other.__module__}.{other.__qualname__} has "
                "this name already; choose another, it stands in files"
            )
        _kinds[event] = cls

    def logs(self) -> dict[str, float]:
        """Numbers for a Trainer's log, each under ``sparsity/``; by default the record's own."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "step"}
        return {f"sparsity/{name}": float(value) for name, value in own.items() if isinstance(value, (int, float))}

    @classmethod
    def draw(cls, history: Sequence[Self], figure: Figure) -> None:
        """Draw a history of one adapter, oldest record first; by default a line for each number of the log."""
        axis, logs = figure.subplots(), [record.logs() for record in history]
        for name in logs[-1]:
            found = [(record.step, log[name]) for record, log in zip(history, logs, strict=True) if name in log]
            axis.plot(*zip(*found, strict=True), "o-", label=name.removeprefix("sparsity/"))
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize=8)

    def to_dict(self) -> dict[str, Any]:
        """The event's name and the fields, as plain numbers, strings, lists and dicts."""
        return {"event": self.event, **{name: _plain(value) for name, value in asdict(self).items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``.

        Raises:
            TypeError: a field is missing, or there are others.
        """
        hints = get_type_hints(cls)
        return cls(**{name: _typed(value, hints.get(name)) for name, value in data.items() if name != "event"})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _typed(value: Any, hint: Any) -> Any:
    """A field's value from its plain form: tuples from lists, dataclasses from dicts."""
    if get_origin(hint) is tuple:
        return tuple(value)
    if get_origin(hint) is dict:
        kind = get_args(hint)[1]
        return {name: kind(**part) if isinstance(part, dict) else part for name, part in value.items()}
    return value


def plot_captions() -> dict[str, str]:
    """``{file name: caption}`` of the plots of all kinds of records."""
    kinds = _kinds.values()
    return {kind.plot_name: kind.plot_caption or kind.plot_name for kind in kinds if kind.plot_name is not None}


def record_from_dict(data: Mapping[str, Any]) -> Record:
    """The record that ``to_dict`` gave this.

    Raises:
        ValueError: its event is unknown.
        KeyError, TypeError: its event or a field is missing.
    """
    kind = _kinds.get(data["event"])
    if kind is None:
        raise ValueError(
            f"event={data['event']!r}: the known records are {', '.join(_kinds)}; import the package of the method "
            "that wrote it"
        )
    return kind.from_dict(data)


def kind_of_record(event: str) -> type[Record]:
    """The class of the records of an event."""
    return _kinds[event]
