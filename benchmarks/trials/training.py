"""One run: its model and state from the checkpoint on, trained alone on a CPU, and what it leaves behind."""
import fcntl
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.trials.images import MEAN, STD, Batches, EvalBatches, Images, normalise, subset
from benchmarks.trials.models import build, spec_of
from benchmarks.trials.variants import TRANSFERS, Run, parse_variant
from engine import train_epochs
from losses import build_criterion
from models_kan import KAN_OPTIONS
from vision_kan.checkpoints.read import CHECKPOINT, load_file
from vision_kan.checkpoints.write import save_checkpoint
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.common.seeds import seed_everything
from vision_kan.common.text import to_builtin_types
from vision_kan.config.resolve import parse_args
from vision_kan.data.transforms import build_mixup
from vision_kan.layers.function_layer import function_layers
from vision_kan.models.cost import count_flops, count_parameters
from vision_kan.models.finetune import load_finetune
from vision_kan.run.folder import versions
from vision_kan.training.criterion import Criterion
from vision_kan.training.optim import build_state
from vision_kan.training.precision import choose_amp_dtype
from vision_kan.training.speed import missing_for_compile
from vision_kan.training.state import results_of
from vision_kan.training.training import Hooks, Training
from vision_kan.training.updates import Updater

CLASSES_A, CLASSES_B = range(0, 5), range(5, 10)        # transfer: pretrain, fine-tune


def flags_of(recipe: dict[str, Any], updates: int) -> Namespace:
    """main.py's flags for a recipe. updates: of an epoch."""
    args = parse_args(["--data-set", "FOLDER", "--input-size", "32", "--unscale-lr", "--sched-on-updates", "--aa", "none",
                       "--color-jitter", "0", "--reprob", "0", "--no-repeated-aug"]).args
    for key in ("epochs", "batch_size", "lr", "min_lr", "weight_decay", "smoothing", "clip_grad", "kan_lr_mult",
                "kan_weight_decay", "mixup", "cutmix", "drop_path"):
        setattr(args, key, recipe[key])
    args.mean, args.std = MEAN, STD
    args.model_ema, args.model_ema_decay = recipe["ema_decay"] > 0, recipe["ema_decay"]
    args.warmup_epochs = recipe["warmup_steps"] / updates       # timm turns it into updates again
    return args


def description(run: Run, args: Namespace, classes: list[str]) -> dict[str, Any]:
    """The entries of a checkpoint by which `main.py --eval` and every tool take it. A model that this library does not have is
    under a name that they refuse."""
    spec = spec_of(run.variant, len(classes))
    flags = {**vars(args), **{key: spec.kwargs[key] for key in KAN_OPTIONS if key in spec.kwargs}, "model": spec.name,
             "seed": run.seed, "nb_classes": len(classes), "warmup_epochs": round(args.warmup_epochs)}
    if run.variant.options.get("weight_init") == "mimetic":
        flags["weight_init"] = "mimetic"
    return {"args": to_builtin_types(flags), "model_args": to_builtin_types({"name": spec.name, "kwargs": spec.kwargs}),
            "class_names": classes, "versions": versions(), "trial": f"{run.setting} {run.words} seed {run.seed}"}


class Smooth(Criterion):
    """A criterion plus `weight` times the sum of the squared second differences of all C over grid points: 0 for functions that
    are straight lines in their coefficients."""

    def __init__(self, criterion: Criterion, model: nn.Module, weight: float):
        super().__init__(None)
        self.criterion, self.weight = criterion, weight
        self.functions = [p for layer in function_layers(model).values() for p in layer.scaled_parameters()]

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(c.diff(n=2, dim=-1).square().sum() for c in self.functions)
        return self.criterion(images, outputs, targets) + self.weight * penalty


