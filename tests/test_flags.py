
"""No flag is dead: each of DeiT's 71 and of ours changes what the real program builds, reads, writes or refuses.

`EFFECTS` has a row for each flag: what to look at, the command line with the flag, and the one without it. Most
look at what `main` hands to the first epoch, which is caught there; the others train, evaluate or start processes.
"""
import io
import json
import re
import shutil
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from e2e import QUICK, free_port, run, write_digits
from helpers import DEIT, NANO, differences, every, scalars
from PIL import Image
from torch import nn

import engine
import main as program
from datasets import build_loaders
from vision_kan import kernels
from vision_kan.common.process import Process
from vision_kan.config.flags import FLAGS
from vision_kan.data import transforms

GROUPS = "--model vit_nano_patch8_32_GKAN"
STUDENT = "--model deit_tiny_distilled_patch16_224_KAN --input-size 32 --hdim_kan 8"
# Nothing random in an image, so that what a flag adds to it stands out.
STILL = "--aa none --reprob 0 --hflip 0 --color-jitter 0 --crop-padding 0"
EVALUATION = "--eval --resume {run}/checkpoint.pth --data-path {data} --device cpu --num_workers 0"
UNMOVED = "--epochs 3 --keep 9 --lr 1e-30 --min-lr 0 --no-model-ema"
PLATEAU = "--sched plateau --unscale-lr --lr 1 --min-lr 0 --decay-rate 0.5 --epochs 9 --patience-epochs 1"


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """What the command lines below name as {data}, {run}, {teacher} and so on."""
    folder = tmp_path_factory.mktemp("flags")
    places = {"folder": folder, "run": folder / "run", "recipe": folder / "recipe.yaml", "port": free_port(),
              "data": write_digits(folder / "data"), "small": write_digits(folder / "small", train=8, classes=2),
              "data64": write_digits(folder / "data64", size=64), "inat": write_inat(folder / "inat"),
              "teacher": folder / "teacher.pth", "other_teacher": folder / "other.pth", "weights": folder / "weights.pth"}
    places["recipe"].write_text("lr: 0.25\n")
    places["single"], places["wds"] = write_digits(folder / "split", val=0) / "train", write_wds(folder / "wds")
    places["same"] = write_digits(folder / "same")
    places["uneven"] = write_digits(folder / "uneven")
    for path in sorted((places["uneven"] / "train/digit1").iterdir())[3:]:
        path.unlink()
    places["turned"] = write_digits(folder / "turned")
    for path in places["turned"].rglob("*.png"):
        exif = Image.Exif()
        exif[0x0112] = 6        # lying on its side
        Image.open(path).save(path, exif=exif)
    pictures = sorted(places["same"].rglob("*.png"))
    for path in pictures[1:]:
        path.write_bytes(pictures[0].read_bytes())
    assert run(*QUICK, "--epochs", 1, "--data-path", places["data"], "--output_dir", places["run"]) == 0
    for name, model, seed in (("teacher", NANO, 1), ("other_teacher", NANO, 2), ("weights", NANO, 3)):
        torch.manual_seed(seed)
        torch.save({"model": timm.create_model(model, num_classes=3).state_dict()}, places[name])
    PLACES.clear()
    PLACES.update(places)
    caught.cache_clear()


PLACES: dict[str, object] = {}


def write_inat(folder: Path) -> Path:
    """iNaturalist 2019 with three species of two kingdoms, an image each."""
    species = [("Plantae", "fern"), ("Plantae", "moss"), ("Animalia", "newt")]
    folder.mkdir()
    (folder / "categories.json").write_text(json.dumps([
        {"id": i, "kingdom": kingdom, "name": name} for i, (kingdom, name) in enumerate(species)]))
    for half in ("train", "val"):
        images = [{"id": i, "file_name": f"train_val2019/Any/{i % 3}/{half}{i}.jpg"} for i in range(18)]
        (folder / f"{half}2019.json").write_text(json.dumps(
            {"images": images, "annotations": [{"image_id": i, "category_id": i % 3} for i in range(18)]}))
        for i, image in enumerate(images):
            path = folder / image["file_name"].replace("Any/", "")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i, i, i)).save(path)
    return folder


