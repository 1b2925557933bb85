"""Every op's first tile compiles for every target without spills and on tensor cores, without a GPU."""
import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


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
        for op in products | {"rswaf_activation.forward", "rswaf_activation.backward"}}
    for row in rows:
        assert int(row["registers"]) > 16 and not int(row["spills"]) and not int(row["stack"]) and not row["problems"]
        assert int(row["shared"]) <= int(row["limit"])
        if row["kernel"] in products:
            assert row["matrix"] == matrix[row["target"]] and int(row["mma"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full(tmp_path):
    compile_all(tmp_path)
