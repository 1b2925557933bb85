"""What a run leaves in its folder."""
import io
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import epochs, forked, names, scalars, sentence

from vision_kan.checkpoints.read import BEST, CHECKPOINT, PREVIOUS, load_file
from vision_kan.checkpoints.write import save_checkpoint
from vision_kan.common.process import Process
from vision_kan.run.folder import RunFolder, _run_id


# ---------------------------------------------------------------- the run's folder
def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def written(folder: Path, epoch: int, until: int, offset: float = 0.0) -> RunFolder:
    run = RunFolder(str(folder), Process())
    run.start("lr: 0.5\n", ["--lr", "0.5", "--output_dir", "a b"], epoch)
    for e in range(epoch, until):
        run.log({"epoch": e, "train_loss": e + offset, "test_acc1": 10.0 * e, "ema_test_acc1": 1, "note": "text"})
    run.close()
    return run


def test_log_tensorboard_flags_and_versions(tmp_path):
    folder = tmp_path / "deep" / "run"
    run = written(folder, 0, 2)
    assert run.failed == "" and len(names(folder)) == 4
    assert records(folder)[1] == {"epoch": 1, "train_loss": 1.0, "test_acc1": 10.0, "ema_test_acc1": 1, "note": "text"}
    assert scalars(folder) == {"train/loss": [(0, 0.0), (1, 1.0)], "test/acc1": [(0, 0.0), (1, 10.0)],
                               "ema_test/acc1": [(0, 1.0), (1, 1.0)]}
    assert (folder / "args.yaml").read_text() == "lr: 0.5\n"
    [launch] = yaml.safe_load((folder / "run.yaml").read_text())
    assert launch["command"].endswith("main.py --lr 0.5 --output_dir 'a b'")
    assert launch["versions"]["torch"] == torch.__version__.partition("+")[0] or \
        launch["versions"]["torch"] == torch.__version__
    assert {"python", "torchvision", "timm", "numpy", "platform", "cuda"} <= set(launch["versions"])
    assert launch["first_epoch"] == 0 and launch["processes"] == 1 and launch["device"] == "cpu"


def test_a_resumed_run_writes_each_epoch_once(tmp_path):
    written(tmp_path, 0, 3)
    log = tmp_path / "log.txt"
    log.write_text(log.read_text() + '{"epoch": 3, "train_lo')      # a kill while writing
    written(tmp_path, 2, 4, offset=0.5)                             # epochs 2 and 3 are done again
    assert [(r["epoch"], r["train_loss"]) for r in records(tmp_path)] == [(0, 0), (1, 1), (2, 2.5), (3, 3.5)]
    assert scalars(tmp_path)["train/loss"] == [(0, 0.0), (1, 1.0), (2, 2.5), (3, 3.5)]
    launches = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert [launch["first_epoch"] for launch in launches] == [0, 2]


def test_a_run_is_known_by_the_same_id_however_often_it_is_resumed(tmp_path):
    def ids():
        return [launch.get("run_id") for launch in yaml.safe_load((tmp_path / "run.yaml").read_text())]

    written(tmp_path, 0, 1)
    written(tmp_path, 1, 2)
    first, second = ids()
    assert first == second and len(first) == 32
    written(tmp_path, 0, 1)             # begun again: another run
    assert ids()[0] != first
    for damage in ("[{}]", "- a: [", ""):       # by an earlier version, or cut off
        (tmp_path / "run.yaml").write_text(damage)
        assert _run_id(tmp_path) == ""


def test_a_folder_in_the_place_of_a_checkpoint_makes_room(tmp_path, capsys):
    (tmp_path / CHECKPOINT / "mine").mkdir(parents=True)
    run = written(tmp_path, 0, 1)
    assert f"{tmp_path / CHECKPOINT} is renamed to {CHECKPOINT}.folder" in capsys.readouterr().err
    run.save({"epoch": 0})
    assert run.failed == "" and load_file(tmp_path / CHECKPOINT) == {"epoch": 0}
    assert (tmp_path / f"{CHECKPOINT}.folder" / "mine").is_dir()


def test_a_half_written_line_of_an_earlier_epoch_does_not_swallow_the_next_one(tmp_path):
    written(tmp_path, 0, 2)
    log = tmp_path / "log.txt"
    log.write_text(log.read_text() + '{"epo\0\0')
    written(tmp_path, 2, 3)
    assert [r["epoch"] for r in records(tmp_path)] == [0, 1, 2]


def test_a_run_that_begins_again_at_the_first_epoch(tmp_path):
    written(tmp_path, 0, 1)             # killed before its first checkpoint
    written(tmp_path, 0, 2, offset=0.5)
    assert [(r["epoch"], r["train_loss"]) for r in records(tmp_path)] == [(0, 0.5), (1, 1.5)]
    assert scalars(tmp_path)["train/loss"] == [(0, 0.5), (1, 1.5)]
    assert len(yaml.safe_load((tmp_path / "run.yaml").read_text())) == 1


