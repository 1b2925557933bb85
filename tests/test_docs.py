"""Every command in README.md and docs/ is run: on small images and models; what needs GPUs, a cluster or hours, and benchmarks,
as a dry run that checks the flags; of make, that there is the target. Links lead somewhere, Python blocks run."""
import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from e2e import QUICK, run, write_digits
from helpers import ROOT, every
from torch.distributed.run import get_args_parser as torchrun_parser

import run_with_submitit
from vision_kan.config.checks import validate
from vision_kan.config.flag import Flag
from vision_kan.config.flags import FLAGS, GROUPS, get_args_parser
from vision_kan.config.parser import Parser
from vision_kan.config.resolve import parse_args

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# What is shown and not run here: they make or want an environment, or a program of others.
SHOWN = ("python3 -m venv ", "pip install ", "tensorboard --logdir ", "source .venv/bin/activate")
# Pages whose blocks other tests run from the first to the last, with what they need around them.
ELSEWHERE = {"export.md": "test_export.py", "library.md": "test_library.py"}
# Appended to a training or an evaluation, so that it takes a second.
SMALL = ("--device", "cpu", "--num_workers", "0", "--batch-size", "4")
SHORT = ("--epochs", "1", "--warmup-epochs", "0", "--data-set", "FOLDER", "--no-download", "--input-size", "32")


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, content) of the fenced blocks in that language."""
    return [(page.name, content) for page in PAGES if page.name not in ELSEWHERE
            for tag, content in FENCE.findall(page.read_text()) if tag == language]


def commands() -> list[tuple[str, str]]:
    """(page, command), each once; comments left out, lines that go on joined."""
    lines = {}
    for page, content in blocks(""):
        for line in content.replace("\\\n", " ").splitlines():
            line = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            if line and not line.startswith(SHOWN):
                lines.setdefault(line, page)
    return [(page, line) for line, page in lines.items()]


# ---------------------------------------------------------------- what the placeholders stand for
@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> dict[str, str]:
    """Placeholder -> a file or folder."""
    folder = tmp_path_factory.mktemp("ground")
    data = write_digits(folder / "data", train=12, val=6)
    runs = {}
    for suffix in ("GKAN", "KAN"):
        output = folder / "runs" / suffix
        few = ("--kan-groups", 1) if suffix == "GKAN" else ()       # formulas take a third of a second each
        assert run(*QUICK, "--model", f"vit_nano_patch8_32_{suffix}", "--data-path", data, "--epochs", 1, *few,
                   "--output_dir", output) == 0
        runs[suffix] = output / "checkpoint.pth"
    deit = folder / "deit.pth"
    torch.save({"model": timm.create_model("vit_nano_patch8_32_ViT", num_classes=3).state_dict()}, deit)
    image = next((data / "val").rglob("*.png"))
    own = folder / "own"        # class folders alone
    write_digits(folder / "halves", train=12, val=0)
    (folder / "halves" / "train").rename(own)
    return {"DIR": str(data), "IMAGES": str(data / "val"), "IMAGE": str(image), "CHECKPOINT": str(runs["GKAN"]),
            "OTHER": str(runs["KAN"]), "FILE": str(deit), "FOLDER": str(own), "RUNS": str(folder / "runs"), "HOST": "localhost"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """A folder for the commands of a page, one after the other, where recipes/ and main.py are found."""
    @cache
    def folder(page: str) -> Path:
        place = tmp_path_factory.mktemp("page")
        for name in ("recipes", "Makefile", "main.py"):
            (place / name).symlink_to(ROOT / name)
        return place
    return folder


def filled(words: list[str], ground: dict[str, str]) -> list[str]:
    """The words with files and folders for placeholders; what is written goes to `out` (a run: to a folder of its own)."""
    found = []
    for before, word in zip(["", *words], words):
        if word == "FOLDER" and before == "--output_dir":
            word = f"run{len(list(Path().glob('run*')))}"
        elif word == "FOLDER" and before == "--output":
            word = "out"
        elif word == "FILE" and before in ("--csv", "--output"):
            word = "out.csv"
        elif before != "--data-set":
            word = ground.get(word, word.replace("FOLDER/", "out/"))
        found.append(word)
    return found


# ---------------------------------------------------------------- main.py
def small(words: list[str], ground: dict[str, str]) -> list[str]:
    """The words with a model that takes a second: the same feed-forward, fewer and narrower blocks."""
    config = parse_args(words)
    if config.args.list_models:
        return words
    extra = list(SMALL)
    if not config.args.eval:
        model = re.sub(r"^(deit|vit)_.*_(\w+)$", r"vit_nano_patch8_32_\2", config.args.model)
        extra += [*SHORT, "--model", model] + (["--finetune", ground["FILE"]] if config.args.finetune else [])
    return [*words, *extra]


def dry(words: list[str], processes: int = 1) -> None:
    config = parse_args(words)
    validate(config.args, processes)
    assert config.args.config is None or (ROOT / config.args.config).is_file()


def run_main(words: list[str], ground: dict[str, str]) -> None:
    assert run(*small(filled(words, ground), ground)) == 0


def run_torchrun(words: list[str], ground: dict[str, str]) -> None:
    launch = torchrun_parser().parse_args(words)
    assert launch.training_script == "main.py"
    dry(launch.training_script_args, int(launch.nproc_per_node) * int(launch.nnodes.split(":")[0]))


def run_submitit(words: list[str], ground: dict[str, str]) -> None:
    parser = Parser(parents=[get_args_parser(), run_with_submitit.get_launch_parser()])
    launch, given = run_with_submitit.get_launch_parser().parse_known_args(words)
    parser.parse_args(words)
    dry(given, launch.nodes * launch.ngpus)


def run_sbatch(words: list[str], ground: dict[str, str]) -> None:
    script = words.index("tools/slurm.sh")
    assert (ROOT / words[script]).is_file()
    dry(words[script + 1:])


# ---------------------------------------------------------------- tools and benchmarks
class Parsed(Exception):
    pass


def run_benchmark(name: str, words: list[str], ground: dict[str, str], monkeypatch) -> None:
    """Its command line alone: the measurement takes long."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    module = load("benchmarks", name)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *filled(words, ground)])
    with pytest.raises(Parsed):
        module.main()


