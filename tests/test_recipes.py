"""Every recipe is understood, names a model that exists, and its header says what a reader wants to know."""
import csv
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT, every

import models_kan
from vision_kan.config.checks import validate
from vision_kan.config.flags import get_args_parser
from vision_kan.config.recipes import dump_yaml
from vision_kan.config.resolve import parse_args
from vision_kan.models import conversion
from vision_kan.models.cost import count_flops, count_parameters, twin_mismatch
from vision_kan.run.build import build_model, choose_backend, model_spec
from vision_kan.run.starting import Start, effective_config, with_own_input_size

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
# KAT's authors' table: file -> top-1, drop path
KATS = {"imagenet_tiny_kat": ("74.6", 0.1), "imagenet_small_kat": ("81.2", 0.1), "imagenet_base_kat": ("82.3", 0.4)}
# What is compared: name -> its feed-forwards, in files NAME_FEEDFORWARD.yaml (or PLAIN) that differ in nothing else
PLAIN = {("finetune_folder", "gkan"): "finetune_folder"}
ALL = ("gkan", "kan_full", "mlp")
TWINS = {
    "quickstart": ("gkan", "mlp"), "cifar10": ("gkan", "kan", "mlp"), "cifar10_long": ("gkan", "mlp"),
    **{f"{kind}_{size}": ALL for kind in ("imagenet", "imagenet_finetune", "cifar100_finetune")
       for size in ("tiny", "small", "base")},
    "cifar10_finetune_tiny": ALL, "cifar10_finetune_base": ("gkan", "mlp"), "finetune_folder": ALL,
}


def member(name: str, kind: str) -> str:
    return PLAIN.get((name, kind), f"{name}_{kind}")


FOR_GPUS = {member(name, kind) for name, kinds in TWINS.items() if name not in ("quickstart", "cifar10", "cifar10_long")
            for kind in kinds} - ROWS.keys()
# The only figures there are for those: DeiT's own
PUBLISHED = {
    "imagenet_small_mlp": "top-1 79.9, top-5 95.0 ", "imagenet_base_mlp": "top-1 81.8, top-5 95.6 ",
    "cifar100_finetune_base_mlp": "top-1 90.8 ", "cifar10_finetune_base_mlp": "top-1 99.1 ",
}
GLOBAL_BATCH = {"imagenet": 1024, "imagenet_finetune": 512, "cifar100_finetune": 768, "cifar10_finetune": 768,
                "finetune": 64}
CLASSES = {"IMNET": 1000, "FOLDER": 1000, "CIFAR": 100, "CIFAR10": 10, "DIGITS": 10}


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


