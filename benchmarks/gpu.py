"""One command for a machine with a GPU: the speed of training, the speed of each op, and its accuracy.

    python benchmarks/gpu.py                            # within 5 minutes; a table, and benchmarks/results/gpu.csv and .md
    python benchmarks/gpu.py --part models --seconds 90 # one part, or less of it: the most important comes first
    python benchmarks/gpu.py --quick                    # small sizes, a minute
    python benchmarks/gpu.py --device cpu --quick       # the same code on a CPU

models  main.py's training step (bfloat16 autocast, fused AdamW, stochastic depth) of the KANs and their MLP twin: eager; captured
        as CUDA graphs (--cuda-graph); through torch.compile, eager and captured. Beside the time of a step stands the time of
        its kernels, from the profiler; the rest is host overhead. Not included: copying images to the device, mixup, and the
        moving average without --ema.
ops     Every op's time, forward and forward + backward, bfloat16, against its reference in eager mode and through
        torch.compile; the full-edge layer also against a compiled basis that is written to memory for cuBLAS, and against an
        MLP of equal FLOPs; the activation also against GELU. Calls are captured in a CUDA graph if possible, which excludes
        Python's overhead; data that fit into the L2 cache may stay there, as they do after a matrix product.
checks  Every op, forward and every gradient, against float64 on the device, in float32, bfloat16 and float16. An error
        beyond the bound makes the exit status 1.

Times are medians of n repetitions in which all variants take turns; spread is the interquartile range in percent of the median.
TFLOP/s and GB/s count the work that the op requires, not what a variant does. The peak of products is the card's nominal one
(`speed.PEAK_TFLOPS`), for an unknown card that of a matrix product measured at the start; the peak of memory is that of a copy.
Each row is written as soon as it is known; a failure becomes a row that says so. Timings are valid only while nothing else uses
the GPU.
"""
import argparse
import csv
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import models_kan
from losses import ClassLoss
from vision_kan import kernels
from vision_kan.common.process import Process
from vision_kan.common.seeds import seed_everything
from vision_kan.config.resolve import parse_args
from vision_kan.models.cost import count_flops
from vision_kan.training.captured import CapturedUpdater, CudaGraphs
from vision_kan.training.optim import build_state
from vision_kan.training.speed import peak_flops
from vision_kan.training.updates import Requests, Updater

FIELDS = ("part", "name", "variant", "width", "dtype", "phase", "ms", "spread_percent", "n", "how", "ratio", "tflops",
          "tflops_percent", "gbps", "gbps_percent", "images_per_s", "mfu_percent", "kernels_ms",
          "over_kernels", "flashkat_images_per_s", "memory_mib", "batch", "error", "bound",
          "problem", "card", "driver", "torch", "triton", "cuda", "peak_tflops", "peak_gbps", "peaks")
GRID, H, G, GROUPS = (-3.0, 3.0), 6 / 7, 8, 8
POINTS = tuple(torch.linspace(*GRID, G, dtype=torch.float64).tolist())
TOKENS = 25_216                     # 128 images of 197 tokens
# Images/s that FlashKAT (arXiv:2505.13813) publishes for one H200: of its ViT twin and of itself, a group KAN
FLASHKAT = {("deit_tiny_patch16_224", "ViT"): 8955, ("deit_tiny_patch16_224", "GKAN"): 6318,
            ("deit_small_patch16_224", "ViT"): 5312, ("deit_small_patch16_224", "GKAN"): 3742,
            ("deit_base_patch16_224", "ViT"): 2457, ("deit_base_patch16_224", "GKAN"): 1802}