def test_nothing_without_a_folder_and_on_other_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in (RunFolder("", Process()), RunFolder(str(tmp_path / "run"), Process(rank=1, world_size=2))):
        run.start("lr: 1\n", [], 0)
        run.log({"epoch": 0, "train_loss": 1.0})
        run.save({"epoch": 0})
        run.close()
        assert names(tmp_path) == [] and run.failed == ""
        assert not run.holds_another_run("")


def test_a_folder_that_holds_another_run(tmp_path):
    run = RunFolder(str(tmp_path), Process())
    assert not run.holds_another_run("") and not run.holds_another_run("elsewhere/checkpoint.pth")
    run.save({"epoch": 0})
    assert run.holds_another_run("") and run.holds_another_run("elsewhere/checkpoint.pth")
    (tmp_path / CHECKPOINT).rename(tmp_path / BEST[0])      # what --resume auto finds, a new run keeps away from
    assert run.holds_another_run("")
    for own in (CHECKPOINT, PREVIOUS, "../" + tmp_path.name + "/" + CHECKPOINT):
        assert not run.holds_another_run(str(tmp_path / own))


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        text = sentence(RunFolder, str(folder), Process())
        assert f"--output_dir {folder}" in text and "another folder" in text
    for where in (Path("/proc/none"), tmp_path / "locked"):
        if where.name == "locked":
            if os.getuid() == 0:
                continue            # root writes anywhere
            where.mkdir(mode=0o500)
        assert "--output_dir" in sentence(RunFolder, str(where), Process())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_cannot_be_written_is_told_and_survived(tmp_path, capsys):
    run = RunFolder(str(tmp_path), Process())
    run.start("lr: 1\n", [], 0)
    (tmp_path / "log.txt").symlink_to("/dev/full")
    run.log({"epoch": 0, "train_loss": 1.0})
    assert "log.txt could not be written" in run.failed and "No space left" in run.failed
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and str(tmp_path) in told and "training goes on" in told
    run.save({"epoch": 0})
    assert run.failed == "" and epochs_of_checkpoints(tmp_path) == {CHECKPOINT: 0}
    assert '{"epoch": 0, "train_loss": 1.0}' in run.stopped_by("SIGTERM", SimpleNamespace(epoch=0, step=3))
    run.close()
    assert "log.txt could not be written" in run.failed
    (tmp_path / "log.txt").unlink()
    run.close()
    assert json.loads((tmp_path / "log.txt").read_text()) == {"epoch": 0, "train_loss": 1.0}


def epochs_of_checkpoints(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["epoch"] for path in folder.glob("*.pth")}


def test_a_folder_that_vanishes_is_told_and_survived(tmp_path, capsys):
    folder = tmp_path / "run"
    run = written(folder, 0, 1)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    run.log({"epoch": 1, "train_loss": 1.0})
    assert "log.txt could not be written" in run.failed
    run.save({"epoch": 1})
    assert "checkpoint.pth could not be written" in run.failed and "No such file" in run.failed
    assert capsys.readouterr().err.count("warning: ") == 2
    folder.mkdir()                      # mounted again
    run.save({"epoch": 2})
    assert run.failed == "" and epochs(folder) == {CHECKPOINT: 2}


def on_a_full_disk(folder: Path) -> dict:
    small, large = {"epoch": 0, "model": {"w": torch.rand(10)}}, {"epoch": 1, "model": {"w": torch.rand(500_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sys.stdout = sys.stderr = said = io.StringIO()      # pytest's are files, to which the limit would apply
    run = RunFolder(str(folder), Process())
    run.start("lr: 1", ["--lr", "1"], 0)
    run.log({"epoch": 0, "train_loss": 1.0})
    run.save(small)
    told = {"before": run.failed}
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))     # of every file: 200 kB, and then EFBIG
    run.save(large)
    told["checkpoint"] = run.failed
    with pytest.raises(OSError):
        save_checkpoint(large, folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    run.log({"epoch": 1, "train_loss": 1.0, "test_acc1": 2.0})
    run.log({"epoch": 2, "train_loss": 1.0})
    told["log"] = run.failed
    told["kept"], told["epoch"] = names(folder), torch.load(folder / CHECKPOINT)["epoch"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.save(large)
    told["healed"], told["at last"] = run.failed, torch.load(folder / CHECKPOINT)["epoch"]
    run.close()
    return {**told, "said": said.getvalue()}


def test_a_full_disk_is_survived(tmp_path):
    told = forked(on_a_full_disk, tmp_path)
    assert told["before"] == "" and "checkpoint.pth could not be written" in told["checkpoint"]
    assert "log.txt could not be written" in told["log"]
    assert [name for name in told["kept"] if not name.startswith("events")] == ["args.yaml", CHECKPOINT, "log.txt",
                                                                                "run.yaml"]
    assert told["epoch"] == 0 and told["healed"] == "" and told["at last"] == 1
    assert told["said"].count("warning: checkpoint.pth could not be written") == 1
    assert told["said"].count("warning: log.txt could not be written") == 2
