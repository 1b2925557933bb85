"""Accuracy of feed-forwards: KANs against their MLP twin, paired by seed, on CIFAR-10 images.

    python benchmarks/accuracy.py scratch  --data cifar10 --variants mlp gkan relu2 kan --seeds 0 1 2 3 4
    python benchmarks/accuracy.py transfer --data cifar10 --variants mlp gkan --seeds 0 1 2 3 4
    python benchmarks/accuracy.py convert  --data cifar10 --seeds 0 1 2 3 4
    python benchmarks/accuracy.py report

`scratch` trains a small ViT (`vit_nano_patch8_32`: 32 px, patch 8, width 96, depth 4) from random weights.
`transfer` trains the MLP ViT on classes 0-4, converts it, and fine-tunes every variant in the same way on classes 5-9.
`convert` turns the MLPs of finished `scratch --variants mlp` runs into full-edge KANs, without training.
A variant is a name of `VARIANTS` and changes to it: `gkan,kan_groups=16,lr=2e-3`. For a given seed, what two variants share has
the same initial weights, and they get the same images in the same order.

Finished runs are rows of `runs.csv` in --results and are not run again; an unfinished one continues after its last epoch. Models,
optimizer, schedule, loss, training loop and evaluation are main.py's; only the images come from memory, and the models go through
torch.compile if there is a C++ compiler.
"""
import argparse
import csv
import fcntl
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import timm
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from torchvision.datasets import ImageFolder

import models_kan
from engine import evaluate, train_epochs
from faster_kan import FasterKANLayer
from losses import build_criterion
from models_kan import ModelSpec
from samplers import RASampler
from tools.common import half_interval
from vision_kan.checkpoints.read import CHECKPOINT, load_file
from vision_kan.checkpoints.write import save_checkpoint
from vision_kan.common.files import atomic_write
from vision_kan.common.process import Process
from vision_kan.common.seeds import seed_everything
from vision_kan.config.resolve import parse_args
from vision_kan.kernels import rswaf_basis
from vision_kan.layers.group_kan import GroupActivation
from vision_kan.models import conversion
from vision_kan.models.cost import cost_mismatch, count_flops, count_parameters
from vision_kan.models.finetune import load_finetune
from vision_kan.training.optim import build_state
from vision_kan.training.training import Hooks, Training
from vision_kan.training.updates import Updater

# name -> (model suffix, differences). `act`: another fixed activation in the MLP. `frozen`: learned functions that are not
# trained here, see `_load_functions`. `phi_qkv`, `phi_out`: a learned function before the qkv map, or after the second map.
# `gain`: of a full-edge layer's initial weights. `whiten`: see `_Whitened`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("ViT", {}),
    "relu": ("ViT", {"act": "relu"}),
    "relu2": ("ViT", {"act": "relu2"}),
    "silu": ("ViT", {"act": "silu"}),
    "gkan": ("GKAN", {}),
    "mean-shape": ("GKAN", {"frozen": "mean", "kan_groups": 1, "kan_input_phi": False}),
    "frozen": ("GKAN", {"frozen": "own"}),
    "kan-original": ("KAN", {}),
    "kan": ("KAN", {"kan_basis": "covering"}),
    "ekan": ("EKAN", {}),
}
RECIPE = {"epochs": 4, "batch_size": 128, "lr": 1e-3, "min_lr": 1e-5, "weight_decay": 0.05, "smoothing": 0.1,
          "clip_grad": 1.0, "warmup_steps": 200, "ema_decay": 0.99, "kan_lr_mult": 20.0, "kan_weight_decay": 0.0}
SIZE = "vit_nano_patch8_32"
MODEL = {"class_token": False, "global_pool": "avg", "weight_init": "reset"}      # PyTorch's initialisation
MEAN, STD = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)
CLASSES_A, CLASSES_B = range(0, 5), range(5, 10)        # transfer: pretrain, fine-tune
FIELDS = ["setting", "variant", "seed", "epochs", "lr", "top1", "top1_ema", "top1_by_epoch", "train_loss", "parameters",
          "matmul_mflops", "elementwise_mflops", "step_ms", "seconds", "step0_error", "torch", "timm"]


