"""Every recipe is understood, names a model that exists, and its header says what a reader wants to know."""
import re
import shlex
from pathlib import Path

import pytest
import timm

import models_kan  # noqa: F401  (registers the models)
from config import parse_args, validate

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# The original authors' table: file -> (model, hidden width of the KAN, data set, top-1, top-5)
ROWS = {
    "imagenet_tiny_mlp": ("deit_tiny_patch16_224_ViT", None, "IMNET", "72.2", "91.1"),
    "cifar100_tiny_mlp": ("deit_tiny_patch16_224_ViT", None, "CIFAR", "84.94", "96.53"),
    "cifar100_small_mlp": ("deit_small_patch16_224_ViT", None, "CIFAR", "86.49", "96.17"),
    "cifar100_base_mlp": ("deit_base_patch16_224_ViT", None, "CIFAR", "86.54", "96.16"),
    "imagenet_tiny_kan20": ("deit_tiny_patch16_224_KAN", 20, "IMNET", "36.34", "61.48"),
    "imagenet_tiny_kan192": ("deit_tiny_patch16_224_KAN", 192, "IMNET", "64.87", "86.14"),
    "imagenet_tiny_kan768": ("deit_tiny_patch16_224_KAN", 768, "IMNET", "48.94", "73.68"),
    "cifar100_tiny_kan192": ("deit_tiny_patch16_224_KAN", 192, "CIFAR", "73.17", "93.307"),
    "cifar100_small_kan384": ("deit_small_patch16_224_KAN", 384, "CIFAR", "78.69", "94.73"),
    "cifar100_base_kan768": ("deit_base_patch16_224_KAN", 768, "CIFAR", "76.96", "94.36"),
}


def header(path: Path) -> dict[str, str]:
    """'command', 'cost', ... -> text, from the comment lines before the first key."""
    comment = re.match(r"(#.*\n)+", path.read_text()).group()
    fields, key = {}, None
    for line in comment.splitlines():
        start = re.match(r"# (\w+): +(.*)", line)
        if start:
            key = start.group(1)
            fields[key] = start.group(2)
        elif key:
            fields[key] += " " + line.lstrip("# ")
    return fields


def test_all_rows_are_covered():
    twins = {f"{name}_{kind}" for name in ("quickstart", "cifar10") for kind in ("kan", "mlp")}
    assert ROWS.keys() | twins <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    parsed = parse_args(["--config", str(path)])
    validate(parsed.args)
    assert timm.is_model(parsed.args.model)
    place = {"output_dir", "data_path", "resume", "device", "eval"} & parsed.given.keys()
    assert not place, "a recipe must not say where to run"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header(path, monkeypatch):
    fields = header(path)
    assert {"command", "cost", "expected", "source"} <= fields.keys()
    assert re.search(r"top-1 (\d\d\.\d|not measured)", fields["expected"])
    assert re.search(r"not measured|measured:|GPU hour", fields["cost"])
    if path.stem in ROWS:                   # figures that aren't ours are said not to be
        assert "Not re-run by us" in fields["source"] and "authors' table" in fields["source"]
        assert "estimate" in fields["cost"]
    words = shlex.split(fields["command"].replace("\\ ", " "))
    assert "main.py" in words
    monkeypatch.chdir(ROOT)
    parsed = parse_args(words[words.index("main.py") + 1:])
    assert parsed.args.config == f"recipes/{path.name}" and parsed.args.output_dir
    assert bool(parsed.args.data_path) == (parsed.args.data_set != "DIGITS")


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    model, hidden, data_set, top1, top5 = ROWS[name]
    path = ROOT / "recipes" / f"{name}.yaml"
    args = parse_args(["--config", str(path)]).args
    assert (args.model, args.hdim_kan, args.data_set, args.input_size) == (model, hidden, data_set, 224)
    assert header(path)["expected"].startswith(f"top-1 {top1}, top-5 {top5} ")
    published = rf"deit/{model.rpartition('_')[0]}-[0-9a-f]{{8}}\.pth$"
    assert bool(re.search(published, args.finetune)) == (data_set == "CIFAR")
    assert args.eval_crop_ratio == (0.875 if name == "imagenet_tiny_mlp" else 1.0)


@pytest.mark.parametrize("name", ["quickstart", "cifar10"])
def test_the_baseline_is_a_fair_twin(name):
    """Same settings, another feed-forward, whose own options are the only other difference."""
    kan, mlp = (vars(parse_args(["--config", str(ROOT / f"recipes/{name}_{kind}.yaml")]).args)
                for kind in ("kan", "mlp"))
    assert {key for key in kan if kan[key] != mlp[key] and not key.startswith("kan_")} == {"model", "config"}
    assert kan["model"].removesuffix("_KAN") == mlp["model"].removesuffix("_ViT")