# Allowed error, relative to the largest value of the result.
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Bench:
    """The device, sizes, the deadline, and the rows found so far."""

    def __init__(self, device: str, quick: bool, seconds: float, output: Path | None = None, ema: bool = False, only: str = "",
                 top: int = 0):
        self.device, self.quick, self.cuda, self.output, self.ema = device, quick, device == "cuda", output, ema
        self.only, self.top = re.compile(only), top
        self.end = time.monotonic() + seconds
        self.n = 3 if quick else 15
        self.compile = self.cuda
        self.rows: list[dict] = []
        self.card, self.peaks = platform.processor() or platform.machine(), (None, None)
        self.versions = {"card": self.card, "torch": torch.__version__, "triton": _version("triton"),
                         "cuda": torch.version.cuda or torch.version.hip or "", "driver": _driver() if self.cuda else ""}
        if self.cuda:
            self.card = self.versions["card"] = torch.cuda.get_device_name()
            nominal, measured = peak_flops(self.card), self._measured_peaks()
            self.peaks = (nominal / 1e12 if nominal else measured[0], measured[1])
            self.versions |= {"peak_tflops": self.peaks[0], "peak_gbps": self.peaks[1],
                              "peaks": "nominal products, measured copy" if nominal else "measured"}

    def _measured_peaks(self) -> tuple[float, float]:
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        big = torch.empty(2 ** 28, device="cuda", dtype=torch.uint8)
        times = self.times({"product": lambda: a @ a, "copy": lambda: big.clone()})
        return (round(2 * 8192 ** 3 / times["product"]["ms"] / 1e9, 1), round(2 * big.numel() / times["copy"]["ms"] / 1e6, 1))

    def add(self, part: str, name: str, **values) -> None:
        row = {"part": part, "name": name, **values}
        ms = values.get("ms")
        if ms:
            flops, size = row.pop("flops", 0), row.pop("bytes", 0)
            for key, amount, peak in (("tflops", flops / ms / 1e9, self.peaks[0]), ("gbps", size / ms / 1e6, self.peaks[1])):
                if amount:
                    row |= {key: amount} | ({f"{key}_percent": 100 * amount / peak} if peak else {})
        row = {key: value for key, value in row.items() if key in FIELDS}
        self.rows.append({**self.versions, **row})
        if self.output:
            write(self, self.output)
        text = f"{value_of(row, 'problem')}" or " ".join(
            f"{key} {_short(row[key])}" for key in FIELDS[6:] if row.get(key) not in (None, ""))
        label = " ".join(str(row[key]) for key in FIELDS[1:6] if row.get(key) not in (None, ""))
        print(f"{part}: {label}: {text}", flush=True)

    def late(self, seconds: float) -> bool:
        return time.monotonic() + seconds > self.end

    # ---------------------------------------------------------------- time
    def times(self, variants: dict[str, Callable[[], object]], graphs: bool = True) -> dict[str, dict]:
        """name -> {"ms", "spread_percent", "n", "how"}, or {"problem"} if it does not run."""
        runs, found = {}, {}
        for name, run in variants.items():
            try:
                runs[name] = self._prepare(run, graphs)
            except Exception as error:      # out of memory, no kernel for this card, or any other: its row says so
                found[name] = {"problem": _first_line(error)}
                self.free()
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.n):
            for name, (run, calls, _) in runs.items():
                samples[name].append(self.measure(run) / calls)
        for name, values in samples.items():
            low, median, high = statistics.quantiles(values, n=4)
            found[name] = {"ms": median, "spread_percent": 100 * (high - low) / median, "n": self.n, "how": runs[name][2]}
        return {name: found[name] for name in variants}

    def _prepare(self, run: Callable[[], object], graphs: bool) -> tuple[Callable[[], object], int, str]:
        """What to time, how many calls of `run` that is, and how they are launched."""
        if not self.cuda:
            run()
            return run, 1, "calls"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):                         # CUDA graphs need another stream; also compiles kernels
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        calls = max(1, min(100, round(3 / max(self.measure(run), 1e-3))))     # about 3 ms a measurement
        if graphs:
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(calls):
                        run()
                graph.replay()
                torch.cuda.synchronize()
                return graph.replay, calls, "graph"
            except RuntimeError as error:
                torch.cuda.synchronize()
                print(f"not captured ({_first_line(error)}): timed with Python's overhead")

        def repeat() -> None:
            for _ in range(calls):
                run()
        return repeat, calls, "calls"

    def measure(self, run: Callable[[], object]) -> float:
        """Milliseconds."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def kernels_of(self, step: Callable[[], None], n: int = 3) -> dict[str, float]:
        """Milliseconds per step of each of its kernels and copies, from the profiler; the largest first."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            for _ in range(n):
                step()
            torch.cuda.synchronize()
        spent: Counter[str] = Counter()
        for event in profiled.events():
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
                spent[event.name] += event.self_device_time_total / n / 1e3
        return dict(spent.most_common())

    def free(self) -> None:
        """Free memory and compiled programs, so that each width compiles anew instead of with dynamic shapes."""
        torch.compiler.reset()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- accuracy of the ops
