"""Compile every tile of every Triton kernel ahead of time, without a GPU, and check the machine code.

    python benchmarks/aot.py                                    # all tiles, all targets; rewrites results/kernels_aot.*
    python benchmarks/aot.py --quick                            # one tile of each op and target
    python benchmarks/aot.py --kernels forward --targets sm_90  # names that contain "forward"
    python benchmarks/aot.py --triton 3.4.0 3.6.0               # by other versions than the installed one

It prints and writes (kernels_aot.csv and kernels_aot.md in --output; `--quick` and filtered runs write only if --output is given)
registers, stack and spills, shared memory against the target's limit per block, the kind of matrix instruction, instruction
classes of the main loop, and a lower bound on the time of each op. The exit status is 1 if a tile has a spill, a stack, too much
shared memory, a matrix product off the tensor cores, or warpgroup products that ptxas had to serialise; or if a kernel that only
streams memory has a loop with a barrier, shared memory or narrow accesses. Launchers choose among the same cases (`aot_cases` in
each module).

Versions of Triton compile differently, and a GPU machine has the one of its PyTorch. --triton downloads each version to
$VISION_KAN_CACHE (else ~/.cache/vision-kan), about 600 MB, and compiles with it. AMD's targets are left out if a version has no
linker for them.

Triton's cache keeps compiled kernels, so a second run only reads them.
"""
import argparse
import csv
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)        # the interpreter's kernels cannot be compiled
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vision_kan.kernels.triton_common import TARGETS, AotCase, Device

MODULES = ("vision_kan.kernels.triton_linear", "vision_kan.kernels.triton_activation", "vision_kan.kernels.triton_rational")
TOKENS = 25_216                                 # 128 images of 197 tokens
WIDTHS = (192, 384, 768)
# Rates behind the lower bounds: flop/s of 16-bit matrix products, special functions/s (16 a clock and
# multiprocessor), bytes/s. H100: products and memory as measured with cuBLAS and a copy, clock 1.755 GHz.
# A100: assumed, clock 1.41 GHz.
RATES = {"sm_90": (800e12, 132 * 16 * 1.755e9, 3.0e12), "sm_80": (260e12, 108 * 16 * 1.41e9, 1.5e12)}
FIELDS = ("kernel", "target", "tile", "warps", "stages", "registers", "stack", "spills", "shared", "limit", "matrix",
          "loop", "mma", "special", "float", "convert", "shared_access", "global_access", "narrowest", "barrier", "other",
          "seconds", "problems")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# Instruction classes of NVIDIA's machine code by the opcode's first part; others count as "other".
CLASSES = {name: group for group, names in {
    "mma": "HMMA HGMMA UTCHMMA UTCQMMA",
    "special": "MUFU",
    "float": "FFMA FMUL FADD FMNMX FMNMX3 FSEL FSETP HFMA2 HMUL2 HADD2 FFMA2 FMUL2 FADD2",
    "convert": "F2FP F2F I2F I2FP F2I",
    "shared_access": "LDS LDSM STS STSM LDTM STTM UTMALDG",
    "global_access": "LDG STG LDGSTS",
    "local_access": "LDL STL",
    "barrier": "BAR WARPSYNC WARPGROUP SYNCS DEPBAR LDGDEPBAR",
}.items() for name in names.split()}
# The same for AMD's, by a pattern for the whole line.
AMD_CLASSES = {
    "mma": r"v_mfma", "special": r"v_(exp|rcp|log|rsq|sqrt)_", "float": r"v_(pk_)?(fma|fmac|mul|add|sub|max|min)_\w*f(32|16)",
    "convert": r"v_cvt", "shared_access": r"ds_", "global_access": r"(global|buffer|flat)_", "local_access": r"scratch_",
    "barrier": r"s_barrier|s_waitcnt",
}


# ---------------------------------------------------------------- compile
def links_amd() -> bool:
    """Whether this Triton or ROCm has a linker for AMD's targets; prints it if not."""
    from triton.backends.amd.compiler import HIPBackend
    try:
        HIPBackend.path_to_rocm_lld()
    except AttributeError:          # newer ones link without it
        return True
    except Exception as error:
        print(f"AMD's targets are left out: {' '.join(str(error).split())}")
        return False
    return True


def compile_case(case: AotCase, device: Device):
    """The kernel compiled as the launcher's call would do."""
    names = case.fn.arg_names
    left_out = set(names) - set(case.signature) - set(case.constexprs)
    if left_out:
        raise ValueError(f"{case.name}: arguments {sorted(left_out)} are in neither signature nor constexprs")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*")] + list(case.divisible)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    target = (GPUTarget("hip", device.arch, 64) if device.backend == "hip"
              else GPUTarget("cuda", device.capability, 32))
    source = ASTSource(fn=case.fn, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": case.num_warps, "num_stages": case.num_stages})


# ---------------------------------------------------------------- read
def read_nvidia(kernel, device: Device) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "-res-usage", file.name)
        listing = _run(TOOLS / "cuobjdump", "-sass", file.name)
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", listing)]
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in code]
    groups = [CLASSES.get(opcode.split(".")[0], "other") for opcode in opcodes]
    at = {address: i for i, (address, _) in enumerate(code)}
    loops: list[tuple[int, int]] = []
    for i, (address, text) in enumerate(code):
        jump = re.search(r"BRA\S*\s.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address and int(jump[1], 16) in at:
            loops.append((at[int(jump[1], 16)], i + 1))
    ptx = kernel.asm["ptx"]
    matrix = next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx), "")
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "spills": groups.count("local_access"), "matrix": matrix.split(".mma")[0] if matrix != "mma.sync" else matrix,
            **_main_loop(groups, loops, opcodes),
            "serialised": device.family == "wgmma" and "wgmma" in matrix and _serialised(ptx, device)}


