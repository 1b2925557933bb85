"""Host time of one learned activation, forward and backward, over GELU's: in eager mode a GPU waits for it.

    python benchmarks/host.py                  # any machine, no GPU; under a minute

A call passes through PyTorch's dispatcher and autograd, our checks, and Triton's launcher. Here a stand-in that returns
immediately, on CPU tensors, replaces every kernel of `kernels.triton_activation`, so that everything but the launch itself is
timed: in bfloat16 under autocast, as in training. "custom op" is the path of torch.compile's graphs and other tracers, "eager"
that of ordinary training steps. Prints the median microseconds of all rounds, and the quartiles.
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
from vision_kan.kernels import backend, triton_activation
from vision_kan.layers.group_kan import GroupActivation


class NoKernel:
    """Replaces a compiled kernel, its launcher and its launch; does nothing."""

    def __init__(self, kernel):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        return self


def without_kernels() -> None:
    for name, value in vars(triton_activation).items():
        if name.endswith("_kernel"):
            setattr(triton_activation, name, NoKernel(value))


def microseconds(function, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls * 1e6


def step_of(layer, u: torch.Tensor, dv: torch.Tensor):
    def step() -> None:
        layer(u).backward(dv)
    return step


def main(argv=None) -> dict[str, float]:
    """Microseconds of each way, "gelu", "custom op" and "eager"."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=200, help="calls per round")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    without_kernels()
    kernels.use("triton")
    layer, gelu = GroupActivation(16, groups=8, base="gelu"), torch.nn.GELU()
    u = torch.randn(4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    dv = torch.randn_like(u)
    steps = {"gelu": step_of(gelu, u, dv), "custom op": step_of(layer, u, dv), "eager": step_of(layer, u, dv)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    plain = backend.traced
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(args.rounds + 1):
            for name, step in steps.items():
                backend.traced = (lambda *tensors: True) if name == "custom op" else plain
                times[name].append(microseconds(step, args.calls))
    backend.traced = plain
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}       # the first warms up
    for name, values in times.items():
        low, _, high = statistics.quantiles(values[1:], n=4)
        print(f"{name:10} {medians[name]:7.1f} us [{low:.1f}, {high:.1f}]   over GELU {medians[name] - medians['gelu']:7.1f} us")
    print(f"PyTorch {torch.__version__}, Triton {triton_activation.triton.__version__}, {args.rounds} rounds of {args.calls}")
    kernels.use("auto")
    return medians


if __name__ == "__main__":
    main()