def check_ops(bench: Bench) -> None:
    rows = 67 if bench.quick else 1000
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        every = dtype == torch.float32 and not bench.quick      # each compiles two kernels
        for base in ("none", "identity", "gelu", "silu", "relu", "relu2") if every else ("gelu",):
            _check_activation(bench, dtype, rows, 96, 8, base, POINTS, H, scaled=base != "none")
        for name, channels, groups, points, h in (("a group a channel", 45, 45, POINTS, H), ("16 points", 64, 2,
                                                  tuple(x / 2.5 for x in range(16)), 0.4),
                                                  ("not uniform", 96, 8, (-3.0, -1.0, 0.5, 3.0), 0.9)):
            _check_activation(bench, dtype, 21, channels, groups, "gelu", points, h, True, name)
        for name, channels, groups in (("", 96, 8), ("a group a channel", 45, 45)):
            _check_rational(bench, dtype, rows, channels, groups, name)
        for name, t, i, o, trained in (("", rows, 64, 96, False), ("odd sizes", 21, 45, 35, False),
                                       ("trained grid and h", rows, 64, 96, True)):
            _check_linear(bench, dtype, t, i, o, trained, name)


def _check_activation(bench: Bench, dtype: torch.dtype, rows: int, channels: int, groups: int, base: str,
                      points: tuple[float, ...], h: float, scaled: bool, note: str = "") -> None:
    torch.manual_seed(0)
    u = (2 * torch.randn(rows, channels, device=bench.device)).to(dtype)
    c = torch.randn(groups, len(points), device=bench.device)
    s = torch.randn(groups, device=bench.device) if scaled else None
    _compare(bench, f"activation {base}", note, dtype, (u, c, s), ("v", "du", "dC", "dscale"),
             lambda u, c, s: kernels.rswaf_activation(u, c, points, h, base=base, scale=s),
             lambda u, c, s: kernels.rswaf_activation_reference(u, c, points, h, base=base, scale=s))


def _check_rational(bench: Bench, dtype: torch.dtype, rows: int, channels: int, groups: int, note: str) -> None:
    torch.manual_seed(0)
    u = (2 * torch.randn(rows, channels, device=bench.device)).to(dtype)
    c = torch.cat([torch.randn(groups, 6, device=bench.device), torch.rand(groups, 4, device=bench.device)], 1)
    _compare(bench, "rational", note, dtype, (u, c), ("v", "du", "dC"), kernels.rational, kernels.rational_reference)


def _check_linear(bench: Bench, dtype: torch.dtype, rows: int, n_in: int, n_out: int, trained: bool, note: str) -> None:
    torch.manual_seed(0)
    u = torch.randn(rows, n_in, device=bench.device).to(dtype)
    w = (torch.randn(n_out, n_in * G, device=bench.device) / (n_in * G) ** 0.5).to(dtype)
    grid, h = torch.tensor(POINTS, device=bench.device, dtype=torch.float32), torch.tensor(H, device=bench.device)
    exact = grid.double()
    _compare(bench, "linear", note, dtype, (u, w, *((grid, h) if trained else ())), ("y", "du", "dW", "dgrid", "dh"),
             lambda u, w, g=grid, h=H: kernels.rswaf_linear(u, w, g, h, not trained),
             lambda u, w, g=exact, h=H: kernels.rswaf_linear_reference(u, w, g, h))