def read_amd(kernel) -> dict:
    text = kernel.asm["amdgcn"]
    lines = [line.strip() for line in text.splitlines()]
    groups, labels, loops, opcodes = [], {}, [], []
    for line in lines:
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(groups)
        elif re.match(r"[a-z]+_\w+", line):
            groups.append(next((group for group, pattern in AMD_CLASSES.items() if re.match(pattern, line)), "other"))
            opcodes.append(line.split()[0])
            jump = re.match(r"s_c?branch\S*\s+(\.LBB\w+)", line)
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(groups)))
    number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
              for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")}
    return {"registers": number["vgpr_count"], "stack": number["private_segment_fixed_size"],
            "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"], "matrix": "mfma" if "mma" in groups else "",
            **_main_loop(groups, loops, opcodes), "serialised": False}


def _main_loop(groups: list[str], loops: list[tuple[int, int]], opcodes: list[str]) -> dict:
    """Instruction counts of the loop with the most matrix instructions, or without any the most special functions; of two equal
    ones the shorter; of the whole kernel if no loop has either. Also whether threads of different warps
    meet in it, and the bytes of its narrowest access to memory."""
    unit = "mma" if "mma" in groups else "special"
    best = max(loops, key=lambda span: (groups[slice(*span)].count(unit), span[0] - span[1]), default=None)
    if best is None or unit not in groups[slice(*best)]:
        best = (0, len(groups))
    inside = slice(*best)
    counts = Counter(groups[inside])
    widths = [_width(opcode) for opcode, group in zip(opcodes[inside], groups[inside]) if group == "global_access"]
    return {"loop": best[1] - best[0], "narrowest": min(widths, default=0), "in_loop": best != (0, len(groups)),
            "meets": any(re.match(r"BAR|s_barrier|LDS|STS|ds_", opcode) for opcode in opcodes[inside])
            } | {name: counts[name] for name in FIELDS[FIELDS.index("mma"):FIELDS.index("seconds")] if name != "narrowest"}


def _width(opcode: str) -> int:
    """Bytes of a load or store, from NVIDIA's LDG.E.128 or AMD's global_load_dwordx4."""
    if match := re.search(r"dwordx(\d)", opcode):
        return 4 * int(match[1])
    if match := re.search(r"\.(?:[US])?(8|16|64|128)(?:\.|$)", opcode):
        return int(match[1]) // 8
    return {"short": 2, "byte": 1}.get(next(iter(re.findall("short|byte", opcode)), ""), 4)