# ---------------------------------------------------------------- variants
def parse_variant(text: str) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """`gkan,kan_groups=16,lr=2e-3` -> (name, model suffix, model options, recipe). SystemExit if it is wrong."""
    name, *changes = text.split(",")
    if name not in VARIANTS:
        sys.exit(f"error: --variants {text}: {name} is not one of {', '.join(VARIANTS)}")
    suffix, options = VARIANTS[name]
    options, recipe = dict(options), dict(RECIPE)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            sys.exit(f"error: --variants {text}: write {key}=VALUE")
        parsed = _value(value)
        if key in recipe:
            recipe[key] = parsed
        elif key in (*models_kan.KAN_OPTIONS, "act", "frozen", "phi_qkv", "phi_out", "gain", "whiten", "weight_init",
                     "mlp_ratio"):
            options[key] = parsed
        else:
            sys.exit(f"error: --variants {text}: {key} is not one of {', '.join((*recipe, *models_kan.KAN_OPTIONS))}")
    return name, suffix, options, recipe


def _value(text: str) -> Any:
    """A number, true/false, a name, or `a:b` for two numbers."""
    if ":" in text:
        return [float(part) for part in text.split(":")]
    try:
        return float(text) if "e" in text.lower() and text.lower() not in ("true", "false") else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


def build(suffix: str, options: dict[str, Any], seed: int, num_classes: int, functions: Path | None) -> nn.Module:
    """The model of a variant. What it shares with the MLP twin has the twin's random weights."""
    options = dict(options)
    act, frozen, phi_qkv, phi_out, gain, whiten = (
        options.pop(key, None) for key in ("act", "frozen", "phi_qkv", "phi_out", "gain", "whiten"))
    settings = {**MODEL, "num_classes": num_classes}
    settings |= {key: options.pop(key) for key in ("weight_init", "mlp_ratio") if key in options}
    if act:
        options["act_layer"] = {"relu": nn.ReLU, "relu2": SquaredReLU, "silu": nn.SiLU}[act]
    seed_everything(seed)
    twin = timm.create_model(f"{SIZE}_ViT", **settings)
    seed_everything(seed, 1)
    model = timm.create_model(f"{SIZE}_{suffix}", **settings, **options)
    own = model.state_dict()
    model.load_state_dict({key: value for key, value in twin.state_dict().items()
                           if key in own and own[key].shape == value.shape}, strict=False)
    for block in model.blocks:
        if phi_qkv:
            block.attn.qkv = _PhiLinear(GroupActivation(block.attn.qkv.in_features, base="identity"), block.attn.qkv)
        if phi_out:
            block.mlp.drop2 = GroupActivation(block.mlp.fc2.out_features, base="identity")
    for layer in model.modules() if gain else ():
        if isinstance(layer, FasterKANLayer):
            layer.spline_linear.weight.data *= gain
    for layer in model.modules() if whiten else ():
        if isinstance(layer, FasterKANLayer):
            register_parametrization(layer.spline_linear, "weight", _Whitened(layer.rbf.grid, layer.rbf.h, whiten))
    if frozen:
        _load_functions(model, frozen, functions)
    return model


