import builtins

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sparse_peft import SketchConfig, SparseConfig, report
from sparse_peft.report import (
    plot_allocation,
    plot_ranks,
    plot_report,
    plot_sparsity_curve,
    plot_supports,
    plot_turnover,
    read_history,
    support_map,
    write_history,
)
from sparse_peft.sparsify import CurvePoint, SparsityCurve
from sparse_peft.support import Support
from sparse_peft.tuners.snella.records import Allocation, LayerAllocation
from sparse_peft.tuners.sora.records import LayerRanks, Ranks
from sparse_peft.tuners.sparse.records import LayerChange, Reselection

image = pytest.importorskip("matplotlib.image")


def history(events=6, adapter="default", random=False):
    out = []
    for i in range(events):
        layers = {
            f"layers.{n}.q": LayerChange(100, 20 - 3 * i, 10000, 1e-3 * (n + 1), None if random else 0.1 / (i + 1 + n))
            for n in range(4)
        }
        out.append(
            Reselection(5 + 20 * i, adapter, 0.2, layers, (20, 40, 80, 160), (80 - 12 * i, 320 + 12 * i, 0, 0, 0))
        )
    return out


def model_of(blocks=3):
    base = nn.Sequential(*[nn.ModuleDict({"q_proj": nn.Linear(70, 90)}) for _ in range(blocks)])
    return get_peft_model(base, SparseConfig(target_modules=["q_proj"], density=0.1))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 64), (130, 67), (200, 33)])
def test_support_map_is_the_local_density(shape):
    support = Support.random(shape, max(1, shape[0] * shape[1] // 7), seed=0, name="x")
    grid = support_map(support, (16, 64))
    height, width = min(shape[0], 16), min(shape[1], 64)
    assert grid.shape == (height, width)
    mask = support.to_mask()
    rows, cols = torch.arange(shape[0]) * height // shape[0], torch.arange(shape[1]) * width // shape[1]
    for i in range(height):
        for j in range(width):
            cell = mask[rows == i][:, cols == j]
            assert grid[i, j] == pytest.approx(cell.float().mean().item())


def looks_like_a_plot(path):
    picture = image.imread(path)
    assert picture.ndim == 3 and min(picture.shape[:2]) > 250
    assert picture[..., :3].std() > 0.02
    assert not [other for other in path.parent.iterdir() if other.name.startswith(".")]


@pytest.mark.parametrize("blocks", [1, 3, 30])
def test_supports_are_drawn(tmp_path, blocks):
    looks_like_a_plot(plot_supports(model_of(blocks), tmp_path / "supports.png", max_layers=7))


@pytest.mark.parametrize("events", [1, 2, 6])
@pytest.mark.parametrize("random", [False, True])
def test_turnover_is_drawn(tmp_path, events, random):
    looks_like_a_plot(plot_turnover(history(events, random=random), tmp_path / "turnover.png"))


def rank_history(events=4, adapter="default"):
    names = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("q_proj", "up_proj")]
    return [
        Ranks(10 * step, adapter, 0.1 * step, {name: LayerRanks(max(0, 4 - step), 4, 4) for name in names})
        for step in range(events)
    ]


@pytest.mark.parametrize("events", [1, 5])
def test_ranks_are_drawn(tmp_path, events):
    looks_like_a_plot(plot_ranks(rank_history(events), tmp_path / "ranks.png"))
    with pytest.raises(ValueError, match="no reports of ranks to draw"):
        plot_ranks(history(), tmp_path / "ranks.png")
    with pytest.raises(ValueError, match="2 adapters"):
        plot_ranks([*rank_history(), *rank_history(adapter="b")], tmp_path / "ranks.png")


@pytest.mark.parametrize("events", [1, 5])
def test_allocations_are_drawn(tmp_path, events):
    def shares(event):
        return {
            f"{n}.{kind}": LayerAllocation(90 - event * (n + 5), 100, 0.2) for n in range(3) for kind in ("q", "v")
        }

    records = [Allocation(5 * event, "default", 540 - 30 * event, shares(event)) for event in range(events)]
    looks_like_a_plot(plot_allocation(records, tmp_path / "shares.png"))
    with pytest.raises(ValueError, match="no allocations to draw"):
        plot_allocation(history(), tmp_path / "shares.png")


def test_a_report_has_both_and_the_history(tmp_path):
    files = plot_report(model_of(), history(), tmp_path / "report")
    assert [file.name for file in files] == ["turnover.png", "supports.png", "sparsity_history.json"]
    assert read_history(tmp_path / "report") == history() == read_history(files[2])


def test_a_method_without_positions_has_no_report(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), SketchConfig(bits=2, target_modules=["0"]))
    assert plot_report(model, [], tmp_path) == []
    with pytest.raises(ValueError, match="adapter='ref': no layer"):
        plot_report(model, [], tmp_path, adapter="ref")


def test_errors_say_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="history: no reselections to draw"):
        plot_turnover([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="history: reselections of 2 adapters \\(a, b\\)"):
        plot_turnover([*history(1, "a"), *history(1, "b")], tmp_path / "a.png")
    with pytest.raises(ValueError, match="adapter='ref': no layer of PeftModel has it; there are 'default'"):
        plot_supports(model_of(), tmp_path / "a.png", adapter="ref")
    with pytest.raises(ValueError, match="the model has no sparse adapter"):
        plot_supports(nn.Linear(2, 2), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"ends in \.png"):
        plot_turnover(history(), tmp_path / "a.svg")
    with pytest.raises(ValueError, match=r"folder .*missing does not exist"):
        plot_turnover(history(), tmp_path / "missing" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"sparsity_history\.json: no history"):
        read_history(tmp_path)
    (tmp_path / "sparsity_history.json").write_text('[{"step": 1}]')
    with pytest.raises(ValueError, match="is no history of a training"):
        read_history(tmp_path)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "\.\[plot\]"'):
        plot_turnover(history(), tmp_path / "a.png")


def test_a_history_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_history(history(2), tmp_path)
    monkeypatch.setattr("json.dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        write_history(history(3), tmp_path)
    monkeypatch.undo()
    assert read_history(tmp_path) == history(2)


def test_the_path_of_each_layer_is_named_with_its_reason():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 64), nn.Linear(64, 64)),
        SparseConfig(target_modules=["0", "1"], density_pattern={"0": 0.02, "1": 0.9}),
    )
    paths = report.layer_paths(model)
    assert [(p.layer, p.forward, p.gradient) for p in paths] == [
        ("0", "resident", "sampled"), ("1", "resident", "panels"),
    ]  # fmt: skip
    assert "below the crossover 0.12 (default)" in paths[0].why and "above the crossover" in paths[1].why
    assert paths[1].density == pytest.approx(0.9, abs=1e-3)
    model.base_model.set_adapter([])
    assert report.layer_paths(model) == []


@pytest.mark.parametrize("random", [None, 90.0])
def test_a_curve_is_drawn(tmp_path, random):
    points = tuple(CurvePoint(str(s), s, 10 + 40 * s**3, random) for s in (0.2, 0.5, 0.8))
    path = plot_sparsity_curve(SparsityCurve(10.0, points, False), tmp_path / "curve.png", label="perplexity")
    picture = image.imread(path)
    assert picture.shape[:2] == (480, 720) and picture[..., :3].std() > 0.02
    plot_sparsity_curve(SparsityCurve(0.0, points[:1], True), tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"ends in \.png"):
        plot_sparsity_curve(SparsityCurve(10.0, points, False), tmp_path / "curve.svg")