def _serialised(ptx: str, device: Device) -> bool:
    """Whether ptxas makes each warpgroup product wait for the one before it; only its log shows that."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        log = _run(triton.knobs.nvidia.ptxas.path, "-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{device.capability}a",
                   file.name, "-o", os.devnull)
    return "C7515" in log or "serializ" in log.lower()


def _run(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def check(case: AotCase, target: str) -> dict:
    """One row of the table: `FIELDS`."""
    device, start = TARGETS[target], time.perf_counter()
    row = dict.fromkeys(FIELDS, 0) | {
        "kernel": case.name, "target": target, "tile": case.tile, "warps": case.num_warps, "stages": case.num_stages,
        "limit": device.shared, "matrix": "", "problems": ""}
    try:
        kernel = compile_case(case, device)
        found = read_amd(kernel) if device.backend == "hip" else read_nvidia(kernel, device)
    except Exception as error:      # any failure of the compiler is a failure of the tile
        while error.__cause__ is not None:      # Triton wraps the error once for each call on the way
            error = error.__cause__
        return row | {"problems": f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"}
    row |= {"shared": kernel.metadata.shared} | {name: value for name, value in found.items() if name in row}
    problems = [text for text, wrong in (
        (f"{row['stack']} bytes of stack", row["stack"]), (f"{row['spills']} spills", row["spills"]),
        (f"shared memory over {device.shared}", row["shared"] > device.shared),
        ("no matrix instruction", case.tensor_cores and not (row["matrix"] and row["mma"])),
        ("serialised wgmma", found["serialised"]),
        ("no loop found", case.vector and not found["in_loop"]),
        ("a barrier or shared memory in the loop", case.vector and found["meets"]),
        (f"accesses of {row['narrowest']} bytes in place of {case.vector}", case.vector > row["narrowest"])) if wrong]
    return row | {"problems": "; ".join(problems), "seconds": round(time.perf_counter() - start, 1)}


# ---------------------------------------------------------------- the lower bounds
def bounds(case: AotCase, target: str, width: int) -> tuple[float, float, float]:
    """Microseconds on tensor cores, special functions, memory, each as if alone."""
    work = case.work(TOKENS, width)
    return tuple(1e6 * amount / rate for amount, rate in zip((work.flops, work.specials, work.bytes), RATES[target]))


def bounds_table(cases: Iterable[tuple[str, AotCase]]) -> list[str]:
    """For each op, target and width, the tile with the lowest bound."""
    lines = ["| kernel | target | width | tile | tensor cores | special functions | memory | bound |",
             "|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple, list] = {}
    for target, case in cases:
        if case.work is not None and target in RATES:
            groups.setdefault((case.name, target), []).append(case)
    for (name, target), members in groups.items():
        for width in WIDTHS:
            case = min(members, key=lambda case: max(bounds(case, target, width)))
            times = bounds(case, target, width)
            lines.append(f"| {name} | {target} | {width} | {case.tile} | "
                         + " | ".join(f"{time:.0f}" for time in (*times, max(times))) + " |")
    return lines


# ---------------------------------------------------------------- report
def write_report(rows: list[dict], cases: list[tuple[str, AotCase]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "kernels_aot.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in FIELDS if name != "seconds"], extrasaction="ignore",
                                lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    shown = ("kernel", "target", "tile", "warps", "stages", "registers", "spills", "shared", "limit", "matrix", "loop",
             "mma", "special", "float", "convert", "shared_access")
    lines = [f"# Kernels compiled ahead of time (Triton {triton.__version__})", "",
             "By `python benchmarks/aot.py`, without a GPU. Shared memory and its limit for one block in bytes; counts "
             "of instructions are of the main loop.", "",
             "| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(str(row[name]) for name in shown) + " |" for row in rows]
    lines += ["", f"## Lower bounds in microseconds, {TOKENS:,} tokens, 8 grid points, bf16", "",
              "From counts of operations and the rates in benchmarks/aot.py, each unit as if alone: nothing here was run.",
              "H100 (sm_90): measured rates of cuBLAS and of a copy; A100 (sm_80): assumed rates.", ""]
    (folder / "kernels_aot.md").write_text("\n".join(lines + bounds_table(cases)) + "\n")


def print_row(row: dict) -> None:
    counts = " ".join(f"{name}={row[name]}" for name in FIELDS[FIELDS.index("loop"):FIELDS.index("seconds")] if row[name])
    print(f"{row['kernel']:26s} {row['target']:7s} {row['tile']:44s} w{row['warps']} s{row['stages']} "
          f"reg={row['registers']} stack={row['stack']} spills={row['spills']} shared={row['shared']}/{row['limit']} "
          f"{row['matrix'] or '-'} {counts} {row['seconds']}s {row['problems']}", flush=True)


def collect(targets: list[str], kernels: list[str] | None, quick: bool) -> list[tuple[str, AotCase]]:
    cases = []
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        for target in targets:
            found = module.aot_cases(TARGETS[target])
            if quick:       # the first marked case of each op
                found = list({case.name: case for case in reversed(found) if case.quick}.values())[::-1]
            cases += [(target, case) for case in found
                      if not kernels or any(part in case.name for part in kernels)]
    return cases


def compile_with(version: str, arguments: list[str]) -> int:
    """This program's exit status with another version of Triton, which precedes the installed one in sys.path."""
    cache = Path(os.environ.get("VISION_KAN_CACHE", Path.home() / ".cache" / "vision-kan"))
    folder = cache / f"triton-{version}"
    if not (folder / "triton").is_dir():
        partial = cache / f"triton-{version}.{os.getpid()}"
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target",
                        str(partial), f"triton=={version}"], check=True)
        partial.rename(folder)
    print(f"\nTriton {version}", flush=True)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, __file__, *arguments], env=os.environ | {"PYTHONPATH": path}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", help="only ops whose name contains one of these")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="one tile of each op and target")
    parser.add_argument("--output", type=Path, help="folder of kernels_aot.csv and kernels_aot.md")
    parser.add_argument("--triton", nargs="+", metavar="VERSION", help="compile with these in place of the installed one")
    args = parser.parse_args()
    if args.triton:
        rest = [*(["--kernels", *args.kernels] if args.kernels else []), "--targets", *args.targets,
                *(["--quick"] if args.quick else [])]
        codes = [compile_with(version, [*rest, "--output", str((args.output or Path(tempfile.gettempdir())) / version)])
                 for version in args.triton]
        return max(codes)
    targets = [target for target in args.targets if TARGETS[target].backend != "hip" or links_amd()]
    cases = collect(targets, args.kernels, args.quick)
    if not cases:
        parser.error(f"no kernel's name contains one of {args.kernels}")
    rows = []
    for target, case in cases:
        rows.append(check(case, target))
        print_row(rows[-1])
    whole = not args.quick and not args.kernels and set(args.targets) == set(TARGETS)
    folder = args.output or (ROOT / "benchmarks" / "results" if whole else None)
    if folder is not None:
        write_report(rows, cases, folder)
    failed = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