def _compare(bench: Bench, op: str, note: str, dtype: torch.dtype, inputs: tuple[Tensor | None, ...],
             names: tuple[str, ...], run: Callable[..., Tensor], reference: Callable[..., Tensor]) -> None:
    """A row for the op's result with the largest error, relative to its largest value."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    want = reference(*exact)
    dy = torch.randn_like(want).to(dtype)
    right = [want, *torch.autograd.grad(want, [x for x in exact if x is not None], dy.double())]
    row = {"variant": note, "dtype": _name(dtype), "bound": BOUNDS[dtype]}
    try:
        kernels.use("auto")
        y = run(*leaves)
        got = [y, *torch.autograd.grad(y, [x for x in leaves if x is not None], dy.to(y.dtype))]
        errors = {name: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
                  for name, a, b in zip(names, got, right)}
    except Exception as error:      # a kernel that does not compile fails the check; go on with the others
        bench.add("check", op, **row, problem=_first_line(error))
        return
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    problem = "" if errors[worst] <= BOUNDS[dtype] else f"error {errors[worst]:.1e} of {worst} over {BOUNDS[dtype]:.0e}"
    bench.add("check", op, **row, error=errors[worst], problem=problem)


# ---------------------------------------------------------------- speed of the ops
def with_backward(run: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(), leaves, dy)


def without_grad(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(run)


def time_ops(bench: Bench) -> None:
    kernels.use("auto")
    tokens = 197 if bench.quick else TOKENS
    for width in (96,) if bench.quick else (192, 384, 768):
        _time_activation(bench, tokens, width)
        bench.free()
        _time_linear(bench, tokens, width)
        bench.free()


def _time_activation(bench: Bench, tokens: int, width: int) -> None:
    u = torch.randn(tokens, width, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    c = (0.1 * torch.randn(GROUPS, G, device=bench.device)).requires_grad_()
    grid = torch.tensor(POINTS, device=bench.device, dtype=torch.float32)

    def kernel() -> Tensor:
        return kernels.rswaf_activation(u, c, POINTS, H, base="gelu")

    def reference(u: Tensor, c: Tensor, grid: Tensor) -> Tensor:       # with the grid on the device already
        x = u.float()
        return (F.gelu(x) + (kernels.rswaf_basis(x, grid, H) * c.repeat_interleave(width // GROUPS, 0)).sum(-1)).to(u.dtype)

    variants = {"kernel": (kernel, [u, c]), "reference": (lambda: reference(u, c, grid), [u, c])}
    if bench.compile:
        compiled = torch.compile(reference, dynamic=False)
        variants["reference compiled"] = (lambda: compiled(u, c, grid), [u, c])
    a_b = torch.rand(GROUPS, 10, device=bench.device).requires_grad_()
    variants["rational"] = (lambda: kernels.rational(u, a_b), [u, a_b])       # KAT's
    variants["GELU"] = (lambda: F.gelu(u), [u])
    _time(bench, "activation", variants, "GELU", width, torch.randn_like(u),
          {"forward": (0, 2 * 2 * tokens * width), "forward+backward": (0, 5 * 2 * tokens * width)})


def _time_linear(bench: Bench, tokens: int, width: int) -> None:
    u = torch.randn(tokens, width, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(width, width * G, device=bench.device) / (width * G) ** 0.5).bfloat16().requires_grad_()
    grid = torch.tensor(POINTS, device=bench.device, dtype=torch.float32)
    w1, w2 = ((torch.randn(shape, device=bench.device) / shape[1] ** 0.5).bfloat16().requires_grad_()
              for shape in ((4 * width, width), (width, 4 * width)))

    def basis(u: Tensor) -> Tensor:
        return kernels.rswaf_basis(u.float(), grid, H).flatten(-2).bfloat16()

    def reference(u: Tensor, w: Tensor) -> Tensor:
        return F.linear(basis(u), w)

    variants = {"kernel": (lambda: kernels.rswaf_linear(u, w, grid, H, True), [u, w]),
                "reference": (lambda: reference(u, w), [u, w])}
    if bench.compile:
        compiled_basis, compiled = (torch.compile(function, dynamic=False) for function in (basis, reference))
        variants |= {"reference compiled": (lambda: compiled(u, w), [u, w]),
                     "basis written, cuBLAS": (lambda: F.linear(compiled_basis(u), w), [u, w])}
    variants["MLP"] = (lambda: F.linear(F.gelu(F.linear(u, w1)), w2), [u, w1, w2])
    flops, once, weight = 2 * tokens * width * width * G, 2 * tokens * width, 2 * width * width * G
    _time(bench, "linear", variants, "MLP", width, torch.randn_like(u),
          {"forward": (flops, 2 * once + weight), "forward+backward": (3 * flops, 7 * once + 3 * weight)})


def _time(bench: Bench, name: str, variants: dict[str, tuple[Callable[[], Tensor], list[Tensor]]], twin: str, width: int,
          dy: Tensor, work: dict[str, tuple[float, float]]) -> None:
    """Rows of an op's variants. work: phase -> FLOPs and bytes that the op requires."""
    for phase, (flops, size) in work.items():
        if bench.late(20):
            bench.add("op", name, width=width, phase=phase, problem="left out: no time left")
            continue
        backward = phase != "forward"
        found = bench.times({variant: with_backward(run, leaves, dy) if backward else without_grad(run)
                             for variant, (run, leaves) in variants.items()})
        for variant, times in found.items():
            ratio = times["ms"] / found[twin]["ms"] if "ms" in times and "ms" in found[twin] else None
            bench.add("op", name, variant=variant, width=width, dtype="bfloat16", phase=phase, flops=flops, bytes=size,
                      ratio=ratio, **times)


