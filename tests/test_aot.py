"""Every op's first tile compiles for every target without spills and on tensor cores, without a GPU."""
import csv
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ELEMENTWISE = {f"{op}.{way}" for op in ("rswaf_activation", "rational") for way in ("forward", "backward")}


def compile_all(folder: Path, *options: str) -> list[dict]:
    done = subprocess.run([sys.executable, "benchmarks/aot.py", "--output", str(folder), *options], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    with open(folder / "kernels_aot.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(900)
def test_one_tile_of_every_op_and_target(tmp_path):
    rows = compile_all(tmp_path, "--quick")
    matrix = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05",
              "sm_120": "mma.sync", "gfx942": "mfma"}
    products = {"rswaf_linear.forward", "rswaf_linear.backward_u", "rswaf_linear.backward_weight"}
    assert {(row["kernel"], row["target"]) for row in rows} >= {
        (op, target) for target in matrix
        for op in products | ELEMENTWISE}
    for row in rows:
        assert int(row["registers"]) > 16 and not int(row["spills"]) and not int(row["stack"]) and not row["problems"]
        assert int(row["shared"]) <= int(row["limit"])
        if row["kernel"] in ELEMENTWISE:
            assert row["narrowest"] == "16" and int(row["special"]) and row["shared_access"] == "0"
            assert row["target"] == "gfx942" or row["barrier"] == "0"       # AMD's count has waits for memory in it
        if row["kernel"] in products:
            assert row["matrix"] == matrix[row["target"]] and int(row["mma"])


def test_the_main_loop_and_what_it_does():
    """In a listing: the loop with the most special functions, its narrowest access, and whether it has a barrier."""
    from benchmarks import aot
    opcodes = ["LDG.E", "MUFU.EX2", "BRA", "LDG.E.128", "MUFU.EX2", "MUFU.RCP", "STG.E.64", "BRA", "BAR.SYNC"]
    groups = [aot.CLASSES.get(opcode.split(".")[0], "other") for opcode in opcodes]
    found = aot._main_loop(groups, [(0, 3), (3, 8)], opcodes)
    assert (found["loop"], found["special"], found["narrowest"], found["meets"]) == (5, 2, 8, False)
    whole = aot._main_loop(groups, [], opcodes)
    assert (whole["loop"], whole["narrowest"], whole["meets"], whole["in_loop"]) == (9, 4, True, False)
    assert [aot._width(name) for name in ("LDG.E.U8", "LDG.E.U16", "STG.E", "LDG.E.64.CONSTANT", "global_load_dwordx4",
                                          "global_load_ushort", "buffer_store_byte")] == [1, 2, 4, 8, 16, 2, 1]


@pytest.mark.timeout(3600)
def test_full(tmp_path):
    compile_all(tmp_path)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", ["3.4.0", "3.6.0"])
def test_older_versions_of_triton(tmp_path, version):
    """Downloads them. The oldest that the requirements allow, and the one in which activations once met in their loop."""
    done = subprocess.run([sys.executable, "benchmarks/aot.py", "--quick", "--output", str(tmp_path), "--triton", version],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"Triton {version}" in (tmp_path / version / "kernels_aot.md").read_text()