@cache
def load(folder: str, name: str):
    for place in (ROOT / folder, ROOT):
        if str(place) not in sys.path:
            sys.path.append(str(place))
    return importlib.import_module(f"{folder}.{name}")


def run_tool(name: str, words: list[str], ground: dict[str, str]) -> None:
    # a conversion's tiny model becomes the nano one, whose MLP has 384 hidden units in place of 768
    words = [word.replace("deit_tiny_patch16_224", "vit_nano_patch8_32").replace("768", "384") for word in words]
    if name == "convert":
        ground = {**ground, "CHECKPOINT": ground["FILE"]}
    if name == "runs":
        ground = {**ground, "FOLDER": ground["RUNS"]}
    if name == "compare":
        words = [*words, "--seeds", "1", *SMALL, *SHORT, "--data-path", "DIR"]
    assert load("tools", name).main(filled(words, ground)) == 0


# Seconds each, and what reads their files. Most tests of these tools are run every time; of commands, the README's.
LONG = re.compile(r"tools/(compare|prune|symbolic|export|evaluate|inspect_kan)\.py|small\.pth|formulas\.safetensors|--track")


@pytest.mark.parametrize("page, command", [
    pytest.param(*each, marks=pytest.mark.slow if LONG.search(each[1]) or each[0] != "README.md" else ()) for each in commands()],
    ids=lambda value: value[:60])