class Trial:
    """A run in training, from its checkpoint on if there is one."""

    def __init__(self, run: Run, model: nn.Module, images: Images, folder: Path, process: Process):
        self.run, self.recipe, self.folder, self.process = run, run.variant.recipe, folder, process
        self.steps = len(images["train"]) // self.recipe["batch_size"]     # of an epoch
        self.args = flags_of(self.recipe, self.steps)
        self.about = description(run, self.args, images.classes)
        self.flops, self.parameters = count_flops(model), count_parameters(model)
        # bfloat16 or float32: the steps of side_by_side.py do not scale losses, as float16 needs
        self.amp_dtype = choose_amp_dtype("auto", process.device)
        self.amp_dtype = torch.float32 if self.amp_dtype == torch.float16 else self.amp_dtype
        self.model = model.to(process.device)
        self.state = build_state(self.args, self.model, self.args.lr, self.steps, process.device, self.amp_dtype)
        self.mixup = build_mixup(self.args, len(images.classes))
        self.criterion: Criterion = build_criterion(self.args, len(images.classes), self.mixup is not None)
        if self.recipe["smooth"]:
            self.criterion = Smooth(self.criterion, model, self.recipe["smooth"])
        self.progress: dict[str, Any] = {"curve": [], "seconds": 0.0, "step_ms": []}
        if (folder / CHECKPOINT).exists():
            try:
                stored = load_file(folder / CHECKPOINT)
            except UserError as error:
                raise UserError(f"{folder / CHECKPOINT} is damaged: remove it, and the run begins again") from error
            self.state.load_state_dict(stored)
            self.progress = stored["progress"]
        self.set_function_rate()

    @property
    def done(self) -> bool:
        return self.state.epoch >= self.recipe["epochs"]

    def training(self, updater: Updater) -> Training:
        return Training(updater, self.mixup, epochs=self.recipe["epochs"], seed=self.run.seed, print_freq=100)

    def set_function_rate(self) -> None:
        """For the next epoch: `kan_lr_mult` of the first goes evenly to `kan_lr_end` of the last."""
        first, last, epochs = self.recipe["kan_lr_mult"], self.recipe["kan_lr_end"], self.recipe["epochs"]
        for group in self.state.optimizer.param_groups if last else ():
            if "kan_multiple" in group:
                group["lr_scale"] = first + (last - first) * min(1, self.state.epoch / max(1, epochs - 1))

    def note(self, loss: float, results: dict[str, dict[str, float]], seconds: float, step_ms: float) -> None:
        """The outcome of an epoch, after `state.next_epoch`."""
        top1 = results["test"]["acc1"]
        self.progress["curve"].append(round(top1, 2))
        self.progress["step_ms"].append(step_ms)
        self.progress |= {"seconds": self.progress["seconds"] + seconds, "loss": loss,
                          "top1_ema": results["ema_test"]["acc1"] if self.state.ema else top1}
        self.state.results = results_of(results, self.args)
        self.set_function_rate()

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint({**self.state.state_dict(), **self.about, "progress": self.progress}, self.folder, keep=1)

    def columns(self) -> dict[str, Any]:
        """The row of a finished run."""
        run, progress = self.run, self.progress
        device = torch.cuda.get_device_name(self.process.device) if self.process.device.type == "cuda" else run.device
        return {"setting": run.setting, "variant": run.variant.text, "seed": run.seed, "epochs": self.recipe["epochs"],
                "lr": self.recipe["lr"], "weight_decay": self.recipe["weight_decay"], "size": run.variant.size,
                "device": device, "top1": progress["curve"][-1], "top1_ema": round(progress["top1_ema"], 2),
                "top1_by_epoch": " ".join(map(str, progress["curve"])), "train_loss": round(progress["loss"], 4),
                "parameters": self.parameters, "matmul_mflops": round(self.flops.matmul / 1e6, 2),
                "elementwise_mflops": round(self.flops.elementwise / 1e6, 3), "seconds": round(progress["seconds"]),
                "step_ms": round(min(progress["step_ms"]), 2), "torch": torch.__version__, "timm": timm.__version__}


def begin(run: Run, images: Images, work: Path, process: Process) -> Trial:
    """A trial of `scratch` or `long`."""
    batch = normalise(images["train"][:: max(1, len(images["train"]) // 256)][:256].cpu())     # where the model is made
    model = build(run.variant, run.seed, len(images.classes), run.siblings(work), batch)
    return Trial(run, model, images, run.folder(work), process)


def train(trial: Trial, images: Images, deadline: float = float("inf")) -> bool:
    """Train alone, as main.py does. Returns whether the run is finished; if not, `deadline` (by time.monotonic()) has passed in
    the last epoch."""
    batches = Batches(images, trial.args, trial.run.seed, trial.process.device)
    val = EvalBatches(images, trial.process.device)
    net = trial.model if missing_for_compile("cpu") else torch.compile(trial.model, dynamic=False)
    training = trial.training(Updater(net, trial.state, trial.criterion, trial.process, amp_dtype=trial.amp_dtype,
                                      clip_grad=trial.args.clip_grad))
    start = time.perf_counter()
    for epoch in train_epochs(training, batches, val, Hooks()):
        trial.note(epoch.trained["loss"], epoch.results, time.perf_counter() - start,
                   1000 * epoch.trained["seconds"] / trial.steps)
        trial.save()
        start = time.perf_counter()
        if time.monotonic() > deadline:
            break
    return trial.done


# ---------------------------------------------------------------- transfer
def begin_transfer(run: Run, images: Images, work: Path, process: Process, deadline: float) -> tuple[Trial, Images, float] | None:
    """The trial with the weights of an MLP ViT trained on the first classes and a new head; the images of the other classes; and
    the largest difference of its logits from the MLP's, relative to the largest logit, before any training. None if `deadline`
    (by time.monotonic()) has passed before the MLP was trained."""
    mlp = Run(run.setting, parse_variant("mlp", size=run.variant.size, epochs=TRANSFERS[run.setting]), run.seed)
    folder = run.siblings(work) / f"pretrained-seed{run.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    twin: Any = build(mlp.variant, run.seed, len(CLASSES_A))
    first = subset(images, CLASSES_A)
    with open(folder / "lock", "w") as lock:     # another variant may train it at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not train(Trial(mlp, twin, first, folder, process), first, deadline):
            return None
    model: Any = build(run.variant, run.seed, len(CLASSES_A))
    load_finetune(model, twin.state_dict())
    twin.eval(), model.eval()
    with torch.inference_mode():
        batch = normalise(first["val"][:500])
        logits, converted = twin(batch), model(batch)
    error = ((converted - logits).abs().max() / logits.abs().max()).item()
    for net in (twin, model):
        seed_everything(run.seed, 2)
        net.reset_classifier(len(CLASSES_B))
    model.head.load_state_dict(twin.head.state_dict())
    second = subset(images, CLASSES_B)
    return Trial(run, model, second, run.folder(work), process), second, error
