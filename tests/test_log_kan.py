"""--log-kan: functions, coverage and dead units in TensorBoard, a warning off the grid, and the same training as without it."""
import io
import resource
import sys
from pathlib import Path

import pytest
import torch
from e2e import QUICK, checkpoint, launch, left, log, refusal, run
from helpers import differences, forked, scalars
from models import learned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools.images import loaders_of
from vision_kan.analysis.inputs import collect_inputs
from vision_kan.analysis.measures import measure
from vision_kan.analysis.training_log import log_functions
from vision_kan.common.process import Process
from vision_kan.data.loaders import validation_images
from vision_kan.layers.function_layer import function_layers
from vision_kan.run.folder import RunFolder
from vision_kan.run.trained import load_trained

GROUP = ("--model", "vit_nano_patch8_32_GKAN")
ALL = ("kan_off_grid", "kan_dead_groups", "kan_distance")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """The same training of three epochs without and with the flag, everything random switched on."""
    folder = tmp_path_factory.mktemp("runs")
    line = (*QUICK, *GROUP, "--data-path", data, "--epochs", 3, "--drop", 0.1, "--drop-path", 0.1, "--lr", 0.01, "--unscale-lr")
    assert run(*line, "--output_dir", folder / "without") == 0
    assert run(*line, "--log-kan", 1, "--output_dir", folder / "with") == 0
    return folder


def board(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    return events


def without_kan(state: dict) -> dict:
    for saved in state["files"].values():
        saved["args"].pop("log_kan")
    return {**state, "scalars": {tag: points for tag, points in state["scalars"].items() if not tag.startswith("kan_")}}


# ---------------------------------------------------------------- what is written
@pytest.mark.slow
def test_tensorboard_has_functions_coverage_and_dead_groups(runs, data):
    events = board(runs / "with")
    layers = [f"blocks.{block}.mlp.phi{n}" for block in range(4) for n in (1, 2)]
    kan = {tag for tag in events.Tags()["scalars"] if tag.startswith("kan_")}
    assert kan == {f"{name}/{layer}" for name in ALL for layer in layers}
    assert set(events.Tags()["images"]) == {f"kan_functions/blocks.{block}" for block in range(4)}
    assert set(events.Tags()["histograms"]) == {f"kan_inputs/{layer}" for layer in layers}
    for tag in kan:
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2]
    picture = events.Images("kan_functions/blocks.3")
    assert [event.step for event in picture] == [0, 1, 2] and len({event.encoded_image_string for event in picture}) == 3
    assert picture[0].encoded_image_string.startswith(b"\x89PNG") and picture[0].width > 500
    # nothing of it without the flag
    events = board(runs / "without")
    assert not any(tag.startswith("kan_") for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind])


@pytest.mark.slow
def test_the_numbers_are_those_of_the_last_checkpoint(runs, data):
    trained = load_trained(str(runs / "with/checkpoint.pth"), device="cpu", flags=["--data-path", str(data)])
    images = validation_images(loaders_of(trained))
    assert len(images) == 24
    inputs = collect_inputs(trained.model, [images]).inputs
    events = board(runs / "with")
    for name, layer in function_layers(trained.model).items():
        found = measure(layer, inputs[name])
        assert events.Scalars(f"kan_distance/{name}")[-1].value == pytest.approx(found.distance, rel=1e-4)
        assert events.Scalars(f"kan_off_grid/{name}")[-1].value == pytest.approx(found.off_grid, abs=1e-4)
        assert events.Scalars(f"kan_dead_groups/{name}")[-1].value == found.dead
        histogram = events.Histograms(f"kan_inputs/{name}")[-1].histogram_value
        assert histogram.num == sum(histogram.bucket) == int(inputs[name].counts.sum())
        assert (histogram.min, histogram.max) == (pytest.approx(found.smallest, rel=1e-4), pytest.approx(found.largest, rel=1e-4))
    assert found.distance > 1e-3        # the run has moved its functions


# ---------------------------------------------------------------- the training does not notice
@pytest.mark.slow
def test_the_training_is_the_same_bit_by_bit(runs):
    a, b = (without_kan(left(runs / name)) for name in ("without", "with"))
    assert differences(a, b) == []
    assert differences(a["files"]["checkpoint.pth"]["model"], checkpoint(runs / "with", "checkpoint_previous.pth")["model"])


@pytest.mark.slow
def test_a_resumed_run_is_the_same_and_writes_each_epoch_once(runs, data):
    (runs / "with/checkpoint.pth").unlink()
    assert run("--resume", "auto", "--data-path", data, "--device", "cpu", "--num_workers", 0, "--log-kan", 1,
               "--output_dir", runs / "with") == 0
    assert differences(without_kan(left(runs / "without")), without_kan(left(runs / "with"))) == []
    events = board(runs / "with")
    assert [event.step for event in events.Scalars("kan_distance/blocks.0.mlp.phi1")] == [0, 1, 2]
    assert [event.step for event in events.Images("kan_functions/blocks.0")] == [0, 1, 2]


