"""Ctrl-C during the imports and in a tool, output that cannot show a name, output that nobody reads."""
import functools
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from e2e import QUICK, Run, checkpoint, command_line, log, write_digits
from helpers import ROOT, wait_for

import engine
import main as program
from tools import evaluate, inspect_kan, predict, runs
from vision_kan.common import console, peers
from vision_kan.common.interruption import Interruption

TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
PROGRAMS = [ROOT / "main.py", ROOT / "run_with_submitit.py", *TOOLS]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# A module that stands for one whose import takes long, in the place of the real one.
SLOW = "import pathlib, time\npathlib.Path({file!r}).touch()\ntime.sleep(100)\n"


# ---------------------------------------------------------------- Ctrl-C
@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: path.stem)
def test_interrupted_while_it_imports(script, tmp_path):
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("torch", "matplotlib", "huggingface_hub", "timm"):
        (modules / f"{name}.py").write_text(SLOW.format(file=str(tmp_path / "importing")))
    process = subprocess.Popen([sys.executable, "-c", "import signal, runpy, sys; signal.signal(signal.SIGINT, "
                                "signal.default_int_handler); del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')",
                                str(script)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**ENVIRONMENT, "PYTHONPATH": f"{modules}:{ROOT}"})
    try:
        wait_for(tmp_path / "importing")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "stopped: interrupted\n")


@pytest.mark.parametrize("words, code, told", [
    (["--help"], 0, "--batch-size"), (["--modle", "x"], 2, "unknown flag --modle: did you mean --model?"),
    (["--epochs", "0"], 2, "--epochs 0 must be from 1 to 1000000"), (["--sched", "cosin"], 2, "did you mean cosine?"),
    (["--config", "nowhere.yaml"], 2, "there is no such file"), (["--world_size", "4"], 2, "torchrun --nproc_per_node=4")])
def test_what_needs_no_torch_is_answered_before_it_is_imported(words, code, told, tmp_path):
    for name in ("torch", "timm", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *words], capture_output=True, text=True, timeout=60,
                          env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == code and told in (done.stderr if code else done.stdout) and "imported" not in done.stderr
    assert done.stderr.startswith("error: ") == bool(code) and "Traceback" not in done.stderr


LACKS = (rf"error: {re.escape(sys.executable)} has no module %s: take the Python of .venv, which `make venv` sets up, or install "
         r"requirements\.txt\n")


@pytest.mark.parametrize("script", [*PROGRAMS, ROOT / "benchmarks" / "accuracy.py"], ids=lambda path: path.stem)
def test_a_python_without_the_packages_is_told_where_they_are(script):
    done = subprocess.run([sys.executable, "-E", "-S", str(script), "--list-models"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(LACKS % r"\w+", done.stderr)


def test_a_python_without_torch_alone_is_told_where_it_is(tmp_path):
    (tmp_path / "torch.py").write_text("import absent\n")
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), "--list-models"], capture_output=True, text=True, timeout=60,
                          env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and re.fullmatch(LACKS % "absent", done.stderr)


