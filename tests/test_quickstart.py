"""tools/quickstart.py and tools/plot_run.py: the table, the picture, and both trainings end to end."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

import models_kan  # noqa: F401  (registers the models)
from checkpoints import load_file
from faster_kan import FasterKANLayer
from group_kan import GroupKAN
from tools import plot_run, quickstart
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent


def write_log(folder: Path, *top1: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(
        json.dumps({"epoch": number, "train_loss": 2.0 - number, "test_loss": 1.9 - number, "test_acc1": acc1}) + "\n"
        for number, acc1 in enumerate(top1)))
    return folder


def save(folder: Path, suffix: str, **kwargs) -> None:
    name = f"vit_nano_patch8_32_{suffix}"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    torch.save({"model": model.state_dict(), "model_args": {"name": name, "kwargs": kwargs}}, folder / "checkpoint.pth")


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24))


# ---------------------------------------------------------------- plot_run
def test_log(tmp_path):
    assert [record["test_acc1"] for record in plot_run.read_log(write_log(tmp_path, 10.0, 20.0))] == [10, 20]
    with pytest.raises(UserError, match="output_dir"):
        plot_run.read_log(tmp_path / "nothing")


def test_log_with_a_last_line_cut_off(tmp_path):
    with open(write_log(tmp_path, 10.0, 20.0) / "log.txt", "a") as log:
        log.write('{"epoch": 2, "test_')
    assert [record["epoch"] for record in plot_run.read_log(tmp_path)] == [0, 1]


@pytest.mark.parametrize("text", ["", "hello\n", "3\n", '{"loss": 1}\n', '{"epoch": 0}\nrubbish\n{"epoch": 1}\n'])
def test_log_that_is_none(tmp_path, text):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(UserError, match=r"log\.txt"):
        plot_run.read_log(tmp_path)


def test_runs_of_one_name_stay_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    assert plot_run.names_of(folders) == ["a/run", "b/run", "b/other"]
    assert plot_run.names_of(folders[1:]) == ["run", "other"]


@pytest.mark.parametrize("train_h", [False, True])
def test_edge_functions_add_up_to_the_layer(train_h):
    torch.manual_seed(0)
    layer = FasterKANLayer(3, 2, h=0.5, train_h=train_h)
    state = {f"it.{key}": value for key, value in layer.state_dict().items()}
    u = torch.linspace(-3, 3, 50)
    edges = plot_run.edge_functions(state, "it", 0.5, u, count=6)
    with torch.no_grad():
        layer.layernorm = torch.nn.Identity()
        for output in range(2):
            total = sum(edges[f"{i} → {output}"] for i in range(3))
            torch.testing.assert_close(total, layer(u[:, None].expand(-1, 3))[:, output])


def test_the_strongest_edges_come_first():
    torch.manual_seed(0)
    layer = FasterKANLayer(6, 4)
    with torch.no_grad():
        layer.spline_linear.weight[2, 3 * 8:4 * 8] *= 50
        layer.spline_linear.weight[1, :8] *= 20
    state = {f"it.{key}": value for key, value in layer.state_dict().items()}
    assert list(plot_run.edge_functions(state, "it", 0.33, torch.linspace(-3, 3, 50), count=2)) == ["3 → 2", "0 → 1"]


def group_kan(**kwargs) -> GroupKAN:
    """A feed-forward of 12 channels whose functions are no longer their bases."""
    torch.manual_seed(0)
    kan = GroupKAN(12, 24, groups=4, **kwargs)
    with torch.no_grad():
        for name, parameter in kan.named_parameters():
            if ".coefficients" in name or ".scale" in name:
                parameter.normal_()
    return kan


@pytest.mark.parametrize("kwargs", [{}, dict(h=0.5, base="silu"), dict(trainable_base=True, num_grids=5, grid_min=-1.0)], ids=str)
def test_group_functions_are_the_activations(kwargs):
    kan = group_kan(**kwargs)
    state, base = {f"it.{key}": value for key, value in kan.state_dict().items()}, kwargs.get("base", "gelu")
    assert plot_run.activations(state) == ["it.phi1", "it.phi2"] and not plot_run.kan_layers(state)
    u = torch.linspace(-4, 4, 50)
    with torch.no_grad():
        for phi in (kan.phi1, kan.phi2):
            name = "it.phi1" if phi is kan.phi1 else "it.phi2"
            functions = plot_run.group_functions(state, name, kwargs.get("h"), base, u)
            assert list(functions) == ["base", "0", "1", "2", "3"]
            torch.testing.assert_close(functions["base"], u if phi is kan.phi1 else plot_run.BASES[base](u))
            each = phi(u[:, None].expand(-1, phi.channels))
            for group in range(4):
                torch.testing.assert_close(functions[str(group)], each[:, group * phi.channels // 4])


def test_the_groups_that_left_the_base_are_drawn():
    kan = GroupKAN(24, groups=12)
    with torch.no_grad():
        kan.phi2.coefficients[2:10, 0] = torch.arange(8.0) + 1
    axes = Figure().subplots()
    plot_run.draw_groups(axes, {f"it.{key}": value for key, value in kan.state_dict().items()}, "it.phi2", None, "gelu")
    drawn = axes.lines[:9]
    assert [line.get_label() for line in drawn] == [*map(str, range(2, 10)), "base"]
    u = torch.tensor(drawn[-1].get_xdata())
    torch.testing.assert_close(torch.tensor(drawn[-1].get_ydata()), torch.nn.functional.gelu(u))
    bump = torch.tensor(drawn[0].get_ydata()) - torch.nn.functional.gelu(u)
    assert (float(u[0]), float(u[-1]), float(u[bump.argmax()])) == (-4, 4, pytest.approx(-3, abs=0.03))
    assert "8 of 12" in axes.get_title() and len(axes.lines) == 9 + 8       # and a line for each grid point


def test_curves_are_those_of_the_logs():
    axes = Figure().subplots()
    logs = {"a": [{"epoch": 0, "x": 5, "t": 1}, {"epoch": 1, "x": 6, "t": 2}], "b": [{"epoch": 0, "x": 7, "t": 3}]}
    plot_run.draw_curve(axes, logs, "x", "y", dashed="t")
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == \
        [([1, 2], [5, 6]), ([1, 2], [1, 2]), ([1], [7]), ([1], [3])]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "a (training)", "b", "b (training)"]
    assert axes.lines[0].get_color() == axes.lines[1].get_color() != axes.lines[2].get_color()
    assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == "y"


def test_picture_with_and_without_a_kan(tmp_path, capsys):
    kan, mlp = (write_log(tmp_path / name, 10.0, 20.0) for name in ("KAN", "MLP"))
    save(mlp, "ViT")
    assert plot_run.main([str(kan), str(mlp), "--output", str(tmp_path / "curves.png")]) == 0
    save(kan, "KAN", kan_h=0.7)
    assert plot_run.main([str(kan), str(mlp)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "curves.png"), str(kan / "curves.png")]
    with Image.open(tmp_path / "curves.png") as small, Image.open(kan / "curves.png") as large:
        assert large.size[0] == small.size[0] and large.size[1] > 2 * small.size[1]
    assert min(colours(tmp_path / "curves.png"), colours(kan / "curves.png")) > 50      # not a blank page


@pytest.mark.parametrize("kwargs, rows", [({}, 3), (dict(kan_input_phi=False, kan_groups=16, kan_base="relu"), 3),
                                          (dict(depth=1), 2)], ids=str)
def test_picture_of_a_group_kan(tmp_path, kwargs, rows, monkeypatch):
    seen = []
    real = plot_run.draw_groups
    monkeypatch.setattr(plot_run, "draw_groups", lambda *args: seen.append(args[2:]) or real(*args))
    save(write_log(tmp_path / "group", 10.0, 20.0), "GKAN", **kwargs)
    save(write_log(tmp_path / "mlp", 10.0, 20.0), "ViT")
    assert plot_run.main([str(tmp_path / "group"), str(tmp_path / "mlp")]) == 0
    with Image.open(tmp_path / "group/curves.png") as picture:
        assert picture.size == (1210, pytest.approx(396 * rows, abs=2))
    assert colours(tmp_path / "group/curves.png") > 50
    blocks, base = kwargs.get("depth", 4), kwargs.get("kan_base", "gelu")
    phis = ["phi2"] if "kan_input_phi" in kwargs else ["phi1", "phi2"]
    names = [f"blocks.{i}.mlp.{phi}" for i in range(blocks) for phi in phis]
    assert seen == [(name, None, base) for name in (names if len(names) <= 4 else names[:2] + names[-2:])]


def test_the_width_of_bumps_that_the_picture_assumes(tmp_path, monkeypatch):
    """It is the model's: its option's, or the default of its feed-forward."""
    seen = []
    for name in ("draw_edges", "draw_groups"):
        monkeypatch.setattr(plot_run, name, lambda axes, state, layer, h, base=None: seen.append(h))
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
    folder = write_log(tmp_path, 10.0)
    for suffix, kwargs in (("KAN", {}), ("KAN", dict(kan_h=0.7)), ("KAN", dict(kan_basis="covering")),
                           ("GKAN", {}), ("GKAN", dict(kan_h=0.9))):
        save(folder, suffix, **kwargs)
        assert plot_run.main([str(folder)]) == 0
    assert seen == [h for h in (0.33, 0.7, None, None, 0.9) for _ in range(4)]


def test_plot_run_tells_what_is_missing(tmp_path, capsys):
    assert plot_run.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# ---------------------------------------------------------------- quickstart
def test_only_an_earlier_quickstart_is_replaced(tmp_path):
    folder = tmp_path / "deep" / "quickstart"
    quickstart.prepare(folder)
    (folder / "old.txt").touch()
    quickstart.prepare(folder)
    assert folder.is_dir() and not (folder / "old.txt").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").touch()
    with pytest.raises(SystemExit, match="choose another folder"):
        quickstart.prepare(other)
    assert (other / "chapter.txt").exists()
    with pytest.raises(SystemExit, match="choose another folder"):
        quickstart.prepare(other / "chapter.txt")


def test_table_of_one_seed_and_of_several():
    run = {"top1": 96.0, "seconds": 60.0, "img_per_s": 500.0}
    _, kan, mlp = quickstart.table({"GKAN": [run], "MLP": [{**run, "top1": 98.0}]}).splitlines()
    assert kan.split() == ["GKAN", "96.00", "469,290", "16.08", "1.96", "60", "500"]
    assert mlp.split() == ["MLP", "98.00", "468,778", "16.08", "0.13", "60", "500"]
    _, kan, _ = quickstart.table({"GKAN": [run, {"top1": 98.0, "seconds": 80.0, "img_per_s": 700.0}],
                                  "MLP": [run, run]}).splitlines()
    assert kan.split() == ["GKAN", "97.00", "±", "1.41", "469,290", "16.08", "1.96", "70", "600"]


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """The command of the README on one thread, from another folder, cut to an epoch."""
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--output-dir", "out", "--epochs", "1"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=240)
    assert answer.returncode == 0, answer.stderr
    lines = {line.split()[0]: line.split() for line in answer.stdout.splitlines() if line.split()}
    assert lines["GKAN"][2] == "469,290" and lines["MLP"][2] == "468,778"
    assert "not twins" not in answer.stdout
    assert colours(tmp_path / "out" / "quickstart.png") > 50
    for name in ("GKAN", "MLP"):
        folder = tmp_path / "out" / f"{name}_seed0"
        assert {"log.txt", "checkpoint.pth", "args.yaml"} <= {path.name for path in folder.iterdir()}
        assert any(folder.glob("events.out.tfevents.*"))
        [record] = plot_run.read_log(folder)
        assert lines[name][1] == f"{record['test_acc1']:.2f}" and record["test_images"] == 360
        assert load_file(folder / "checkpoint.pth")["args"]["data_set"] == "DIGITS"
