"""tools/quickstart.py and tools/plot_run.py: the table, the picture, and both trainings end to end."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT, sentence
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from tools import plot_run, quickstart
from vision_kan.analysis.inputs import InputHistogram
from vision_kan.checkpoints.read import load_file
from vision_kan.common.errors import UserError


def write_log(folder: Path, *top1: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(
        json.dumps({"epoch": number, "train_loss": 2.0 - number, "test_loss": 1.9 - number, "test_acc1": acc1,
                    "test_images": 360, "img_per_s": 9.0}) + "\n" for number, acc1 in enumerate(top1)))
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


@pytest.mark.parametrize("text", ["", "hello\n", "3\n", '{"loss": 1}\n', '{"epoch": 0}\nrubbish\n{"epoch": 1}\n',
                                  '{"epoch": 0, "img_per_s": "fast"}\n', '{"epoch": 0, "test_loss": null}\n'])
def test_log_that_is_none(tmp_path, text):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(UserError, match=r"log\.txt"):
        plot_run.read_log(tmp_path)


@pytest.mark.filterwarnings("error")
def test_epochs_without_an_evaluation_are_left_out(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    assert plot_run.main([str(tmp_path)]) == 0 and colours(tmp_path / "curves.png") > 1


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


@pytest.mark.slow
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
    pytest.param("GKAN", {}, 3, marks=pytest.mark.slow),
    pytest.param("GKAN", dict(kan_input_phi=False, kan_groups=16, kan_base="relu"), 3, marks=pytest.mark.slow),
    ("GKAN", dict(depth=1), 2), pytest.param("KAN", dict(kan_h=0.7), 3, marks=pytest.mark.slow),
    ("EKAN", dict(depth=1), 2)], ids=str)
def test_picture_of_learned_functions(tmp_path, suffix, kwargs, rows, monkeypatch):
    """Of the model in the file, so that grid, width and base are its own; the first layers and the last."""
    seen = []
    real = plot_run.draw_functions
    monkeypatch.setattr(plot_run, "draw_functions", lambda *args: seen.append(args[1:3]) or real(*args))
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


def test_functions_over_what_arrives(tmp_path, monkeypatch):
    """Of the digits that the run's checkpoint names, in the middle of the picture; nowhere without them."""
    drawn = []
    monkeypatch.setattr(plot_run, "draw_functions", lambda axes, name, layer, inputs: drawn.append((layer, inputs)))
    folder = write_log(tmp_path / "kan", 10.0)
    save(folder, "GKAN", depth=1)
    torch.save({**torch.load(folder / "checkpoint.pth"), "args": {"data_set": "DIGITS"}}, folder / "checkpoint.pth")
    plot_run.plot_runs([folder], tmp_path / "p.png", with_inputs=True)
    assert [int(inputs.counts.sum()) for _, inputs in drawn] == [64 * 17 * 96, 64 * 17 * 384]      # images, tokens, channels
    assert all(isinstance(inputs, InputHistogram) for _, inputs in drawn)
    drawn.clear()
    plot_run.plot_runs([folder], tmp_path / "p.png")
    assert [inputs for _, inputs in drawn] == [None, None]


def test_plot_run_tells_what_is_missing(tmp_path, capsys):
    assert plot_run.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# ---------------------------------------------------------------- quickstart