@pytest.mark.slow
def test_every_so_many_epochs(data, tmp_path):
    assert run(*QUICK, *GROUP, "--data-path", data, "--epochs", 3, "--log-kan", 2, "--output_dir", tmp_path) == 0
    assert [step for step, _ in scalars(tmp_path)["kan_off_grid/blocks.0.mlp.phi1"]] == [1]


@pytest.mark.slow
def test_two_processes(data, tmp_path):
    line = (*QUICK, "--data-path", data, "--epochs", 1, "--dist-eval", "--kan-grid-range", -0.5, 0.5)
    assert [process.wait() for process in launch(tmp_path, *line, "--output_dir", tmp_path / "without")] == [0, 0]
    processes = launch(tmp_path, *line, "--log-kan", 1, "--output_dir", tmp_path / "with")
    assert [process.wait() for process in processes] == [0, 0]
    assert [process.err.read_text().count("fall off its grid") for process in processes] == [1, 0]
    assert differences(*(without_kan(left(tmp_path / name)) for name in ("without", "with"))) == []
    assert [step for step, _ in scalars(tmp_path / "with")["kan_off_grid/blocks.0.mlp.layers.0"]] == [0]


# ---------------------------------------------------------------- the warning
@pytest.mark.slow
@pytest.mark.parametrize("flags, warned", [(("--kan-grid-range", -0.5, 0.5), True), (GROUP, False)])
def test_warning_off_the_grid(data, tmp_path, capfd, flags, warned):
    assert run(*QUICK, *flags, "--data-path", data, "--epochs", 2, "--log-kan", 1, "--output_dir", tmp_path) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: epoch ")]
    assert [line[:16] for line in lines] == (["warning: epoch 0", "warning: epoch 1"] if warned else [])
    if warned:
        assert scalars(tmp_path)["kan_off_grid/blocks.0.mlp.layers.0"][0][1] > 0.05
        assert "of the other 7 layers" in lines[0] and "[-0.5, 0.5]" in lines[0] and "--kan-grid-range" in lines[0]


# ---------------------------------------------------------------- mistakes and full disks
def test_without_effect_it_is_an_error(data, tmp_path_factory, tmp_path, capsys):
    trained = tmp_path_factory.mktemp("trained")
    assert run(*QUICK, *GROUP, "--data-path", data, "--epochs", 1, "--output_dir", trained) == 0
    line = (*QUICK, "--data-path", data, "--log-kan", 1)
    text = refusal(capsys, *line, "--output_dir", tmp_path, "--model", "vit_nano_patch8_32_ViT")
    assert "--log-kan has no effect on --model vit_nano_patch8_32_ViT" in text and "vit_nano_patch8_32_GKAN" in text
    assert "--log-kan has no effect" in refusal(capsys, *line, "--output_dir", tmp_path, "--model", "resnet10t")
    assert "--output_dir" in refusal(capsys, *line)
    evaluation = ("--eval", "--resume", trained / "checkpoint.pth", "--data-path", data)
    assert "--eval" in refusal(capsys, *evaluation, "--log-kan", 1)
    assert "--log-kan" in refusal(capsys, *line[:-1], -1, "--output_dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


def on_a_full_disk(folder: Path) -> tuple[str, str, float]:
    sys.stdout = sys.stderr = said = io.StringIO()      # pytest's are files, to which the limit would apply
    folder_of_run, model = RunFolder(str(folder), Process()), learned("GKAN", depth=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folder_of_run.events(0, lambda board: None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    log_functions(model, torch.randn(4, 3, 32, 32), folder_of_run, 0)
    log_functions(model, torch.randn(4, 3, 32, 32), folder_of_run, 1)
    failed = folder_of_run.failed
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log_functions(model, torch.randn(4, 3, 32, 32), folder_of_run, 2)
    folder_of_run.close()
    return failed, said.getvalue(), sum(float((value - before[key]).abs().sum()) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_a_full_disk_is_told_and_survived(tmp_path):
    failed, said, moved = forked(on_a_full_disk, tmp_path)
    assert "TensorBoard events could not be written" in failed and "warning: the TensorBoard events" in said and moved == 0
    assert scalars(tmp_path)["kan_off_grid/blocks.0.mlp.phi1"][-1][0] == 2      # and it goes on


@pytest.mark.slow
def test_log_lines_are_as_before(runs):
    assert log(runs / "with") == log(runs / "without")
