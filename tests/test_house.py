"""Who may import whom, and that the package can be imported anywhere."""
import ast
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

# From the ground up: each imports from itself and from those before it.
FLOORS = ["vision_kan.common", "vision_kan.kernels", "vision_kan.config", "vision_kan.layers", "faster_kan",
          "vision_kan.checkpoints", "vision_kan.data", "models_kan", "vision_kan.models", "vision_kan.training",
          "vision_kan.run", "vision_kan.analysis", "utils", "samplers", "losses", "datasets", "engine", "main",
          "run_with_submitit", "hubconf"]
EVERYDAY = {"main", "engine", "datasets", "losses", "samplers", "utils"}      # names that any program may have


@cache
def import_nodes(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def room(module: str) -> str:
    return ".".join(module.split(".")[:2 if module.startswith("vision_kan.") else 1])


def imports(root: Path) -> dict[str, set[str]]:
    """module -> the modules of this project that it imports, anywhere in its file."""
    files = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
             for path in [*root.glob("*.py"), *root.glob("vision_kan/**/*.py")]}
    found = {}
    for module, path in files.items():
        names = set()
        for node in import_nodes(path.read_text()):
            if isinstance(node, ast.ImportFrom):
                names |= {part if (part := f"{node.module}.{alias.name}") in files else node.module for alias in node.names}
            else:
                names |= {alias.name for alias in node.names}
        found[module] = names & files.keys() - {module}
    return found


def imported_tests(root: Path) -> list[str]:
    """What is shared stands beside the tests, so that a test file can be moved, run or deleted alone."""
    said = []
    for path in root.glob("tests/*.py"):
        for node in import_nodes(path.read_text()):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            said += [f"{path.name} imports the test {name}" for name in names if name.split(".")[-1].startswith("test_")]
    return said


def complaints(root: Path) -> list[str]:
    """What breaks the rules: an import that points up, an everyday name inside the package, a circle of modules, a test that
    imports another."""
    graph, said = imports(root), imported_tests(root)
    for module, targets in graph.items():
        for target in targets:
            if module.startswith("vision_kan") and target in EVERYDAY:
                said.append(f"{module} imports {target}, which is everyone's name")
            elif FLOORS.index(room(target)) > FLOORS.index(room(module)):
                said.append(f"{module} imports {target} from a floor above")
    above = set(graph)
    while above:        # those that import only what is known to be in no circle are in none
        free = {module for module in above if not graph[module] & above}
        if not free:
            said.append(f"a circle within {', '.join(sorted(above))}")
            break
        above -= free
    return said


def test_imports_point_down():
    assert not complaints(ROOT)


@pytest.mark.parametrize("file, line, expected", [
    ("vision_kan/common/text.py", "from vision_kan.run.folder import RunFolder", "floor above"),
    ("vision_kan/run/folder.py", "import utils", "everyone's name"),
    ("vision_kan/models/cost.py", "def late():\n    from vision_kan.models import cost_of\n", "circle"),
    ("tests/test_utils.py", "def late():\n    from test_errors import ROOT\n", "test_utils.py imports the test test_errors")])
def test_a_planted_violation_is_found(file, line, expected, tmp_path):
    copy_of_sources(tmp_path)
    (tmp_path / "vision_kan/models/cost_of.py").write_text("from vision_kan.models import cost\n")
    with open(tmp_path / file, "a") as planted:
        planted.write(f"\n{line}\n")
    assert any(expected in said for said in complaints(tmp_path))


def test_files_are_read_at_a_sitting():
    files = {*ROOT.glob("*.py"), *ROOT.glob("vision_kan/**/*.py")} - {ROOT / "vision_kan/config/flags.py"}      # a table
    lengths = {path: len(path.read_text().splitlines()) for path in files if path.parent.name != "kernels"}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.get)
    assert len((ROOT / "main.py").read_text().splitlines()) < 130


def test_readme_draws_the_house():
    """Each room has its row, in the order of the floors, the highest first."""
    table = (ROOT / "README.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([\w/]+?)(?:\.py|/)?`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    named = [[name.replace("/", ".") for name in row if name != "tools"] for row in rows]
    assert sorted(sum(named, [])) == sorted(FLOORS) and set(map(room, imports(ROOT))) - {"vision_kan"} == set(FLOORS)
    heights = [[FLOORS.index(name) for name in row] for row in named]
    assert all(min(above) > max(below) for above, below in zip(heights, heights[1:]))


# ---------------------------------------------------------------- in other programs
@pytest.fixture
def foreign(tmp_path) -> Path:
    """A folder of another program, whose modules have everyday names, each of which says so when it is imported."""
    for name in EVERYDAY | {"config", "checkpoints", "kernels", "start", "trained"}:
        (tmp_path / f"{name}.py").write_text(f"print('the other program has its own {name}')\n")
    return tmp_path


@pytest.mark.parametrize("code", [
    f"import sys; sys.path.append({str(ROOT)!r})\nimport models_kan, timm\nmake = timm.create_model",
    pytest.param(f"import torch\nmake = lambda name, **options: torch.hub.load({str(ROOT)!r}, name, source='local', **options)",
                 marks=pytest.mark.slow)], ids=["timm", "torch.hub"])
def test_models_beside_modules_of_everyday_names(code, foreign):
    code = f"import torch\n{code}\nimport utils, datasets, config\nmodel = make('vit_nano_patch8_32_GKAN', num_classes=3)\n" \
           "print(model(torch.zeros(1, 3, 32, 32)).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=foreign, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"the other program has its own {name}" for name in ("utils", "datasets", "config")] + [
        "torch.Size([1, 3])"]


def test_what_pip_installs(tmp_path):
    """The wheel holds the package, two modules of our own names, the kernels' source, the trained weights, and nothing else."""
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir",
                           str(tmp_path), str(copy_of_sources(tmp_path / "source"))], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vision_kan", "models_kan.py", "faster_kan.py"}
    ours = {str(path.relative_to(ROOT)) for path in ROOT.glob("vision_kan/**/*.py")} | {
        f"vision_kan/kernels/{name}" for name in ("rational.cpp", "rswaf.cpp", "simd.h")}
    ours |= {str(path.relative_to(ROOT)) for path in ROOT.glob("vision_kan/pretrained/*.*")}
    assert ours <= set(names)


def copy_of_sources(target: Path) -> Path:
    """What git tracks; building in the clone itself would leave files there."""
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).suffix in (".py", ".toml", ".cpp", ".h", ".txt", ".safetensors", ".md"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target
