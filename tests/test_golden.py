"""The first losses of three fixed runs are those in tests/data/golden_losses.json, so that nothing alters the training
unnoticed.

    python tests/test_golden.py             write the file anew, after a change that is meant to alter the training
    python tests/test_golden.py --spread    how far rounding alone moves the losses on this machine
"""
import contextlib
import io
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from e2e import Enough, recording, run  # noqa: E402
from helpers import every  # noqa: E402

import main as program  # noqa: E402
from vision_kan import kernels  # noqa: E402

FILE = ROOT / "tests/data/golden_losses.json"
FLAGS = ("--data-set DIGITS --device cpu --num_workers 0 --batch-size 32 --epochs 1 --warmup-epochs 0 --sched-on-updates "
         "--lr 1e-3 --unscale-lr --seed 0 --repeated-aug --reprob 0.25 --mixup 0.8 --cutmix 1 --smoothing 0.1 --drop 0.1 "
         "--drop-path 0.1 --amp-dtype float32").split()
# The reference formulas: what the compiled kernels round depends on the compiler. The full-edge KAN with its covering grid: in
# its original form the second LayerNorm divides by the spread of hidden units that are nearly alike at first, and makes a
# rounding error a thousand times as large at each update.
RUNS = {"vit_nano_patch8_32_GKAN": "--kan-backend reference --aa rand-m9-mstd0.5-inc1".split(),
        "vit_nano_patch8_32_KAN": "--kan-backend reference --kan-basis covering --aa rand-m9-mstd0.5-inc1 --clip-grad 1".split(),
        "vit_nano_patch8_32_ViT": "--ThreeAugment --src --color-jitter 0.3 --opt momentum --lr 0.1 --layer-decay 0.75".split()}
STEPS = 20
# Relative. Rounding alone (`--spread`: two threads, no AVX, MKL's slowest path, the C++ kernels) moves these losses by 1e-7 to
# 3.1e-7; a learning rate of 1% more moves them by 3e-4, weight decay 0.06 in place of 0.05 by 1e-5.
TOLERANCE = 4e-6


# ---------------------------------------------------------------- losses
def losses_of(model: str, *more, steps: int = STEPS, threads: int = 1) -> list[float]:
    """The first losses of the run."""
    before, backend = torch.get_num_threads(), kernels.chosen()
    torch.set_num_threads(threads)
    try:
        with recording(steps) as record, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
            run("--model", model, *FLAGS, *RUNS[model], *more)
    finally:
        torch.set_num_threads(before)
        kernels.use(backend)
    assert len(record["losses"]) == steps
    return torch.stack(record["losses"]).tolist()


def deviation(losses: list[float], others: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def made_with() -> dict[str, str | bool]:
    """Versions that decide the numbers: others may augment, initialise and draw differently."""
    names = {name: version(name).partition("+")[0] for name in ("torch", "torchvision", "timm", "numpy", "pillow")}
    return {**names, "mkl": torch.backends.mkl.is_available()}


# ---------------------------------------------------------------- tests
@pytest.fixture(scope="module")
def golden() -> dict[str, list[float]]:
    kept = json.loads(FILE.read_text())
    if kept["made_with"] != made_with():
        pytest.skip(f"{FILE.name} was made with {kept['made_with']}, here is {made_with()}")
    return kept["losses"]


@pytest.mark.parametrize("model", every(3, RUNS))
def test_the_first_losses_are_those_kept(model, golden):
    losses = losses_of(model)
    assert deviation(losses, golden[model]) < TOLERANCE, \
        f"{losses}: if the training is meant to change, `python tests/test_golden.py` writes {FILE.name} anew"


def late(monkeypatch) -> None:
    """The schedule is one update behind."""
    build_state = program.build_state

    def shifted(*args):
        state = build_state(*args)
        step_update = state.scheduler.step_update
        state.scheduler.step_update = lambda update, *more: step_update(max(0, update - 1), *more)
        return state
    monkeypatch.setattr(program, "build_state", shifted)


@pytest.mark.slow
@pytest.mark.parametrize("change", every(4, ["--lr 1.001e-3", "--seed 1", "--reprob 0", late]))
def test_a_small_change_is_noticed(change, golden, monkeypatch):
    more = change.split() if isinstance(change, str) else change(monkeypatch) or ()
    model, steps = "vit_nano_patch8_32_GKAN", 6
    assert deviation(losses_of(model, *more, steps=steps), golden[model][:steps]) > 3 * TOLERANCE


# ---------------------------------------------------------------- the file
def write() -> None:
    FILE.write_text(json.dumps({"command": "python tests/test_golden.py", "made_with": made_with(),
                                "losses": {model: losses_of(model) for model in RUNS}}, indent=1) + "\n")
    print(f"wrote {FILE}")


# What changes the rounding and nothing else: threads, variables of the environment, flags of the KANs.
ROUNDINGS = [(2, {}, ""), (1, {"ATEN_CPU_CAPABILITY": "default"}, ""), (1, {"MKL_CBWR": "COMPATIBLE"}, ""),
             (1, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, ""), (1, {}, "--kan-backend cpu")]


def spread() -> None:
    """Print how far the losses are from those kept, for each way of rounding, in processes of their own."""
    kept = json.loads(FILE.read_text())["losses"]
    for threads, environment, flags in ROUNDINGS:
        for model in RUNS:
            if flags and model.endswith("_ViT"):
                continue
            code = ("import json, test_golden; "
                    f"print(json.dumps(test_golden.losses_of({model!r}, *{flags.split()}, threads={threads})))")
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={
                **os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment})
            print(f"{threads} thread(s) {environment} {flags:18} {model}: "
                  f"{deviation(json.loads(done.stdout), kept[model]):.1e}", flush=True)


if __name__ == "__main__":
    spread() if sys.argv[1:] == ["--spread"] else write()