# ---------------------------------------------------------------- speed of training
KINDS = ("GKAN", "ViT", "KAN", "KAT")
SIZES = ("deit_tiny_patch16_224", "deit_base_patch16_224", "deit_small_patch16_224")     # the most important first
COMPILED = ((SIZES[0], ("GKAN", "ViT")), (SIZES[1], ("GKAN", "ViT")), (SIZES[0], ("KAN",)), (SIZES[1], ("KAN",)),
            (SIZES[2], ("GKAN", "ViT", "KAN")))


def time_models(bench: Bench) -> None:
    kernels.use("auto")
    if not bench.cuda or bench.quick:
        _time_size(bench, "vit_nano_patch8_32", KINDS, 8, compiled=False)
        return
    for compiled, plan in ((False, [(size, KINDS) for size in SIZES]), (True, COMPILED)):
        need, phase = (30., "compiled") if compiled else (15., "eager")     # seconds a model
        for size, kinds in plan:
            kinds = tuple(kind for kind in kinds if bench.only.search(f"{size}_{kind} {phase}"))
            if not kinds:
                continue
            if bench.late(need * len(kinds)):
                for kind in kinds:
                    bench.add("step", size, variant=kind, phase=phase, problem="left out: no time left")
                continue
            start = time.monotonic()
            _time_size(bench, size, kinds, 128, compiled)
            need = (time.monotonic() - start) / len(kinds)
            bench.free()


def _time_size(bench: Bench, size: str, kinds: tuple[str, ...], batch: int, compiled: bool) -> None:
    """Rows of a size's models, all with the same matmul FLOPs, timed in turn."""
    width = models_kan.SIZES[size].embed_dim
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    known: dict[tuple[str, str], dict] = {}
    for kind in kinds:
        try:
            for phase, step, values in _steps(bench, size, kind, batch, compiled):
                steps[kind, phase], known[kind, phase] = step, values
        except Exception as error:      # out of memory, no kernel for this card, or any other: its row says so
            bench.add("step", size, variant=kind, width=width, phase="compiled" if compiled else "eager", batch=batch,
                      problem=_first_line(error))
    found = _time_steps(bench, steps)
    for (kind, phase), times in found.items():
        ms, values = times.get("ms"), dict(known[kind, phase])
        if ms:
            flops = values["flops"]
            values |= {"images_per_s": 1e3 * batch / ms, "flashkat_images_per_s": FLASHKAT.get((size, kind))}
            if bench.peaks[0]:
                values["mfu_percent"] = 100 * flops / ms / 1e9 / bench.peaks[0]
            if twin := found.get(("ViT", phase), {}).get("ms"):
                values["ratio"] = ms / twin
            if kernel := times.get("kernels_ms"):
                values["over_kernels"] = ms / kernel
        top = times.pop("top", [])
        bench.add("step", size, variant=kind, width=width, dtype="bfloat16", phase=phase, batch=batch, **values, **times)
        for name, kernel in top:
            bench.add("kernel", f"{size}_{kind}", variant=name[:100], phase=phase, ms=kernel, batch=batch)