def test_command(page, command, ground, folders, monkeypatch):
    monkeypatch.chdir(folders(page))
    if "--track" in command:
        pytest.importorskip("wandb"), pytest.importorskip("mlflow")
        for name, value in (("WANDB_MODE", "offline"), ("MLFLOW_ALLOW_FILE_STORE", "true"), ("MLFLOW_TRACKING_URI", "mlruns")):
            monkeypatch.setenv(name, value)
    words = shlex.split(command)
    program, rest = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
        assert set(word for word in rest if "=" not in word) <= set(targets)
    elif program == "torchrun":
        run_torchrun(rest, ground)
    elif program == "sbatch":
        run_sbatch(rest, ground)
    else:
        assert program in ("python", ".venv/bin/python"), f"{page}: no way to run {command}"
        script = Path(rest[0])
        if script.name == "main.py":
            run_main(rest[1:], ground)
        elif script.name == "run_with_submitit.py":
            run_submitit(rest[1:], ground)
        elif script.parts[0] == "tools" and script.stem != "quickstart":     # tests/test_quickstart.py has that
            run_tool(script.stem, rest[1:], ground)
        elif script.parts[0] == "benchmarks":
            run_benchmark(script.stem, rest[1:], ground, monkeypatch)
        else:
            assert (ROOT / script).is_file()


def test_there_are_commands():
    assert len(commands()) > 30 and {page for page, _ in commands()} >= {"README.md", "train.md", "clusters.md"}


# ---------------------------------------------------------------- links, pictures, Python
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(),
                                                                        flags=re.M | re.S)):
        if not target.startswith("https://"):
            to = page.parent / target if target else page
            assert to.exists() and (not heading or heading in anchors(to)), f"{page.name}: {target}#{heading}"


def anchors(page: Path) -> list[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page, block", every(3, blocks("python")), ids=lambda value: value[:30])
def test_python(page, block, ground, folders, monkeypatch):
    monkeypatch.chdir(folders(page))
    block = block.replace('"checkpoint.pth"', repr(ground["CHECKPOINT"]))
    u = torch.linspace(-3, 3, 100)
    names = {"u": u, "y": u.sin(), "weight": torch.full((100,), 0.01), "tensor": u,
             "batches": [torch.randn(4, 3, 32, 32)], "images": torch.randn(2, 3, 32, 32)}
    exec(compile(block, page, "exec"), names)


def test_the_other_pages_are_run_elsewhere():
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_exist(page):
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    known |= {option for action in run_with_submitit.get_launch_parser()._actions for option in action.option_strings}
    for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", page.read_text()):
        if flag in known:
            continue
        sources = [path.read_text() for folder in ("tools", "benchmarks") for path in (ROOT / folder).glob("*.*")]
        others = ("--ipc", "--shm-size", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port",
                  "--max-restarts", "--gpus-per-node", "--logdir", "--no-X", "--spread")
        assert flag in others or any(re.search(rf"{flag}\b", source) for source in sources), f"{page.name}: {flag}"


# ---------------------------------------------------------------- README's table of flags
def shown(flag: Flag) -> str:
    value = f"{{{','.join(flag.choices)}}}" if flag.choices and len(",".join(flag.choices)) < 40 else \
        flag.metavar if isinstance(flag.metavar, str) else " ".join(flag.metavar or ())
    return f"`{flag.option}{' ' * bool(value)}{f'[{value}]' if flag.mode else value}`"


def flags_table() -> str:
    """The flags that DeiT does not have, by the groups of --help, and those that may differ from a checkpoint's."""
    rows = {group.title: [shown(flag) for flag in group.flags if flag.ours] for group in GROUPS}
    rows["may differ from the checkpoint's on `--resume`"] = [f"`{flag.option}`" for flag in FLAGS.values() if flag.on_resume]
    rows["and on `--eval`"] = [f"`{flag.option}`" for flag in FLAGS.values() if flag.on_eval]
    return "\n".join(["| | |", "|---|---|", *(f"| {title} | {', '.join(flags)} |" for title, flags in rows.items() if flags)])


def test_the_readmes_table_of_flags():
    assert flags_table() in (ROOT / "README.md").read_text(encoding="utf-8"), \
        "README.md's table of flags is out of date: PYTHONPATH=. python tests/test_docs.py writes it"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text, found = re.subn(r"\| \| \|\n\|---\|---\|\n\| run \|.*?(?=\n\n)", lambda _: flags_table(),
                          readme.read_text(encoding="utf-8"), flags=re.S)
    assert found == 1
    readme.write_text(text, encoding="utf-8")
