"""--track: what Weights & Biases and MLflow really hold after a run, offline; and that neither can stop or delay one."""
import importlib.util
import json
import struct
import time
from pathlib import Path

import pytest
import yaml
from e2e import QUICK, Run, log, refusal, run

from vision_kan.common.errors import Preempted
from vision_kan.common.process import Process
from vision_kan.run import tracking
from vision_kan.run.folder import RunFolder
from vision_kan.run.tracking import About, Tracker

needs = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
         for name in tracking.SERVICES}


def offline(folder: Path) -> dict[str, str]:
    return {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": (folder / "store").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}


def expected(record: dict) -> dict[str, float]:
    """A line of log.txt under the trackers' names."""
    return {key.replace("ema_test_", "ema_test/").replace("train_", "train/") if key.startswith(("ema", "train"))
            else key.replace("test_", "test/"): value for key, value in record.items() if key != "epoch"}


def wandb_records(file: Path):
    """What an offline run of W&B holds: a log in LevelDB's format of its protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, place, whole = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:       # a header does not cross the end of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place:place + 7])
        whole += content[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):                  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_run(file: Path) -> tuple[str, str, str, dict, list[dict], int]:
    """id, project, name, config, history, exit code"""
    records = list(wandb_records(file))
    about = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    config = {update.key: json.loads(update.value_json) for update in about.config.update}
    history = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
               for r in records if r.WhichOneof("record_type") == "history"]
    codes = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    return about.run_id, about.project, about.display_name, config, history, codes[-1]


@pytest.mark.slow
@needs["wandb"]
@needs["mlflow"]
def test_a_run_and_its_resumption_are_one_run_at_both(data, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    out = tmp_path / "my_run"
    command = [*QUICK, "--data-path", data, "--output_dir", out, "--track", "wandb", "mlflow", "--track-project", "digits"]
    for more in (["--epochs", 1], ["--epochs", 2, "--resume", "auto"]):
        launch = Run(tmp_path, *command, *more, environment=offline(tmp_path))
        assert launch.wait() == 0, launch.err.read_text()
        assert "warning" not in launch.err.read_text()
    lines = log(out, times=True)
    assert [line["epoch"] for line in lines] == [0, 1]

    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    (id_a, *about_a, config, first, code_a), (id_b, *about_b, again, second, code_b) = map(wandb_run, files)
    assert id_a == id_b == yaml.safe_load((out / "run.yaml").read_text())[0]["run_id"]
    assert about_a == about_b == ["digits", "my_run"] and code_a == code_b == 0
    assert config["epochs"] == 1 and again["epochs"] == 2 and config["batch_size"] == 16
    assert {"torch", "timm"} <= config["launch"]["versions"].keys() and "--track" in config["launch"]["command"]
    for line, [sent] in zip(lines, (first, second)):
        assert sent.pop("epoch") == sent.pop("_step") == line["epoch"]
        assert {key: value for key, value in sent.items() if key[0] != "_"} == pytest.approx(expected(line))

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(offline(tmp_path)["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("digits")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "my_run" and found.info.status == "FINISHED"
    assert found.data.params["epochs"] == "1" and found.data.params["batch_size"] == "16"
    tags = found.data.tags
    assert tags["resumed.epochs"] == "2" and "--resume auto" in tags["mlflow.source.name"] and "version.torch" in tags
    assert "resumed.batch_size" not in tags
    assert found.data.metrics.keys() == expected(lines[0]).keys()
    for key in found.data.metrics:
        history = [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, key)]
        assert history == [(line["epoch"], expected(line)[key]) for line in lines]


@needs["mlflow"]
@pytest.mark.parametrize("error,state", [(Preempted("stopped"), "KILLED"), (RuntimeError("boom"), "FAILED")])
def test_a_run_that_does_not_finish_is_told_so(error, state, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from mlflow import MlflowClient
    for key, value in offline(tmp_path).items():
        monkeypatch.setenv(key, value)
    folder = RunFolder(str(tmp_path / "run"), Process(), track=["mlflow", "mlflow"], track_project="p")
    with pytest.raises(type(error)), folder.reporting_status(SimpleNamespace(epoch=0, step=0)):
        folder.start("lr: 1\n", [], 0)
        folder.log({"epoch": 0, "train_loss": 1.5})
        raise error
    client = MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert found.info.status == state and found.data.metrics == {"train/loss": 1.5}


@pytest.mark.slow
@needs["mlflow"]
def test_a_server_that_is_not_there_stops_nothing_and_is_told_once(data, tmp_path):
    out = tmp_path / "run"
    launch = Run(tmp_path, *QUICK, "--data-path", data, "--output_dir", out, "--epochs", 2, "--track", "mlflow", environment={
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    assert launch.wait() == 0
    warnings = [line for line in launch.err.read_text().splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "--track mlflow failed" in warnings[0] and "127.0.0.1" in warnings[0]
    assert len(log(out)) == 2 and json.loads((out / "status.json").read_text())["state"] == "finished"


def test_mistakes(data, tmp_path, capsys, monkeypatch):
    given = [*QUICK, "--data-path", data, "--epochs", 1, "--output_dir", tmp_path / "run"]
    assert "did you mean wandb?" in refusal(capsys, *given, "--track", "wandbb")
    assert "--output_dir" in refusal(capsys, *given[:-2], "--track", "mlflow")
    (tmp_path / "flags.yaml").write_text("eval: true\n")
    assert "--eval has none" in refusal(capsys, *given, "--config", tmp_path / "flags.yaml", "--track", "mlflow")
    (tmp_path / "recipe.yaml").write_text("track: wandb\n")
    assert "a list of one or more names" in refusal(capsys, *given, "--config", tmp_path / "recipe.yaml")
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in tracking.SERVICES else present(name))
    for name in tracking.SERVICES:
        assert f"pip install {name}" in refusal(capsys, *given, "--track", name)
    assert run(*given) == 0


@pytest.mark.slow
@needs["wandb"]
def test_without_a_login_wandb_is_refused_before_the_training(data, tmp_path):
    launch = Run(tmp_path, *QUICK, "--data-path", data, "--epochs", 1, "--output_dir", tmp_path / "run", "--track", "wandb",
                 environment={"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": "",
                              "WANDB_MODE": "online"})
    assert launch.wait() == 2
    last = launch.err.read_text().splitlines()[-1]
    assert last.startswith("error: --track wandb") and "wandb login" in last and "WANDB_MODE=offline" in last


def test_other_processes_track_nothing(tmp_path):
    folder = RunFolder(str(tmp_path / "run"), Process(rank=1, world_size=2), track=["mlflow"], track_project="p")
    folder.start("lr: 1\n", [], 0)
    folder.log({"epoch": 0, "train_loss": 1.0})
    assert folder.trackers == []


# ---------------------------------------------------------------- the thread, before a service that fails or is slow
class Shaky:
    """Fails as often as `failures` says, and takes `seconds` for a call."""
    failures, seconds = 0, 0.0
    got: list = []

    def __init__(self, about):
        self._work()

    def log(self, epoch, numbers):
        self._work()
        self.got.append((epoch, numbers["a"]))

    def finish(self, state, exit_code):
        self._work()
        self.got.append((state, exit_code))

    @classmethod
    def _work(cls):
        time.sleep(cls.seconds)
        cls.failures -= 1
        if cls.failures >= 0:
            raise ConnectionError("no route\nto host")


@pytest.fixture
def shaky(monkeypatch):
    monkeypatch.setitem(tracking.SERVICES, "shaky", Shaky)
    monkeypatch.setattr(Shaky, "got", [])
    return About("id", "name", "project", Path(), {}, {})


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_what_could_not_be_sent_is_sent_later_in_order(failures, shaky, monkeypatch, capsys):
    monkeypatch.setattr(Shaky, "failures", failures)
    tracker = Tracker("shaky", shaky)
    for epoch in range(4):
        tracker.log(epoch, {"a": epoch / 2})
    tracker.finish("finished", 0)
    assert Shaky.got == [*((epoch, epoch / 2) for epoch in range(4)), ("finished", 0)]
    assert capsys.readouterr().err.count("warning: --track shaky failed (no route)") == (failures > 0)


def test_a_slow_service_delays_nothing(shaky, monkeypatch, capsys):
    monkeypatch.setattr(Shaky, "seconds", 0.5)
    monkeypatch.setattr(tracking, "FINISH_S", 0.1)
    start = time.monotonic()
    tracker = Tracker("shaky", shaky)
    for epoch in range(100):
        tracker.log(epoch, {"a": 1.0})
    tracker.finish("finished", 0)
    assert time.monotonic() - start < 0.4
    assert "took longer" in capsys.readouterr().err