def test_a_program_that_imports_another_keeps_its_handler():
    handler = signal.getsignal(signal.SIGINT)
    console.starting("main")
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_after_the_end_leaves_the_exit_code():
    script = ("import atexit, os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "from vision_kan.common import console\n"
              "console.starting('__main__')\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
              "sys.exit(console.guarded(lambda: 75))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_an_interrupt_in_a_tool_says_nothing_of_a_training(capsys):
    def tool():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # ignored where the tests run in the background
    try:
        assert peers.exit_code(tool) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "stopped: interrupted\n"


def test_an_interruption_leaves_no_thread_and_no_descriptor():
    import threading
    before = threading.active_count(), len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for _ in range(3):
        with Interruption(speaks=False) as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert interruption.signal == signal.SIGTERM
    assert before == (threading.active_count(), len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0)


# ---------------------------------------------------------------- names that the output cannot show
NAMES = ["猫", "żółw", "café 🐈"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on classes whose names no 8-bit encoding has, and its data."""
    folder = tmp_path_factory.mktemp("names")
    data = write_digits(folder / "データ", names=NAMES, train=8, val=4)
    assert program.main([*QUICK, "--batch-size", "12", "--epochs", "1", "--data-path", str(data), "--output_dir",
                         str(folder / "läufe")]) == 0
    return folder / "läufe", data


def printed(main, *words, encoding: str = "cp1252") -> str:
    """What a tool prints where its output has this encoding."""
    raw, before = io.BytesIO(), sys.stdout
    sys.stdout = stream = io.TextIOWrapper(raw, encoding=encoding)
    try:
        assert main([str(word) for word in words]) == 0
    finally:
        sys.stdout = before
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.slow
def test_a_training_whose_names_the_output_lacks(run, tmp_path):
    out = tmp_path / "läufe"
    done = command_line(*QUICK, "--batch-size", "12", "--epochs", "1", "--data-path", run[1], "--output_dir", out, "--log-kan",
                        "1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(checkpoint(out)["class_names"]) == sorted(NAMES) and len(log(out)) == 1
    assert "データ" in (out / "args.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_sentence_on_a_name_that_the_output_lacks(tmp_path):
    done = command_line("--data-path", tmp_path / "猫", PYTHONIOENCODING="cp1252")
    assert done.returncode == 2 and r"\u732b" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Glyph")
def test_tools_whose_names_the_output_lacks(run):
    out, data = run
    given = out / "checkpoint.pth", "--device", "cpu"
    table = printed(predict.main, *given, data / "val")
    assert r"\u732b" in table and r"caf\u00e9" not in table and r"café \ud83d\udc08" in table
    for tool in (evaluate, inspect_kan):
        printed(tool.main, *given, "--data-path", data, "--output", out / "report")
    report = (out / "report/report.json").read_text(encoding="utf-8")
    assert {row["name"] for row in json.loads(report)["classes"]} == set(NAMES)
    assert set(re.findall("|".join(NAMES), (out / "report/classes.csv").read_text(encoding="utf-8"))) == set(NAMES)
    assert "l\\u00e4ufe" in printed(runs.main, out, encoding="ascii")


def test_json_stays_json_and_bytes_that_are_no_text_are_shown():
    shown = ["猫 🐈", os.fsdecode(b"caf\xe9.png")]
    program = functools.partial(peers.exit_code, lambda: print(json.dumps(shown, ensure_ascii=False)) or 0)
    assert json.loads(printed(lambda _: program(), encoding="ascii")) == shown


# ---------------------------------------------------------------- output that nobody reads
def unread(script: str, *words, unbuffered: bool = False, into: str = "stdout") -> tuple[int, bytes]:
    """Exit code and what came on the other stream of a program whose output is a pipe that is closed already."""
    receiver, sender = os.pipe()
    os.close(receiver)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, into: sender}
    process = subprocess.Popen([sys.executable, *(["-u"] if unbuffered else []), str(ROOT / script), *map(str, words)],
                               env=ENVIRONMENT, **streams)
    os.close(sender)
    said = process.communicate(timeout=200)[0 if into == "stderr" else 1]
    return process.returncode, said


@pytest.mark.parametrize("script, words, code", [
    pytest.param("main.py", ["--list-models"], 141, marks=pytest.mark.slow), ("main.py", ["--help"], None),
    ("tools/runs.py", ["RUN"], 141),
    pytest.param("tools/predict.py", ["RUN/checkpoint.pth", "DATA", "--device", "cpu"], 141, marks=pytest.mark.slow)], ids=str)
def test_a_reader_that_has_left(script, words, code, run):
    words = [word.replace("RUN", str(run[0])).replace("DATA", str(run[1])) for word in words]
    ended, err = unread(script, *words, unbuffered=code is None)
    assert ended in ((141, 0) if code is None else (code,)) and b"rror" not in err and b"Traceback" not in err


def test_an_error_that_nobody_reads():
    assert unread("main.py", "--modle", "x", into="stderr") in ((2, b""), (141, b""))


@pytest.mark.slow
def test_a_training_that_nobody_reads_is_saved(run, tmp_path):
    """Not lost: `| tee` dies of the same Ctrl-C that the training stops for."""
    process = Run(tmp_path, *QUICK, "--batch-size", "12", "--epochs", 1000, "--print-freq", 1, "--data-path", run[1],
                  "--output_dir", tmp_path / "out", call=without_reader)
    assert process.wait() == 141
    assert process.err.read_text() == ""
    told, saved = json.loads((tmp_path / "out/status.json").read_text()), checkpoint(tmp_path / "out")
    assert (told["state"], told["exit_code"]) == ("preempted", 141) and told["reason"].startswith("SIGPIPE: saved")
    assert (saved["epoch"] + 1, saved["step"]) == (told["epoch"], told["step"]) and saved["step"] > 0


def without_reader(argv: list[str]) -> int:
    """The program, whose reader leaves once it trains."""
    receiver, sender = os.pipe()
    sys.stdout = os.fdopen(sender, "w")
    real = engine.train_one_epoch

    def train(*args, **kwargs):
        os.close(receiver)
        return real(*args, **kwargs)

    engine.train_one_epoch = train
    return program.main(argv)


def test_an_interrupted_training_is_saved_though_its_reader_has_left(run, tmp_path):
    process = Run(tmp_path, *QUICK, "--batch-size", "12", "--epochs", 1000, "--print-freq", 1, "--data-path", run[1],
                  "--output_dir", tmp_path / "out", call=interrupted_without_reader)
    assert process.wait() == 75
    assert json.loads((tmp_path / "out/status.json").read_text())["reason"].startswith("SIGINT: saved")
    assert torch.is_tensor(checkpoint(tmp_path / "out")["model"]["head.weight"])


def interrupted_without_reader(argv: list[str]) -> int:
    def mark(doing: str) -> None:
        if doing == "the update of step 1 of epoch 0":
            os.kill(os.getpid(), signal.SIGINT)
            receiver, sender = os.pipe()
            os.close(receiver)
            os.dup2(sender, 1)
            os.dup2(sender, 2)
            os.close(sender)

    peers.progress = mark
    return program.main(argv)


# ---------------------------------------------------------------- arguments of tools
NEEDED = {"compare": "--ffn", "convert": "SOURCE, TARGET, --model", "evaluate": "CHECKPOINT", "export": "CHECKPOINT, TARGET",
          "inspect_kan": "CHECKPOINT", "plot_run": "FOLDER", "predict": "CHECKPOINT, IMAGE|FOLDER",
          "prune": "CHECKPOINT, TARGET, --what", "push_to_hub": "FOLDER, USER/NAME", "runs": "FOLDER", "ship": "CHECKPOINT, TAG",
          "symbolic": "CHECKPOINT"}


@pytest.mark.parametrize("name", NEEDED)
def test_a_tool_without_its_arguments_says_which(name, capsys):
    tool = importlib.import_module(f"tools.{name}")
    assert tool.main([]) == 2
    assert capsys.readouterr() == ("", f"error: missing on the command line: {NEEDED[name]} (see {name}.py --help)\n")


@pytest.mark.parametrize("name", [*NEEDED, "quickstart"])
def test_a_mistyped_flag_of_a_tool(name, capsys):
    given = {"--model": ["--model", "m"], "--ffn": ["--ffn", "mlp"], "--what": ["--what", "hidden", "--curve"],
             "TAG": ["digits"], "": []}
    words = [word for needed in NEEDED.get(name, "").split(", ") for word in given.get(needed, ["x"])]
    tool = importlib.import_module(f"tools.{name}")
    assert tool.main([*words, "--no-such-flag"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: unknown flag --no-such-flag") and err.count("\n") == 1


@pytest.mark.parametrize("words, sentence", [
    ("quickstart --epochs 0", "--epochs 0 must be at least 1"),
    ("quickstart --epochs 1.5", "--epochs: '1.5' is not a whole number"),
    ("prune a b --what hidden --max-loss x", "--max-loss: 'x' is not a number"),
    ("prune a b --what hidden", "give one of --keep-parameters, --max-loss, --curve (see prune.py --help)"),
    ("prune a b --what hidden --max-loss 1 --curve", "--curve cannot be combined with --max-loss")])
def test_wrong_values_of_a_tool(words, sentence, capsys):
    name, *argv = words.split()
    assert importlib.import_module(f"tools.{name}").main(argv) == 2
    assert capsys.readouterr() == ("", f"error: {sentence}\n")


def test_what_memory_cannot_hold_is_one_sentence(capsys):
    assert console.exit_code(lambda: len(torch.empty(2 ** 46))) == console.EXIT_FAILED
    assert capsys.readouterr().err == (
        "stopped: out of memory: lower --batch-size (and raise --grad-accum), or take a smaller --model\n")
