"""Shared by the Triton kernels: two approximate instructions, devices, launches, and cases to compile.

The kernels compute the basis B_k(u) = 1 - tanh((u - g_k)/h)^2 from one exponential for all grid points. With c the grid's middle,
s = 2 log2(e)/h and E = 2^z, z = clamp(s (u - c), +-60),

    D_k = p_k E + q_k/E + 1/2,    p_k = 2^(-s (g_k - c))/4,    q_k = 2^(s (g_k - c))/4,
    B_k = 1/D_k,                  dB_k/du = (2/h) (q_k/E - p_k E) / D_k^2.

Every term is positive, so nothing cancels, and nothing overflows while max |g_k - c| / h <= 10. Any other grid uses one
exponential per point, e = 2^-|s (u - g_k)|, B_k = 4e/(1 + e)^2, dB_k/du = -sign(u - g_k) (2/h) B_k (1 - e)/(1 + e) (`SINGLE_EXP`
off).
"""
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SCALE = tl.constexpr(2 * math.log2(math.e))
# In the interpreter, kernels are Python on CPU tensors. Read at import, as Triton's decorators do.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


# ---------------------------------------------------------------- inside kernels
@triton.jit
def fast_exp2(x, APPROX: tl.constexpr):
    """2^x, relative error 2^-22, results below 2^-126 flushed to zero. APPROX: NVIDIA's instruction."""
    if APPROX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def fast_reciprocal(x, APPROX: tl.constexpr, PURE: tl.constexpr = True):
    """1/x, relative error 2^-23; the plain division compiles to ten instructions instead of one. Not PURE: computed
    once, in one layout, where Triton would else repeat it for every thread and product that reads it."""
    if APPROX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=PURE,
                                         pack=1)
    else:
        return 1.0 / x


@triton.jit
def load_width(h, H_TENSOR: tl.constexpr):
    """h as a number, from a number or from the address of a 0-d tensor."""
    if H_TENSOR:
        return tl.load(h).to(tl.float32)
    else:
        return h


@triton.jit
def grid_middle(grid, G: tl.constexpr):
    return 0.5 * (tl.load(grid).to(tl.float32) + tl.load(grid + (G - 1)).to(tl.float32))


# ---------------------------------------------------------------- devices
@dataclass(frozen=True)
class Device:
    """A device's facts for the launchers, and its stand-in for compiling ahead of time.

    capability: 10 * major + minor on NVIDIA, 0 elsewhere. shared: bytes of shared memory that one block may take.
    processors: multiprocessors (compute units). memory: bytes of its memory."""
    backend: str                # "cuda" or "hip"
    capability: int
    shared: int
    processors: int
    arch: str = ""              # AMD's name of the architecture
    memory: int = 2 ** 33       # unknown ahead of time; nothing compiled depends on it

    @property
    def family(self) -> str:
        """The matrix instructions that Triton uses on it: "mma", "wgmma", "tcgen05" or "mfma"."""
        if self.backend == "hip":
            return "mfma"
        return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(self.capability // 10, "mma")

    @property
    def approx(self) -> bool:
        """Whether the approximate instructions exist."""
        return self.backend == "cuda" and not INTERPRETED


TARGETS = {
    "sm_80": Device("cuda", 80, 163 * 1024, 108),
    "sm_86": Device("cuda", 86, 99 * 1024, 68),
    "sm_89": Device("cuda", 89, 99 * 1024, 128),
    "sm_90": Device("cuda", 90, 227 * 1024, 132),
    "sm_100": Device("cuda", 100, 227 * 1024, 148),
    "sm_120": Device("cuda", 120, 99 * 1024, 170),
    "gfx942": Device("hip", 0, 64 * 1024, 304, "gfx942"),
}


@functools.lru_cache
def _cuda_device(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)       # its type lacks the last one used here
    if torch.version.hip is not None:
        return Device("hip", 0, properties.shared_memory_per_block, properties.multi_processor_count,
                      properties.gcnArchName.split(":")[0], properties.total_memory)
    return Device("cuda", 10 * properties.major + properties.minor, properties.shared_memory_per_block_optin,
                  properties.multi_processor_count, memory=properties.total_memory)


def device_of(tensor: Tensor) -> Device:
    """The device on which a tensor's kernels run; for CPU tensors in the interpreter, one of the smallest."""
    return _cuda_device(tensor.get_device()) if tensor.is_cuda else device_at(tensor.device)


def device_at(where: torch.device) -> Device:
    if where.type == "cpu" and INTERPRETED:
        return TARGETS["sm_86"]
    if where.type != "cuda":
        raise ValueError(f"a Triton kernel needs a tensor on a GPU, got one on {where}")
    return _cuda_device(where.index)


# ---------------------------------------------------------------- launches
def allocator(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> Callable[[], Tensor]:
    """A function that returns an uninitialised, contiguous tensor on the current device of the type of `where`. It is
    torch.compile's: on the host it takes a third of the time of `torch.empty`."""
    guards: Any = torch._C._dynamo.guards           # its types lack the functions used here
    empty = guards._empty_strided_cpu if where.type == "cpu" else guards._empty_strided_cuda
    return functools.partial(empty, tuple(shape), torch.empty(shape, device="meta").stride(), dtype)


class Launch:
    """A kernel with its grid and every argument except the tensors, which come first. It runs on the current device.

    Triton's launch examines all arguments each time, which takes the host longer than a small kernel takes the GPU. Here the
    compiled kernel is called directly, as long as it is valid: the caller keeps each tensor's device and type, and says whether
    addresses are multiples of 16.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], values: dict[str, object], num_warps: int,
                 num_stages: int = 1):
        """values: argument's name -> value; those of other kernels are ignored. grid: without zeros."""
        self.kernel, self.grid = kernel, grid
        self.rest = tuple(values[name] for name in kernel.arg_names if name in values)
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.compiled: Callable[..., None] | None = None

    def __call__(self, aligned: bool, *tensors: Tensor) -> None:
        """aligned: whether the address of every tensor is a multiple of 16, as that of newly allocated memory is."""
        if self.compiled is not None and aligned:
            self.compiled(*tensors, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.rest, **self.options)
        if aligned and not INTERPRETED:
            self.compiled = compiled[self.grid]


# ---------------------------------------------------------------- compiled ahead of time
@dataclass(frozen=True)
class Work:
    """The minimal work of a kernel: FLOPs in matrix products, special functions, bytes from and to memory."""
    flops: float = 0.0
    specials: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel that a launcher may choose on a device.

    name: the op ("rswaf_linear.forward"). tile: a description that identifies the case among the op's.
    fn: a `triton.jit` function. signature: Triton types of its runtime arguments. constexprs: the other arguments.
    divisible: the integer arguments that are multiples of 16, besides all addresses.
    tensor_cores: it multiplies matrices on matrix instructions (a product in full fp32 has none on NVIDIA).
    vector: bytes of each access to memory in its main loop, which has no barrier and no shared memory; 0: no such rule.
    quick: compiled by `--quick`, one case of each op and device.
    work: (tokens, width d) -> Work of the op at d inputs and d outputs with this tile; None: no bound is printed.
    """
    name: str
    tile: str
    fn: Callable
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    tensor_cores: bool = False
    divisible: tuple[str, ...] = ()
    vector: int = 0
    quick: bool = False
    work: Callable[[int, int], Work] | None = field(default=None, compare=False)
