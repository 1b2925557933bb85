"""Trained MLP ViTs converted to full-edge KANs, without training."""
import csv
import statistics
from pathlib import Path

import timm

from benchmarks.trials.images import EvalBatches, load_images, normalise
from benchmarks.trials.models import MODEL, build
from benchmarks.trials.variants import SIZES, Run, parse_variant
from engine import evaluate
from models_kan import ModelSpec
from vision_kan.checkpoints.read import CHECKPOINT, load_file
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.models.conversion import load_converted

GRIDS = [((-2.0, 2.0), 0.33), ((-2.0, 2.0), None), ((-3.0, 3.0), None), ((-4.0, 4.0), None)]      # range, h


def convert(seeds: list[int], data: Path, work: Path, results: Path) -> None:
    """Top-1 of trained MLP ViTs and of the full-edge KANs converted from them, for several grids, as a table and a CSV."""
    images, process = load_images(data, work), Process()
    val = EvalBatches(images, process.device)
    batch = normalise(images["train"][:: max(1, len(images["train"]) // 256)][:256])
    name = f"{SIZES['nano']}_KAN"
    rows = []
    for seed in seeds:
        run = Run("scratch", parse_variant("mlp"), seed)
        checkpoint = run.folder(work) / CHECKPOINT
        stored = load_file(checkpoint) if checkpoint.exists() else {"epoch": -1}
        if stored["epoch"] < run.variant.recipe["epochs"] - 1:
            raise UserError(f"{checkpoint} is missing or not of the last epoch: run scratch --variants mlp --seeds {seed} first")
        state = stored["model"]
        source = build(run.variant, seed, len(images.classes))
        source.load_state_dict(state)
        top1 = evaluate(source, val, process)["acc1"]
        for grid, h in GRIDS:
            kwargs = {**MODEL, "num_classes": len(images.classes), "hdim_kan": 4 * source.embed_dim, "kan_basis": "covering",
                      "kan_second_norm": "static", "kan_grid_range": grid, **({} if h is None else {"kan_h": h})}
            model = timm.create_model(name, **kwargs)
            _, errors = load_converted(model, ModelSpec(name, kwargs), state, lambda: batch)
            rows.append({"seed": seed, "grid": f"[{grid[0]:g}, {grid[1]:g}]", "h": "spacing" if h is None else h,
                         "top1_mlp": round(top1, 2), "top1_kan": round(evaluate(model, val, process)["acc1"], 2),
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
