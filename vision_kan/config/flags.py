"""DeiT's flags and ours."""
import argparse
from functools import cache

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vision_kan.config.parser import HeightAndWidth, Parser, SwitchOrMode, with_underscores
from vision_kan.kernels import BACKENDS, BASES

# ---------------------------------------------------------------- torch.compile
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")      # torch's, the first its own
OWN_GRAPHS = ("reduce-overhead", "max-autotune")            # these capture CUDA graphs
TRACKERS = ("wandb", "mlflow")      # services of --track

# Where a default differs from DeiT's: dest -> (DeiT's, ours, why).
CHANGED_DEFAULTS = {
    "model": ("deit_base_patch16_224", "deit_tiny_patch16_224_GKAN",
              "the model that this project is about; its _ViT twin is the baseline"),
    "data_path": ("a path on its authors' cluster", "", "there is no folder to guess"),
    "device": ("cuda", "auto", "CUDA where there is a GPU, else MPS, else the CPU"),
}
# Values that a flag of DeiT's accepts here in addition.
ADDED_CHOICES = {"data_set": ["CIFAR10", "TinyIMNET", "FOLDER", "DIGITS", "torch/NAME", "hfds/NAME", "hfids/NAME", "wds/NAME"]}


class DataSets(list):
    """The values of --data-set. One that ends in /NAME stands for all names of `timm.data.create_dataset` that begin so."""

    def __contains__(self, name: object) -> bool:
        kind, _, rest = str(name).partition("/")
        return super().__contains__(f"{kind}/NAME" if rest else name)


# What each flag says something about, which decides what a checkpoint may fill in (see `resolve`):
#   model  what the network is            data   which images, which classes, at which size
#   train  how it is trained              place  where and how this one run happens: never from a checkpoint
_SCOPES = {
    "model": "model hdim_kan kan_groups kan_base kan_input_phi kan_trainable_base kan_grid_range kan_grid_points kan_h "
             "kan_trainable_grid kan_trainable_h kan_basis kan_base_branch kan_second_norm",
    "data": "data_set inat_category data_split val_split input_key target_key num_classes input_size eval_crop_ratio "
            "exif_orientation crop_mode interpolation mean std",
    "train": "batch_size epochs grad_accum bce_loss class_weights unscale_lr drop drop_path grad_checkpointing amp_dtype "
             "patience model_ema model_ema_decay model_ema_warmup model_ema_force_cpu opt opt_eps opt_betas clip_grad momentum "
             "weight_decay layer_decay kan_lr_mult kan_weight_decay sched lr lr_noise lr_noise_pct lr_noise_std warmup_lr min_lr "
             "decay_epochs warmup_epochs sched_on_updates cooldown_epochs patience_epochs decay_rate color_jitter aa "
             "hflip crop_padding "
             "smoothing train_interpolation data_on_device repeated_aug train_mode ThreeAugment src reprob remode recount "
             "resplit mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode teacher_model "
             "distillation_type distillation_alpha distillation_tau cosub attn_only seed",
    "place": "track track_project "
             "config list_models data_path download output_dir device finetune resume start_epoch eval compile profile "
             "kan_backend cuda_graph "
             "dist_eval num_workers pin_mem distributed world_size dist_url dist_timeout print_freq log_kan teacher_path "
             "save_interval_steps save_interval_minutes keep debug_nan deterministic strict_data max_unreadable",
}
SCOPE = {dest: scope for scope, dests in _SCOPES.items() for dest in dests.split()}
# How a resumed run may differ from the one that wrote the checkpoint: length, batch, memory and arithmetic.
# The first four change the run on purpose; the others are what a different machine or a NaN asks for.
MAY_CHANGE_ON_RESUME = {"epochs", "patience", "batch_size", "grad_accum",
                        "amp_dtype", "grad_checkpointing", "model_ema_force_cpu"}
# How an image is prepared for a model beside its size: of timm's pretrained configurations, too.
PREPARATION = {"eval_crop_ratio", "crop_mode", "interpolation", "mean", "std"}
# To evaluate on other images or with another crop is an ordinary wish; the input size is in the weights.
MAY_CHANGE_ON_EVAL = {"data_set", "inat_category", "data_split", "val_split", "input_key", "target_key", "exif_orientation",
                      *PREPARATION}
