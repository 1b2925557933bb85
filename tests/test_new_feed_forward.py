"""A new feed-forward is one file and one line in `models_kan.FEED_FORWARDS`."""
import re
import shutil
import subprocess
import sys

import pytest
import torch
from e2e import QUICK, write_digits
from helpers import ROOT

HERE = ("--device", "cpu", "--num_workers", "0")
# Runs in the copy: each line is a command as a user gives it, in one process.
DRIVER = """
import runpy, sys
for words in {commands}:
    sys.argv = words
    print("$", *words, flush=True)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


@pytest.mark.slow
def test_a_new_feed_forward_is_one_file_and_one_line(tmp_path):
    """Trained, evaluated from its checkpoint and from its bare weights, inspected, given formulas, pruned, exported, counted:
    through the real commands in a copy of this code, to which nothing but the file and the line (and its import) is added."""
    copy = tmp_path / "copy"
    for name in ("vision_kan", "tools", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    shutil.copy(ROOT / "tests/toy_kan.py", copy)
    table = (copy / "models_kan.py").read_text()
    assert table.count('    "ViT": MLP,\n') == 1
    table = table.replace('    "ViT": MLP,\n', '    "ViT": MLP,\n    "TOY": ToyKAN,\n')
    table = table.replace("from faster_kan import", "from toy_kan import ToyKAN\nfrom faster_kan import")
    (copy / "models_kan.py").write_text(table)
    data = write_digits(tmp_path / "data", train=16, val=8)

    def call(*commands) -> str:
        words = [[str(word) for word in command] for command in commands]
        done = subprocess.run([sys.executable, "-c", DRIVER.format(commands=words)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    quick = [word if word != QUICK[QUICK.index("--model") + 1] else "vit_nano_patch8_32_TOY" for word in QUICK]
    run, checkpoint, on = tmp_path / "run", tmp_path / "run/checkpoint.pth", ("--data-path", data, *HERE)
    out = call(["main.py", *quick, "--data-path", data, "--epochs", 1, "--hdim_kan", 12, "--kan-grid-points", 5, "--log-kan", 1,
                "--output_dir", run],
               ["main.py", "--eval", "--resume", checkpoint, *on])
    model = torch.load(checkpoint, weights_only=True)["model"]
    assert model["blocks.3.mlp.layers.1.weight"].shape == (96, 12, 5)
    tokens, edges = 17, 4 * 2 * 96 * 12 * 5
    outside = 2 * 16 * 192 * 96 + 4 * (2 * tokens * 4 * 96 * 96 + 4 * tokens ** 2 * 96) + 2 * 96 * 3
    matmul, elementwise = outside + 2 * tokens * edges, 4 * 3 * tokens * (96 + 12) * 5
    assert f"{matmul / 1e6:,.1f} M matmul and {elementwise / 1e6:,.2f} M elementwise FLOPs" in out
    torch.save({"model": model}, tmp_path / "bare.pth")
    small, card = tmp_path / "small.pth", tmp_path / "card"
    out += call(["main.py", "--eval", "--resume", tmp_path / "bare.pth", *on],
                ["tools/inspect_kan.py", checkpoint, "--data-path", data, "--output", tmp_path / "report"],
                ["tools/symbolic.py", checkpoint, *on, "--edges", 1, "--limit", 8],
                ["tools/prune.py", checkpoint, small, "--what", "hidden", "--keep-parameters", 0.5, *on],
                ["main.py", "--eval", "--resume", small, *on],
                ["tools/export.py", checkpoint, card])
    results = re.findall(r"^model: (top-1 .*) \(24 images\)", out, re.MULTILINE)
    assert len(results) == 4 and len(set(results[:3])) == 1         # after training, from the checkpoint, from bare weights
    assert "blocks.3.mlp.layers.1" in (tmp_path / "report/report.html").read_text()
    assert torch.load(small, weights_only=True)["model"]["blocks.0.mlp.layers.1.weight"].shape[1] < 12
    assert "feed-forward Chebyshev KAN" in (card / "README.md").read_text()
