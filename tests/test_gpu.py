"""What only a GPU can show: training steps as CUDA graphs (the rest of them is in test_captured.py).

And benchmarks/gpu.py where there is no GPU: its code by `--device cpu --quick`, and what it says without that."""
import csv
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from e2e import QUICK, at, checkpoint, command_line, log, run, write_digits
from helpers import GKAN, differences
from models import nano
from recorded import K, Net, Reading, assert_same, batches, evaluation
from recorded import run as train
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

from benchmarks import gpu
from vision_kan.common.errors import EXIT_PREEMPTED
from vision_kan.training.state import MovingAverage


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict[str, str]]:
    output = tmp_path_factory.mktemp("gpu") / "gpu.csv"
    assert gpu.main(["--device", "cpu", "--quick", "--output", str(output)]) == 0
    with open(output, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_csv_has_all_columns_and_the_machine(rows):
    assert tuple(rows[0]) == gpu.FIELDS
    assert all(row["torch"] == torch.__version__ and row["card"] for row in rows)


@pytest.mark.slow
def test_every_op_is_checked_in_every_dtype(rows):
    checks = [row for row in rows if row["part"] == "check"]
    assert {row["dtype"] for row in checks} == {"float32", "bfloat16", "float16"}
    assert {row["name"].split()[0] for row in checks} == {"activation", "rational", "linear"}
    assert all(float(row["error"]) <= float(row["bound"]) and not row["problem"] for row in checks)


@pytest.mark.slow
def test_every_op_and_its_twin_is_timed(rows):
    timed = {(row["name"], row["variant"], row["phase"]) for row in rows if row["part"] == "op" and float(row["ms"]) > 0}
    for op, twin in (("activation", "GELU"), ("linear", "MLP")):
        for variant in ("kernel", "reference", twin):
            assert {(op, variant, "forward"), (op, variant, "forward+backward")} <= timed
    assert all(int(row["n"]) >= 3 and float(row["spread_percent"]) >= 0 for row in rows if row["part"] == "op")


@pytest.mark.slow
def test_models_are_timed_against_their_twin(rows):
    steps = {row["variant"]: row for row in rows if row["part"] == "step"}
    assert set(steps) == {"ViT", "GKAN", "KAN", "KAT"} and float(steps["ViT"]["ratio"]) == 1
    assert all(float(row["images_per_s"]) > 0 and row["phase"] == "eager" for row in steps.values())


@pytest.mark.slow
def test_parts_in_order_of_their_weight_each_row_at_once(rows, tmp_path, monkeypatch):
    assert [row["part"] for row in rows] == sorted((row["part"] for row in rows), key=["step", "op", "check"].index)
    output = tmp_path / "gpu.csv"

    def interrupted(bench):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PARTS, "ops", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--quick", "--output", str(output), "--part", "models", "ops"])
    with open(output, newline="") as file:
        assert {row["part"] for row in csv.DictReader(file)} == {"step"}
    assert output.with_suffix(".md").read_text().count("vit_nano_patch8_32") == 4


@pytest.mark.slow
def test_a_model_that_fails_is_a_row(monkeypatch):
    real = gpu._steps

    def fails(bench, size, kind, *more):
        if kind == "ViT":
            raise torch.OutOfMemoryError("no more of it")
        yield from real(bench, size, kind, *more)

    monkeypatch.setattr(gpu, "_steps", fails)
    bench = gpu.Bench("cpu", True, 60)
    gpu.time_models(bench)
    assert {row["variant"]: bool(row.get("problem")) for row in bench.rows} == {"ViT": True, "GKAN": False, "KAN": False,
                                                                                "KAT": False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert gpu.main(["--output", str(tmp_path / "gpu.csv")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.rstrip().endswith(".") and "GPU" in message
    assert not (tmp_path / "gpu.csv").exists()


def test_only_must_be_a_regular_expression(capsys):
    with pytest.raises(SystemExit) as e:
        gpu.main(["--device", "cpu", "--only", "["])
    assert e.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: --only [: this is not a regular expression (unterminated "
                                                             "character set at position 0)")


@pytest.mark.slow
def test_a_wrong_op_fails(monkeypatch, tmp_path):
    bench = gpu.Bench("cpu", True, 60)
    monkeypatch.setattr(gpu.kernels, "rswaf_linear", lambda u, w, grid, h, single_exp: 0 * u @ w[:, :u.shape[1]].t())
    gpu._check_linear(bench, torch.float32, 21, 45, 35, False, "")
    assert "over" in bench.rows[-1]["problem"]


@pytest.mark.slow
def test_what_does_not_run_is_a_row(capsys):
    def fails():
        raise RuntimeError("no kernel image\nmore")
    found = gpu.Bench("cpu", True, 60).times({"fails": fails, "runs": lambda: None})
    assert found["fails"] == {"problem": "RuntimeError: no kernel image"} and found["runs"]["ms"] >= 0


# ---------------------------------------------------------------- CUDA graphs
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = torch.device("cuda:0")


def dropping() -> nn.Module:
    return nano(GKAN, depth=2, drop_path_rate=0.3, proj_drop_rate=0.1)


# In bfloat16: PyTorch's attention in float32 adds up its gradients in any order, so that two runs without graphs differ too.
GRAPHS = {
    "mixup, accumulation, clipping": {"mixup": lambda: Mixup(0.8, 1.0, num_classes=K), "accumulate": 2, "clip_grad": 0.05,
                                      "loader": lambda: batches(15, 16), "between": evaluation},
    "a short last batch": {"loader": lambda: batches(10, 16, last=5), "epochs": 5, "argv": ("--epochs", 5)},
    "float16 and its scaler": {"amp_dtype": torch.float16, "clip_grad": 1.0, "accumulate": 2, "loader": lambda: batches(15, 16),
                               "scaler": lambda: torch.amp.GradScaler("cuda", init_scale=2.0 ** 24, growth_interval=3)},
    "sgd": {"argv": ("--opt", "sgd", "--momentum", 0.9)},
    "running statistics": {"model": Net, "argv": ("--no-model-ema",), "amp_dtype": torch.float32},
    "through torch.compile": {"model": lambda: compiled(dropping())},
}


def compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


@needs_gpu
@pytest.mark.parametrize("name", GRAPHS)
def test_captured_is_eager(name, capsys):
    case = {"device": CUDA, "model": dropping, "amp_dtype": torch.bfloat16, **GRAPHS[name]}
    mixup = case.pop("mixup", lambda: None)
    eager, wanted, _ = train(False, mixup=mixup(), **case)
    state, got, updater = train(True, mixup=mixup(), **case)
    assert "off from here on" not in capsys.readouterr().out and updater.batches and updater.apply
    assert_same(state, eager)
    assert_same(got, wanted)


@needs_gpu
def test_a_step_that_cannot_be_captured_goes_on_without(capsys):
    """The attempt changes no weights, statistics or random numbers, and CUDA still works."""
    case = {"device": CUDA, "model": Reading, "argv": ("--no-model-ema",)}
    eager, wanted, _ = train(False, **case)
    state, got, updater = train(True, **case)
    assert capsys.readouterr().out.count("CUDA graphs: off from here on") == 1 and updater.recorder is None
    assert_same(state, eager)
    assert_same(got, wanted)
    state, _, updater = train(True, device=CUDA, model=Net, argv=("--no-model-ema",))         # and another can be captured
    assert updater.apply


@needs_gpu
def test_a_loss_that_is_not_finite_is_told_as_without():
    def loader():
        spoiled = batches(10, 16)
        spoiled[7][0][0, 0, 0, 0] = math.nan
        return spoiled

    case = {"device": CUDA, "model": dropping, "loader": loader, "clip_grad": 1.0, "amp_dtype": torch.bfloat16}
    eager, wanted, _ = train(False, **case)
    state, got, _ = train(True, **case)
    assert "loss became nan at step 8 of epoch 0" in got[-1] and got == wanted
    assert_same(state, eager)


@needs_gpu
def test_moving_average_is_timms():
    model = dropping().to(CUDA)
    ours, theirs = MovingAverage(model, 0.9), ModelEmaV3(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), 0.1)
        ours.update(model)
        theirs.update(model)
    assert_same(dict(ours.module.state_dict()), dict(theirs.module.state_dict()))


def trained(data: Path, out: Path, *more) -> tuple:
    return (*QUICK, "--device", "cuda", "--model", "vit_nano_patch8_32_GKAN", "--epochs", 3, "--data-path", data, "--drop", 0.1,
            "--drop-path", 0.2, "--model-ema-decay", 0.8, "--output_dir", out, "--grad-accum", 2, "--clip-grad", 1, *more)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), train=48)         # 9 steps of 16 images


@pytest.fixture(scope="module")
def without(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("without") / "out"
    assert run(*trained(digits, out, "--cuda-graph", "off")) == 0
    return out


def assert_same_run(a: Path, b: Path) -> None:
    ends = [{key: value for key, value in checkpoint(out).items() if key not in ("args", "seconds")} for out in (a, b)]
    assert differences(*ends) == [] and differences(log(a), log(b)) == []


@needs_gpu
@pytest.mark.parametrize("where", ["the forward pass of step 8 of epoch 0", "the update of step 4 of epoch 2"])
def test_stopped_and_resumed_with_graphs(where, without, digits, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at(patch, where, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(*trained(digits, tmp_path, "--cuda-graph", "on")) == EXIT_PREEMPTED
    assert run(*trained(digits, tmp_path, "--cuda-graph", "on", "--resume", "auto")) == 0
    assert capsys.readouterr().out.count("CUDA graphs: on") == 2
    assert_same_run(without, tmp_path)


@needs_gpu
def test_one_process_of_torchrun(without, digits, tmp_path):
    """NCCL's watchdog calls CUDA while the steps are captured."""
    done = command_line(*trained(digits, tmp_path, "--cuda-graph", "on"), module=("torch.distributed.run", "--nproc_per_node=1"))
    assert done.returncode == 0, done.stderr
    assert_same_run(without, tmp_path)