def recipe(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


@cache
def build(path: Path, model: str | None = None):
    """The recipe's model, or another one of its size and without KAN options, on no device."""
    config = with_own_input_size(parse_args(["--config", str(path)]))
    spec = model_spec(config, Start(), CLASSES[config.args.data_set])
    if model:
        spec = models_kan.ModelSpec(model, {key: spec.kwargs[key] for key in ("num_classes", "img_size")})
        return timm.create_model(spec.name, device="meta", **spec.kwargs)
    return build_model(models_kan.ModelSpec(spec.name, {**spec.kwargs, "device": "meta"}), config)[0]


def test_all_recipes_are_known():
    twins = {member(name, kind) for name, kinds in TWINS.items() for kind in kinds}
    assert {path.stem for path in RECIPES} == ROWS.keys() | KATS.keys() | twins


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    parsed = parse_args(["--config", str(path)])
    validate(parsed.args)
    assert timm.is_model(parsed.args.model)
    place = {"output_dir", "data_path", "resume", "device", "eval"} & parsed.given.keys()
    # own photos to a model by one line: what is trained must be kept
    assert place == ({"output_dir"} if path.stem == "finetune_folder" else set()), "a recipe must not say where to run"


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


@cache
def tables() -> dict[str, tuple[str, set[float]]]:
    """Recipe -> heading and accuracies of its row in docs/results.md."""
    rows, heading, columns = {}, "", []
    for line in (ROOT / "docs/results.md").read_text().splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        columns = columns or cells if cells else []
        row = dict(zip(columns, cells))
        if name := re.fullmatch("`(.+)`", row.get("recipe", "")):
            figures = " ".join(text for column, text in row.items() if re.match("top-|of each seed", column))
            rows[name[1]] = heading, set(accuracies(figures))
    return rows


def accuracies(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\d.,])\d+\.\d+(?![\d.])", text)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_says_what_the_tables_say(path):
    """What a header calls measured is in docs/results.md, and nothing there is called unmeasured."""
    fields, (heading, figures) = header(path), tables().get(path.stem, ("", set()))
    ours, theirs = heading == "The recipes' own runs", heading in ("The original's figures", "KAT's figures")
    assert ours or theirs or not heading
    assert ("not measured" in fields["expected"]) == (not heading)
    known = figures if heading else {figure for _, row in tables().values() for figure in row}      # its twin's, say
    assert set(accuracies(fields["expected"])) <= known and figures <= set(accuracies(fields["expected"]))
    source = fields["source"].lower()
    assert ("our measurement, docs/results.md" in source) == ours
    assert ("not re-run by us" in source) == theirs
    assert ("no run of ours yet" in source or "no run yet" in source) == (not heading)


def test_what_benchmarks_accuracy_measured_is_not_called_unmeasured():
    with open(ROOT / "benchmarks/results/accuracy/runs.csv", newline="") as file:
        measured = {int(row["parameters"]) for row in csv.DictReader(file)}
    assert len(measured) > 5
    for path in RECIPES:
        if path.stem.startswith("cifar10_") and count_parameters(build(path)) in measured:
            assert "not measured" not in header(path)["expected"]


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    model, hidden, data_set, top1, top5 = ROWS[name]
    path = recipe(name)
    args = parse_args(["--config", str(path)]).args
    assert (args.model, args.hdim_kan, args.data_set, args.input_size) == (model, hidden, data_set, 224)
    assert header(path)["expected"].startswith(f"top-1 {top1}, top-5 {top5} ")
    published = rf"deit/{model.rpartition('_')[0]}-[0-9a-f]{{8}}\.pth$"
    assert bool(re.search(published, args.finetune)) == (data_set == "CIFAR")
    assert args.eval_crop_ratio == (0.875 if name == "imagenet_tiny_mlp" else 1.0)


@pytest.mark.parametrize("name", KATS)
def test_kat(name):
    """The authors' settings, as their script has them."""
    (top1, drop_path), args = KATS[name], parse_args(["--config", str(recipe(name))]).args
    size = name.split("_")[1]
    assert header(recipe(name))["expected"].startswith(f"top-1 {top1} ")
    assert (args.model, args.drop_path) == (f"deit_{size}_patch16_224_KAT", drop_path)
    assert (args.lr, args.unscale_lr, args.weight_decay, args.kan_weight_decay, args.kan_lr_mult) == (1e-3, True, 0.05, 0.05, 1)
    assert "nproc_per_node=8" in header(recipe(name))["command"] and args.batch_size * 8 * args.grad_accum == 1024
    assert (args.kan_base, args.kan_groups, args.weight_init) == ("silu", 8, "mimetic")
    assert (args.epochs, args.warmup_epochs, args.sched, args.opt, args.model_ema_decay) == (300, 5, "cosine", "adamw", 0.9999)
    assert (args.mixup, args.cutmix, args.smoothing, args.reprob, args.aa) == (0.8, 1.0, 0.1, 0.25, "rand-m9-mstd0.5")
    assert twin_mismatch(build(recipe(name)), build(recipe(name), f"deit_{size}_patch16_224_ViT")) is None


