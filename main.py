"""Train, evaluate, resume or fine-tune a vision transformer: `python main.py --help`."""
import math
import sys

from vision_kan.config.early import answered

answered(__name__)
import torch

from datasets import build_loaders, calibration_batch
from engine import evaluate, summary, train_epochs
from losses import build_criterion
from models_kan import ModelSpec
from utils import main_process_first, stop_together, use_deterministic_kernels
from vision_kan.common import peers
from vision_kan.common.launch import world_size_of_launch
from vision_kan.common.process import Process
from vision_kan.common.seeds import seed_everything
from vision_kan.common.text import say, warn
from vision_kan.config.checks import validate
from vision_kan.config.flags import get_args_parser
from vision_kan.config.resolve import Config, describe_sources, parse_args
from vision_kan.data.device import move_to_device
from vision_kan.data.loaders import Loaders, validation_images
from vision_kan.data.transforms import build_mixup
from vision_kan.models.infer import load_exactly
from vision_kan.run import build
from vision_kan.run.starting import Start, effective_config, read_start
from vision_kan.run.training_run import TrainingRun, build_training, has_ended, open_folder, resume
from vision_kan.training.captured import build_updater
from vision_kan.training.optim import build_state, scaled_lr, schedule_warnings
from vision_kan.training.precision import choose_amp_dtype

__all__ = ["get_args_parser", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run with these command-line words (None: the process's own); returns the exit code of `peers.exit_code`."""
    return peers.exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    # 1. Flags, processes, and the checkpoint, which fills in the flags that are not given
    config = parse_args(argv)
    if config.args.list_models:
        say(build.model_table())
        return 0
    validate(config.args, world_size_of_launch(), complete=not config.args.resume)
    process = peers.init_process(config.args.device, config.args.dist_url, config.args.dist_timeout)
    with stop_together(process):
        with main_process_first(process):       # it downloads, the others read the cached file
            start = read_start(config)
        config = effective_config(config, start)
        args = config.args
        validate(args, process.world_size)
    if args.deterministic:
        use_deterministic_kernels()
    exact = args.eval and "amp_dtype" not in config.given
    amp_dtype = torch.float32 if exact else choose_amp_dtype(args.amp_dtype, process.device)
    say(f"device: {process.device}, {process.world_size} process(es), {str(amp_dtype).removeprefix('torch.')}\n"
        f"{describe_sources(config)}")
    # 2. Images, then the model, whose head needs the number of classes
    with stop_together(process):
        loaders = move_to_device(build_loaders(args, process, start.class_names(args.eval)), args, process)
        seed_everything(args.seed)
        model, spec = build.model_of_run(config, start, loaders.nb_classes, process.device,
                                         lambda: calibration_batch(loaders, args.seed))
    # 3. Evaluation or training
    if args.eval:
        return evaluate_checkpoint(config, start, model, loaders, process, amp_dtype)
    return train(config, argv, start, model, spec, loaders, process, amp_dtype)


def evaluate_checkpoint(config: Config, start: Start, model: torch.nn.Module, loaders: Loaders, process: Process,
                        amp_dtype: torch.dtype) -> int:
    """Evaluate a checkpoint's `model` and `model_ema`, or with --finetune the model made from it."""
    keys = [key for key in ("model", "model_ema") if start.purpose == "eval" and start.checkpoint.state.get(key)]
    lines: list[str] = []
    for key in keys or ["model"]:
        if start.purpose == "eval":
            load_exactly(model, start.checkpoint.weights(key), f"{key} in checkpoint {start.checkpoint.path}")
        result = evaluate(model, loaders.val, process, amp_dtype=amp_dtype, shared=config.args.dist_eval, title=key)
        with stop_together(process):
            loaders.check_unreadable(gather=True)
        if result["unreadable"] and not lines:
            say(f"{result['unreadable']} images could not be read and are left out")
        lines.append(summary(key, result))
    say("\n".join(lines))
    return 0


def train(config: Config, argv: list[str], start: Start, model: torch.nn.Module, spec: ModelSpec, loaders: Loaders,
          process: Process, amp_dtype: torch.dtype) -> int:
    args = config.args
    # 1. The output folder, before anything is computed
    with stop_together(process):
        folder = open_folder(args, start, process)
    # 2. Loss, optimizer, schedule and moving average, as an earlier launch left them
    mixup, lr = build_mixup(args, loaders.nb_classes), scaled_lr(args, process.world_size)
    with stop_together(process), main_process_first(process):
        teacher = build.build_teacher(args, loaders.class_names, process.device)
    criterion = build_criterion(args, loaders.nb_classes, mixup is not None, teacher,
                                build.class_weights(args, loaders, process.device))
    state = build_state(args, model, lr, math.ceil(len(loaders.train) / args.grad_accum), process.device, amp_dtype)
    resume(state, args, start, loaders, process)
    if has_ended(args, state, folder, process):
        return 0
    warn(state.fit_launch(args.batch_size, process), *schedule_warnings(args, lr))
    # 3. The training step, for one process or several, as CUDA graphs or not
    updater = build_updater(args, state, criterion, process, amp_dtype)
    training = build_training(args, spec, updater, mixup, loaders)
    this_run = TrainingRun(args, training, loaders, folder, build.description(config, spec, loaders))
    # 4. Epoch by epoch
    with this_run.running(argv):
        for epoch in train_epochs(training, loaders.train, loaders.val, this_run):
            best = this_run.record_results(epoch)
            this_run.log(epoch)
            if args.log_kan and process.is_main and state.epoch % args.log_kan == 0:
                from vision_kan.analysis.training_log import log_functions  # matplotlib is slow to import
                log_functions(model, validation_images(loaders), folder, epoch.number)
            this_run.save(also=best)
            if this_run.ends_early():
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
