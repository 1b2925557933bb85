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
    kwargs = {"num_classes": 10, **kwargs}
    model = timm.create_model(name, **kwargs)
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


@pytest.mark.parametrize("suffix, kwargs, rows", [
    ("GKAN", {}, 3), ("GKAN", dict(kan_input_phi=False, kan_groups=16, kan_base="relu"), 3), ("GKAN", dict(depth=1), 2),
    ("KAN", dict(kan_h=0.7), 3), ("EKAN", dict(depth=1), 2)], ids=str)
def test_picture_of_learned_functions(tmp_path, suffix, kwargs, rows, monkeypatch):
    """Of the model in the file, so that grid, width and base are its own; the first layers and the last."""
    seen = []
    real = plot_run.draw_functions
    monkeypatch.setattr(plot_run, "draw_functions", lambda *args: seen.append(args[1:]) or real(*args))
    save(write_log(tmp_path / "mlp", 10.0, 20.0), "ViT")
    save(write_log(tmp_path / "kan", 10.0, 20.0), suffix, **kwargs)
    assert plot_run.main([str(tmp_path / "mlp"), str(tmp_path / "kan")]) == 0
    with Image.open(tmp_path / "mlp/curves.png") as picture:
        assert picture.size == (1210, pytest.approx(396 * rows, abs=2))
    assert colours(tmp_path / "mlp/curves.png") > 50
    parts = ["layers.0", "layers.1"] if suffix != "GKAN" else ["phi2"] if "kan_input_phi" in kwargs else ["phi1", "phi2"]
    names = [f"blocks.{i}.mlp.{part}" for i in range(kwargs.get("depth", 4)) for part in parts]
    assert [name for name, _ in seen] == (names if len(names) <= 4 else names[:2] + names[-2:])
    if "kan_h" in kwargs:
        assert {layer.rbf.h for _, layer in seen} == {0.7}
    if "kan_base" in kwargs:
        assert {layer.base for _, layer in seen} == {"relu"}


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