def _steps(bench: Bench, size: str, kind: str, batch: int, compiled: bool) -> Iterator[tuple[str, Callable[[], None], dict]]:
    """Each way to run a model's training step: (phase, step, columns known before it is timed)."""
    device = torch.device("cuda", torch.cuda.current_device()) if bench.cuda else torch.device("cpu")
    spec = models_kan.SIZES[size]
    options = {"hdim_kan": spec.embed_dim // 2} if kind == "KAN" else {}        # of the twin's FLOPs
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    model = timm.create_model(f"{size}_{kind}", num_classes=1000, drop_path_rate=0.1, **options).to(device).train()
    if compiled:
        model.compile()
    args = parse_args(["--model", f"{size}_{kind}", "--model-ema" if bench.ema else "--no-model-ema"]).args
    state = build_state(args, model, 1e-4, 1000, device, torch.bfloat16)
    criterion, process = ClassLoss(SoftTargetCrossEntropy()), Process(device=device)
    images = torch.randn(batch, 3, spec.img_size, spec.img_size, device=device)
    targets = torch.rand(batch, 1000, device=device).softmax(1)                 # as mixup makes them
    loss_sum = torch.zeros((), device=device)
    flops = 3 * batch * count_flops(model).matmul

    def stepping(updater: Updater) -> Callable[[], None]:
        count = iter(range(10 ** 9))

        def step() -> None:
            number = next(count)
            seed_everything(0, 0, number, 0)
            loss_sum.add_(updater.add_gradients(images, targets, 1))
            updater.update(number, Requests())
        return step

    step = stepping(Updater(model, state, criterion, process, amp_dtype=torch.bfloat16))
    values: dict = {"flops": flops}
    for _ in range(2):          # in the second, the optimizer's state exists from the start
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        step()
        if bench.cuda:
            values["memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    yield "compiled" if compiled else "eager", step, values
    if not bench.cuda:
        return
    updater = CapturedUpdater(model, state, criterion, process, CudaGraphs(device), required=True, amp_dtype=torch.bfloat16)
    step = stepping(updater)
    for _ in range(updater.WARM_UP + 1):
        step()
    yield "compiled, captured" if compiled else "captured", step, {"flops": flops}


def _time_steps(bench: Bench, steps: dict[tuple[str, str], Callable[[], None]]) -> dict[tuple[str, str], dict]:
    """(kind, phase) -> {"ms", "spread_percent", "n", "how", "kernels_ms"}, or {"problem"}; the same steps timed in turn."""
    found: dict[tuple[str, str], dict] = {}
    calls, samples = {}, {}
    for key, step in steps.items():
        try:
            for _ in range(2):
                step()
            calls[key] = max(1, round((100 if bench.cuda else 1) / max(bench.measure(step), 1e-3)))
            samples[key] = []
        except Exception as error:
            found[key] = {"problem": _first_line(error)}
    for _ in range(3 if bench.quick else 7):
        for key in samples:
            def several(step: Callable[[], None] = steps[key], n: int = calls[key]) -> None:
                for _ in range(n):
                    step()
            samples[key].append(bench.measure(several) / calls[key])
    for key, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        found[key] = {"ms": median, "spread_percent": 100 * (high - low) / median, "n": len(values), "how": key[1]}
        if bench.cuda:
            spent = bench.kernels_of(steps[key])
            found[key] |= {"kernels_ms": sum(spent.values()), "top": list(spent.items())[:bench.top]}
    return {key: found[key] for key in steps}


# ---------------------------------------------------------------- report
def value_of(row: dict, key: str) -> object:
    return row.get(key) if row.get(key) is not None else ""


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(bench: Bench) -> str:
    """A Markdown table for each part, without empty columns."""
    head = ", ".join(f"{key} {value}" for key, value in bench.versions.items() if value not in (None, ""))
    lines = [head]
    for part in dict.fromkeys(row["part"] for row in bench.rows):
        rows = [row for row in bench.rows if row["part"] == part]
        columns = [key for key in FIELDS if key not in {"part", *bench.versions}
                   and any(value_of(row, key) != "" for row in rows)]
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_short(value_of(row, key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(bench: Bench, path: Path) -> None:
    """Write the rows so far as CSV, and as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in bench.rows)
    path.with_suffix(".md").write_text(table(bench))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"


def _version(package: str) -> str:
    try:
        return __import__(package).__version__
    except ImportError:
        return ""


def _driver() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                              text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()


PARTS = {"models": time_models, "ops": time_ops, "checks": check_ops}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, three repetitions")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.csv")
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit; what does not fit is left out and reported")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--only", default="", metavar="REGEX", help="models whose name and way match: 'base.*compiled'")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also print the N slowest kernels of a step")
    parser.add_argument("--ema", action="store_true", help="steps with the moving average, main.py's default")
    args = parser.parse_args(arguments)
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only}: this is not a regular expression ({error})")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU here: run this on a machine with one, or try the code with --device cpu --quick.",
              file=sys.stderr)
        return 2
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False       # the float32 checks must not compute in TF32
    bench = Bench(args.device, args.quick, args.seconds, args.output, args.ema, args.only, args.top)
    for part in PARTS:
        if part in args.part:
            PARTS[part](bench)
    print(f"\n{table(bench)}\n{args.output}")
    wrong = [row for row in bench.rows if row["part"] == "check" and row["problem"]]
    for row in wrong:
        print(f"WRONG: {row['name']} {row['variant']} {row['dtype']}: {row['problem']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