@pytest.mark.parametrize("path", every(4, RECIPES), ids=lambda path: path.stem)
def test_the_model_is_built(path):
    """And the header computes its cost."""
    model, cost = build(path), header(path)["cost"]
    computed = re.search(r"Computed: ([\d.]+) GMAC per image", cost)
    assert bool(computed) == ("not measured" in cost)
    if computed:
        assert computed.group(1) == f"{count_flops(model).matmul / 2e9:.2f}"


@pytest.mark.parametrize("path", every(4, RECIPES), ids=lambda path: path.stem)
def test_the_args_yaml_of_a_run_is_a_recipe_of_the_same_run(path, tmp_path):
    """What a run by the recipe writes is taken by --config, means the same, and contradicts nothing of the model."""
    written = effective_config(parse_args(["--config", str(path)]), Start())
    (tmp_path / "args.yaml").write_text(dump_yaml(written.args))
    again = effective_config(parse_args(["--config", str(tmp_path / "args.yaml")]), Start())
    validate(again.args)
    assert {**vars(again.args), "config": ""} == {**vars(written.args), "config": ""}
    spec = model_spec(again, Start(), CLASSES[again.args.data_set])
    model, kept = build_model(models_kan.ModelSpec(spec.name, {**spec.kwargs, "device": "meta"}), again)
    choose_backend(again, kept, model, torch.device("cpu"))


@pytest.mark.parametrize("name", sorted(FOR_GPUS))
def test_for_gpus(name):
    """The figures are DeiT's or none, the processes of the command make up the batch, the weights are of the size."""
    fields, args = header(recipe(name)), parse_args(["--config", str(recipe(name))]).args
    assert fields["expected"].startswith(PUBLISHED.get(name, "top-1 not measured yet"))
    if name in PUBLISHED:
        assert "Not re-run by us" in fields["source"] and "DeiT" in fields["source"]
    assert ("--download" in fields["command"]) == args.data_set.startswith("CIFAR")

    processes = int(*re.findall(r"torchrun --nproc_per_node=(\d+) ", fields["command"]) or [1])
    kind = re.match(r"imagenet(_finetune)?|cifar\d+_finetune|finetune", name).group()
    assert processes * args.batch_size * args.grad_accum == GLOBAL_BATCH[kind]
    assert args.dist_eval == (processes > 1)
    size = args.model.rpartition("_")[0]
    assert bool(re.fullmatch(rf"https://\S+/{size}-[0-9a-f]{{8}}\.pth", args.finetune)) == ("finetune" in name)
    for key in ("kan_lr_mult", "kan_weight_decay"):
        assert getattr(args, key) == get_args_parser().get_default(key)


@pytest.mark.parametrize("name", every(4, sorted(name for name in FOR_GPUS if not name.endswith("_mlp"))))
def test_kan_and_mlp_are_comparable(name):
    """As many parameters as the MLP; a full-edge KAN that begins with DeiT's weights can take its MLP over."""
    args = parse_args(["--config", str(recipe(name))]).args
    model, twin = build(recipe(name)), build(recipe(name), f"{args.model.rpartition('_')[0]}_ViT")
    if name.endswith("_kan_full") and args.finetune:
        assert conversion.why_not(model, twin) is None
        assert "8 times the MLP's parameters" in header(recipe(name))["settings"]
    else:
        assert twin_mismatch(model, twin) is None


@pytest.mark.parametrize("name", TWINS)
def test_the_baseline_is_a_fair_twin(name):
    """Same settings, another feed-forward, whose own options are the only other difference."""
    *kans, mlp = (vars(parse_args(["--config", str(recipe(member(name, kind)))]).args) for kind in TWINS[name])
    for kan in kans:
        own = {*models_kan.KAN_OPTIONS, "kan_lr_mult", "output_dir"}
        assert {key for key in kan if kan[key] != mlp[key]} - own == {"model", "config"}
        assert kan["model"].rpartition("_")[0] == mlp["model"].removesuffix("_ViT")