TAKEN = {None: (), "finetune": ("model",), "eval": ("model", "data"), "resume": ("model", "data", "train")}
ONE_SHOT = {"config", "list_models"}       # neither in a recipe nor in args.yaml


def get_args_parser(add_help: bool = False) -> Parser:
    """DeiT's 71 flags with its defaults (except `CHANGED_DEFAULTS`), and ours.

    Without help by default, as DeiT's, so that it can be a parent of another parser.
    """
    parser = Parser("main.py", usage="%(prog)s [--config RECIPE] [--flag value ...]", add_help=add_help,
                    description="Train and evaluate vision transformers with KAN feed-forwards.")
    on_off = argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="RECIPE", help="YAML file of flags; the command line overrides it")
    add("--list-models", action="store_true", help="print this project's models and stop")
    add("--batch-size", default=64, type=int, metavar="N", help="images per process and step")
    add("--epochs", default=300, type=int, metavar="N", help="length of the training, exactly")
    add("--patience", default=0, type=int, metavar="N",
        help="end the training after N epochs in a row without a new best top-1, of the model or its moving average; 0: never")
    add("--grad-accum", default=1, type=int, metavar="N", help="steps whose gradients are summed before an update")
    add("--bce-loss", action=on_off, default=False, help="binary cross-entropy on every class")
    add("--class-weights", default="none", choices=["none", "balanced"],
        help="balanced: an image's loss counts inversely to the number of images that its class has")
    add("--unscale-lr", action=on_off, default=False,
        help="take --lr as it is instead of per 512 images of the global batch")

    add = parser.add_argument_group("model", "A KAN option that is not given is the model's own.").add_argument
    add("--model", default="deit_tiny_patch16_224_GKAN", type=str, metavar="NAME",
        help="one of --list-models, or any other classification model of timm's")
    add("--input-size", action=HeightAndWidth, default=224, type=int, metavar=("PIXELS", "WIDTH"),
        help="side of the square input image, or its height and width; if not given, the model's own")
    add("--drop", type=float, default=0.0, metavar="P",
        help="dropout after the position embedding, in projections and feed-forwards; 0: none")
    add("--drop-path", type=float, default=0.1, metavar="P", help="rate of stochastic depth in the last block; 0: none")
    add("--hdim_kan", type=int, metavar="WIDTH", help="hidden width of the KAN feed-forward")
    add("--kan-grid-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="first and last grid point")
    add("--kan-grid-points", type=int, metavar="N", help="basis functions per input")
    add("--kan-h", type=float, metavar="H", help="width of a basis function")
    add("--kan-basis", choices=["original", "covering"],
        help="the released models' grid, h and initialisation, or ones that cover the inputs and begin as an MLP (_KAN)")
    add("--kan-base-branch", action=on_off, help="add a linear map of silu(u) to each layer (_KAN)")
    add("--kan-second-norm", choices=["layer", "static", "none"],
        help="what normalises the hidden units: a LayerNorm, a learned scale and shift of each, nothing (_KAN)")
    add("--kan-groups", type=int, metavar="N", help="learned activations a layer; 0: one for each channel (_GKAN)")
    add("--kan-base", choices=list(BASES), help="activation that the learned one begins as (_GKAN)")
    add("--kan-input-phi", action=on_off, help="a learned activation before the first linear map too (_GKAN)")
    add("--kan-trainable-base", action=on_off, help="learn the scale of the base function (_GKAN)")
    add("--kan-trainable-grid", action=on_off, help="learn where the grid points are (_KAN)")
    add("--kan-trainable-h", action=on_off, help="learn the width of the basis functions (_KAN)")
    add("--kan-backend", default="auto", choices=list(BACKENDS),
        help="what computes the KAN layers: C++ on a CPU and Triton on a GPU (auto), plain PyTorch (reference), that through "
             "torch.compile (compile)")
    add("--grad-checkpointing", action=on_off, default=False,
        help="recompute activations in the backward pass: less memory, more time")
    add("--amp-dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="arithmetic of the forward pass; auto: what the device is good at")

    add = parser.add_argument_group("moving average of the weights").add_argument
    add("--model-ema", action=on_off, default=True, help="keep (and evaluate) a moving average")
    add("--model-ema-decay", type=float, default=0.99996, metavar="D", help="share kept at each step")
    add("--model-ema-warmup", action=on_off, default=False,
        help="keep less at first, 1 - n^(-2/3) at the n-th update, up to --model-ema-decay: for short runs")
    add("--model-ema-force-cpu", action=on_off, default=False, help="keep it in the CPU's memory")

    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", type=str, metavar="NAME", help="any of timm's optimizers")
    add("--opt-eps", default=1e-8, type=float, metavar="EPS", help="the optimizer's epsilon")
    add("--opt-betas", type=float, nargs="+", metavar="B", help="the optimizer's betas, if not its own")
    add("--clip-grad", type=float, metavar="NORM", help="largest gradient norm; no clipping if left out")
    add("--momentum", type=float, default=0.9, metavar="M", help="for optimizers that have one")
    add("--weight-decay", type=float, default=0.05, metavar="W", help="decay of matrices, not of biases")
    add("--kan-lr-mult", type=float, default=20.0, metavar="M",
        help="learning rate of the learned activations' coefficients relative to the others' (_GKAN)")
    add("--kan-weight-decay", type=float, default=0.0, metavar="W", help="decay of those coefficients; 0: none (_GKAN)")
    add("--layer-decay", type=float, metavar="D", help="learning rate of a block relative to the next one's")

    add = parser.add_argument_group("learning rate").add_argument
    add("--sched", default="cosine", type=str, metavar="NAME",
        help="cosine, tanh, step, multistep, plateau or poly")
    add("--sched-on-updates", action=on_off, default=False,
        help="follow the schedule at every update instead of every epoch: for runs of a few epochs")
    add("--lr", type=float, default=5e-4, help="learning rate per 512 images of the global batch (see --unscale-lr)")
    add("--lr-noise", type=float, nargs="+", metavar="F", help="noise on the rate from this share of the "
        "epochs on (a second value: up to that one)")
    add("--lr-noise-pct", type=float, default=0.67, metavar="SHARE", help="largest relative noise")
    add("--lr-noise-std", type=float, default=1.0, metavar="S", help="deviation of the noise")
    add("--warmup-lr", type=float, default=1e-6, metavar="LR", help="where the warm-up begins")
    add("--min-lr", type=float, default=1e-5, metavar="LR", help="where the schedule ends")
    add("--decay-epochs", type=float, default=30.0, metavar="N", help="epochs between decays (step)")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="epochs of linear warm-up")
    add("--cooldown-epochs", type=int, default=10, metavar="N", help="epochs of rest after a decay (plateau)")
    add("--patience-epochs", type=int, default=10, metavar="N", help="epochs without progress (plateau)")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="R", help="factor of a decay")

    add = parser.add_argument_group("augmentation").add_argument
    add("--color-jitter", type=float, default=0.3, metavar="J", help="strength; unused where --aa is a policy other than 3a")
    add("--crop-padding", type=int, default=4, metavar="PIXELS",
        help="around the image before its random crop, at inputs of 32 pixels and below and with --src")
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a mirrored image")
    add("--aa", type=str, default="rand-m9-mstd0.5-inc1", metavar="POLICY",
        help="AutoAugment policy: rand-..., augmix-..., original, v0, 3a or none")
    add("--smoothing", type=float, default=0.1, metavar="S", help="label smoothing")
    add("--train-interpolation", type=str, default="bicubic", metavar="KIND",
        help="random, nearest, bilinear, bicubic, box, hamming or lanczos")
    add("--repeated-aug", action=on_off, default=True, help="each drawn image three times in a batch")
    add("--train-mode", action=on_off, default=True,
        help="dropout and stochastic depth while training (off: as in evaluation)")
    add("--ThreeAugment", action=on_off, default=False, help="DeiT III's three augmentations")
    add("--src", action=on_off, default=False, help="simple random crop (DeiT III)")

    add = parser.add_argument_group("random erasing").add_argument
    add("--reprob", type=float, default=0.25, metavar="P", help="probability per image; 0: none")
    add("--remode", type=str, default="pixel", metavar="KIND", help="const, rand or pixel")
    add("--recount", type=int, default=1, metavar="N", help="rectangles per image")
    add("--resplit", action=on_off, default=False, help="spare the first repeat of each image")

    add = parser.add_argument_group("mixup and cutmix").add_argument
    add("--mixup", type=float, default=0.8, metavar="ALPHA", help="alpha of mixup's Beta distribution; 0: none")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA", help="the same for cutmix; 0: none")
    add("--cutmix-minmax", type=float, nargs="+", metavar="SHARE",
        help="smallest and largest side of the pasted box; turns cutmix on")
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability of applying mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P",
        help="probability of cutmix in place of mixup where both are on")
    add("--mixup-mode", type=str, default="batch", metavar="KIND", help="batch, pair or elem")

    add = parser.add_argument_group("distillation and co-training").add_argument
    add("--teacher-model", default="regnety_160", type=str, metavar="NAME", help="timm name of the teacher")
    add("--teacher-path", type=str, default="", metavar="FILE",
        help="its weights: a file, a folder, a URL or hf-hub:OWNER/NAME")
    add("--distillation-type", default="none", choices=["none", "soft", "hard"], type=str,
        help="learn from the teacher's probabilities or from its first choice")
    add("--distillation-alpha", default=0.5, type=float, metavar="A", help="weight of the teacher's loss")
    add("--distillation-tau", default=1.0, type=float, metavar="T", help="temperature (soft)")
    add("--cosub", action=on_off, default=False, help="co-training of two submodels")

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--finetune", default="", metavar="FILE",
        help="weights to start from: a file, a folder, a URL, hf-hub:OWNER/NAME or the name of a pretrained timm model")
    add("--attn-only", action=on_off, default=False, help="train the attention, head and positions alone")

    add = parser.add_argument_group("data").add_argument
    add("--data-path", default="", type=str, metavar="DIR", help="folder of the data set")
    choices = DataSets(["CIFAR", "IMNET", "INAT", "INAT19"] + ADDED_CHOICES["data_set"])
    add("--data-set", default="IMNET", type=str, choices=choices, metavar="NAME",
        help=f"{', '.join(choices)}. CIFAR is CIFAR-100; IMNET and FOLDER are train/ and val/ with a folder per class, FOLDER "
             "also class folders alone; the last four are names of timm.data.create_dataset. If not given: what --data-path "
             "looks like")
    add("--val-split", type=float, metavar="SHARE",
        help="share of each class that is held out where the data has no validation images of its own (FOLDER: 0.2)")
    add("--data-split", nargs=2, metavar=("TRAIN", "VAL"), help="names of the two parts of a data set of timm's; for one that "
        "does not tell its length with the number of images: 'train-{000..009}.tar|5000'")
    add("--input-key", metavar="NAME", help="column that holds the image in hfds/, hfids/ and wds/, if there are several")
    add("--target-key", metavar="NAME", help="column that holds the label in them, if there are several")
    add("--num-classes", type=int, metavar="N", help="classes of a data set of timm's that does not tell them (wds/)")
    add("--inat-category", default="name", type=str, help="which label of iNaturalist to learn",
        choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"])
    add("--download", action=on_off, default=False, help="fetch a data set that torchvision can fetch")
    add("--eval-crop-ratio", default=0.875, type=float, metavar="SHARE",
        help="side of the centre crop relative to the resized image")
    add("--crop-mode", default="center", choices=["center", "squash", "border"],
        help="how an evaluation image is resized before the crop: by its shorter side, both sides (squash), or its longer side "
             "with a border")
    add("--interpolation", default="bicubic", choices=["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"],
        help="filter of that resizing (see --train-interpolation for training images)")
    add("--mean", type=float, nargs=3, default=list(IMAGENET_DEFAULT_MEAN), metavar=("R", "G", "B"),
        help="mean of each channel (values 0 to 1), which is subtracted from an image. If not given, this flag, --std and the "
             "three before come from the timm configuration of the model or of --finetune, if there is one")
    add("--std", type=float, nargs=3, default=list(IMAGENET_DEFAULT_STD), metavar=("R", "G", "B"),
        help="deviation of each channel, by which it is then divided")
    add("--exif-orientation", action=on_off, help="turn photos upright as their EXIF orientation says; on by default with "
        "FOLDER only, unless its classes are ImageNet's")
    add("--strict-data", action=on_off, default=False, help="stop at the first image that cannot be read")
    add("--max-unreadable", default=0.01, type=float, metavar="SHARE",
        help="stop when more than this share of the images, and more than 3, cannot be read; 0: at the first")
    add("--data-on-device", default="auto", choices=["auto", "on", "off"],
        help="keep small images in the device's memory and augment them there; auto: on a GPU, where they fit and --aa is "
             "none or 3a")
    add("--num_workers", default=10, type=int, metavar="N",
        help="loader processes per training process; if not given, at most the cores that there are for each")
    add("--pin-mem", action=on_off, default=True, help="page-locked batches for faster copies to a GPU")

    add = parser.add_argument_group("output and state").add_argument
    add("--output_dir", default="", metavar="DIR", help="checkpoints and logs; nothing is saved without it")
    add("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto: CUDA where there is a GPU, else MPS, else the CPU")
    add("--seed", default=0, type=int, metavar="N", help="random seed for weights, order and augmentation")
    add("--resume", default="", metavar="FILE",
        help="checkpoint to go on from, or to evaluate: a file, a folder, a URL or hf-hub:OWNER/NAME; auto: the newest in "
             "--output_dir, if any")
    add("--save-interval-steps", default=0, type=int, metavar="N",
        help="also save every N steps within an epoch, so that a killed run loses no more; 0: off")
    add("--save-interval-minutes", default=10.0, type=float, metavar="MINUTES",
        help="also save when so much time has passed since the last checkpoint; 0: off")
    add("--keep", default=2, type=int, metavar="N", help="checkpoints to keep, besides the best ones")
    add("--track", nargs="+", choices=list(TRACKERS), metavar="TRACKER",
        help=f"also send each epoch's numbers and the flags to {' or '.join(TRACKERS)}, where installed")
    add("--track-project", default="vision-kan", metavar="NAME", help="project (wandb) or experiment (mlflow) to send them to")
    add("--start_epoch", default=0, type=int, metavar="N",
        help="number of the first epoch, counted from 0, where the checkpoint doesn't say")
    add("--eval", action=on_off, default=False, help="evaluate --resume or --finetune and stop")
    add("--deterministic", action=on_off, default=False,
        help="deterministic kernels on a GPU too (slower; a CPU is deterministic as it is)")
    add("--debug-nan", action=on_off, default=False,
        help="when the loss or a gradient is not finite: keep the batch in --output_dir, replay it, name the layer")
    add("--print-freq", default=10, type=int, metavar="N", help="batches between log lines")
    add("--log-kan", default=0, type=int, metavar="N",
        help="every N epochs the learned functions, what arrives at them and the dead ones to TensorBoard; 0: off")
    add("--compile", action=SwitchOrMode, choices=list(COMPILE_MODES), metavar="MODE",
        help=f"torch.compile the model: minutes at the start, then faster steps; MODE is torch's, {', '.join(COMPILE_MODES)}, "
             "the first where none is named")
    add("--cuda-graph", default="auto", choices=["auto", "on", "off"],
        help="replay recorded training steps on a GPU, without the host's cost of each kernel: wherever that can be done (auto), "
             "always or else refuse to train (on), never (off)")
    add("--profile", action=on_off, default=False,
        help="write a trace of a few training steps to profile/ in --output_dir and print what takes the time")

    add = parser.add_argument_group("several processes (torchrun starts them)").add_argument
    add("--dist-eval", action=on_off, default=False, help="share the evaluation out; the result is the same")
    add("--distributed", action=on_off, default=False, help="refuse to run as a single process")
    add("--world_size", default=1, type=int, metavar="N", help="processes to expect, if more than 1")
    add("--dist_url", default="env://", metavar="URL", help="rendezvous URL")
    add("--dist-timeout", default=600.0, type=float, metavar="SECONDS",
        help="how long a process waits for the others before it ends and names who is missing")
    return parser


@cache
def flags_by_dest() -> dict[str, argparse.Action]:
    """dest -> action, one for each flag."""
    return {action.dest: action for action in get_args_parser()._actions}


def flag_name(dest: str) -> str:
    """The flag as the user writes it: 'batch_size' -> '--batch-size'."""
    return flags_by_dest()[dest].option_strings[0]


def parse_beside_main(parser: Parser, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """A tool's own arguments, and the words that are left for main.py's parser; a flag that neither knows is refused here,
    where the flags of both are known."""
    own, rest = parser.parse_known_args(args)
    theirs = get_args_parser()._option_string_actions
    known = {with_underscores(option) for option in theirs}
    parser.refuse_unknown([word for word in rest if with_underscores(word.partition("=")[0]) not in known],
                          [*parser._option_string_actions, *theirs])
    return own, rest
