"""torch.compile, the profiler's trace, model FLOPs utilisation, waits for the device, attention and optimizer kernels."""
import gzip
import json
import shutil
import sysconfig
from argparse import Namespace
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from e2e import QUICK, checkpoint, run
from helpers import GKAN, NANO, TWIN, every
from models import nano
from recorded import batches
from timm.data import Mixup
from timm.models.vision_transformer import Attention
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine import train_one_epoch
from losses import build_criterion
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.config.checks import validate
from vision_kan.config.resolve import parse_args
from vision_kan.run import training_run
from vision_kan.training import speed as speed_module  # noqa: F401  registers the models with timm
from vision_kan.training.optim import build_optimizer, build_state
from vision_kan.training.speed import StepProfiler, compile_model, ideal_rate, peak_flops
from vision_kan.training.training import Hooks, Training
from vision_kan.training.updates import Updater

CPU = torch.device("cpu")
MODELS = [TWIN, GKAN, NANO]


def flags(*argv) -> Namespace:
    return parse_args(["--epochs", "3", "--warmup-epochs", "0", *map(str, argv)]).args


# ---------------------------------------------------------------- waits for the device
class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, which on a GPU waits for all that was started."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_reads_are_counted():
    with Reads() as reads:
        float(torch.ones(2).sum())
        assert bool(torch.ones(1) > 0)
    assert reads.count == 2


@pytest.mark.parametrize("name, kwargs", every(3, [(name, {}) for name in MODELS] + [
    ("vit_nano_patch8_32_KAN", {"kan_trainable_grid": True, "kan_trainable_h": True}),
    ("vit_nano_patch8_32_GKAN", {"kan_trainable_base": True})]))
def test_steps_do_not_wait_for_the_device(name, kwargs):
    def reads_of(steps: int, print_freq: int) -> int:
        args = flags("--model", name, "--opt", "adamw")
        model = nano(name, **{"depth": 2, **kwargs})
        state = build_state(args, model, 1e-3, steps, CPU, torch.float32)
        with Reads() as reads:
            training = Training(Updater(model, state, build_criterion(args, 4, True), Process(), clip_grad=1.0),
                                Mixup(0.8, 1.0, num_classes=4), epochs=3, accumulate=2, print_freq=print_freq)
            train_one_epoch(training, batches(steps), Hooks())
        return reads.count

    at_the_end = 2      # are the weights finite, the loss of this process
    assert reads_of(3, 100) == reads_of(9, 100) == 1 + at_the_end
    assert reads_of(9, 3) == 3 + at_the_end


# ---------------------------------------------------------------- kernels
@pytest.mark.parametrize("name", [*MODELS, "deit_tiny_distilled_patch16_224_KAN", "deit3_small_patch16_224_GKAN"])
def test_attention_is_pytorchs_own_kernel(name, monkeypatch):
    model = timm.create_model(name, img_size=32, depth=2)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(attentions) == 2 and all(module.fused_attn for module in attentions)
    calls, original = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    model(torch.randn(1, 3, 32, 32))
    assert len(calls) == 2


@pytest.mark.parametrize("opt, fused", [("adamw", True), ("adam", True), ("sgd", True), ("momentum", True),
                                        ("lookahead_adamw", True), ("nadamw", None), ("lamb", None), ("rmsprop", None)])
def test_updates_are_fused_where_the_optimizer_can(opt, fused):
    optimizer = build_optimizer(flags("--opt", opt), nano(NANO, depth=2), 1e-3)
    assert {group.get("fused") for group in optimizer.param_groups} == {fused}


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd", "momentum"])
def test_fused_updates_equal_unfused_ones(opt):
    models = [nano(GKAN, depth=2) for _ in range(2)]
    optimizers = [build_optimizer(flags("--opt", opt, "--model", "vit_nano_patch8_32_GKAN"), model, 1e-3) for model in models]
    for group in optimizers[1].param_groups:
        group["fused"] = group["foreach"] = False
    for seed in range(3):
        for model, optimizer in zip(models, optimizers):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


# ---------------------------------------------------------------- torch.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == GKAN else pytest.mark.slow) for name in MODELS])
def test_one_graph_with_the_gradients_of_the_plain_model(name):
    model, plain = nano(name, depth=2), nano(name, depth=2)
    compile_model(model, CPU, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        model.train(training)
        plain.train(training)
        for images, targets in batches(2):
            for each in (model, plain):
                F.cross_entropy(each(images), targets).backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)


def test_compiling_changes_neither_keys_nor_copies():
    model = nano(NANO, depth=2)
    keys = list(model.state_dict())
    compile_model(model, CPU, backend="eager")
    model(torch.randn(2, 3, 32, 32))
    assert list(model.state_dict()) == keys and model._compiled_call_impl is not None
    assert deepcopy(model)._compiled_call_impl is None