class _Whitened(nn.Module):
    """Spline weights [O, I*G] as combinations of functions that are orthonormal for a standard normal input.

    The optimizer then works on v [O, I*G], W = v M for each input. zca: M = (E[B B'] + r)^-1/2; pca: the functions
    are the eigenvectors of E[B B'], smooth ones first."""

    def __init__(self, grid: Tensor, h: float, kind: str, ridge: float = 1e-3):
        super().__init__()
        nodes, weights = np.polynomial.hermite_e.hermegauss(200)
        basis = rswaf_basis(torch.from_numpy(nodes), grid.double(), h)
        gram = basis.T @ (torch.from_numpy(weights / weights.sum())[:, None] * basis)
        values, vectors = torch.linalg.eigh(gram)
        m = (values + ridge * values.mean()).rsqrt()[:, None] * vectors.T
        m = vectors @ m if kind == "zca" else m
        self.register_buffer("m", m.float(), persistent=False)
        self.register_buffer("inverse", torch.linalg.inv(m).float(), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        return (v.view(len(v), -1, len(self.m)) @ self.m).flatten(1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return (weight.view(len(weight), -1, len(self.m)) @ self.inverse).flatten(1)


class SquaredReLU(nn.Module):
    """relu(u)^2 (Primer, arXiv:2109.08668)."""

    def __init__(self, inplace: bool = False):
        super().__init__()

    def forward(self, u: Tensor) -> Tensor:
        return F.relu(u).square()


class _PhiLinear(nn.Linear):
    """A linear map behind a learned function."""

    def __init__(self, phi: GroupActivation, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.phi(x))


def _load_functions(model: nn.Module, kind: str, folder: Path | None) -> None:
    """Load the coefficients that finished `gkan` runs of --work-dir have learned, and freeze them.

    mean: phi2's, averaged over blocks, groups and all those runs: one fixed activation for the network.
    own: every block's and group's function, averaged over the runs of seed 0 alone."""
    files = sorted(folder.glob(f"{run_name('gkan', RECIPE['epochs'], '*')}/{CHECKPOINT}")) if folder else []
    if not files:
        sys.exit("error: mean-shape and frozen take functions that gkan runs have learned: run --variants gkan first")
    states = [load_file(file)["model"] for file in files]
    own = model.state_dict()
    for key in own:
        if key.endswith(".coefficients"):
            if kind == "mean":
                every = [s[k] for s in states for k in s if k.endswith("phi2.coefficients")]
                own[key] = torch.cat(every).mean(0, keepdim=True).expand_as(own[key]).clone()
            else:
                own[key] = states[0][key]
    model.load_state_dict(own)
    for module in model.modules():
        if isinstance(module, GroupActivation):
            module.coefficients.requires_grad_(False)


# ---------------------------------------------------------------- images
def load_images(folder: Path, cache: Path) -> dict[str, Tensor]:
    """{"train": uint8 [N, 3, 32, 32], "train_y": [N], "val": ..., "val_y": ...}, decoded once."""
    file = cache / "images.npz"
    if not file.exists():
        arrays = {}
        for split in ("train", "val"):
            if not (folder / split).is_dir():
                sys.exit(f"error: --data {folder} has no folder {split}: name the folder with train/CLASS and val/CLASS")
            data = ImageFolder(str(folder / split))
            arrays[split] = np.stack([np.asarray(image) for image, _ in data]).transpose(0, 3, 1, 2)
            arrays[f"{split}_y"] = np.asarray(data.targets)
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            np.savez(temporary, **arrays)
    with np.load(file) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def normalise(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


class Batches:
    """Shuffled batches of one epoch, each image mirrored at random and shifted by up to 4 pixels."""

    def __init__(self, images: Tensor, targets: Tensor, batch_size: int, seed: int, augment: bool = True):
        self.images, self.targets, self.batch_size, self.augment = images, targets, batch_size, augment
        self.sampler = RASampler(len(images), num_repeats=1, seed=seed, shuffle=augment)

    def __len__(self) -> int:
        size = len(self.images) / self.batch_size
        return math.floor(size) if self.augment else math.ceil(size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        keys = torch.tensor([key.index for key in self.sampler])
        for step in range(len(self)):
            rows = keys[step * self.batch_size:(step + 1) * self.batch_size]
            images = self.images[rows]
            if self.augment:
                generator = torch.Generator().manual_seed(int(np.random.SeedSequence(
                    [self.sampler.seed, self.sampler.epoch, step]).generate_state(1)[0]))
                images = _augment(images, generator)
            yield normalise(images), self.targets[rows]


def _augment(images: Tensor, generator: torch.Generator, shift: int = 4) -> Tensor:
    n, _, height, width = images.shape
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    images = F.pad(images, (shift,) * 4)
    top, left = torch.randint(0, 2 * shift + 1, (2, n), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return images[torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def subset(images: dict[str, Tensor], classes: range) -> dict[str, Tensor]:
    out = {}
    for split in ("train", "val"):
        keep = (images[f"{split}_y"] >= classes.start) & (images[f"{split}_y"] < classes.stop)
        out[split], out[f"{split}_y"] = images[split][keep], images[f"{split}_y"][keep] - classes.start
    return out


# ---------------------------------------------------------------- one run
def flags_of(recipe: dict[str, Any], updates: int) -> Namespace:
    """main.py's flags for a recipe of this file."""
    args = parse_args(["--data-set", "FOLDER", "--unscale-lr", "--sched-on-updates"]).args
    for key in ("epochs", "batch_size", "lr", "min_lr", "weight_decay", "smoothing", "clip_grad", "kan_lr_mult",
                "kan_weight_decay"):
        setattr(args, key, recipe[key])
    args.model_ema, args.model_ema_decay = recipe["ema_decay"] > 0, recipe["ema_decay"]
    args.warmup_epochs = recipe["warmup_steps"] / updates       # timm turns it into updates again
    return args


def train(model: nn.Module, images: dict[str, Tensor], recipe: dict[str, Any], seed: int, folder: Path) -> dict:
    """Train and evaluate, from the checkpoint in `folder` on if there is one. Returns columns of the results."""
    checkpoint = folder / CHECKPOINT
    folder.mkdir(parents=True, exist_ok=True)
    device = Process()
    batches = Batches(images["train"], images["train_y"], recipe["batch_size"], seed)
    val = Batches(images["val"], images["val_y"], 500, seed, augment=False)
    args = flags_of(recipe, len(batches))
    state = build_state(args, model, args.lr, len(batches), device.device, torch.float32)
    curve, seconds, step_ms = [], 0.0, []
    if checkpoint.exists():
        stored = load_file(checkpoint)
        state.load_state_dict(stored)
        curve, seconds, step_ms = stored["curve"], stored["seconds"], stored["step_ms"]
    net = torch.compile(model, dynamic=False) if shutil.which("g++") else model
    criterion = build_criterion(args, images["train_y"].max().item() + 1, False, None)
    training = Training(Updater(net, state, criterion, device, clip_grad=args.clip_grad), epochs=recipe["epochs"], seed=seed,
                        print_freq=100)
    start = time.perf_counter()
    for epoch in train_epochs(training, batches, val, Hooks()):
        top1 = epoch.results["test"]["acc1"]
        curve.append(round(top1, 2))
        seconds += time.perf_counter() - start
        step_ms.append(1000 * epoch.trained["seconds"] / len(batches))
        save_checkpoint({**state.state_dict(), "curve": curve, "seconds": seconds, "step_ms": step_ms,
                         "top1_ema": epoch.results["ema_test"]["acc1"] if state.ema else top1,
                         "loss": epoch.trained["loss"]}, folder)
        start = time.perf_counter()
    stored = load_file(checkpoint)
    return {"top1": curve[-1], "top1_ema": round(stored["top1_ema"], 2), "top1_by_epoch": " ".join(map(str, curve)),
            "train_loss": round(stored["loss"], 4), "seconds": round(seconds), "step_ms": round(min(step_ms), 1)}


def run_name(variant: str, epochs: int, seed: int | str) -> str:
    return f"{variant}-{epochs}epochs-seed{seed}"


def run(setting: str, variant: str, seed: int, data: Path, work: Path, results: Path) -> None:
    """Do one run and append it to the results."""
    torch.set_num_threads(1)
    name, suffix, options, recipe = parse_variant(variant)
    images = load_images(data, work)
    folder = work / setting
    columns: dict[str, Any] = {}
    if setting == "scratch":
        model = build(suffix, options, seed, 10, folder)
    else:
        model, columns["step0_error"] = pretrained(suffix, options, seed, images, folder)
        images = subset(images, CLASSES_B)
    flops = count_flops(model)
    columns |= train(model, images, recipe, seed, folder / run_name(variant, recipe["epochs"], seed))
    columns |= {"setting": setting, "variant": variant, "seed": seed, "epochs": recipe["epochs"], "lr": recipe["lr"],
                "parameters": count_parameters(model), "matmul_mflops": round(flops.matmul / 1e6, 2),
                "elementwise_mflops": round(flops.elementwise / 1e6, 3), "torch": torch.__version__,
                "timm": timm.__version__}
    append(results / "runs.csv", columns)


def pretrained(suffix: str, options: dict[str, Any], seed: int, images: dict[str, Tensor],
               folder: Path) -> tuple[nn.Module, float]:
    """The variant with the weights of an MLP ViT trained on the first classes and a new head; and the largest
    difference of its logits from the MLP's, relative to the largest logit, before any training."""
    folder = folder / f"pretrained-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    twin = build("ViT", {}, seed, len(CLASSES_A), None)
    first = subset(images, CLASSES_A)
    with open(folder / "lock", "w") as lock:     # another variant may train it at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        train(twin, first, dict(RECIPE), seed, folder)
    twin.load_state_dict(load_file(folder / CHECKPOINT)["model"])
    model = build(suffix, options, seed, len(CLASSES_A), None)
    load_finetune(model, twin.state_dict())
    twin.eval(), model.eval()
    with torch.inference_mode():
        batch = normalise(first["val"][:500])
        logits, converted = twin(batch), model(batch)
    error = ((converted - logits).abs().max() / logits.abs().max()).item()
    for net in (twin, model):
        seed_everything(seed, 2)
        net.reset_classifier(len(CLASSES_B))
    model.head.load_state_dict(twin.head.state_dict())
    return model, error


GRIDS = [((-2.0, 2.0), 0.33), ((-2.0, 2.0), None), ((-3.0, 3.0), None), ((-4.0, 4.0), None)]      # range, h


def convert(seeds: list[int], data: Path, work: Path, results: Path) -> None:
    """Top-1 of trained MLP ViTs and of the full-edge KANs converted from them, for several grids, as a table and a CSV."""
    images, device = load_images(data, work), Process()
    val = Batches(images["val"], images["val_y"], 500, 0, augment=False)
    batch = normalise(images["train"][:: max(1, len(images["train"]) // 256)][:256])
    rows = []
    for seed in seeds:
        checkpoint = work / "scratch" / run_name("mlp", RECIPE["epochs"], seed) / CHECKPOINT
        if not checkpoint.exists():
            sys.exit(f"error: {checkpoint} is missing: run scratch --variants mlp --seeds {seed} first")
        state = load_file(checkpoint)["model"]
        source = build("ViT", {}, seed, 10, None)
        source.load_state_dict(state)
        top1 = evaluate(source, val, device)["acc1"]
        for grid, h in GRIDS:
            kwargs = {**MODEL, "num_classes": 10, "hdim_kan": 4 * source.embed_dim, "kan_basis": "covering",
                      "kan_second_norm": "static", "kan_grid_range": grid, **({} if h is None else {"kan_h": h})}
            model = timm.create_model(f"{SIZE}_KAN", **kwargs)
            _, errors = conversion.load_converted(model, ModelSpec(f"{SIZE}_KAN", kwargs), state, lambda: batch)
            rows.append({"seed": seed, "grid": f"[{grid[0]:g}, {grid[1]:g}]", "h": "spacing" if h is None else h,
                         "top1_mlp": round(top1, 2), "top1_kan": round(evaluate(model, val, device)["acc1"], 2),
                         "block_errors": " ".join(f"{e.error:.4f}" for e in errors)})
            print(rows[-1], flush=True)
    results.mkdir(parents=True, exist_ok=True)
    with open(results / "conversion.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("\n| grid | h | top-1 after - before | largest difference |\n|---|---|---|---|")
    for grid, h in dict.fromkeys((row["grid"], row["h"]) for row in rows):
        lost = [row["top1_kan"] - row["top1_mlp"] for row in rows if (row["grid"], row["h"]) == (grid, h)]
        print(f"| {grid} | {h} | {statistics.mean(lost):+.2f} | {max(lost, key=abs):+.2f} |")


# ---------------------------------------------------------------- results
def append(file: Path, columns: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", newline="") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        writer = csv.DictWriter(stream, FIELDS)
        if stream.tell() == 0:
            writer.writeheader()
        writer.writerow(columns)


def read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with open(file, newline="") as stream:
        return [{**row, "seed": int(row["seed"]), "top1": float(row["top1"]), "top1_ema": float(row["top1_ema"]),
                 "epochs": int(row["epochs"])} for row in csv.DictReader(stream)]


def interval(differences: list[float]) -> tuple[float, float]:
    """The mean of paired differences, and half the width of its 95% interval (Student's t)."""
    n = len(differences)
    if n < 2:
        return differences[0], math.nan
    return statistics.mean(differences), half_interval(differences)


def table(rows: list[dict[str, Any]], baseline: str) -> str:
    """Markdown: mean and deviation of every variant, and its paired difference from `baseline`."""
    by_variant = defaultdict(dict)
    for row in rows:
        by_variant[row["variant"]][row["seed"]] = row
    lines = ["| variant | top-1 | n | difference (95%) | averaged weights | parameters | matmul MFLOPs | elementwise | "
             "ms/step |", "|---|---|---|---|---|---|---|---|---|"]
    reference, notes = by_variant.get(baseline, {}), []
    for variant, runs in sorted(by_variant.items(), key=lambda item: -statistics.mean(r["top1"] for r in item[1].values())):
        top1, averaged = ([row[key] for row in runs.values()] for key in ("top1", "top1_ema"))
        pairs = [runs[seed]["top1"] - reference[seed]["top1"] for seed in runs if seed in reference]
        mean, half = interval(pairs) if pairs else (math.nan, math.nan)
        difference = "" if variant == baseline or not pairs else (
            f"{mean:+.2f}" + (f" [{mean - half:+.2f}, {mean + half:+.2f}]" if len(pairs) > 1 else "")
            + (f" n={len(pairs)}" if len(pairs) != len(runs) else ""))
        first = next(iter(runs.values()))
        if reference:
            mismatch = cost_mismatch(_cost(first), _cost(next(iter(reference.values()))))
            notes += [f"{variant} and {baseline} are {mismatch}"] if mismatch else []
        lines.append(f"| {variant} | {_spread(top1)} | {len(runs)} | {difference} | {_spread(averaged)} | "
                     f"{int(first['parameters']):,} | {first['matmul_mflops']} | {first['elementwise_mflops']} | "
                     f"{statistics.median(float(r['step_ms']) for r in runs.values()):.0f} |")
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _cost(row: dict[str, Any]) -> dict[str, float]:
    return {"parameters": int(row["parameters"]), "matmul FLOPs": round(1e6 * float(row["matmul_mflops"]))}


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


# The rows of the picture in docs/results.md -> their names there.
PLAIN_NAMES = {"gkan": "group KAN", "relu2": "MLP, squared ReLU", "mlp": "MLP, GELU", "kan": "full-edge KAN, repaired",
               "ekan": "efficient-KAN", "kan-original": "full-edge KAN, original"}


def plot(rows: list[dict[str, Any]], file: Path, title: str, plain: bool = False) -> None:
    """A row for each variant. plain: only those of `PLAIN_NAMES`, under these names."""
    if plain:
        rows = [{**row, "variant": PLAIN_NAMES[row["variant"]]} for row in rows if row["variant"] in PLAIN_NAMES]
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    by_variant = defaultdict(list)
    for row in rows:
        by_variant[row["variant"]].append(row)
    names = sorted(by_variant, key=lambda name: statistics.mean(r["top1"] for r in by_variant[name]))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.35 * len(names)), layout="constrained")
    for y, name in enumerate(names):
        values = [row["top1"] for row in by_variant[name]]
        axes.plot(values, [y] * len(values), "o", alpha=0.6)
        axes.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], "k-", linewidth=1.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("top-1 (%): a point for each seed, a bar at the mean")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def report(results: Path, baseline: str) -> None:
    """Print a table for each setting and length, write them to report.md, and draw a picture for each."""
    rows = read_rows(results / "runs.csv")
    if not rows:
        sys.exit(f"error: {results} holds no finished run yet")
    parts = [f"Written by `benchmarks/accuracy.py report` from `runs.csv`: PyTorch {torch.__version__}, timm {timm.__version__}, "
             f"one thread a run. A difference is paired by seed, its 95% interval is Student's. Milliseconds a step are the "
             f"median over seeds of each run's fastest epoch, on a machine that had other work."]
    for setting, epochs in sorted({(row["setting"], row["epochs"]) for row in rows}):
        chosen = [row for row in rows if (row["setting"], row["epochs"]) == (setting, epochs)]
        reference = baseline + (f",epochs={epochs}" if epochs != RECIPE["epochs"] and "epochs=" not in baseline else "")
        parts.append(f"## {setting}, {epochs} epochs, difference from {reference}\n\n{table(chosen, reference)}")
        plot(chosen, results / f"{setting}_{epochs}_epochs.png", f"CIFAR-10, {setting}, {epochs} epochs")
        if (setting, epochs) == ("scratch", RECIPE["epochs"]):
            plot(chosen, results / "summary.png", f"CIFAR-10 from scratch, {epochs} epochs", plain=True)
    text = "\n\n".join(parts)
    print(text)
    (results / "report.md").write_text(f"# Accuracy\n\n{text}\n")


# ---------------------------------------------------------------- command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=["scratch", "transfer", "convert", "report"])
    parser.add_argument("--data", type=Path, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--variants", nargs="+", metavar="V")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--baseline", default="mlp", metavar="V", help="the variant to compare the others with")
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                                                        else 1), help="runs at a time, a thread each")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "accuracy", help="checkpoints and logs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.setting == "report":
        report(args.results, args.baseline)
        return 0
    if not args.data or not (args.variants or args.setting == "convert"):
        parser.error("give --data FOLDER and --variants")
    if args.setting == "convert":
        convert(args.seeds, args.data, args.work_dir, args.results)
        return 0
    if args.worker:
        run(args.setting, args.variants[0], args.seeds[0], args.data, args.work_dir, args.results)
        return 0
    done = {(row["setting"], row["variant"], row["epochs"], row["seed"]) for row in read_rows(args.results / "runs.csv")}
    epochs = {variant: parse_variant(variant)[3]["epochs"] for variant in args.variants}
    todo = [(variant, seed) for seed in args.seeds for variant in args.variants
            if (args.setting, variant, epochs[variant], seed) not in done]
    load_images(args.data, args.work_dir)
    failures = []

    def work(job: tuple[str, int]) -> None:
        variant, seed = job
        log = args.work_dir / args.setting / run_name(variant, epochs[variant], seed) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as stream:
            code = subprocess.call(
                [sys.executable, __file__, args.setting, "--worker", "--data", str(args.data), "--variants", variant,
                 "--seeds", str(seed), "--work-dir", str(args.work_dir), "--results", str(args.results)],
                stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if code:
            failures.append(f"{variant} seed {seed} (exit code {code}, see {log})")
        print(f"{'failed' if code else 'done'}: {variant} seed {seed}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    if failures:
        print("error: " + "; ".join(failures), file=sys.stderr)
        return 1
    report(args.results, args.baseline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
