"""tools/compare.py: the numbers of its table by hand, what it refuses, and a comparison that is stopped and continued."""
import csv
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from e2e import QUICK, run
from helpers import NANO, ROOT, sentence
from PIL import Image

from tools import compare
from vision_kan.common.errors import EXIT_PREEMPTED
from vision_kan.common.process import peak_memory_mib
from vision_kan.config.resolve import parse_args


def log(*top1: float, rate: float = 100.0, memory: float | None = 50.0, ema: bool = True) -> list[dict]:
    return [{"epoch": number, "train_loss": 2.0 - number, "test_acc1": value, "img_per_s": rate, "n_parameters": 1000,
             **({"ema_test_acc1": value + 1} if ema else {}), **({} if memory is None else {"memory_mib": memory + number})}
            for number, value in enumerate(top1)]


def test_the_table_by_hand():
    logs = {"mlp": [log(1, 50), log(1, 52), log(1, 54)], "gkan": [log(1, 53, rate=50), log(1, 56, rate=50), log(1, 56, rate=50)]}
    mlp, gkan = compare.rows(logs, {"mlp": 10.0, "gkan": 11.0}, 25)
    assert (mlp.top1, mlp.spread, mlp.ema, mlp.difference, mlp.half) == (52, 2, 53, None, None)
    assert gkan.difference == pytest.approx(3) and gkan.ms == 500 and mlp.ms == 250 and mlp.memory_mib == 51
    # differences 3, 4, 2: deviation 1, Student's t of 2 degrees at 97.5% is 4.3027
    assert gkan.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    text = compare.table([mlp, gkan])
    assert "52.00 ± 2.00" in text and "+3.00 [+0.52, +5.48]" in text and "from mlp (95%)" in text
    assert "gkan and mlp: not twins: 11,000,000.0 against 10,000,000.0 matmul FLOPs" in text
    one, = compare.rows({"kat": [log(7, memory=None, ema=False)]}, {"kat": 1.0}, 1)
    assert (one.spread, one.ema, one.memory_mib) == (None, None, None)
    assert "One seed shows no difference" in compare.table([one])
    assert len(compare.curves(logs).axes) == 2


@pytest.mark.parametrize("words, sentence", [
    ("--ffn mlp mlp", "--ffn mlp mlp names one twice"), ("--ffn swiglu", "--ffn: 'swiglu' is not one of mlp, gkan"),
    ("", "missing on the command line: --ffn"), ("--ffn mlp --seeds 0", "--seeds 0 must be at least 1"),
    ("--ffn mlp --seed 3", "--seed (command line) is not for a comparison"), ("--ffn mlp --list-models", "--list-models"),
    ("--ffn mlp kan --kan-groups 4", "--kan-groups has no effect on --ffn mlp kan: leave it out"),
    ("--ffn mlp gkan --model test_convnext --input-size 32", "GELUTanh() is not one of identity"),
    ("--ffn mlp --kan-backend cpu", "--kan-backend has no effect on --ffn mlp: leave it out"),
    ("--ffn gkan --model no_such_model", "--model no_such_model is unknown"),
    ("--ffn mlp --epochs none", "--epochs: 'none' is not a whole number"), ("--ffn mlp --epoch 3", "unknown flag --epoch")])
