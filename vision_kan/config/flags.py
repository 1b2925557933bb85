"""The table of main.py's flags, DeiT's and ours: a row holds every fact about its flag."""
import argparse
import re
from functools import cache
from typing import NamedTuple

from vision_kan.common.device_names import DEVICE_NAME, NOT_A_DEVICE
from vision_kan.config.flag import BELOW_1, MAX_SIDE, POSITIVE, SHARE, Flag, Rule, at_least, between
from vision_kan.config.parser import Parser, with_underscores

# Copies of names whose sources need torch, which takes seconds to import; tests/test_config.py compares them.
KAN_BACKENDS = ["auto", "reference", "cpu", "triton", "compile"]           # vision_kan.kernels.BACKENDS
FFN_SUFFIXES = {"mlp": "ViT", "gkan": "GKAN", "kan": "KAN", "ekan": "EKAN", "kat": "KAT"}     # models_kan.FEED_FORWARDS
KAN_BASES = ["identity", "gelu", "silu", "relu", "relu2"]                    # vision_kan.kernels.BASES
KAN_FUNCTIONS = ["rswaf", "gaussian", "sech", "rational", "bspline", "chebyshev", "fourier"]     # vision_kan.kernels.FUNCTIONS
COMPILE_MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]     # torch's, the first its own
OWN_GRAPHS = ("reduce-overhead", "max-autotune")        # these capture CUDA graphs
TRACKERS = ["wandb", "mlflow"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # timm.data.IMAGENET_DEFAULT_MEAN, _STD


class DataSets(list):
    """The values of --data-set. One that ends in /NAME stands for every name of `timm.data.create_dataset` with this prefix."""

    def __contains__(self, name: object) -> bool:
        kind, _, rest = str(name).partition("/")
        return super().__contains__(f"{kind}/NAME" if rest else name)


DATA_SETS = DataSets(["CIFAR", "IMNET", "INAT", "INAT19",       # DeiT's
                      "CIFAR10", "TinyIMNET", "FOLDER", "DIGITS", "torch/NAME", "hfds/NAME", "hfids/NAME", "wds/NAME"])

# ---------------------------------------------------------------- rules of single flags
# timm silently skips an unknown section without a digit ("rand-strong"), so the pattern lists every section
_COUNT, _NUMBER = "[1-9][0-9]?", r"[0-9]{1,3}(\.[0-9]{1,9})?"
_POSITIVE_NUMBER = rf"(?!0+(\.0+)?(-|$)){_NUMBER}"
_AUTO_AUGMENT = re.compile(
    rf"rand(-(m[0-9]{{1,2}}|n{_COUNT}|p{_NUMBER}|mstd{_NUMBER}|mmax{_COUNT}|inc[01]|tweights|t3aw?)){{0,20}}"
    rf"|augmix(-(m[0-9]{{1,2}}|w{_COUNT}|d{_COUNT}|a{_POSITIVE_NUMBER}|b[01]|mstd{_NUMBER})){{0,20}}"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?|none|")
AUTO_AUGMENT = Rule(lambda name: bool(_AUTO_AUGMENT.fullmatch(name)),
                    "is not an AutoAugment policy: for example rand-m9-mstd0.5-inc1, augmix-m3, original, v0, 3a or none")
DEVICE = Rule(lambda name: bool(DEVICE_NAME.fullmatch(name)), NOT_A_DEVICE)
RENDEZVOUS = Rule(lambda url: url.startswith(("env://", "tcp://", "file://")), "must begin with env://, tcp:// or file://")
UPWARDS = Rule(lambda ends: ends[0] < ends[1], "must go upwards: MIN below MAX")
TWO_SHARES = Rule(lambda shares: len(shares) == 2 and shares[0] < shares[1], "must be two shares, the smaller one first")
ONE_OR_TWO = Rule(lambda shares: len(shares) <= 2, "must be one or two shares of the epochs")
EPOCHS = between(0, 10 ** 6)


class Group(NamedTuple):
    """A group of --help."""
    title: str
    flags: list[Flag]
    description: str = ""


# ---------------------------------------------------------------- the table
GROUPS = [
    Group("run", [
        Flag("--config", None, "run", "YAML file of flags; the command line overrides it", metavar="RECIPE",
             one_shot=True, ours=True),
        Flag("--list-models", False, "run", "print this project's models, and the names with weights, and stop",
             type=bool, one_shot=True, ours=True),
        Flag("--output_dir", "", "run", "folder for checkpoints and logs; without it nothing is saved", metavar="DIR",
             path=True),
        Flag("--resume", "", "run",
             "checkpoint to continue or to evaluate: a file, a folder, a URL, hf-hub:OWNER/NAME or a name with weights "
             "(--list-models); auto: the newest in --output_dir, if any", metavar="FILE", path=True),
        Flag("--start_epoch", 0, "run", "number of the first epoch, counted from 0, if the checkpoint has none",
             type=int, metavar="N", rule=EPOCHS),
        Flag("--eval", False, "run", "evaluate --resume or --finetune and stop", type=bool),
        Flag("--epochs", 300, "training", "epochs to train", type=int, metavar="N", rule=between(1, 10 ** 6),
             on_resume=True),
        Flag("--batch-size", 64, "training", "images per process and step", type=int, metavar="N", rule=at_least(1),
             on_resume=True),
        Flag("--grad-accum", 1, "training", "batches whose gradients are averaged for one update", type=int, metavar="N",
             rule=at_least(1), on_resume=True, ours=True),
        Flag("--patience", 0, "training",
             "end training after N consecutive epochs without a new best top-1 of the model or its moving average; "
             "0: never", type=int, metavar="N", rule=EPOCHS, on_resume=True, ours=True),
        Flag("--device", "auto", "run",
             "cpu, cuda, cuda:N or mps; auto: CUDA where there is a GPU, else MPS, else the CPU", rule=DEVICE,
             deit=("cuda", "CUDA where there is a GPU, else MPS, else the CPU")),
        Flag("--seed", 0, "training", "random seed for weights, order and augmentation", type=int, metavar="N",
             rule=between(0, 2 ** 63 - 1), largest=2 ** 63 - 1),
        Flag("--deterministic", False, "run",
             "deterministic kernels on a GPU (slower; a CPU is always deterministic)", type=bool, ours=True),
    ]),
    Group("model", [
        Flag("--model", "deit_tiny_patch16_224_GKAN", "model",
             "one of --list-models, or any other classification model of timm's", type=str, metavar="NAME",
             deit=("deit_base_patch16_224", "the model that this project is about; its _ViT twin is the baseline")),
        Flag("--ffn", None, "run",
             "give --model, of this project or any of timm's with MLPs, this feed-forward: _GKAN, _KAN, _EKAN or _KAT is added "
             "to its name", choices=list(FFN_SUFFIXES), one_shot=True, ours=True),
        Flag("--input-size", 224, "data",
             "side of the square input image, or height and width; if not given, the model's own", type=int,
             size=True, metavar=("PIXELS", "WIDTH"), rule=between(1, MAX_SIDE)),
        Flag("--drop", 0.0, "training",
             "dropout after the position embedding and in projections and feed-forwards; 0: none", type=float,
             metavar="P",
             rule=BELOW_1),
        Flag("--drop-path", 0.1, "training", "stochastic depth rate of the last block; 0: none", type=float,
             metavar="P", rule=BELOW_1),
        Flag("--weight-init", "timm", "training",
             "how attention begins: at random as in timm, or like trained attention (mimetic, arXiv:2305.09828); --finetune "
             "overwrites it", choices=["timm", "mimetic"], ours=True),
        Flag("--hdim_kan", None, "model", "hidden width of the KAN feed-forward", type=int, metavar="WIDTH",
             rule=at_least(1), one_or_each=True, ours=True),
        Flag("--kan-grid-range", None, "model", "first and last grid point", type=float, nargs=2,
             metavar=("MIN", "MAX"), together=UPWARDS, ours=True),
        Flag("--kan-grid-points", None, "model", "basis functions per input", type=int, metavar="N",
             rule=between(2, 1024), ours=True),
        Flag("--kan-h", None, "model", "width of a basis function", type=float, metavar="H", rule=POSITIVE, ours=True),
        Flag("--kan-basis", None, "model",
             "original: grid, h and initialisation of the released models; covering: a grid that covers the inputs, "
             "and weights that begin as an MLP (_KAN)", choices=["original", "covering"], ours=True),
        Flag("--kan-base-branch", None, "model", "add a linear map of silu(u) to each layer (_KAN)", type=bool,
             ours=True),
        Flag("--kan-second-norm", None, "model",
             "normalisation of the hidden units: a LayerNorm (layer), a learned scale and shift of each unit (static) or "
             "none (_KAN)",
             choices=["layer", "static", "none"], ours=True),
        Flag("--kan-groups", None, "model", "learned activations per layer; 0: one per channel (_GKAN, _KAT)", type=int,
             metavar="N", rule=at_least(0), ours=True),
        Flag("--kan-base", None, "model", "activation from which the learned one starts (_GKAN; _KAT: identity, gelu or silu)",
             choices=KAN_BASES, ours=True),
        Flag("--kan-function", None, "model",
             "basis of the learned activations: FasterKAN's bumps (rswaf), or another, without a kernel of its own (_GKAN)",
             choices=KAN_FUNCTIONS, ours=True),
        Flag("--kan-input-phi", None, "model", "also learn an activation before the first linear map (_GKAN)",
             type=bool, ours=True),
        Flag("--kan-trainable-base", None, "model", "learn the scale of the base function (_GKAN)", type=bool,
             ours=True),
        Flag("--kan-trainable-grid", None, "model", "learn the positions of the grid points (_KAN)", type=bool,
             ours=True),
        Flag("--kan-trainable-h", None, "model", "learn the width of the basis functions (_KAN)", type=bool, ours=True),
    ], "A KAN option that is not given has the model's own default."),
    Group("moving average of the weights", [
        Flag("--model-ema", True, "training", "keep and evaluate a moving average of the weights", type=bool),
        Flag("--model-ema-decay", 0.99996, "training", "share of the moving average that each update keeps", type=float,
             metavar="D", rule=BELOW_1),
        Flag("--model-ema-warmup", False, "training",
             "for short runs: the n-th update keeps 1 - n^(-2/3), up to --model-ema-decay", type=bool,
             ours=True),
        Flag("--model-ema-force-cpu", False, "training", "keep the moving average in CPU memory", type=bool,
             on_resume=True),
    ]),
    Group("loss", [
        Flag("--bce-loss", False, "training", "binary cross-entropy on every class", type=bool),
        Flag("--class-weights", "none", "training",
             "balanced: weight an image's loss inversely to the number of images of its class",
             choices=["none", "balanced"], ours=True),
        Flag("--smoothing", 0.1, "training", "label smoothing", type=float, metavar="S", rule=BELOW_1),
    ]),
    Group("optimizer", [
        Flag("--opt", "adamw", "training", "an optimizer of timm", type=str, metavar="NAME"),
        Flag("--opt-eps", 1e-08, "training", "the optimizer's epsilon", type=float, metavar="EPS", rule=POSITIVE),
        Flag("--opt-betas", None, "training", "the optimizer's betas; if not given, its own", type=float, nargs="+",
             metavar="B", rule=BELOW_1),
        Flag("--clip-grad", None, "training", "clip gradients to this norm; if not given, no clipping", type=float,
             metavar="NORM", rule=POSITIVE),
        Flag("--momentum", 0.9, "training", "momentum, for optimizers that have it", type=float, metavar="M",
             rule=BELOW_1),
        Flag("--weight-decay", 0.05, "training", "weight decay of matrices (biases have none)", type=float, metavar="W",
             rule=at_least(0)),
        Flag("--kan-lr-mult", 20.0, "training",
             "learning rate of the learned activations' coefficients, relative to the other parameters' (_GKAN; _KAT: 1)",
             type=float,
             metavar="M", rule=at_least(0), ours=True),
        Flag("--kan-weight-decay", 0.0, "training", "weight decay of these coefficients (_GKAN; _KAT: 0.05); 0: none", type=float,
             metavar="W", rule=at_least(0), ours=True),
        Flag("--layer-decay", None, "training", "learning rate of a block, relative to the next block's", type=float,
             metavar="D", rule=SHARE, ours=True),
    ]),
    Group("learning rate", [
        Flag("--sched", "cosine", "training", "cosine, tanh, step, multistep, plateau or poly", type=str,
             metavar="NAME", names=("cosine", "tanh", "step", "multistep", "plateau", "poly")),
        Flag("--sched-on-updates", False, "training",
             "for runs of a few epochs: follow the schedule at every update, not every epoch", type=bool,
             ours=True),
        Flag("--lr", 0.0005, "training", "learning rate for 512 images per update (see --unscale-lr)",
             type=float, rule=POSITIVE),
        Flag("--unscale-lr", False, "training", "do not scale --lr with the number of images per update",
             type=bool),
        Flag("--lr-noise", None, "training",
             "add noise to the learning rate from this share of the epochs on, up to the second share if it is given",
             type=float,
             nargs="+", metavar="F", rule=between(0, 1), together=ONE_OR_TWO),
        # timm draws noise until it is below this limit: near 0 that never ends
        Flag("--lr-noise-pct", 0.67, "training", "largest noise, relative to the learning rate", type=float,
             metavar="SHARE",
             rule=between(0.01, 1)),
        # for the same reason
        Flag("--lr-noise-std", 1.0, "training", "standard deviation of the noise", type=float, metavar="S",
             rule=between(0, 100)),
        Flag("--warmup-lr", 1e-06, "training", "learning rate at the start of the warm-up", type=float, metavar="LR",
             rule=at_least(0)),
        Flag("--min-lr", 1e-05, "training", "learning rate at the end of the schedule", type=float, metavar="LR",
             rule=at_least(0)),
        Flag("--decay-epochs", 30.0, "training", "epochs between decays (step)", type=float, metavar="N",
             rule=POSITIVE),
        Flag("--warmup-epochs", 5, "training", "epochs of linear warm-up", type=int, metavar="N", rule=EPOCHS),
        Flag("--cooldown-epochs", 10, "training", "epochs to wait after a decay (plateau)", type=int, metavar="N",
             rule=EPOCHS),
        Flag("--patience-epochs", 10, "training", "epochs without progress before a decay (plateau)", type=int,
             metavar="N", rule=EPOCHS),
        Flag("--decay-rate", 0.1, "training", "factor by which the learning rate decays", type=float, metavar="R",
             rule=POSITIVE, alias="--dr"),
    ]),
    Group("augmentation", [
        Flag("--color-jitter", 0.3, "training",
             "strength of the colour jitter; unused where --aa is a policy other than 3a", type=float, metavar="J",
             rule=at_least(0)),
        Flag("--crop-padding", 4, "training",
             "border added before the random crop, for inputs of up to 32 pixels and with --src", type=int,
             metavar="PIXELS", rule=at_least(0), ours=True),
        Flag("--hflip", 0.5, "training", "probability of mirroring an image", type=float, metavar="P",
             rule=between(0, 1),
             ours=True),
        Flag("--aa", "rand-m9-mstd0.5-inc1", "training",
             "AutoAugment policy: rand-..., augmix-..., original, v0, 3a or none", type=str, metavar="POLICY",
             rule=AUTO_AUGMENT),
        Flag("--train-interpolation", "bicubic", "training",
             "filter for resizing and rotating training images: random, nearest, bilinear, bicubic, box, hamming or "
             "lanczos", type=str, metavar="KIND",
             names=("random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")),
        Flag("--repeated-aug", True, "training", "repeated augmentation: draw each image three times",
             type=bool),
        Flag("--train-mode", True, "training", "use dropout and stochastic depth while training",
             type=bool),
        Flag("--ThreeAugment", False, "training", "DeiT III's three augmentations", type=bool),
        Flag("--src", False, "training", "simple random crop (DeiT III)", type=bool),
    ]),
    Group("random erasing", [
        Flag("--reprob", 0.25, "training", "probability of erasing a part of an image; 0: none", type=float, metavar="P",
             rule=between(0, 1)),
        Flag("--remode", "pixel", "training", "what fills the erased part: const, rand or pixel", type=str,
             metavar="KIND",
             names=("const", "rand", "pixel")),
        Flag("--recount", 1, "training", "erased rectangles per image", type=int, metavar="N", rule=between(1, 1000)),
        Flag("--resplit", False, "training", "do not erase the first repeat of each image (with --repeated-aug)",
             type=bool),
    ]),
    Group("mixup and cutmix", [
        Flag("--mixup", 0.8, "training", "alpha of mixup's Beta distribution; 0: none", type=float, metavar="ALPHA",
             rule=at_least(0)),
        Flag("--cutmix", 1.0, "training", "alpha of cutmix's Beta distribution; 0: none", type=float, metavar="ALPHA",
             rule=at_least(0)),
        Flag("--cutmix-minmax", None, "training", "smallest and largest side of the pasted box; turns cutmix on",
             type=float, nargs="+", metavar="SHARE", rule=between(0, 1), together=TWO_SHARES),
        Flag("--mixup-prob", 1.0, "training", "probability of applying mixup or cutmix", type=float, metavar="P",
             rule=between(0, 1)),
        Flag("--mixup-switch-prob", 0.5, "training", "probability of cutmix instead of mixup, if both are on",
             type=float, metavar="P", rule=between(0, 1)),
        Flag("--mixup-mode", "batch", "training", "mix per batch, per pair or per image: batch, pair or elem", type=str,
             metavar="KIND",
             names=("batch", "pair", "elem")),
    ]),
    Group("distillation and co-training", [
        Flag("--teacher-model", "regnety_160", "training", "the teacher's name in timm", type=str, metavar="NAME"),
        Flag("--teacher-path", "", "run", "the teacher's weights: a file, a folder, a URL, hf-hub:OWNER/NAME or a name "
             "with weights",
             type=str, metavar="FILE", path=True),
        Flag("--distillation-type", "none", "training",
             "learn from the teacher's probabilities (soft) or from its top class (hard)", type=str,
             choices=["none", "soft", "hard"]),
        Flag("--distillation-alpha", 0.5, "training", "weight of the teacher's loss", type=float, metavar="A",
             rule=between(0, 1)),
        Flag("--distillation-tau", 1.0, "training", "temperature of soft distillation", type=float, metavar="T",
             rule=POSITIVE),
        Flag("--cosub", False, "training", "co-training of two submodels", type=bool),
    ]),
    Group("fine-tuning", [
        Flag("--finetune", "", "run",
             "weights to start from: a file, a folder, a URL, hf-hub:OWNER/NAME or the name of a pretrained model, ours or "
             "timm's", metavar="FILE", path=True),
        Flag("--attn-only", False, "training", "train only attention, head and position embeddings", type=bool),
    ]),
    Group("data", [
        Flag("--data-path", "", "run", "folder of the data set", type=str, metavar="DIR", path=True,
             deit=("a path on its authors' cluster", "there is no folder to guess")),
        Flag("--data-set", "IMNET", "data",
             f"{', '.join(DATA_SETS)}. CIFAR is CIFAR-100; IMNET and FOLDER hold train/ and val/ with a folder per class, FOLDER "
             "also the class folders alone; the last four are names of timm.data.create_dataset. If not given, the form of "
             "--data-path decides", type=str, metavar="NAME", choices=DATA_SETS, on_eval=True),
        Flag("--val-split", None, "data",
             "share of each class to hold out for validation, if the data have no validation images (FOLDER: 0.2)",
             type=float, metavar="SHARE", rule=SHARE, on_eval=True, ours=True),
        Flag("--data-split", None, "data",
             "names of the training and validation splits of a timm data set; a stream of unknown length needs its number "
             "of images: 'train-{000..009}.tar|5000'", nargs=2, metavar=("TRAIN", "VAL"), on_eval=True,
             ours=True),
        Flag("--input-key", None, "data", "column of the image in hfds/, hfids/ and wds/, if there are several",
             metavar="NAME", on_eval=True, ours=True),
        Flag("--target-key", None, "data",
             "column of the label in hfds/, hfids/ and wds/, if there are several", metavar="NAME",
             on_eval=True, ours=True),
        Flag("--num-classes", None, "data", "number of classes of a timm data set that does not declare them (wds/)",
             type=int, metavar="N", rule=between(1, 10 ** 6), ours=True),
        Flag("--inat-category", "name", "data", "label of iNaturalist to learn", type=str,
             choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"], on_eval=True),
        Flag("--download", False, "run", "download the data set, if torchvision can", type=bool, ours=True),
        # above 1 the image gets a border, as for timm's volo_d4_448
        Flag("--eval-crop-ratio", 0.875, "data", "side of the centre crop, relative to the resized image", type=float,
             metavar="SHARE", rule=between(0.1, 1.15), preparation=True, on_eval=True),
        Flag("--crop-mode", "center", "data",
             "how to resize an evaluation image before the crop: by its shorter side (center), both sides (squash), or its "
             "longer side with a border (border)", choices=["center", "squash", "border"], preparation=True,
             on_eval=True,
             ours=True),
        Flag("--interpolation", "bicubic", "data",
             "filter for resizing evaluation images (for training images: --train-interpolation)",
             choices=["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"], preparation=True, on_eval=True,
             ours=True),
        Flag("--mean", list(IMAGENET_MEAN), "data",
             "mean of each channel (values 0 to 1), subtracted from an image. If not given, --mean, --std, "
             "--interpolation, --crop-mode and --eval-crop-ratio come from the timm configuration of the model or of "
             "--finetune, if there is one", type=float, nargs=3, metavar=("R", "G", "B"), rule=between(0, 1),
             preparation=True, on_eval=True,
             ours=True),
        Flag("--std", list(IMAGENET_STD), "data",
             "standard deviation of each channel, by which an image is divided", type=float, nargs=3,
             metavar=("R", "G", "B"), rule=between(0.001, 1), preparation=True, on_eval=True, ours=True),
        Flag("--exif-orientation", None, "data",
             "turn photos upright by their EXIF orientation; by default only with FOLDER, unless its classes are ImageNet's",
             type=bool, on_eval=True, ours=True),
        Flag("--strict-data", False, "run", "stop at the first image that cannot be read", type=bool, ours=True),
        Flag("--max-unreadable", 0.01, "run",
             "stop if more than this share of the images, and more than 3, cannot be read; 0: at the first",
             type=float, metavar="SHARE", rule=between(0, 1), ours=True),
    ]),
    Group("speed and memory", [
        Flag("--compile", None, "run",
             "torch.compile the model: minutes at the start, then faster steps; MODE is torch's: "
             f"{', '.join(COMPILE_MODES)}; if not given, the first", mode=True,
             metavar="MODE", choices=COMPILE_MODES, ours=True),
        Flag("--cuda-graph", "auto", "run",
             "replay training steps as CUDA graphs, which saves the host's cost per kernel; auto: if possible; on: refuse "
             "to train if it is not; off: never", choices=["auto", "on", "off"],
             ours=True),
        Flag("--kan-backend", "auto", "run",
             "what computes the KAN layers: auto: C++ on a CPU, Triton on a GPU; reference: plain PyTorch; compile: the "
             "reference through torch.compile", choices=KAN_BACKENDS, ours=True),
        Flag("--amp-dtype", "auto", "training", "number format of the forward pass; auto: by the device",
             choices=["auto", "float32", "bfloat16", "float16"], on_resume=True, ours=True),
        Flag("--grad-checkpointing", False, "training",
             "recompute activations in the backward pass: less memory, more time", type=bool, on_resume=True,
             ours=True),
        Flag("--data-on-device", "auto", "training",
             "keep small images in the device's memory and augment them there; auto: on a CUDA GPU, if they fit and --aa is "
             "none or 3a, or --augment-on device is given", choices=["auto", "on", "off"], ours=True),
        Flag("--augment-on", "loader", "training",
             "what augments training images: PIL in the loader processes, as in published figures, or the device, "
             "after loader processes have decoded and cropped them", choices=["loader", "device"], ours=True),
        Flag("--num_workers", 10, "run",
             "loader processes per training process; if not given, at most the cores available to each", type=int,
             metavar="N", rule=between(0, 1024)),
        Flag("--pin-mem", True, "run", "page-locked memory for faster copies to a GPU", type=bool),
    ]),
    Group("saving", [
        Flag("--save-interval-steps", 0, "run",
             "also save every N steps within an epoch, which limits the loss if the run is killed; 0: off", type=int,
             metavar="N", rule=at_least(0), ours=True),
        Flag("--save-interval-minutes", 10.0, "run",
             "also save after this time since the last checkpoint; 0: off", type=float,
             metavar="MINUTES", rule=at_least(0), ours=True),
        Flag("--keep", 2, "run", "checkpoints to keep besides the best ones", type=int, metavar="N",
             rule=between(1, 1000), ours=True),
    ]),
    Group("watching a run", [
        Flag("--print-freq", 10, "run", "batches between log lines", type=int, metavar="N", rule=at_least(1),
             ours=True),
        Flag("--log-kan", 0, "run",
             "every N epochs write the learned functions, their inputs and the number of dead ones to TensorBoard; 0: off",
             type=int, metavar="N", rule=EPOCHS, ours=True),
        Flag("--track", None, "run",
             f"also send each epoch's numbers and the flags to {' or '.join(TRACKERS)} (install it first)", nargs="+",
             metavar="TRACKER", choices=TRACKERS, ours=True),
        Flag("--track-project", "vision-kan", "run", "project (wandb) or experiment (mlflow) of --track",
             metavar="NAME", ours=True),
        Flag("--profile", False, "run",
             "write a trace of a few training steps to profile/ in --output_dir and print what takes the most time",
             type=bool, ours=True),
        Flag("--debug-nan", False, "run",
             "if the loss or a gradient is not finite: save the batch to --output_dir, replay it and name the layer",
             type=bool, ours=True),
    ]),
    Group("several processes (torchrun starts them)", [
        Flag("--dist-eval", False, "run", "divide the evaluation among the processes; the result is the same",
             type=bool),
        Flag("--distributed", False, "run", "refuse to run as a single process", type=bool),
        Flag("--world_size", 1, "run", "expected number of processes, if more than 1", type=int, metavar="N",
             rule=at_least(1)),
        Flag("--dist_url", "env://", "run", "rendezvous URL", metavar="URL", rule=RENDEZVOUS),
        Flag("--dist-timeout", 600.0, "run",
             "how long a process waits for the others; then it stops and names the missing ones", type=float,
             metavar="SECONDS", rule=POSITIVE, ours=True),
    ]),
]
FLAGS = {flag.dest: flag for group in GROUPS for flag in group.flags}
PREPARATION = {dest for dest, flag in FLAGS.items() if flag.preparation}


def flag_name(dest: str) -> str:
    """The flag as the user writes it: 'batch_size' -> '--batch-size'."""
    return FLAGS[dest].option


# ---------------------------------------------------------------- parsers
def get_args_parser(add_help: bool = False) -> Parser:
    """DeiT's 71 flags with its defaults (`Flag.deit` explains each exception), and ours.

    Without --help by default, as in DeiT, so that it can be a parent of another parser.
    """
    parser = Parser("main.py", usage="%(prog)s [--config RECIPE] [--flag value ...]", add_help=add_help,
                    description="Train and evaluate vision transformers with KAN feed-forwards.")
    for title, flags, description in GROUPS:
        group = parser.add_argument_group(title, description or None)
        for flag in flags:
            flag.add_to(group)
    return parser


@cache
def _options() -> dict[str, argparse.Action]:
    return get_args_parser()._option_string_actions


def parse_beside_main(parser: Parser, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """A tool's own arguments, and the remaining words for main.py's parser. Raises UserError for a flag that neither parser
    knows, with the nearest flag of both."""
    own, rest = parser.parse_known_args(args)
    known = {with_underscores(option) for option in _options()}
    parser.refuse_unknown([word for word in rest if with_underscores(word.partition("=")[0]) not in known],
                          [*parser._option_string_actions, *_options()])
    return own, rest
