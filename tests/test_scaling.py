"""The benchmarks of scaling and of the loader run and write what they promise."""
import csv

import e2e
import pytest
import torch

from benchmarks import loader, scaling

pytestmark = pytest.mark.slow


def test_exponent():
    assert scaling.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_saved_bytes_are_of_distinct_storages_without_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.randn(2, 8)
    kept = scaling.saved_bytes(model, lambda: model(x).sum().backward())
    assert kept == 4 * (2 * 8 + 2 * 16)         # the input; the hidden values, which two nodes keep


def test_scaling(tmp_path, capsys):
    e2e._start_server()
    rows = scaling.main(["--quick", "--repeats", "2", "--output", str(tmp_path / "out/scaling.csv")],
                        start_method="forkserver")      # of the tests, which has imported PyTorch already
    with open(tmp_path / "out/scaling.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) == 3 * (4 * 2 + 2)
    assert all(float(row["seconds"]) > 0 and float(row["img_per_s"]) > 0 for row in written)
    assert {row["size"] for row in written if row["axis"] == "processes"} == {"1", "2"}
    for suffix in scaling.SUFFIXES:             # saved bytes are exact, so what they grow with is too
        kept = {axis: [row["saved_bytes"] for row in rows if (row["axis"], row["model"]) == (axis, suffix)]
                for axis in scaling.AXES}
        assert kept["batch"][1] == pytest.approx(2 * kept["batch"][0], rel=0.02)
        assert 1 < kept["depth"][1] / kept["depth"][0] <= 2
    assert capsys.readouterr().out.count("exponent of seconds") == 4


def test_loader(tmp_path, capsys):
    argv = ["--images", "16", "--batch-size", "4", "--num_workers", "0", "--repeats", "1", "--output",
            str(tmp_path / "loader.csv")]
    for _ in range(2):
        loader.main(argv)
    with open(tmp_path / "loader.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 14                   # a second run is appended
    shares = {row["pipeline"]: float(row["share_of_decoding"]) for row in written[:7] if row["share_of_decoding"]}
    assert len(shares) == 6 and all(float(row["img_per_s"]) > 0 for row in written)
    assert shares["train: decode"] == shares["val: decode"] == 1 and min(shares.values()) > 0
    assert "of decoding" in capsys.readouterr().out
