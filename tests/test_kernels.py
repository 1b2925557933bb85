"""Which code computes the ops: the choice, the compiler, the cache."""
import ctypes
import functools
import importlib
import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from helpers import ROOT, every
from paths import error
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import models_kan  # noqa: F401  registers the models with timm
from faster_kan import FasterKAN, FasterKANLayer
from vision_kan import kernels
from vision_kan.kernels import backend, basis, native, rswaf_activation, rswaf_basis
from vision_kan.layers.efficient_kan import EfficientKAN
from vision_kan.layers.group_kan import GroupActivation, GroupKAN

POINTS = tuple(torch.linspace(-3, 3, 8, dtype=torch.float64).tolist())


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("VISION_KAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_warned", False)
    native.library.cache_clear()
    yield tmp_path / "cache"
    native.library.cache_clear()


def compute(base="gelu"):
    return rswaf_activation(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)),
                            torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), POINTS, 6 / 7, base)


needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")


# ---------------------------------------------------------------- the choice
def test_what_cannot_be_chosen(monkeypatch):
    with pytest.raises(ValueError, match="cuda is not one of auto, reference, cpu, triton, compile"):
        kernels.use("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, and PyTorch finds none here: take auto"):
        kernels.use("triton")
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        kernels.use("triton")
    assert kernels.chosen() == "auto"


def test_what_computes_where(monkeypatch):
    def how(name, tensor, points=POINTS, h=1.0, n=8):
        return backend.resolve(name, tensor, n, points, h)

    u = torch.zeros(2, 2)
    if native.compiler():
        assert how("auto", u) == how("cpu", u) == "native"
    gpu = type("OnGPU", (), {"device": torch.device("cuda"), "dtype": torch.float32})
    assert how("auto", gpu) == how("triton", gpu, None, None) == "triton"
    assert how("cpu", gpu) == how("auto", gpu, None, None, n=17) == "chunked"
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert how("auto", gpu) == how("auto", u.double()) == how("auto", u, None, None) == "chunked"


def test_a_run_says_what_computes_its_layers(monkeypatch):
    lines = {}
    for name in ("auto", "reference", "compile"):
        kernels.use(name)
        lines[name] = kernels.describe("cpu")
    kernels.use("auto")
    assert len(set(lines.values())) == 3
    assert kernels.describe("cuda") == "Triton kernels" and kernels.describe("mps") == "chunked PyTorch"
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert "slower than the C++ kernels, which need a C++ compiler" in kernels.describe("cpu")


def described(layer, device="cpu") -> str:
    return kernels.describe(device, [module.for_kernels for module in layer.modules() if hasattr(module, "for_kernels")])


def test_what_a_run_says_is_what_its_layers_take(monkeypatch):
    seen = []
    resolve = backend.resolve
    monkeypatch.setattr(backend, "resolve", lambda *args: seen.append(resolve(*args)) or seen[-1])
    words = {"native": "C++ kernels", "chunked": "chunked PyTorch, for a grid or a basis that the kernels don't take"}
    for layer in (GroupKAN(16), GroupKAN(16, num_grids=17), GroupKAN(16, function="sech"), FasterKAN(8),
                  FasterKAN(8, train_grid=True), FasterKAN(8, train_h=True), FasterKAN(8, num_grids=20, h=0.5),
                  FasterKAN(8, grid_min=-30, grid_max=30)):
        said = described(layer)
        seen.clear()
        layer(torch.randn(2, layer.phi1.channels if isinstance(layer, GroupKAN) else 8))
        assert seen and (native.compiler() is None or said == words[seen[0]])
    assert described(GroupKAN(16), "cuda") == described(FasterKAN(8, train_grid=True), "cuda") == "Triton kernels"
    assert described(GroupKAN(16, num_grids=17), "cuda") == words["chunked"]
    assert described(GroupKAN(16, function="sech"), "cuda") == (
        "PyTorch through torch.compile, for a basis that the kernels don't take")
    both = nn.ModuleList([GroupKAN(16), FasterKAN(8, train_h=True)])
    assert native.compiler() is None or described(both) == f"{words['native']} and {words['chunked']}"
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert described(GroupKAN(16, function="sech")) == words["chunked"] and "need a C++ compiler" in described(GroupKAN(16))


