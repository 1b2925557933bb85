"""Several processes: gloo on CPUs, started by torchrun itself or with the variables that it sets."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from e2e import ALIKE, QUICK, Run, checkpoint, close, evaluation, finish, free_port, launch, log, run
from helpers import NANO, ROOT, differences, every

import engine
import main as program
from vision_kan.common.errors import EXIT_FAILED, EXIT_PREEMPTED

slow = pytest.mark.slow


def torchrun(*argv, options: tuple = (), cwd: Path | None = None, script: Path = ROOT / "main.py") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, options), str(script), *map(str, argv)],
                            cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def close_logs(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b):
        for key in one:
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


# ---------------------------------------------------------------- training
def weights_of_each_process(argv: list[str]) -> int:
    """The program, and the weights of each process after it beside the output folder."""
    real = engine.train_one_epoch

    def train_one_epoch(training, loader, hooks):
        result = real(training, loader, hooks)
        state, process = training.state, training.process
        folder = Path(argv[argv.index("--output_dir") + 1]).parent
        torch.save({"model": state.model.state_dict(), "model_ema": state.ema.module.state_dict()},
                   folder / f"rank{process.rank}.pth")
        return result

    engine.train_one_epoch = train_one_epoch
    return program.main(argv)


@slow
def test_torchrun_of_two_equals_one_process_of_twice_the_batch(data, tmp_path):
    flags = (*QUICK, *ALIKE, "--epochs", 2, "--data-path", data)
    both = torchrun(*flags, "--batch-size", 8, "--output_dir", tmp_path / "two", options=(
        "--nproc_per_node=2", f"--master_port={free_port()}"), cwd=tmp_path)
    assert run(*flags, "--batch-size", 16, "--output_dir", tmp_path / "one") == 0
    out, err = both.communicate(timeout=200)
    assert both.returncode == 0, err
    assert out.count("\nmodel: top-1") == out.count("\nmodel_ema: top-1") == 2      # the first process alone speaks
    assert "2 process(es)" in out and "for 16 images an update" in out
    assert "Traceback" not in err and "error" not in err
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    close(one, two)
    close_logs(log(tmp_path / "one"), log(tmp_path / "two"))
    before = checkpoint(tmp_path / "one", "checkpoint_previous.pth")["model"]
    assert max((one["model"][key] - before[key]).abs().max() for key in before) > 0.01      # there was much to differ in


@pytest.mark.parametrize("model", [pytest.param(NANO, marks=slow), "vit_nano_patch8_32_GKAN"])
def test_the_processes_agree_on_the_weights(model, data, tmp_path):
    out = finish(launch(tmp_path, *QUICK, "--epochs", 1, "--data-path", data, "--batch-size", 8, "--repeated-aug",
                        "--drop", 0.1, "--lr", 0.1, "--model", model, "--output_dir", tmp_path / "out",
                        call=weights_of_each_process))
    assert out[1] == "" and "model: top-1" in out[0]
    ranks = [checkpoint(tmp_path, f"rank{rank}.pth") for rank in (0, 1)]
    assert not differences(*ranks)
    saved = checkpoint(tmp_path / "out")
    assert not differences(ranks[0], {key: saved[key] for key in ranks[0]})
    learned = [value for key, value in saved["model"].items() if key.endswith(".coefficients")]
    assert len(learned) == (8 if model.endswith("_GKAN") else 0) and all(value.abs().min() > 0 for value in learned)


@slow
@pytest.mark.parametrize("model", [pytest.param(NANO, marks=slow), "vit_nano_patch8_32_GKAN"])
def test_accumulating_gradients_in_two_processes(model, data, tmp_path):
    flags = (*QUICK, *ALIKE, "--epochs", 1, "--data-path", data, "--model", model)
    runs = launch(tmp_path, *flags, "--batch-size", 4, "--grad-accum", 2, "--output_dir", tmp_path / "two")
    assert run(*flags, "--batch-size", 16, "--output_dir", tmp_path / "one") == 0
    finish(runs)
    close(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"))


@slow
def test_the_rate_grows_with_the_processes(data, tmp_path):
    flags = (*QUICK, "--epochs", 1, "--data-path", data, "--lr", 0.01, "--batch-size", 8)
    runs = launch(tmp_path, *flags, "--output_dir", tmp_path / "two")
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    finish(runs)
    one, two = log(tmp_path / "one")[0]["train_lr"], log(tmp_path / "two")[0]["train_lr"]
    assert one == pytest.approx(0.01 * 8 / 512) and two == pytest.approx(2 * one)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": timm.create_model(NANO, num_classes=3).state_dict()}, path)
    return path


DISTILLED = "--model deit_tiny_distilled_patch16_224_KAN --input-size 32 --hdim_kan 8"


@slow
@pytest.mark.parametrize("flags", [
    f"{DISTILLED} --distillation-type hard --teacher-model {NANO} --teacher-path {{teacher}}",
    "--attn-only", DISTILLED, "--cosub --grad-accum 2", "--grad-checkpointing", "--grad-checkpointing --attn-only",
    "--model resnet18 --input-size 32", "--no-train-mode", "--amp-dtype bfloat16 --clip-grad 1", "--no-model-ema",
    "--model-ema-force-cpu --kan-trainable-grid --kan-trainable-h", "--sched plateau --bce-loss",
    "--layer-decay 0.7 --opt lamb", "--model vit_nano_patch8_32_ViT --num_workers 1"])
def test_ways_of_training_in_two_processes(flags, data, teacher, tmp_path):
    out = finish(launch(tmp_path, *QUICK, "--epochs", 2, "--data-path", data, "--batch-size", 8, "--dist-eval",
                        *flags.format(teacher=teacher).split()))
    assert out[0].count("\nmodel: top-1") == 2 and out[1] == ""


def loss_of_the_second_is_nan(argv: list[str]) -> int:
    real = program.build_criterion

    def build_criterion(*args):
        criterion = real(*args)
        if os.environ["RANK"] == "1":
            forward = criterion.forward
            criterion.forward = lambda *inputs: forward(*inputs) * float("nan")
        return criterion

    program.build_criterion = build_criterion
    return program.main(argv)


def test_a_loss_that_is_not_finite_on_one_process_ends_both(data, tmp_path):
    # an epoch of one step: the loss of the first process is still finite, its weights are not any more
    runs = launch(tmp_path, *QUICK, "--epochs", 2, "--data-path", data, "--batch-size", 24, "--output_dir", tmp_path / "out",
                  call=loss_of_the_second_is_nan)
    finish(runs, code=1)
    for process in runs:
        assert process.err.read_text().startswith("stopped: the loss became nan")
    assert not (tmp_path / "out/checkpoint.pth").exists()


# ---------------------------------------------------------------- evaluation
@pytest.mark.parametrize("images", every(4, [7, 8, 9, 1]))
def test_evaluation_is_exact_for_any_number_of_images(images, data, tmp_path, capsys):
    """Also where the second process has none."""
    folder = tmp_path / "data"
    for number, path in enumerate(sorted((data / "val").rglob("*.png"))[::2][:images]):
        place = folder / "val" / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{number}.png")
    torch.manual_seed(0)
    names = sorted(path.name for path in (data / "train").iterdir())
    model, ema = (timm.create_model(NANO, num_classes=3).state_dict() for _ in range(2))
    torch.save({"model": model, "model_ema": ema, "args": {"model": NANO}, "class_names": names,
                "model_args": {"name": NANO, "kwargs": {"num_classes": 3, "img_size": 32}}}, tmp_path / "some.pth")
    flags = ("--eval", "--resume", tmp_path / "some.pth", "--data-path", folder, "--device", "cpu", "--num_workers", 0,
             "--batch-size", 2)
    runs = launch(tmp_path, *flags, "--dist-eval")
    assert run(*flags) == 0
    expected = evaluation(capsys.readouterr().out)
    assert expected.keys() == {"model", "model_ema"} and {line[2] for line in expected.values()} == {images}
    out = finish(runs)
    assert evaluation(out[0]) == expected and out[1] == ""


@slow
def test_unreadable_images_are_counted_over_both_processes(data, tmp_path):
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    broken = [sorted((copy / "val/digit0").iterdir())[0], *sorted((copy / "val/digit1").iterdir())[:2]]
    for path in broken:
        path.write_bytes(b"no picture")
    flags = (*QUICK, *ALIKE, "--epochs", 1, "--data-path", copy, "--max-unreadable", 0.5)
    runs = launch(tmp_path, *flags, "--batch-size", 8, "--output_dir", tmp_path / "two")
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    finish(runs)
    assert log(tmp_path / "two")[0]["test_unreadable"] == 3 and log(tmp_path / "two")[0]["test_images"] == 21
    close_logs(log(tmp_path / "one"), log(tmp_path / "two"))
    said = "".join(process.err.read_text() for process in runs)
    assert [said.count(f"unreadable image: {path} ") for path in broken] == [1, 1, 1]


@slow
def test_evaluation_without_sharing_is_the_same(data, tmp_path):
    flags = (*QUICK, *ALIKE, "--epochs", 1, "--data-path", data, "--batch-size", 8)
    for name, more in (("shared", ()), ("alone", ("--no-dist-eval",))):
        finish(launch(tmp_path, *flags, *more, "--output_dir", tmp_path / name))
    close_logs(log(tmp_path / "shared"), log(tmp_path / "alone"))


# ---------------------------------------------------------------- resuming
def wait_for(path: Path, runs: list[Run], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and all(run.process.is_alive() for run in runs), [
            run.out.read_text() + run.err.read_text() for run in runs]
        time.sleep(0.01)


STATE = ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch", "max_accuracy", "max_accuracy_ema")


@slow
def test_killed_in_two_processes_and_resumed_equals_uninterrupted(data, tmp_path):
    flags = (*QUICK, "--epochs", 4, "--data-path", data, "--batch-size", 8, "--lr", 0.1, "--repeated-aug", "--drop", 0.1,
             "--resume", "auto", "--output_dir")
    finish(launch(tmp_path, *flags, tmp_path / "whole"))
    runs = launch(tmp_path, *flags, tmp_path / "parts")
    wait_for(tmp_path / "parts/checkpoint_previous.pth", runs)      # two epochs are saved
    for process in runs:
        process.kill()
    out = finish(launch(tmp_path, *flags, tmp_path / "parts"))
    assert "resumed from" in out[0]
    whole, parts = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert not differences({key: whole[key] for key in STATE}, {key: parts[key] for key in STATE})
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_the_number_of_processes_may_change_on_resume(data, tmp_path):
    flags = (*QUICK, *ALIKE, "--data-path", data, "--sched", "step", "--resume", "auto")
    assert run(*flags, "--epochs", 2, "--output_dir", tmp_path / "whole") == 0
    assert run(*flags, "--epochs", 1, "--output_dir", tmp_path / "parts") == 0
    finish(launch(tmp_path, *flags, "--epochs", 2, "--batch-size", 8, "--output_dir", tmp_path / "parts"))
    close(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


# ---------------------------------------------------------------- several nodes
@slow
def test_two_launches_meet_as_two_nodes(data, tmp_path):
    flags = (*QUICK, *ALIKE, "--epochs", 2, "--data-path", data)
    port = free_port()
    nodes = [torchrun(*flags, "--batch-size", 8, "--output_dir", tmp_path / "two", options=(
        "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"))
        for rank in (0, 1)]
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    outputs = [node.communicate(timeout=250) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert outputs[0][0].count("\nmodel: top-1") == 2 and outputs[1][0] == ""
    close(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"))


# ---------------------------------------------------------------- bad input
def errors(runs: list[Run]) -> list[str]:
    """The one sentence of each process, all of which end with exit code 2."""
    finish(runs, code=2, timeout=60)
    texts = [process.err.read_text() for process in runs]
    assert all(text.startswith("error: ") and text.count("\n") == 1 for text in texts), texts
    return texts


@slow
def test_the_launch_must_match_what_is_asked_for(data, tmp_path, capsys):
    flags = (*QUICK, "--epochs", 1, "--data-path", data)
    for text in errors(launch(tmp_path, *flags, "--world_size", 4)):
        assert "--world_size 4" in text and "2 process(es)" in text
    assert run(*flags, "--world_size", 4) == 2
    assert "--nproc_per_node=4" in capsys.readouterr().err
    assert run(*flags, "--distributed") == 2
    assert "--distributed" in capsys.readouterr().err
    assert "2 process(es)" in finish(launch(tmp_path, *flags, "--world_size", 2, "--distributed", "--batch-size", 8))[0]


def test_bad_input_ends_both_at_once(data, tmp_path):
    flags = (*QUICK, "--epochs", 1)
    for text in errors(launch(tmp_path, *flags, "--data-path", tmp_path / "absent")):
        assert "--data-path" in text
    for text in errors(launch(tmp_path, *flags, "--data-path", data, "--resume", tmp_path / "absent.pth")):
        assert "absent.pth" in text
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pth").touch()
    for text in errors(launch(tmp_path, *flags, "--data-path", data, "--output_dir", out)):
        assert "holds a run already" in text
    (tmp_path / "file").touch()
    for text in errors(launch(tmp_path, *flags, "--data-path", data, "--output_dir", tmp_path / "file")):
        assert "--output_dir" in text


def test_what_is_wrong_on_one_machine_ends_all(data, tmp_path):
    """Only the first process sees the folder or the checkpoint: it says so too."""
    flags = (*QUICK, "--epochs", 1, "--data-path", data)
    for text in errors(launch(tmp_path, *flags, own={1: ("--data-path", tmp_path / "absent")})):
        assert "--data-path" in text and "absent" in text
    torch.save({"model": timm.create_model(NANO, num_classes=3).state_dict()}, tmp_path / "there.pth")
    for text in errors(launch(tmp_path, *flags, "--finetune", tmp_path / "there.pth",
                              own={1: ("--finetune", tmp_path / "absent.pth")})):
        assert "absent.pth" in text


@slow
def test_torchrun_ends_soon_after_bad_input(tmp_path):
    started = time.monotonic()
    both = torchrun(*QUICK, "--data-path", tmp_path / "absent", options=(
        "--nproc_per_node=2", f"--master_port={free_port()}"))
    out, err = both.communicate(timeout=120)
    assert both.returncode == 1 and re.search(r"exitcode\s*: 2", err)
    assert "error: --data-path" in err and time.monotonic() - started < 100


@slow
def test_a_process_that_is_killed_takes_torchrun_down(data, tmp_path):
    both = torchrun(*QUICK, "--data-path", data, "--epochs", 100000, "--batch-size", 8, "--output_dir", tmp_path / "out",
                    options=("--nproc_per_node=2", f"--master_port={free_port()}"))
    end = time.monotonic() + 120
    while not (tmp_path / "out/checkpoint.pth").exists():
        assert time.monotonic() < end and both.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    both.communicate(timeout=120)
    assert both.returncode == 1
    assert checkpoint(tmp_path / "out")["epoch"] >= 0


# ---------------------------------------------------------------- stopped, hung, restarted
def sent_to_rank_1_at(where: str, what: str):
    """The program; process 1 gets `what` when it marks that it reaches `where`."""
    def call(argv: list[str]) -> int:
        from vision_kan.common import peers
        real, out = peers.progress, Path(argv[argv.index("--output_dir") + 1])

        def mark(doing: str) -> None:
            real(doing)
            if doing == where and os.environ["RANK"] == "1" and not (out / "done").exists():
                (out / "done").touch()
                time.sleep(40) if what == "hang" else os.kill(os.getpid(), getattr(signal, what))

        peers.progress = mark
        return program.main(argv)
    return call


def stop_in_the_middle(argv: list[str]) -> int:
    return sent_to_rank_1_at("the update of step 2 of epoch 1", "SIGTERM")(argv)


def kill_in_the_middle(argv: list[str]) -> int:
    return sent_to_rank_1_at("the backward pass of step 2 of epoch 1", "SIGKILL")(argv)


def hang_in_the_middle(argv: list[str]) -> int:
    return sent_to_rank_1_at("the forward pass of step 2 of epoch 1", "hang")(argv)


def stop_in_the_evaluation(argv: list[str]) -> int:
    return sent_to_rank_1_at("a batch of the evaluation (test)", "SIGUSR2")(argv)


MIDDLE = (*QUICK, "--epochs", 2, "--batch-size", 8, "--lr", 0.1, "--repeated-aug", "--drop", 0.1, "--dist-eval",
          "--save-interval-steps", 1, "--dist-timeout", 4)


@pytest.fixture(scope="module")
def left_in_peace(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("peace")
    finish(launch(out, *MIDDLE, "--data-path", data, "--output_dir", out / "out"))
    return out / "out"


@pytest.mark.parametrize("call, code, text", [
    (stop_in_the_middle, EXIT_PREEMPTED, "SIGTERM: saved"),
    pytest.param(stop_in_the_evaluation, EXIT_PREEMPTED, "SIGUSR2: saved", marks=slow),
    pytest.param(kill_in_the_middle, EXIT_FAILED, "process 1", marks=slow),
    pytest.param(hang_in_the_middle, EXIT_FAILED, "process 1", marks=slow)])
def test_what_happens_to_one_process_stops_both_and_a_resume_is_exact(call, code, text, left_in_peace, data, tmp_path):
    out = tmp_path / "out"
    runs = launch(tmp_path, *MIDDLE, "--data-path", data, "--output_dir", out, call=call)
    start = time.monotonic()
    codes = [run.wait() for run in runs]
    assert codes[0] == code and codes[1] in (code, -signal.SIGKILL) and time.monotonic() - start < 40
    assert text in runs[0].err.read_text() and "Traceback" not in runs[0].err.read_text()
    told = json.loads((out / "status.json").read_text())
    assert told["state"] == ("preempted" if code == EXIT_PREEMPTED else "failed") and text in told["reason"]
    assert told["exit_code"] == code
    finish(launch(tmp_path, *MIDDLE, "--data-path", data, "--resume", "auto", "--output_dir", out))
    whole, parts = checkpoint(left_in_peace), checkpoint(out)
    assert not differences({key: whole[key] for key in STATE}, {key: parts[key] for key in STATE})
    assert log(left_in_peace) == log(out)


@slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_the_number_of_processes_may_change_in_the_middle_of_an_epoch(before, after, data, tmp_path):
    """Without mixup and dropout nothing but rounding changes by that, where the batches stay the same in all."""
    def flags(processes: int) -> tuple:
        return (*QUICK, *ALIKE, "--data-path", data, "--sched", "step", "--epochs", 2, "--batch-size", 16 // processes)

    assert run(*flags(1), "--output_dir", tmp_path / "whole") == 0
    out = tmp_path / "parts"
    calls = launch(tmp_path, *flags(before), "--output_dir", out, processes=before,
                   call=stop_in_the_middle if before == 2 else stop_alone)
    finish(calls, EXIT_PREEMPTED)
    assert checkpoint(out)["position"] == 32
    again = launch(tmp_path, *flags(after), "--resume", "auto", "--output_dir", out, processes=after)
    finish(again)
    close(checkpoint(tmp_path / "whole"), checkpoint(out))
    assert "continues at image 32 with different batches" in again[0].err.read_text()


def stop_alone(argv: list[str]) -> int:
    from vision_kan.common import peers
    peers.progress = lambda doing: os.kill(os.getpid(), signal.SIGTERM) if doing == "the update of step 2 of epoch 1" else None
    return program.main(argv)


@slow
def test_torchrun_restarts_what_was_killed_and_the_run_is_exact(left_in_peace, data, tmp_path):
    script = tmp_path / "killed_once.py"
    script.write_text(f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
                      "import test_distributed as t\nsys.exit(t.kill_in_the_middle(sys.argv[1:]))\n")
    out = tmp_path / "out"
    both = torchrun(*MIDDLE, "--data-path", data, "--resume", "auto", "--output_dir", out, script=script, options=(
        "--nproc_per_node=2", "--max-restarts=3", f"--master_port={free_port()}"))
    _, err = both.communicate(timeout=200)
    assert both.returncode == 0, err
    assert (out / "done").exists()
    whole, parts = checkpoint(left_in_peace), checkpoint(out)
    assert not differences({key: whole[key] for key in STATE}, {key: parts[key] for key in STATE})
    assert log(left_in_peace) == log(out) and json.loads((out / "status.json").read_text())["state"] == "finished"