def test_what_is_refused(words, sentence, tmp_path, capsys):
    assert compare.main([*words.split(), "--output-dir", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1 and not (tmp_path / "none").exists()


def test_flags_of_one_feed_forward_and_of_earlier_runs(tmp_path):
    config = parse_args(["--model", "test_convnext", "--kan-base", "gelu", "--kan-lr-mult", "5", "--epochs", "3"])
    kan = {"model": "test_convnext_GKAN", "kan_base": "gelu", "kan_lr_mult": 5.0, "epochs": 3}
    assert compare.recipe_of("gkan", config) == kan
    assert compare.recipe_of("mlp", config) == {"model": "test_convnext", "epochs": 3}
    config = parse_args(["--kan-backend", "reference", "--log-kan", "1"])
    assert compare.recipe_of("kat", config).keys() == {"model", "kan_backend", "log_kan"}
    assert compare.recipe_of("mlp", config) == {"model": "deit_tiny_patch16_224_ViT"}
    config = parse_args(["--model", "test_convnext", "--epochs", "3"])
    for recipe in (kan, {**kan, "log_kan": 1, "debug_nan": True}, compare.recipe_of("mlp", config)):
        compare.check("gkan", {**recipe, "input_size": 32})
    file = tmp_path / "gkan.yaml"
    compare.check_unchanged(file, kan)
    file.write_text(compare.dump_yaml(Namespace(**kan)))
    compare.check_unchanged(file, {**kan, "data_path": "/elsewhere"})
    for other in ({**kan, "epochs": 4}, {key: kan[key] for key in ("model", "kan_base", "epochs")}, {**kan, "lr": 0.1}):
        assert "give the flags of before, or another --output-dir" in sentence(compare.check_unchanged, file, other)


def test_a_runs_args_yaml_as_the_recipe(data, tmp_path, monkeypatch):
    """It has every flag, also those without effect on the feed-forwards of the comparison, at their defaults."""
    assert run(*QUICK, "--data-path", data, "--epochs", 1, "--output_dir", tmp_path / "kan") == 0
    text = (tmp_path / "kan/args.yaml").read_text()
    (tmp_path / "r.yaml").write_text("".join(line for line in text.splitlines(True)
                                             if not line.startswith(("seed:", "output_dir:", "resume:"))))
    trained = []
    monkeypatch.setattr(compare, "train", lambda *given: trained.append(given[:2]) or sys.exit(5))
    with pytest.raises(SystemExit):
        compare.main(["--config", str(tmp_path / "r.yaml"), "--ffn", "mlp", "kat", "--output-dir", str(tmp_path / "out")])
    assert trained == [("mlp", 0)] and compare.load_recipe(str(tmp_path / "out/kat.yaml"))["model"] == "vit_nano_patch8_32_KAT"


def test_a_folder_of_nobody(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--ffn", "mlp", "--output-dir", "~nouser/x"]) == 2
    assert "--output-dir ~nouser/x cannot be a path (there is no such user)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_memory():
    before = peak_memory_mib(torch.device("cpu"))
    kept = torch.ones(2 ** 26)      # 256 MiB
    assert peak_memory_mib(torch.device("cpu")) >= before and before > 100 and kept.sum() == 2 ** 26
    assert peak_memory_mib(torch.device("meta")) is None


def test_a_run_with_ffn_resumes_by_the_same_command(data, tmp_path, capsys):
    words = [*QUICK, "--model", "vit_nano_patch8_32", "--ffn", "gkan", "--data-path", data, "--output_dir", tmp_path / "out",
             "--resume", "auto"]
    assert run(*words, "--epochs", 1) == 0 and run(*words, "--epochs", 2) == 0
    capsys.readouterr()
    words[words.index("gkan")] = "kat"
    assert run(*words, "--epochs", 3) == 2
    assert "--model vit_nano_patch8_32_KAT (--ffn kat) contradicts the checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_is_stopped_and_continued(data, tmp_path):
    folder = tmp_path / "runs"
    words = [sys.executable, "tools/compare.py", "--ffn", "mlp", "kat", "--seeds", "2", "--output-dir", folder,
             "--data-path", data, *QUICK, "--model", NANO.removesuffix("_KAN"), "--epochs", "2"]
    words = list(map(str, words))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (folder / "kat_seed0/checkpoint.pth").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode in (0, EXIT_PREEMPTED), errors
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    table = list(csv.DictReader(open(folder / "compare.csv", encoding="utf-8")))
    assert [row["ffn"] for row in table] == ["mlp", "kat"] and all(row["seeds"] == "2" for row in table)
    top1 = [compare.read_log(folder / f"kat_seed{seed}")[-1]["test_acc1"] for seed in range(2)]
    assert float(table[1]["top1"]) == statistics.mean(top1)
    assert "from mlp (95%)" in done.stdout and "not twins" not in done.stdout
    assert Image.open(folder / "compare.png").size[0] > 500
    again = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0 and "step 3/3" not in again.stdout        # nothing is trained again