@pytest.mark.slow
def test_a_compiled_run_its_checkpoint_and_its_evaluation(data, tmp_path, monkeypatch, capsys):
    original, compiled = compile_model, []
    monkeypatch.setattr("vision_kan.run.build.compile_model", lambda model, device, mode: compiled.append(mode) or original(
        model, device, backend="eager"))
    options = (*QUICK, "--epochs", 1, "--data-path", data, "--drop-path", 0)
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        assert run(*options, "--output_dir", tmp_path / name, *more) == 0
    one, two = checkpoint(tmp_path / "plain"), checkpoint(tmp_path / "compiled")
    assert compiled == ["default"]
    for key in ("model", "model_ema"):
        assert list(one[key]) == list(two[key])
        for a, b in zip(one[key].values(), two[key].values()):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    capsys.readouterr()
    lines = []
    for more in ([], ["--compile"]):
        assert run("--eval", "--resume", tmp_path / "compiled/checkpoint.pth", "--data-path", data, "--device", "cpu",
                   "--num_workers", 0, *more) == 0
        lines.append(capsys.readouterr().out.splitlines()[-2:])
    assert compiled == ["default"] * 2 and lines[0] == lines[1]


def test_without_a_compiler_one_sentence(data, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run(*QUICK, "--epochs", 1, "--data-path", data, "--compile") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --compile needs a C++ compiler") and error.count("\n") == 1
    monkeypatch.setattr(speed_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--compile needs Triton"):
        compile_model(nano(NANO, depth=2), torch.device("cuda"))
    monkeypatch.setattr(speed_module, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="--compile needs a C compiler"):
        compile_model(nano(NANO, depth=2), torch.device("cuda"))


def test_without_headers_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match="Python.h is not found"):
        compile_model(nano(NANO, depth=2), CPU)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("name", MODELS)
def test_compiled_by_inductor(name):
    """As near to float64's gradients as plain PyTorch is: how near that is depends on the model and the machine."""
    model, plain, exact = nano(name, depth=2), nano(name, depth=2), nano(name, depth=2).double()
    compile_model(model, CPU)
    images, targets = batches(1)[0]
    for each in (model, plain, exact):
        F.cross_entropy(each(images.to(next(each.parameters()).dtype)), targets).backward()

    def error(net) -> float:
        return max((a.grad.double() - b.grad).abs().max().item() for a, b in zip(net.parameters(), exact.parameters()))

    assert error(plain) < 5e-3 and error(model) < 3 * error(plain)


# ---------------------------------------------------------------- profiler
@pytest.mark.slow
def test_a_trace_of_warm_steps_and_the_training_goes_on(data, tmp_path, capfd):
    folder = tmp_path / "out"
    assert run(*QUICK, "--batch-size", 4, "--epochs", 2, "--data-path", data, "--profile", "--output_dir", folder) == 0
    out = capfd.readouterr().out
    with gzip.open(folder / "profile/trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3       # of 12 steps
    assert any("aten::addmm" in name for name in names)
    assert out.count("--profile: steps 10 to 12 are in") == 1 and "calls a step" in out and "aten::" in out
    assert (folder / "checkpoint.pth").exists() and "best top-1" in out
    assert len((folder / "log.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("steps, recorded", [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (30, 3)])
def test_short_epochs_are_profiled_too(steps, recorded, tmp_path, capfd):
    profiler = StepProfiler(tmp_path, steps, CPU)
    for step in range(1, steps + 3):
        torch.ones(2) + step
        profiler()
        assert (profiler.profile is None) == (step >= min(steps, 14))
    with gzip.open(tmp_path / "profile/trace.json.gz") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == recorded


def test_a_trace_that_cannot_be_written_does_not_end_the_training(tmp_path, capfd):
    (tmp_path / "profile").write_text("in the way")
    profiler = StepProfiler(tmp_path, 2, CPU)
    profiler()
    profiler()
    assert "could not be written" in capfd.readouterr().err


def test_the_profile_needs_a_folder_and_a_training():
    with pytest.raises(UserError, match="--profile writes its trace into --output_dir"):
        validate(flags("--profile"))
    with pytest.raises(UserError, match="--profile traces training steps"):
        validate(flags("--profile", "--eval", "--resume", "x.pth", "--output_dir", "out"))
    validate(flags("--profile", "--output_dir", "out"))


# ---------------------------------------------------------------- model FLOPs utilisation
@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA A10", 125), ("Tesla V100-SXM2-16GB", 125),
    ("AMD Instinct MI300X", 1307), ("NVIDIA A10G", None), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA H100 NVL", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GH200 480GB", None), ("Quadro P400", None)])
def test_peak_of_a_card(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_ideal_rate(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    process = Process(0, 4, 0, torch.device("cuda", 0))
    assert ideal_rate(10 ** 9, process, torch.bfloat16) == pytest.approx(4 * 312e12 / 3e9)
    assert ideal_rate(10 ** 9, process, torch.float32) is None and ideal_rate(None, process, torch.float16) is None
    assert ideal_rate(10 ** 9, Process(), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert ideal_rate(10 ** 9, process, torch.bfloat16) is None


@pytest.mark.slow
def test_each_line_has_the_rate_and_where_it_is_known_the_utilisation(data, tmp_path, capsys, monkeypatch):
    options = (*QUICK, "--epochs", 2, "--data-path", data, "--print-freq", 1)
    assert run(*options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 6 and all("img/s" in line and "MFU" not in line for line in lines)
    monkeypatch.setattr(training_run, "ideal_rate", lambda flops, process, dtype: 1e4 if flops > 1e6 else None)
    assert run(*options, "--output_dir", tmp_path / "out") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    for line in lines:
        rate, used = float(line[line.index("img/s") - 1]), float(line[line.index("MFU") - 1].rstrip("%"))
        assert used == pytest.approx(rate / 100, abs=0.06)
    logged = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    assert [np.isclose(line["mfu"], line["img_per_s"] / 1e4) for line in logged] == [True, True]