# ---------------------------------------------------------------- the compiler and the cache
@pytest.mark.slow
@needs_compiler
def test_compiled_once_and_kept(fresh, monkeypatch):
    want = compute()
    files = sorted(fresh.iterdir())
    assert [file.name.rpartition("-")[0] for file in files] == ["rswaf-8-gelu"]         # and nothing half-made beside it
    native.library.cache_clear()
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: (calls.append(command), run(command, **kwargs))[1])
    assert torch.equal(compute(), want) and sorted(fresh.iterdir()) == files
    assert all("--version" in command for command in calls)
    compute("silu")
    assert len(list(fresh.iterdir())) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written(fresh):
    fresh.touch()           # a file where the folder would be
    assert native.library(8, "gelu") is not None and fresh.is_file()


@pytest.mark.parametrize("compiler, words", every(3, [
    ("/bin/false", "/bin/false could not build them"), (None, "no C\\+\\+ compiler"),
    (sys.executable, "could not build them")]), ids=["fails", "none", "no compiler at all"])
def test_without_a_compiler_a_slower_path_and_one_warning(fresh, monkeypatch, compiler, words):
    want = compute() if native.compiler() else None
    native.library.cache_clear()
    for file in fresh.iterdir() if fresh.exists() else ():
        file.unlink()
    monkeypatch.setattr(native, "compiler", lambda: compiler)
    with pytest.warns(UserWarning, match=f"slower than their C\\+\\+ kernels: .*{words}"):
        got = compute()
    assert want is None or error(got, want) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute("silu")


