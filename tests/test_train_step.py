"""The speed benchmarks of ops and whole steps run, and their rows say what they should; no time is asserted."""
import csv

import pytest
import torch

from benchmarks import kernels as op_benchmark
from benchmarks import timing, train_step
from vision_kan import kernels

pytestmark = pytest.mark.slow


def rows_of(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_whole_steps(tmp_path, capsys):
    out = tmp_path / "steps.csv"
    variants = ["mlp", "gkan", "kan-48", "original-48"]
    assert train_step.main(["--model", "vit_nano_patch8_32", "--variants", *variants, "--batch-size", "2", "--repeats", "2",
                            "--output", str(out)]) == 0
    rows = {row["variant"]: row for row in rows_of(out)}
    assert list(rows) == variants
    assert rows["mlp"]["ratio"] == "1.0" and all(row["n"] == "2" for row in rows.values())
    kept = {name: float(row["saved_mb_per_image"]) for name, row in rows.items()}
    assert kept["kan-48"] < kept["mlp"] < kept["gkan"] < kept["original-48"]
    assert all(float(row["peak_mb"]) > 0 for row in rows.values())
    assert "| original-48 |" in capsys.readouterr().out
    train_step.main(["--model", "vit_nano_patch8_32", "--variants", "mlp", "kan-48", "--dtype", "bfloat16", "--batch-size", "2",
                     "--repeats", "1", "--no-peak", "--output", str(out)])
    assert len(rows_of(out)) == 6 and kernels.chosen() == "auto"


def test_the_original_layer_is_the_same_function():
    nets = [train_step.build("vit_nano_patch8_32", name).eval() for name in ("kan-48", "original-48")]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(nets[0](x), nets[1](x), rtol=0, atol=1e-4)


def test_ops_alone(tmp_path):
    out = tmp_path / "ops.csv"
    op_benchmark.main(["--tokens", "9", "--widths", "16", "--repeats", "2", "--no-compile", "--output", str(out)])
    rows = rows_of(out)
    ways = {op: {row["way"] for row in rows if row["op"] == op} for op in ("rswaf_linear", "rswaf_activation")}
    assert ways == {"rswaf_linear": {"ours", "original", "products", "mlp"}, "rswaf_activation": {"ours", "original", "gelu"}}
    assert len(rows) == 2 * 2 * 7 and all(row["beside_ours"] == "1.0" for row in rows if row["way"] == "ours")
    kept = {row["way"]: float(row["saved_mb"]) for row in rows
            if row["op"] == "rswaf_linear" and row["part"] == "training step" and row["dtype"] == "float32"}
    assert kept["ours"] < kept["original"]


def test_the_ways_are_one_function():
    for make in (op_benchmark.linear_ways, op_benchmark.activation_ways):
        ways = make(7, 16, torch.float32, False)
        (ours, leaves), (original, _) = ways["ours"], ways["original"]
        torch.testing.assert_close(ours(*leaves), original(*leaves), rtol=1e-4, atol=1e-5)


def test_steps_are_timed_in_turn():
    order = []
    seconds = timing.time_in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 3, warmup=1)
    assert "".join(order) == "abababab" and [len(values) for values in seconds.values()] == [3, 3]
    assert timing.ratios([2.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == (3.0, 2.0, 3.0)
