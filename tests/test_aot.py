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


def test_quick(tmp_path):
    """Two targets of different matrix instructions; the others are in the full run."""
    rows = compile_all(tmp_path, "--quick", "--targets", "sm_86", "sm_90", "--kernels", "rswaf_linear")
    ops = {"rswaf_linear.forward", "rswaf_linear.backward_u", "rswaf_linear.backward_weight"}
    assert {(row["kernel"], row["target"]) for row in rows} == {(op, arch) for op in ops for arch in ("sm_86", "sm_90")}
    for row in rows:
        assert row["matrix"] == {"sm_86": "mma.sync", "sm_90": "wgmma"}[row["target"]]
        assert int(row["mma"]) and int(row["registers"]) > 32 and not int(row["spills"]) and not row["problems"]
        assert int(row["shared"]) <= int(row["limit"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full(tmp_path):
    compile_all(tmp_path)