def test_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "OUTPUT", tmp_path / "runs" / "quickstart")
    for name in ("quickstart", "quickstart_2", "quickstart_3"):
        folder = quickstart.prepare(None)
        assert folder == tmp_path / "runs" / name and not any(folder.iterdir())
        (folder / "log.txt").write_text(name)
    assert (tmp_path / "runs/quickstart/log.txt").read_text() == "quickstart"
    assert quickstart.prepare(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    for taken in (folder, folder / "log.txt"):
        assert f"--output-dir {taken} is not empty" in sentence(quickstart.prepare, taken)
    assert "cannot be made" in sentence(quickstart.prepare, folder / "log.txt" / "below")


@pytest.mark.parametrize("words, says", [
    ("--epoch 1", "error: unknown flag --epoch: did you mean --epochs?"), ("--seed 1", "did you mean --seeds?"),
    ("out", "error: unexpected argument 'out'"), ("--epochs one", "--epochs"), ("--seeds 1 0 1", "--seeds 1 0 1 names one twice"),
    ("--topk 5", "error: unknown flag --topk\n")])
def test_no_abbreviations(words, says, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "prepare", None)        # nothing is begun
    assert quickstart.main(words.split()) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_table_of_one_seed_and_of_several():
    run = {"top1": 96.0, "seconds": 60.0, "img_per_s": 500.0}
    _, kan, mlp = quickstart.table({"GKAN": [run], "MLP": [{**run, "top1": 98.0}]}).splitlines()
    assert kan.split() == ["GKAN", "96.00", "469,290", "16.08", "1.96", "60", "500"]
    assert mlp.split() == ["MLP", "98.00", "468,778", "16.08", "0.13", "60", "500"]
    _, kan, _ = quickstart.table({"GKAN": [run, {"top1": 98.0, "seconds": 80.0, "img_per_s": 700.0}],
                                  "MLP": [run, run]}).splitlines()
    assert kan.split() == ["GKAN", "97.00", "±", "1.41", "469,290", "16.08", "1.96", "70", "600"]


def results(kan: list[float], mlp: list[float]) -> dict[str, list[dict[str, float]]]:
    return {name: [{"top1": top1, "images": 360} for top1 in values] for name, values in (("GKAN", kan), ("MLP", mlp))}


def test_what_one_seed_says():
    text = " ".join(quickstart.conclusion(results([98.0], [96.0])).split())      # however it is broken into lines
    half = 1.96 * (100 * 98 * 2 / 360 / 100 + 100 * 96 * 4 / 360 / 100) ** 0.5      # of a difference of two shares, in points
    assert f"+2.00 points of top-1, one seed, 360 test images (one image is 0.28 points; the choice of images alone is worth " \
           f"± {half:.2f}, 95%)" in text
    assert "One seed does not show which is better" in text and "docs/results.md" in text and "better on these" not in text


@pytest.mark.parametrize("kan, mlp, verdict", [
    ([98.0, 97.0, 99.0], [97.5, 97.5, 98.0], "no difference is shown"),
    ([98.0, 97.0, 99.0], [96.0, 95.1, 96.9], "GKAN is better on these digits"),
    ([96.0, 95.1, 96.9], [98.0, 97.0, 99.0], "MLP is better on these digits")])
def test_what_several_seeds_say(kan, mlp, verdict):
    text = " ".join(quickstart.conclusion(results(kan, mlp)).split())
    interval = stats.ttest_rel(kan, mlp).confidence_interval(0.95)
    assert f"[{interval.low:+.2f}, {interval.high:+.2f}] (Student's t, 3 seeds, paired, 360 test images): {verdict}." in text
    assert "docs/results.md" in text


class Printed:
    """A training in the place of `subprocess.Popen`, that prints what main.py does and leaves a log."""

    def __init__(self, command, **_):
        folder = Path(command[command.index("--output_dir") + 1])
        top1 = [50.0, 60.0, 70.0] if "GKAN" in folder.name else [40.0, 65.0, 71.0]
        if self.code:
            top1 = []
        write_log(folder, *top1)
        self.stdout = ["error: no room\n"] if not top1 else [
            line for epoch, value in enumerate(top1) for line in (
                *(f"epoch {epoch}/3  step {step}/9  loss 1\n" for step in range(10)),
                f"model: top-1 {value:.2f} top-5 99.00 (360 images)\n")]

    code = 0

    def wait(self) -> int:
        return self.code


def test_a_short_line_for_each_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart.subprocess, "Popen", Printed)
    found = quickstart.train(7, tmp_path, [])
    assert {name: (run["top1"], run["images"]) for name, run in found.items()} == {"GKAN": (70.0, 360), "MLP": (71.0, 360)}
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit("  ", 1)[0] for line in lines] == [
        "seed 7  epoch 1/3  top-1 (%) GKAN  50.00  MLP  40.00", "seed 7  epoch 2/3  top-1 (%) GKAN  60.00  MLP  65.00",
        "seed 7  epoch 3/3  top-1 (%) GKAN  70.00  MLP  71.00"]
    for name in ("GKAN", "MLP"):
        assert (tmp_path / f"{name}_seed7.txt").read_text().count("\n") == 33


def test_why_a_training_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart.subprocess, "Popen", Printed)
    monkeypatch.setattr(Printed, "code", 2)
    with pytest.raises(SystemExit) as stop:
        quickstart.train(0, tmp_path, [])
    assert stop.value.code == 2 and "error: no room" in capsys.readouterr().err


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """The command of the README on one thread, from another folder, cut to an epoch."""
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--output-dir", "out", "--epochs", "1"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=240)
    assert answer.returncode == 0, answer.stderr
    lines = {line.split()[0]: line.split() for line in answer.stdout.splitlines() if re.match(r"(GKAN|MLP) +\d", line)}
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
