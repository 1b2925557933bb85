"""benchmarks/gpu.py where there is no GPU: its code by `--device cpu --quick`, and what it says without that."""
import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict[str, str]]:
    output = tmp_path_factory.mktemp("gpu") / "gpu.csv"
    assert gpu.main(["--device", "cpu", "--quick", "--output", str(output)]) == 0
    with open(output, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_all_columns_and_the_machine(rows):
    assert tuple(rows[0]) == gpu.FIELDS
    assert all(row["torch"] == torch.__version__ and row["card"] for row in rows)


def test_every_op_is_checked_in_every_dtype(rows):
    checks = [row for row in rows if row["part"] == "check"]
    assert {row["dtype"] for row in checks} == {"float32", "bfloat16", "float16"}
    assert {row["name"].split()[0] for row in checks} == {"activation", "linear"}
    assert all(float(row["error"]) <= float(row["bound"]) and not row["problem"] for row in checks)


def test_every_op_and_its_twin_is_timed(rows):
    timed = {(row["name"], row["variant"], row["phase"]) for row in rows if row["part"] == "op" and float(row["ms"]) > 0}
    for op, twin in (("activation", "GELU"), ("linear", "MLP")):
        for variant in ("kernel", "reference", twin):
            assert {(op, variant, "forward"), (op, variant, "forward+backward")} <= timed
    assert all(int(row["n"]) >= 3 and float(row["spread_percent"]) >= 0 for row in rows if row["part"] == "op")


def test_models_are_timed_against_their_twin(rows):
    steps = {row["variant"]: row for row in rows if row["part"] == "step"}
    assert set(steps) == {"ViT", "GKAN", "KAN"} and float(steps["ViT"]["ratio"]) == 1
    assert all(float(row["images_per_s"]) > 0 and row["phase"] == "eager" for row in steps.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert gpu.main(["--output", str(tmp_path / "gpu.csv")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.rstrip().endswith(".") and "GPU" in message
    assert not (tmp_path / "gpu.csv").exists()


def test_a_wrong_op_fails(monkeypatch, tmp_path):
    bench = gpu.Bench("cpu", True, 8)
    monkeypatch.setattr(gpu.kernels, "rswaf_linear", lambda u, w, grid, h, single_exp: 0 * u @ w[:, :u.shape[1]].t())
    gpu._check_linear(bench, torch.float32, 21, 45, 35, False, "")
    assert "over" in bench.rows[-1]["problem"]


def test_what_does_not_run_is_a_row(capsys):
    def fails():
        raise RuntimeError("no kernel image\nmore")
    found = gpu.Bench("cpu", True, 8).times({"fails": fails, "runs": lambda: None})
    assert found["fails"] == {"problem": "RuntimeError: no kernel image"} and found["runs"]["ms"] >= 0