@needs_compiler
def test_a_file_in_the_cache_that_is_no_library(fresh):
    compute()
    file, = fresh.iterdir()
    file.unlink()           # not in place: this process has it mapped
    file.write_bytes(b"cut off")
    native.library.cache_clear()
    assert error(compute(), rswaf_activation(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).double(),
                                             torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), POINTS, 6 / 7,
                                             "gelu")) < 1e-6
    assert ctypes.CDLL(str(next(fresh.iterdir())))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_one_openmp_in_the_process(threads):
    """A second OpenMP library would double the threads; ours takes the one that PyTorch has loaded."""
    code = ("import torch\nfrom vision_kan import kernels\n"
            f"torch.set_num_threads({threads})\n"
            "torch.randn(500, 500) @ torch.randn(500, 500)\n"
            "u = torch.randn(3000, 64, requires_grad=True)\n"
            f"kernels.rswaf_activation(u, torch.randn(4, 8), {POINTS}, 6 / 7, 'gelu').sum().backward()\n"
            "names = {line.split('/')[-1].strip() for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]}\n"
            "print(len(names))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    if sys.platform == "linux":
        assert done.stdout.strip() == "1"


# ---------------------------------------------------------------- the constants
@pytest.mark.parametrize("low, high, n, h", [(-3, 3, 8, 6 / 7), (-2, 2, 3, 2.0), (-1, 1, 16, 0.1), (5, 6, 2, 0.3)])
def test_pairs_are_the_basis(low, high, n, h):
    """The formulas of cpu.cpp in fp64 against the definition."""
    points = tuple(torch.linspace(low, high, n, dtype=torch.float64).tolist())
    u = torch.linspace(low - 2, high + 2, 501, dtype=torch.float64)
    want = rswaf_basis(u, torch.tensor(points, dtype=torch.float64), h)
    z = 2 * (u - (low + high) / 2) / h
    s, t = torch.exp(-z.abs()), torch.tanh(z)
    w = s / (1 + s * s)
    constants = basis.pair_constants(points, h)
    for j in range((n + 1) // 2):
        a, b, g, x, y, c = constants[6 * j:6 * j + 6]
        q = a + b * w + g * w * w
        plus, minus = w * (x + y * w) / q, w * t * c / q
        if j == n - 1 - j:
            torch.testing.assert_close(plus, want[:, j], rtol=1e-12, atol=1e-15)
        else:
            torch.testing.assert_close((plus + minus) / 2, want[:, n - 1 - j], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close((plus - minus) / 2, want[:, j], rtol=1e-9, atol=1e-12)


def test_grids_that_have_no_pairs():
    assert basis.pair_constants((-1.0, 0.2, 1.0), 0.5) is None          # not symmetric
    assert basis.pair_constants((-1.0, 1.0), 0.09) is None              # too narrow
    assert not native.supports(tuple(map(float, range(17))), 2.0)       # more than the kernels know


# ---------------------------------------------------------------- whole models
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_nano_patch8_32_GKAN", "vit_nano_patch8_32_KAN"])
def test_a_model_is_the_same_on_every_path(name):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, num_classes=5)
    for key, parameter in model.named_parameters():
        if key.endswith("coefficients"):
            torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 3, 32, 32)
    results = {}
    for path in ("auto", "reference", "compile"):
        kernels.use(path)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results[path] = [y, *(p.grad.clone() for p in model.parameters())]
    kernels.use("auto")
    for path in ("reference", "compile"):
        assert all(error(a, b) < 1e-4 for a, b in zip(results["auto"], results[path], strict=True))


# ---------------------------------------------------------------- what traces
def ops_in(graph) -> list[str]:
    """The ops of ours among a graph's calls."""
    return [str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith("vision_kan.")]


@pytest.mark.parametrize("make, op", every(3, [
    (GroupKAN, "rswaf_activation"), (FasterKAN, "rswaf_linear"), (EfficientKAN, None)]))
def test_a_compiled_layer_runs_the_ops_and_an_exported_one_plain_pytorch(make, op):
    layer, x, compiled = make(16), torch.randn(4, 16, requires_grad=True), []

    def record(module, example):
        compiled.append(ops_in(module.graph))
        return make_boxed_func(module.forward)

    torch.compile(layer, backend=aot_autograd(fw_compiler=record), fullgraph=True)(x).sum().backward()
    assert compiled == ([[op] * 2, [f"{op}_grad"] * 2] if op else [[], []])         # forward, backward
    for strict in (False, True):
        program = torch.export.export(layer, (x.detach(),), strict=strict, dynamic_shapes=({0: torch.export.Dim("n")},))
        assert ops_in(program.graph) == [] and len(program.graph.nodes) > 20
        other = torch.randn(7, 16)
        assert error(program.module()(other), layer(other)) < 1e-5


class Ops(TorchDispatchMode):
    """The ops of ours that reach the dispatcher, in a list of each call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += [str(function).split(".")[1]] if str(function).startswith("vision_kan.") else []
        return function(*args, **kwargs or {})


LAYERS = {"rswaf_activation": lambda: GroupActivation(16, trainable_base=True), "rswaf_linear": lambda: FasterKANLayer(16, 8)}


@pytest.mark.parametrize("op", LAYERS)
def test_eager_calls_pass_by_the_dispatcher_and_what_looks_on_sees_the_ops(op, monkeypatch):
    """To the same bits."""
    layer, x = LAYERS[op](), torch.randn(4, 16, requires_grad=True)
    leaves, calls = [x, *layer.parameters()], []
    module = importlib.import_module(f"vision_kan.kernels.{op}")
    for name in ("_activation", "_activation_grad") if op == "rswaf_activation" else ("_linear", "_linear_grad"):
        def counted(*args, real, name):
            calls.append(name)
            return real(*args)
        monkeypatch.setattr(module, name, functools.partial(counted, real=getattr(module, name), name=name))

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    plain = step()
    y = layer(x)
    assert calls == [] and y.grad_fn is not None
    y.mul_(2)                                                   # in place, as an activation after the layer may
    with Ops() as ops:
        seen = step()
    assert ops.seen == [op, f"{op}_grad"] and len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert len(calls) == 4 and (op == "rswaf_activation" or counter.get_total_flops() == 3 * 2 * 4 * 16 * 8 * 8)
    with Ops() as ops:                                          # only the backward pass is looked at
        torch.autograd.grad(y.sum(), x)
    assert ops.seen == [f"{op}_grad"]
    calls.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(layer(mode.from_tensor(x.detach()))).__name__ == "FakeTensor"
    graph = make_fx(lambda x: torch.autograd.grad(layer(x).sum(), x)[0])(x).graph
    assert ops_in(graph) == [op, f"{op}_grad"]
    assert f"vision_kan::{op}" in str(torch.jit.trace(layer, (x.detach(),), check_trace=False).graph)
    assert type(layer(Marked(torch.randn(4, 16)))) is Marked
    assert calls == [calls[0]] * 2 + [calls[2]] + [calls[0]] * 2 and calls[0] != calls[2]     # fake, make_fx's two, jit, Marked


class Marked(torch.Tensor):
    """A subclass, which its own __torch_function__ keeps through ops."""


# ---------------------------------------------------------------- Triton, in its interpreter
@pytest.mark.slow
def test_the_ops_reach_their_triton_kernels():
    """Forward and every gradient through the registered ops, a fixed and a trained grid."""
    pytest.importorskip("triton")
    code = """
import torch
from vision_kan import kernels
from vision_kan.kernels import triton_linear
from vision_kan.kernels.triton_columns import ColumnsPlan
calls = []
for module, names in ((ColumnsPlan, ("forward", "backward")),
                      (triton_linear, ("forward", "backward_u", "backward_weight", "backward_grid"))):
    for name in names:
        def counted(*args, real=getattr(module, name), label=f"{module.__name__}.{name}", **kwargs):
            calls.append(label)
            return real(*args, **kwargs)
        setattr(module, name, counted)
points, h = tuple(torch.linspace(-3, 3, 8, dtype=torch.float64).tolist()), 6 / 7
torch.manual_seed(0)
u, c, s = torch.randn(5, 3, 12, requires_grad=True), torch.randn(4, 8, requires_grad=True), torch.rand(4, requires_grad=True)
w, dy, dz = torch.randn(7, 96, requires_grad=True), torch.randn(5, 3, 12), torch.randn(5, 3, 7)
grid, width = torch.tensor(points, dtype=torch.float32, requires_grad=True), torch.tensor(h, requires_grad=True)
def everything():
    y = kernels.rswaf_activation(u, c, points, h, "gelu", s)
    out = [y, *torch.autograd.grad(y, [u, c, s], dy)]
    z = kernels.rswaf_linear(u, w, grid.detach(), h, True)
    out += [z, *torch.autograd.grad(z, [u, w], dz)]
    y = kernels.rational(u, c.abs())
    out += [y, *torch.autograd.grad(y, [u, c], dy)]
    z = kernels.rswaf_linear(u, w, grid, width)
    return out + [z, *torch.autograd.grad(z, [u, w, grid, width], dz)]
kernels.use("triton")
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    got = everything()
dispatched = {event.key for event in profile.key_averages()}
assert "_ActivationBackward" in dispatched and not any(key.startswith("vision_kan::") for key in dispatched), dispatched
assert kernels.describe("cpu") == "Triton kernels"
kernels.use("reference")
for a, b in zip(got, everything(), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= 2e-5 * b.abs().max(), (a - b).abs().max() / b.abs().max()
assert calls.count("ColumnsPlan.backward") == 2
assert {name.removeprefix("vision_kan.kernels.") for name in calls} == {"ColumnsPlan.forward", "ColumnsPlan.backward",
    "triton_linear.forward", "triton_linear.backward_u", "triton_linear.backward_weight", "triton_linear.backward_grid"}, calls
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_hosts_time_is_measured_without_a_gpu():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "benchmarks/host.py", "--rounds", "2", "--calls", "2"], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[:3]] == ["gelu", "custom op", "eager"]
