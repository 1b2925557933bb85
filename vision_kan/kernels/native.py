"""The CPU kernels of *.cpp, compiled by the machine's C++ compiler at their first use and cached.

They are optional: without a compiler, or if it fails, `library` returns None and warns once, and the ops use PyTorch.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_kan.common.errors import one_line
from vision_kan.kernels.basis import MAX_POINTS, pair_constants

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.bfloat16)
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w")
# The machine's own instructions and OpenMP, if the compiler supports them; the first that works.
OPTIONS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
# Argument types for ctypes.
POINTER: Any = ctypes.c_void_p      # lists of these hold several types
INT, LONG = ctypes.c_int, ctypes.c_int64
MATRIX: list[Any] = [LONG, LONG]
_warned = False


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++, clang++ or c++; None without any."""
    if sys.platform == "win32":         # its compiler lacks vector extensions
        return None
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++", "c++")
                 if name and (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """The folder of compiled kernels: $VISION_KAN_CACHE, else vision-kan in the user's cache folder."""
    own = os.environ.get("VISION_KAN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vision-kan"


@functools.lru_cache
def library(points: int, base: str | None = None) -> ctypes.CDLL | None:
    """The kernels of rswaf.cpp for grids of this many points: the activation's with a base function, without one the basis's.
    None if they cannot be built."""
    found = _library("rswaf", POINTS=str(points), **({} if base is None else {"BASE": base.upper()}))
    if found is None:
        return None
    constants: list[Any] = [POINTER, ctypes.c_float, ctypes.c_float]
    if base is None:
        found.rswaf_basis.argtypes = [POINTER, INT, POINTER, INT, *MATRIX, *constants]
        found.rswaf_basis_grad.argtypes = [POINTER, INT, POINTER, INT, POINTER, *MATRIX, *constants]
    else:
        found.rswaf_activation.argtypes = [POINTER] * 2 + [INT, *MATRIX, POINTER, POINTER, LONG, *constants]
        pointers: list[Any] = [POINTER] * 3
        found.rswaf_activation_grad.argtypes = [*pointers, INT, *MATRIX, POINTER, POINTER, LONG, *constants, POINTER, POINTER]
    return found


@functools.lru_cache
def rational_library(degree: int, below: int) -> ctypes.CDLL | None:
    """The kernels of rational.cpp for a numerator and a denominator of these degrees; None if they cannot be built."""
    found = _library("rational", DEGREE=str(degree), BELOW=str(below))
    if found is not None:
        found.rational.argtypes = [POINTER] * 2 + [INT, *MATRIX, POINTER, LONG]
        found.rational_grad.argtypes = [POINTER] * 3 + [INT, *MATRIX, POINTER, LONG, POINTER]
    return found


def _library(source: str, **macros: str) -> ctypes.CDLL | None:
    command = compiler()
    if command is None:
        _warn_fallback("no C++ compiler (g++ or clang++) was found")
        return None
    try:
        return _load(command, source, macros)
    except (OSError, subprocess.SubprocessError) as error:
        _warn_fallback(f"{command} could not build them ({one_line(error, 200, line=-1)})")
        return None


def _warn_fallback(reason: str) -> None:
    """Warn once that the slower path is used, and why."""
    global _warned
    if not _warned:
        warnings.warn(f"KAN layers compute in plain PyTorch, slower than their C++ kernels: {reason}", stacklevel=2)
    _warned = True


def _load(command: str, source: str, macros: dict[str, str]) -> ctypes.CDLL:
    _share_openmp()
    file = _compiled(command, source, macros)
    try:
        found = ctypes.CDLL(str(file))
    except OSError:                     # the cached file is not a library: build it again
        file.unlink()
        found = ctypes.CDLL(str(_compiled(command, source, macros)))
    if file.parent != cache_folder():
        shutil.rmtree(file.parent, ignore_errors=True)
    return found


def _compiled(command: str, source: str, macros: dict[str, str]) -> Path:
    """The shared library, from the cache or newly built. Its name depends on source, compiler and processor."""
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    text = [(HERE / name).read_text(encoding="utf-8") for name in ("simd.h", f"{source}.cpp")]
    key = hashlib.sha256("\0".join([*text, version, _processor(), repr((FLAGS, OPTIONS))]).encode())
    file = cache_folder() / f"{'-'.join([source, *macros.values()]).lower()}-{key.hexdigest()[:16]}.so"
    if file.exists():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=file.parent)
    except OSError:                                 # the cache cannot be written to
        folder = tempfile.mkdtemp()
        file = Path(folder) / file.name
    objects, shared = Path(folder) / "cpu.o", Path(folder) / "cpu.so"
    error: subprocess.CalledProcessError | None = None
    for options in OPTIONS:
        try:
            for arguments in ([*FLAGS, *options, *(f"-D{name}={value}" for name, value in macros.items()), "-c",
                               str(HERE / f"{source}.cpp"), "-o", str(objects)],
                            # without -fopenmp, so that it uses PyTorch's OpenMP instead of loading a second one
                            ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []),
                             str(objects), "-o", str(shared)]):
                subprocess.run([command, *arguments], capture_output=True, text=True, check=True, timeout=300)
            break
        except subprocess.CalledProcessError as failed:
            error = failed
    else:
        assert error is not None
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(error.stderr.strip() or str(error))
    os.replace(shared, file)                        # atomic, since other processes may build it now
    objects.unlink()
    with contextlib.suppress(OSError):
        os.rmdir(folder)
    return file


