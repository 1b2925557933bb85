"""Measures the host time of a learned activation and of a full-edge layer, forward and backward, over GELU's and over that
of a linear layer with GELU: in eager mode a GPU waits for it.

    python benchmarks/host.py                  # on any machine, no GPU needed; under a minute

The host time of a call is spent in PyTorch's dispatcher and autograd, our own checks, and Triton's launcher. Here every
kernel of `kernels.triton_activation` and `kernels.triton_linear` does nothing, on CPU tensors, so everything except the
launch itself is timed: in bfloat16 under autocast, as in training; gradients are dropped before each step, as an
optimizer does. "custom op" is what torch.compile's graphs and other tracers call, "eager" what ordinary training steps
call. Prints the median microseconds of all rounds, and the quartiles.
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"            # before Triton is imported: launchers take CPU tensors
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from vision_kan import kernels
from vision_kan.kernels import backend, triton_activation, triton_columns, triton_common, triton_linear
from vision_kan.layers.group_kan import GroupActivation


class NoKernel:
    """A `triton.jit` function, and what it compiles to: their launches do nothing."""

    def __init__(self, kernel):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self


def without_kernels() -> None:
    for module in (triton_activation, triton_columns, triton_linear):
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                setattr(module, name, NoKernel(value))
    triton_columns.device_at = triton_linear.device_of = lambda where: triton_common.TARGETS["sm_90"]
    triton_common.INTERPRETED = False           # compiled kernels are launched directly, as on a GPU


class FullEdge(torch.nn.Module):
    """The op of a full-edge layer of one width, 8 points."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, 8 * width))
        self.grid = torch.linspace(-3, 3, 8)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return kernels.rswaf_linear(u, self.weight, self.grid, 6 / 7, True)


def microseconds(function, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls * 1e6


def step_of(layer, u: torch.Tensor, dv: torch.Tensor):
    leaves = [u, *layer.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(u).backward(dv)
    return step


def main(argv=None) -> dict[str, float]:
    """Microseconds of each: "gelu", "custom op", "eager", "linear" (with GELU), "full-edge"."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=200, help="calls per round")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    kernels.use("triton")
    without_kernels()
    layer = GroupActivation(16, groups=8, base="gelu")
    mlp = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.GELU())
    u = torch.randn(4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    dv = torch.randn_like(u)
    twins = {"gelu": "gelu", "custom op": "gelu", "eager": "gelu", "linear": "linear", "full-edge": "linear"}
    layers = {"gelu": torch.nn.GELU(), "custom op": layer, "eager": layer, "linear": mlp, "full-edge": FullEdge(16)}
    steps = {name: step_of(module, u, dv) for name, module in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    plain = backend.intercepted
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(args.rounds + 1):
            for name, step in steps.items():
                backend.intercepted = (lambda *tensors: True) if name == "custom op" else plain
                times[name].append(microseconds(step, args.calls))
    backend.intercepted = plain
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}       # the first round warms up
    for name, values in times.items():
        low, _, high = statistics.quantiles(values[1:], n=4)
        print(f"{name:10} {medians[name]:7.1f} us [{low:.1f}, {high:.1f}]   over {twins[name]} "
              f"{medians[name] - medians[twins[name]]:7.1f} us")
    print(f"PyTorch {torch.__version__}, Triton {triton_activation.triton.__version__}, {args.rounds} rounds of {args.calls}")
    kernels.use("auto")
    return medians


if __name__ == "__main__":
    main()
