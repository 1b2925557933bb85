"""tools/runs.py on folders that real runs of the program left: finished, killed, failed, and folders that are not runs."""
import csv
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from e2e import QUICK, log, run, write_digits
from helpers import TWIN
from PIL import Image

from tools import plot_run, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """deep/kan: 2 epochs with another rate; mlp: 1; failed: no epoch, its loss was not finite."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_digits(folder.parent / f"{folder.name}_data")
    assert run(*QUICK, "--data-path", data, "--epochs", 2, "--lr", 1e-3, "--output_dir", folder / "deep" / "kan") == 0
    assert run(*QUICK, "--data-path", data, "--epochs", 1, "--model", TWIN, "--no-model-ema", "--output_dir", folder / "mlp") == 0
    assert run(*QUICK, "--data-path", data, "--epochs", 1, "--model", TWIN, "--lr", 1e8, "--opt", "momentum", "--output_dir",
               folder / "failed") == 1
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "runs")


def table(capsys, *argv) -> tuple[dict[str, str], list[str]]:
    """Line of each run, and all lines; the exit code was 0."""
    capsys.readouterr()
    assert runs.main([str(word) for word in argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in lines if "|" not in line}, lines


def test_the_table_tells_what_the_runs_did(folder, tmp_path, capsys):
    lines, _ = table(capsys, folder, "--csv", tmp_path / "t.csv", "--output", tmp_path / "p.png")
    kan, mlp = log(folder / "deep" / "kan", times=True), log(folder / "mlp", times=True)
    best = max(record["test_acc1"] for record in kan)
    averaged = max(record["ema_test_acc1"] for record in kan)
    assert re.search(rf"2/2 +{best:.2f} +{averaged:.2f} +{kan[-1]['train_loss']:.4f} +{kan[-1]['test_loss']:.4f} ", lines["kan"])
    assert re.search(rf"1/1 +{mlp[0]['test_acc1']:.2f} +- +{mlp[0]['train_loss']:.4f} ", lines["mlp"])
    assert f"{mlp[0]['n_parameters']:,}" in lines["mlp"] and " finished " in lines["mlp"]
    assert "lr 0.001" in lines["kan"] and "model_ema off" in lines["mlp"] and "opt momentum" in lines["failed"]
    assert "batch_size" not in "".join(lines.values()) and "output_dir" not in "".join(lines.values())
    assert " 0/1 " in lines["failed"] and " failed " in lines["failed"]
    status = json.loads((folder / "failed" / "status.json").read_text())
    assert lines["failed:"] == f"failed: failed: {status['reason']}"

    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "t.csv").open())}
    assert list(rows) == ["failed", "kan", "mlp"] and rows["failed"]["reason"] == status["reason"]
    assert float(rows["kan"]["top1"]) == best and float(rows["kan"]["lr"]) == 1e-3 and rows["mlp"]["model"] == TWIN
    assert float(rows["kan"]["hours"]) == pytest.approx(sum(record["epoch_seconds"] for record in kan) / 3600)
    seconds = sum(record["epoch_seconds"] for record in kan)
    images = sum(record["epoch_seconds"] * record["img_per_s"] for record in kan)
    assert float(rows["kan"]["img_per_s"]) == pytest.approx(images / seconds)
    assert rows["failed"]["top1"] == "" and rows["mlp"]["ema_top1"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "t.csv"]
    assert Image.open(tmp_path / "p.png").size[0] > 1000


@pytest.mark.parametrize("key,first,last", [("name", "failed", "mlp"), ("epochs", "kan", "failed"), ("test_loss", None, "failed"),
                                            ("parameters", "kan", "failed"), ("top1", None, "failed")])
def test_sorted_with_the_best_first(key, first, last, folder, tmp_path, capsys):
    _, lines = table(capsys, folder, "--sort", key, "--output", tmp_path / "p.png")
    order = [line.split()[0] for line in lines[1:4]]
    if first is None:
        values = {"kan": log(folder / "deep" / "kan"), "mlp": log(folder / "mlp")}
        value = {name: min(-r["test_acc1"] for r in records) if key == "top1" else records[-1]["test_loss"]
                 for name, records in values.items()}
        first = min(value, key=value.get)
        if value["kan"] == value["mlp"]:
            first = order[0]
    assert (order[0], order[-1]) == (first, last)


def test_runs_that_are_under_way_or_were_killed(copy, capsys):
    status = json.loads((copy / "mlp" / "status.json").read_text()) | {"state": "running"}
    for pid, host, told in ((os.getpid(), socket.gethostname(), "running"), (2 ** 22 + 1, socket.gethostname(), "killed"),
                            (2 ** 22 + 1, "elsewhere", "running"), (None, socket.gethostname(), "killed")):
        (copy / "mlp" / "status.json").write_text(json.dumps(status | {"pid": pid, "host": host}))
        assert f" {told} " in table(capsys, copy)[0]["mlp"]


def test_damaged_and_missing_parts_are_told_and_the_rest_is_shown(copy, capsys, monkeypatch):
    log_file = copy / "deep" / "kan" / "log.txt"
    log_file.write_text(log_file.read_text() + '{"epoch": 2, "tr')          # a kill while writing
    (copy / "mlp" / "status.json").write_text("{")
    (copy / "mlp" / "args.yaml").write_text("no_such_flag: 1\n")
    (copy / "failed" / "log.txt").write_text("not a log\n")
    (copy / "foreign").mkdir()
    (copy / "foreign" / "log.txt").write_bytes(b"\xff\xfe")
    (copy / "infinite").mkdir()
    (copy / "infinite" / "log.txt").write_text('{"epoch": Infinity}\n')
    (copy / "new").mkdir()
    (copy / "new" / "status.json").write_text("[]")
    (copy / "words").mkdir()
    (copy / "words" / "log.txt").write_text('{"epoch": 0, "img_per_s": "fast", "epoch_seconds": 1}\n')
    shutil.copytree(copy / "words", copy / "damaged")
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: real(path if path.parent.name != "damaged" else copy / "", **how))
    assert runs.main([str(copy)]) == 0
    out, err = capsys.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert " 2/2 " in lines["kan"] and " unknown " in lines["mlp"] and " unknown " in lines["new"]
    assert lines["mlp"].endswith(" -") and f"{log(copy / 'mlp')[0]['test_loss']:.4f}" in lines["mlp"]
    assert len(err.splitlines()) == 7 and all(line.startswith("warning: ") for line in err.splitlines())
    assert "status.json" in err and "no_such_flag" in err and "words/log.txt line 1 is not an epoch" in err
    assert "damaged/log.txt cannot be read (Is a directory)" in err
    assert (copy / "runs.png").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Glyph")
def test_names_in_a_script_that_the_font_lacks(copy, tmp_path):
    one = next(path.parent for path in sorted(copy.rglob("log.txt")))
    place = shutil.copytree(one, tmp_path / "猫" / "猫")
    other = shutil.copytree(one, tmp_path / "犬" / "犬")
    assert runs.main([str(place), str(other), "--output", str(tmp_path / "r.png")]) == 0
    assert plot_run.main([str(place), str(other), "--output", str(tmp_path / "p.png")]) == 0
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("r.png", "p.png"))


def test_many_runs_have_colours_of_their_own(copy, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(runs.plt, "close", figures.append)
    for number in range(12):
        shutil.copytree(copy / "mlp", copy / "more" / f"run{number}")
    lines, _ = table(capsys, copy / "more", copy / "more" / "run3", "--output", copy / "p.png")
    assert {name for name in lines if name.startswith("run")} == {"run", *(f"run{number}" for number in range(12))}
    [figure] = figures
    assert len({tuple(line.get_color()) for line in figure.axes[1].lines}) == len(figure.axes[1].lines) == 12
    assert len(figure.axes[0].lines) == 24 and len(figure.legends[0].get_texts()) == 12


@pytest.mark.parametrize("words,sentence", [
    (["NOWHERE"], "is not a folder"), (["EMPTY"], "holds no run"), (["RUNS", "--csv", "A_FILE/t.csv"], "cannot be written"),
    (["RUNS", "--output", "A_FILE/p.png"], "cannot be written")])
def test_mistakes(words, sentence, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {"A_FILE": tmp_path / "file", "NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path / "empty", "RUNS": folder}
    words = [re.sub("[A-Z_]{3,}", lambda name: str(places[name[0]]), word) for word in words]
    assert runs.main(words) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("error: ") and "Traceback" not in err
    (folder / "runs.png").unlink(missing_ok=True)