def _processor() -> str:
    """The processor, which -march=native depends on: a cache in a shared home may serve several kinds of machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
    return platform.processor() + platform.machine()


def _share_openmp() -> None:
    """Make the functions of PyTorch's OpenMP library visible to ours."""
    for file in (*Path(torch.__file__).parent.glob("lib/lib*omp*.so*"),
                 *Path(torch.__file__).parent.parent.glob("torch.libs/lib*omp*.so*")):
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)


# ---------------------------------------------------------------- called by the ops
def supports(points: tuple[float, ...], h: float) -> bool:
    """Whether the kernels support the grid."""
    return 2 <= len(points) <= MAX_POINTS and pair_constants(points, h) is not None


@functools.lru_cache(maxsize=256)
def _grid(points: tuple[float, ...], h: float) -> tuple[ctypes.Array, float, float]:
    constants = pair_constants(points, h)
    assert constants is not None        # `supports` has checked
    return (ctypes.c_float * len(constants))(*constants), (points[0] + points[-1]) / 2, 2 / h


def _found(points: int, base: str | None = None) -> ctypes.CDLL:
    """`library`, which exists: `backend.resolve` has checked."""
    found = library(points, base)
    assert found is not None
    return found


def _half(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def activation(u: Tensor, coefficients: Tensor, scale: Tensor | None, points: tuple[float, ...], h: float,
               base: str) -> Tensor:
    """v [T, C] in u's dtype from contiguous u [T, C] (`DTYPES`), coefficients [groups, G], scale [groups] float32."""
    v = torch.empty_like(u)
    if u.numel():
        _found(len(points), base).rswaf_activation(
            u.data_ptr(), v.data_ptr(), _half(u), *u.shape, coefficients.data_ptr(), _address(scale), len(coefficients),
            *_grid(points, h))
    return v


def activation_grad(dv: Tensor, u: Tensor, coefficients: Tensor, scale: Tensor | None, points: tuple[float, ...],
                    h: float, base: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """du [T, C] in u's dtype, and in float32 dC [groups, G] and, with a scale, its gradient [groups]."""
    du, dc = torch.empty_like(u), torch.zeros(coefficients.shape, dtype=torch.float64)
    dscale = None if scale is None else torch.zeros(len(coefficients), dtype=torch.float64)
    if u.numel():
        _found(len(points), base).rswaf_activation_grad(
            dv.data_ptr(), u.data_ptr(), du.data_ptr(), _half(u), *u.shape, coefficients.data_ptr(), _address(scale),
            len(coefficients), *_grid(points, h), dc.data_ptr(), _address(dscale))
    return du, dc.float(), None if dscale is None else dscale.float()


def basis(u: Tensor, points: tuple[float, ...], h: float, out: Tensor) -> None:
    """out [T, I, G] = B_k(u) from contiguous u [T, I]; both of `DTYPES`."""
    if u.numel():
        _found(len(points)).rswaf_basis(u.data_ptr(), _half(u), out.data_ptr(), _half(out), *u.shape, *_grid(points, h))


def basis_grad(values: Tensor, u: Tensor, points: tuple[float, ...], h: float, out: Tensor) -> None:
    """out [T, I] = sum_k values_k dB_k/du, values [T, I, G] being the gradient of the basis; then values = the basis."""
    if u.numel():
        _found(len(points)).rswaf_basis_grad(values.data_ptr(), _half(values), u.data_ptr(), _half(u), out.data_ptr(),
                                             *u.shape, *_grid(points, h))


def rational(u: Tensor, coefficients: Tensor, degree: int) -> Tensor:
    """v [T, C] in u's dtype from contiguous u [T, C] (`DTYPES`) and float32 coefficients [groups, m + 1 + n]."""
    v, library = torch.empty_like(u), rational_library(degree, coefficients.shape[1] - 1 - degree)
    assert library is not None      # checked by `rational._kernel`
    if u.numel():
        library.rational(u.data_ptr(), v.data_ptr(), _half(u), *u.shape, coefficients.data_ptr(), len(coefficients))
    return v


def rational_grad(dv: Tensor, u: Tensor, coefficients: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """du [T, C] in u's dtype, and float32 gradients of the coefficients."""
    du, dc = torch.empty_like(u), torch.zeros(coefficients.shape, dtype=torch.float64)
    library = rational_library(degree, coefficients.shape[1] - 1 - degree)
    assert library is not None
    if u.numel():
        library.rational_grad(dv.data_ptr(), u.data_ptr(), du.data_ptr(), _half(u), *u.shape, coefficients.data_ptr(),
                              len(coefficients), dc.data_ptr())
    return du, dc.float()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