def write_wds(folder: Path) -> Path:
    """Two shards of 16 records with two images (under png and other.png) and two classes (cls and other.cls)."""
    folder.mkdir()
    for half in ("train", "val"):
        with tarfile.open(folder / f"{half}.tar", "w") as tar:
            for i in range(16):
                for key, content in (("png", picture(i)), ("other.png", picture(16 * i)), ("cls", b"%d" % (i % 3)),
                                     ("other.cls", b"%d" % (i % 2))):
                    member = tarfile.TarInfo(f"{i}.{key}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def picture(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (32, 32), grey).save(file, "PNG")
    return file.getvalue()


WDS = "--data-set wds/x --data-path {wds} --num-classes 3 --data-split train.tar|16"


# ---------------------------------------------------------------- what main hands to the first epoch
class Caught(BaseException):
    pass


def words(line: str) -> list[str]:
    return line.format(**PLACES).split()


@cache
def caught(line: str) -> SimpleNamespace:
    """What `train_one_epoch` is called with, caught before anything is trained."""
    seen = SimpleNamespace()

    def catch(training, loader, hooks):
        state = training.state
        vars(seen).update(training=training, loader=loader, hooks=hooks, state=state, model=state.model,
                          criterion=training.criterion, weights={k: v.clone() for k, v in state.model.state_dict().items()})
        raise Caught

    given = words(line)
    data = [] if "--data-path" in given or "--data-set" in given else ["--data-path", str(PLACES["data"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_one_epoch", catch)
        try:
            code = run(*QUICK, "--epochs", 4, *data, *given)
            raise AssertionError(f"{line} did not come to train: exit code {code}")
        except Caught:
            return seen


def optimizer(line):
    groups = caught(line).state.optimizer.param_groups
    return type(caught(line).state.optimizer).__name__, [{k: v for k, v in g.items() if k != "params"} for g in groups]


def rates(line):
    """The learning rate of each epoch, for an accuracy that rises once and then stays."""
    seen = caught(line)
    scheduler, steps = seen.state.scheduler, []
    groups = [dict(group) for group in seen.state.optimizer.param_groups]
    for epoch in range(seen.training.epochs):
        if not line.startswith("--sched plateau"):
            scheduler.step(epoch)
        for update in range(len(seen.loader)):
            scheduler.step_update(epoch * len(seen.loader) + update)
            steps.append(max(group["lr"] for group in seen.state.optimizer.param_groups))
        if line.startswith("--sched plateau"):
            scheduler.step(epoch + 1, 50.0)
    for group, before in zip(seen.state.optimizer.param_groups, groups):
        group.update(before)
    return steps


def batches(line):
    """Targets and images of an epoch."""
    loader = caught(line).loader
    loader.sampler.set_epoch(0)
    return [(targets, images) for images, targets in loader]


def images_of(line):
    return torch.cat([images for _, images in batches(line)])


def draws(line):
    """Indices into the data set, and repeats."""
    return [(key.index, key.repeat) for key in caught(line).loader.sampler]


def loss(line):
    """Of fixed outputs, images and targets."""
    seen = caught(line)
    generator = torch.Generator().manual_seed(0)
    images, a, b = (torch.randn(shape, generator=generator) for shape in ((4, 3, 32, 32), (4, 3), (4, 3)))
    outputs = torch.cat([a, b]) if seen.criterion.copies == 2 else (a, b) if "--distillation-type" in line else a
    soft = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.6, 0.35], [0.05, 0.05, 0.9], [0.9, 0.05, 0.05]])
    return seen.criterion(images, outputs, soft if seen.training.mixup else soft.argmax(1)).item()


def mixed(line):
    """A mixed batch: how many of its pixels are not the image's, its targets."""
    mixup = caught(line).training.mixup
    if mixup is None:
        return None
    found = []
    for seed in range(8):
        np.random.seed(seed)
        images, targets = mixup(torch.arange(4.).view(4, 1, 1, 1).expand(4, 3, 32, 32).clone(), torch.tensor([0, 1, 2, 0]))
        found.append((images, targets))
    return found


def rates_of_dropout(line):
    model = caught(line).model
    return {name: module.p if isinstance(module, nn.Dropout) else module.drop_prob for name, module in
            model.named_modules() if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob")}


def structure(line):
    return repr(caught(line).model)


def basis(line):
    return {name: value for name, value in caught(line).model.named_buffers()}, [
        (name, tuple(value.shape)) for name, value in caught(line).model.named_parameters()], [
        module.h for module in caught(line).model.modules() if isinstance(getattr(module, "h", None), float)]


def trainable(line):
    return {name for name, parameter in caught(line).model.named_parameters() if parameter.requires_grad}


def average(line):
    ema = caught(line).state.ema
    return ema and (ema.decay, ema.device, ema.use_warmup)


def initial_weights(line):
    return caught(line).weights


def data_of(line):
    data = caught(line).loader.dataset
    return len(data), data.classes


# ---------------------------------------------------------------- what the program does
def trained(line):
    """Weights after an epoch of `train_one_epoch` as main calls it."""
    seen = caught(line)
    seen.model.load_state_dict(seen.weights)
    seen.loader.sampler.set_epoch(0)
    engine.train_one_epoch(seen.training, seen.loader, seen.hooks)
    result = {key: value.clone() for key, value in seen.model.state_dict().items()}
    seen.model.load_state_dict(seen.weights)
    caught.cache_clear()
    return result


def printed(line):
    """Exit code, standard output and error of the whole program."""
    CAPTURE.readouterr()
    code = run(*words(line))
    out, err = CAPTURE.readouterr()
    return code, out, err


def wording(line):
    """What a short training prints, without its numbers: no two runs take the same time."""
    _, out, err = printed(" ".join([*QUICK, f"--data-path {{data}} --epochs 1 {line}"]))
    return re.sub(r"[0-9][0-9.:]*", "#", out + err)


def backend(line):
    """What computes the KAN layers when training begins."""
    caught(line)
    name = kernels.chosen()
    kernels.use("auto")
    return name


def evaluated(line):
    """The images of an evaluation."""
    def catch(model, loader, *args, **options):
        raise Caught(torch.cat([images for images, _ in loader]))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught_images:
        patch.setattr(program, "evaluate", catch)
        run(*words(f"--eval --resume {{run}}/checkpoint.pth --device cpu --num_workers 0 --data-path {{data64}} {line}"))
    return caught_images.value.args[0]


def shard(line):
    """Images that the first of two processes evaluates."""
    args = program.parse_args([*QUICK, "--input-size", "32", "--data-path", str(PLACES["data"]), *words(line)]).args
    args.data_set = "FOLDER"
    return list(build_loaders(args, Process(0, 2)).val.sampler)


def pinned(line):
    args = program.parse_args([*QUICK, "--input-size", "32", "--data-path", str(PLACES["data"]), *words(line)]).args
    args.data_set = "FOLDER"
    return build_loaders(args, Process(device=torch.device("cuda"))).train.pin_memory


def files_written(line):
    folder = Path(words(line)[-1]) if line else PLACES["folder"] / "not_given"
    assert run(*QUICK, "--epochs", 1, "--data-path", PLACES["data"], *words(line)) == 0
    return folder.exists() and sorted(path.name for path in folder.iterdir() if path.suffix == ".pth")


def tags_written(line):
    """What TensorBoard has to show of a run of an epoch."""
    assert run(*QUICK, "--epochs", 1, "--data-path", PLACES["data"], *words(line)) == 0
    return sorted(scalars(Path(words(line)[-1])))


CAPTURE = None


@pytest.fixture(autouse=True)
def capture(capsys):
    global CAPTURE
    CAPTURE = capsys
    yield
    CAPTURE = None


def saves(line):
    """How many checkpoints a run of one epoch writes."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vision_kan.run.folder.save_checkpoint", lambda *args: calls.append(args))
        assert run(*QUICK, "--epochs", 1, "--data-path", PLACES["data"], *words(line)) == 0
    return len(calls)


def with_a_broken_image(line):
    """Exit code of a run that meets one image that cannot be read."""
    data = Path(tempfile.mkdtemp(dir=PLACES["folder"])) / "data"
    shutil.copytree(PLACES["data"], data)
    next((data / "train").rglob("*.png")).write_text("no image")
    return run(*QUICK, "--epochs", 1, "--data-path", data, *words(line))


def deterministic(line):
    caught(line)
    try:
        return torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def joined(line, world="1"):
    """Exit code of a single process that a launcher started, and what it says on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", world)
        code, _, err = printed(f"{EVALUATION} {line}")
    return code, err


def fetching(line):
    """What the program says for a CIFAR-10 that is not there and whose server is not either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
        return printed(f"--data-set CIFAR10 --data-path {{folder}}/absent --device cpu {line}")


def tracked(line):
    """Names of the experiments that an MLflow store holds after a run."""
    mlflow = pytest.importorskip("mlflow")
    folder = Path(tempfile.mkdtemp(dir=PLACES["folder"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", (folder / "store").as_uri())
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        assert run(*QUICK, "--epochs", 1, "--data-path", PLACES["data"], "--output_dir", folder / "run", *words(line)) == 0
        return sorted(experiment.name for experiment in mlflow.MlflowClient().search_experiments())


# ---------------------------------------------------------------- the table
EFFECTS = {
    # run
    "batch_size": (lambda line: len(batches(line)[0][0]), "--batch-size 8", ""),
    "epochs": (lambda line: caught(line).training.epochs, "--epochs 9", ""),
    "grad_accum": (trained, "--grad-accum 3", ""),
    "bce_loss": (loss, "--bce-loss", ""),
    "unscale_lr": (optimizer, "--unscale-lr", ""),
    "config": (optimizer, "--config {recipe}", ""),
    "list_models": (printed, "--list-models", "--no-such-flag"),
    # model
    "model": (structure, "--model vit_nano_patch8_32_ViT", ""),
    "ffn": (structure, "--model vit_nano_patch8_32 --ffn kat", ""),
    "input_size": (lambda line: images_of(line).shape, "--input-size 64", ""),
    "drop": (rates_of_dropout, "--drop 0.3", ""),
    "drop_path": (rates_of_dropout, "--drop-path 0.5", ""),
    "hdim_kan": (structure, "--hdim_kan 16", ""),
    "kan_grid_range": (basis, "--kan-grid-range -1 1", ""),
    "kan_grid_points": (basis, "--kan-grid-points 5", ""),
    "kan_h": (trained, "--kan-h 0.7", ""),
    "kan_trainable_grid": (basis, "--kan-trainable-grid", ""),
    "kan_trainable_h": (basis, "--kan-trainable-h", ""),
    "kan_basis": (basis, "--kan-basis covering", ""),
    "kan_base_branch": (basis, "--kan-base-branch", ""),
    "kan_second_norm": (structure, "--kan-second-norm static", ""),
    "kan_groups": (basis, f"{GROUPS} --kan-groups 2", GROUPS),
    "kan_base": (structure, f"{GROUPS} --kan-base relu2", GROUPS),
    "kan_function": (structure, f"{GROUPS} --kan-function gaussian", GROUPS),
    "kan_input_phi": (basis, f"{GROUPS} --no-kan-input-phi", GROUPS),
    "kan_trainable_base": (basis, f"{GROUPS} --kan-trainable-base", GROUPS),
    "kan_backend": (backend, "--kan-backend reference", ""),
    "grad_checkpointing": (lambda line: caught(line).model.grad_checkpointing, "--grad-checkpointing", ""),
    "amp_dtype": (trained, "--amp-dtype bfloat16", ""),
    # moving average
    "model_ema": (average, "--no-model-ema", ""),
    "model_ema_decay": (average, "--model-ema-decay 0.5", ""),
    "model_ema_warmup": (average, "--model-ema-warmup", ""),
    "model_ema_force_cpu": (average, "--model-ema-force-cpu", ""),
    "patience": (files_written, f"{UNMOVED} --patience 1 --output_dir {{folder}}/patient",
                 f"{UNMOVED} --output_dir {{folder}}/impatient"),
    # optimizer
    "opt": (optimizer, "--opt sgd", ""),
    "opt_eps": (optimizer, "--opt-eps 1e-3", ""),
    "opt_betas": (optimizer, "--opt-betas 0.5 0.6", ""),
    "clip_grad": (trained, "--opt sgd --clip-grad 1e-3", "--opt sgd"),
    "momentum": (optimizer, "--opt sgd --momentum 0.5", "--opt sgd"),
    "weight_decay": (optimizer, "--weight-decay 0.3", ""),
    "layer_decay": (optimizer, "--layer-decay 0.5", ""),
    "weight_init": (initial_weights, "--weight-init mimetic", ""),
    "kan_lr_mult": (trained, f"{GROUPS} --kan-lr-mult 5", GROUPS),
    "kan_weight_decay": (optimizer, f"{GROUPS} --kan-weight-decay 0.3", GROUPS),
    # learning rate
    "sched": (rates, "--sched step --decay-epochs 1", ""),
    "sched_on_updates": (rates, "--sched-on-updates", ""),
    "lr": (optimizer, "--lr 0.01", ""),
    "lr_noise": (rates, "--lr-noise 0.2", ""),
    "lr_noise_pct": (rates, "--lr-noise 0 --lr-noise-pct 0.1", "--lr-noise 0"),
    "lr_noise_std": (rates, "--lr-noise 0 --lr-noise-std 0.01", "--lr-noise 0"),
    "warmup_lr": (rates, "--warmup-epochs 2 --warmup-lr 1e-7", "--warmup-epochs 2"),
    "min_lr": (rates, "--min-lr 1e-9", ""),
    "decay_epochs": (rates, "--sched step --decay-epochs 2", "--sched step"),
    "warmup_epochs": (rates, "--warmup-epochs 2", ""),
    "cooldown_epochs": (rates, f"{PLATEAU} --cooldown-epochs 0", PLATEAU),
    "patience_epochs": (rates, f"{PLATEAU} --patience-epochs 3", PLATEAU),
    "decay_rate": (rates, "--sched step --decay-epochs 1 --decay-rate 0.5", "--sched step --decay-epochs 1"),
    # augmentation
    "color_jitter": (images_of, f"{STILL} --color-jitter 0.5", STILL),
    "crop_padding": (images_of, f"{STILL} --crop-padding 6", STILL),
    "hflip": (images_of, f"{STILL} --hflip 1", STILL),
    "aa": (images_of, f"{STILL} --aa rand-m9-n2", STILL),
    "smoothing": (loss, "--mixup 0 --cutmix 0 --smoothing 0.4", "--mixup 0 --cutmix 0"),
    "train_interpolation": (images_of, f"{STILL} --input-size 64 --train-interpolation nearest", f"{STILL} --input-size 64"),
    "repeated_aug": (draws, "--repeated-aug", ""),
    "train_mode": (trained, "--drop 0.5 --no-train-mode", "--drop 0.5"),
    "ThreeAugment": (images_of, f"{STILL} --ThreeAugment", STILL),
    "src": (images_of, f"{STILL} --input-size 64 --src", f"{STILL} --input-size 64"),
    # random erasing
    "reprob": (images_of, f"{STILL} --reprob 1", STILL),
    "remode": (images_of, f"{STILL} --reprob 1 --remode const", f"{STILL} --reprob 1"),
    "recount": (images_of, f"{STILL} --reprob 1 --recount 4", f"{STILL} --reprob 1"),
    "resplit": (images_of, f"{STILL} --reprob 1 --repeated-aug --resplit", f"{STILL} --reprob 1 --repeated-aug"),
    # mixup and cutmix
    "mixup": (mixed, "--mixup 0", ""),
    "cutmix": (mixed, "--cutmix 0", ""),
    "cutmix_minmax": (mixed, "--mixup 0 --cutmix-minmax 0.1 0.2", "--mixup 0"),
    "mixup_prob": (mixed, "--mixup-prob 0.3", ""),
    "mixup_switch_prob": (mixed, "--mixup-switch-prob 1", ""),
    "mixup_mode": (mixed, "--mixup-mode elem", ""),
    # distillation and co-training
    "teacher_model": (printed, *(f"--distillation-type soft {STUDENT} --teacher-path {{teacher}} --teacher-model {name} "
                                 "--data-path {data} --device cpu --num_workers 0 --batch-size 16 --epochs 1 --warmup-epochs 0"
                                 for name in (NANO, "resnet18"))),
    "teacher_path": (loss, *(f"--distillation-type soft {STUDENT} --teacher-model {NANO} --teacher-path {path}"
                             for path in ("{other_teacher}", "{teacher}"))),
    "distillation_type": (loss, *(f"--distillation-type {kind} {STUDENT} --teacher-model {NANO} --teacher-path {{teacher}}"
                                  for kind in ("hard", "soft"))),
    "distillation_alpha": (loss, *(f"--distillation-type hard {STUDENT} --teacher-model {NANO} --teacher-path {{teacher}}"
                                   f"{more}" for more in (" --distillation-alpha 0.9", ""))),
    "distillation_tau": (loss, *(f"--distillation-type soft {STUDENT} --teacher-model {NANO} --teacher-path {{teacher}}"
                                 f"{more}" for more in (" --distillation-tau 3", ""))),
    "cosub": (loss, "--cosub", ""),
    # fine-tuning
    "finetune": (initial_weights, "--finetune {weights}", ""),
    "attn_only": (trainable, "--attn-only", ""),
    # data
    "data_path": (data_of, "--data-path {small}", ""),
    "data_set": (data_of, "--data-set DIGITS", ""),
    "inat_category": (data_of, "--data-path {inat} --inat-category kingdom", "--data-path {inat}"),
    "val_split": (data_of, "--data-path {single} --val-split 0.5", "--data-path {single}"),
    "data_split": (data_of, *(f"--data-set torch/image_folder --data-path {{data}} --data-split {half} val"
                              for half in ("val", "train"))),
    "input_key": (images_of, f"{WDS} val.tar|16 {STILL} --input-key other.png", f"{WDS} val.tar|16 {STILL}"),
    "target_key": (batches, f"{WDS} val.tar|16 {STILL} --target-key other.cls", f"{WDS} val.tar|16 {STILL}"),
    "num_classes": (data_of, f"{WDS} val.tar|16 --num-classes 5", f"{WDS} val.tar|16"),
    "download": (fetching, "--download", ""),
    "eval_crop_ratio": (evaluated, "--eval-crop-ratio 0.5", ""),
    "data_on_device": (images_of, "--aa none --data-on-device on", "--aa none"),
    "augment_on": (images_of, "--augment-on device", ""),
    "class_weights": (loss, *(f"--data-path {{uneven}} --class-weights {kind}" for kind in ("balanced", "none"))),
    "exif_orientation": (images_of, f"--data-path {{turned}} {STILL}", f"--data-path {{turned}} {STILL} --no-exif-orientation"),
    "crop_mode": (evaluated, "--crop-mode border --eval-crop-ratio 1.1", "--eval-crop-ratio 1.1"),
    "interpolation": (evaluated, "--interpolation nearest", ""),
    "mean": (lambda line: (evaluated(line), images_of(f"{STILL} {line}")), "--mean 0.5 0.5 0.5", ""),
    "std": (lambda line: (evaluated(line), images_of(f"{STILL} {line}")), "--std 0.5 0.5 0.5", ""),
    "strict_data": (with_a_broken_image, "--strict-data", ""),
    "max_unreadable": (with_a_broken_image, "--max-unreadable 0", ""),
    "num_workers": (lambda line: caught(line).loader.num_workers, "--num_workers 2", ""),
    "pin_mem": (pinned, "--no-pin-mem", ""),
    # output and state
    "output_dir": (files_written, "--output_dir {folder}/written", ""),
    "device": (lambda line: printed(f"{EVALUATION} {line}")[0], "--device cuda:99", ""),
    "seed": (lambda line: (initial_weights(line), draws(line), images_of(line)), "--seed 5", ""),
    "resume": (lambda line: caught(line).state.epoch, "--resume {run}/checkpoint.pth", ""),
    "start_epoch": (lambda line: caught(line).state.epoch, "--start_epoch 3", ""),
    "eval": (lambda line: printed(f"{EVALUATION.removeprefix('--eval')} {line}"), "--eval", ""),
    "print_freq": (lambda line: printed(" ".join([*QUICK, "--data-path {data} --epochs 1", line]))[1].count("img/s"),
                   "--print-freq 1", ""),
    "log_kan": (tags_written, "--log-kan 1 --output_dir {folder}/kan", "--output_dir {folder}/no_kan"),
    "compile": (lambda line: caught(line).model._compiled_call_impl is None, "--compile", ""),
    "cuda_graph": (lambda line: printed(" ".join([*QUICK, "--data-path {data} --epochs 1", line]))[0], "--cuda-graph on", ""),
    "profile": (wording, "--profile", ""),
    "save_interval_steps": (saves, "--save-interval-steps 1 --output_dir {folder}/steps", "--output_dir {folder}/no_steps"),
    "save_interval_minutes": (saves, "--save-interval-minutes 1e-9 --output_dir {folder}/minutes",
                              "--output_dir {folder}/no_minutes"),
    "keep": (lambda line: printed(" ".join([*QUICK, "--data-path {data} --epochs 3", line])) and sorted(
        path.name for path in Path(words(line)[-1]).glob("checkpoint*")), "--keep 3 --output_dir {folder}/three",
        "--output_dir {folder}/two"),
    "track": (tracked, "--track mlflow", ""),
    "track_project": (tracked, "--track mlflow --track-project other", "--track mlflow"),
    "debug_nan": (lambda line: caught(line).hooks.kept is None, "--debug-nan --output_dir {folder}/nan", ""),
    "deterministic": (deterministic, "--deterministic", ""),
    # several processes
    "dist_timeout": (lambda line: joined(line, world="2"), "--dist-timeout 0.1 --dist_url file://{folder}/meet1",
                     "--dist-timeout 0.2 --dist_url file://{folder}/meet2"),
    "dist_eval": (shard, "--dist-eval", ""),
    "distributed": (lambda line: printed(f"{EVALUATION} {line}")[0], "--distributed", ""),
    "world_size": (lambda line: printed(f"{EVALUATION} {line}")[0], "--world_size 4", ""),
    "dist_url": (joined, "--dist_url tcp://127.0.0.1:{port}", ""),
}


def test_the_table_is_complete():
    assert len(DEIT) == 71
    assert EFFECTS.keys() == FLAGS.keys() and DEIT.keys() < EFFECTS.keys()


@pytest.mark.parametrize("dest", every(10, EFFECTS))
def test_the_flag_has_an_effect(dest):
    look, with_it, without_it = EFFECTS[dest]
    assert differences(plain(look(with_it)), plain(look(without_it))), f"{with_it} changes nothing"


@pytest.mark.parametrize("look", every(3, [optimizer, rates, images_of, draws, loss, mixed, trained, basis, structure, average,
                                  initial_weights, rates_of_dropout, wording]))
def test_without_a_flag_nothing_changes(look):
    """The looks above see nothing but the flags: the same command line twice looks the same."""
    first = plain(look("--mixup-prob 0.5"))
    caught.cache_clear()
    assert not differences(first, plain(look("--mixup-prob 0.5")))


def plain(value):
    if isinstance(value, (tuple, set)):
        return [plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


# ---------------------------------------------------------------- which effect, where it is worth saying
def test_the_rate_is_scaled_to_the_images_of_an_update():
    for line, rate in (("--lr 0.512", 0.016), ("--lr 0.512 --grad-accum 3", 0.048), ("--lr 0.512 --batch-size 8", 0.008),
                       ("--lr 0.512 --unscale-lr", 0.512)):
        assert optimizer(line)[1][0]["lr"] == pytest.approx(rate)


def test_schedules_by_hand():
    line = "--unscale-lr --lr 1 --min-lr 0 "
    half = 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4))
    assert rates(line + "--sched cosine")[::3] == pytest.approx(half.tolist())
    assert rates(line + "--sched step --decay-epochs 2")[::3] == pytest.approx([1, 1, 0.1, 0.1])
    assert rates(line + "--sched multistep --decay-epochs 2 --decay-rate 0.5")[::3] == pytest.approx([1, 1, 0.5, 0.5])
    assert rates(line + "--warmup-epochs 2 --warmup-lr 0.2")[:6:3] == pytest.approx([0.2, 0.6])
    by_update = 0.5 * (1 + np.cos(np.pi * np.arange(12) / 12))
    assert rates(line + "--sched-on-updates") == pytest.approx(by_update.tolist())
    assert rates(PLATEAU + " --cooldown-epochs 0")[::3] == pytest.approx([1, 1, 1, .5, .5, .25, .25, .125, .125])
    assert rates(PLATEAU + " --cooldown-epochs 2")[::3] == pytest.approx([1, 1, 1, .5, .5, .5, .5, .25, .25])


def test_what_attention_only_trains():
    names = trainable("--attn-only")
    assert names == {name for name in trainable("") if ".attn." in name or name.startswith("head.") or name == "pos_embed"}


def test_layer_decay_by_hand():
    groups = optimizer("--layer-decay 0.5")[1]
    # the head, four blocks, the embedding
    assert sorted({group["lr_scale"] for group in groups}) == pytest.approx([2.0 ** -n for n in range(5, -1, -1)])


def test_the_rate_and_decay_of_coefficients_by_hand():
    line = f"{GROUPS} --unscale-lr --lr 0.01 --weight-decay 0.2 --kan-lr-mult 5 --kan-weight-decay 0.3"
    groups = {(group["weight_decay"], group["lr"]) for group in optimizer(line)[1]}
    assert groups == {(0.0, 0.01), (0.2, 0.01), (0.3, 0.05)}
    assert {(group["weight_decay"], group["lr"]) for group in optimizer(GROUPS + " --unscale-lr --lr 0.01")[1]} == {
        (0.0, 0.01), (0.05, 0.01), (0.0, 0.2)}


def test_options_of_the_activation_by_hand():
    phis = {name: module for name, module in caught(f"{GROUPS} --kan-groups 2 --kan-base silu --kan-h 0.7 --kan-grid-points 5 "
                                                    "--kan-grid-range -1 2").model.named_modules() if ".phi" in name}
    assert len(phis) == 8
    for name, phi in phis.items():
        assert phi.coefficients.shape == (2, 5) and phi.h == 0.7 and phi.points == (-1, -0.25, 0.5, 1.25, 2)
        assert phi.base == ("identity" if name.endswith("phi1") else "silu")
    assert caught(f"{GROUPS} --kan-groups 0").model.blocks[0].mlp.phi2.coefficients.shape == (384, 8)


def test_the_optimizers_numbers_arrive():
    name, groups = optimizer("--opt adamw --opt-eps 1e-3 --opt-betas 0.5 0.6 --weight-decay 0.3")
    assert name == "AdamW" and {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert all(group["eps"] == 1e-3 and tuple(group["betas"]) == (0.5, 0.6) for group in groups)
    name, groups = optimizer("--opt momentum --momentum 0.7")
    assert name == "SGD" and all(group["momentum"] == 0.7 and not group["nesterov"] for group in groups)


def test_the_seed_is_of_everything_random():
    for look in (initial_weights, draws):
        assert differences(plain(look("--seed 5")), plain(look("")))
    # of one and the same image, where the order makes no difference
    assert not differences(*(images_of(f"--data-path {{same}} {STILL} --seed {seed}") for seed in (5, 6)))
    assert differences(*(images_of(f"--data-path {{same}} --seed {seed}") for seed in (5, 6)))
    assert caught("--seed 5").training.seed == 5     # mixup, dropout


def test_the_teacher_is_not_trained():
    teacher = caught(f"--distillation-type hard {STUDENT} --teacher-model {NANO} --teacher-path {{teacher}}").criterion.teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_clipping_bounds_the_step():
    """Plain SGD at rate 1 for three updates: no tensor moves further than three times the bound."""
    line = "--opt momentum --momentum 0 --unscale-lr --lr 1 --weight-decay 0 --sched step"
    start = {key: value.clone() for key, value in initial_weights(line).items()}

    def distance(weights):
        return sum((weights[key] - start[key]).square().sum() for key in start).sqrt().item()

    assert distance(trained(f"{line} --clip-grad 1e-3")) <= 3.01e-3 < distance(trained(line))


def test_mixing_by_hand():
    for images, targets in mixed("--cutmix 0 --smoothing 0"):
        share = targets.max(1).values[1]            # of the image itself or of its partner
        assert images[1].min() == images[1].max() and targets.sum(1) == pytest.approx(1)
        assert images[1, 0, 0, 0].item() == pytest.approx((1 * targets[1, 1] + 2 * targets[1, 2]).item(), abs=1e-5)
        assert 0.5 <= share <= 1
    for images, targets in mixed("--mixup 0 --smoothing 0"):
        assert set(images[1].unique().tolist()) <= {1.0, 2.0}
        assert (images[1] == 1).float().mean().item() == pytest.approx(targets[1, 1].item(), abs=1e-5)
    for images, _ in mixed("--mixup-prob 0"):
        assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_repeated_augmentation_draws_three_times():
    assert [repeat for _, repeat in draws("--repeated-aug")][:6] == [0, 1, 2, 0, 1, 2]
    assert sorted(index for index, _ in draws("")) == list(range(48))


def test_the_first_repeat_is_spared():
    erased = images_of(f"{STILL} --reprob 1 --repeated-aug --resplit")
    whole = images_of(f"{STILL} --repeated-aug")
    same = [torch.equal(a, b) for a, b in zip(erased, whole)]
    assert same[:12] == [True, False, False] * 4


def test_no_train_mode_switches_dropout_off():
    line = f"{STILL} --mixup 0 --cutmix 0 --no-train-mode"
    assert not differences(trained(f"{line} --drop 0.5 --drop-path 0.5"), trained(f"{line} --drop 0 --drop-path 0"))


def test_gradient_checkpointing_changes_memory_alone():
    assert not differences(trained("--grad-checkpointing"), trained(""))


def test_accumulating_gradients_is_a_larger_batch():
    line = f"{STILL} --mixup 0 --cutmix 0 --drop-path 0 --opt momentum --unscale-lr --lr 0.1"
    one, two = trained(f"{line} --batch-size 16"), trained(f"{line} --batch-size 8 --grad-accum 2")
    start = caught(f"{line} --batch-size 16").weights
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)
    assert any((one[key] - start[key]).abs().max() > 1e-3 for key in one)


def test_the_crop_of_the_evaluation():
    args = program.parse_args([]).args
    args.input_size, args.eval_crop_ratio = 64, 0.5
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    middle = transforms.build_transform(False, args)(image)
    args.eval_crop_ratio = 1.0
    assert torch.equal(middle, transforms.build_transform(False, args)(image.crop((32, 32, 96, 96))))


@pytest.mark.slow
def test_the_log_has_no_lines_beyond_print_freq():
    for freq, lines in ((1, 12), (4, 4), (100, 2)):
        line = " ".join([*QUICK, f"--data-path {{data}} --epochs 2 --batch-size 8 --print-freq {freq}"])
        assert printed(line)[1].count("img/s") == lines
