"""Who may import whom, and that the package can be imported anywhere."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: each imports from itself and from those before it.
FLOORS = ["vision_kan.common", "vision_kan.kernels", "vision_kan.config", "vision_kan.layers", "faster_kan",
          "vision_kan.checkpoints", "vision_kan.data", "models_kan", "vision_kan.models", "vision_kan.training",
          "vision_kan.run", "vision_kan.analysis", "utils", "samplers", "losses", "datasets", "engine", "main",
          "run_with_submitit", "hubconf"]
EVERYDAY = {"main", "engine", "datasets", "losses", "samplers", "utils"}      # names that any program may have


def room(module: str) -> str:
    return ".".join(module.split(".")[:2 if module.startswith("vision_kan.") else 1])


def imports(root: Path) -> dict[str, set[str]]:
    """module -> the modules of this project that it imports, anywhere in its file."""
    files = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
             for path in [*root.glob("*.py"), *root.glob("vision_kan/**/*.py")]}
    found = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {part if (part := f"{node.module}.{alias.name}") in files else node.module for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[module] = names & files.keys() - {module}
    return found


def complaints(root: Path) -> list[str]:
    """What breaks the rules: an import that points up, an everyday name inside the package, a circle of modules."""
    graph, said = imports(root), []
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
    ("vision_kan/models/cost.py", "def late():\n    from vision_kan.models import cost_of\n", "circle")])
def test_a_planted_violation_is_found(file, line, expected, tmp_path):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("vision_kan/**/*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "vision_kan/models/cost_of.py").write_text("from vision_kan.models import cost\n")
    with open(tmp_path / file, "a") as planted:
        planted.write(f"\n{line}\n")
    assert any(expected in said for said in complaints(tmp_path))
