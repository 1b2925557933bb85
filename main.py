"""Train, evaluate, resume or fine-tune a vision transformer: `python main.py --help`."""
import sys
from typing import Any, Optional

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import models_kan
import start as starting
import utils
from config import Config, describe_sources, dump_yaml, get_args_parser, parse_args, validate
from datasets import Loaders, build_loaders
from engine import TrainState, choose_amp_dtype, ema_model, evaluate, summary, train_one_epoch
from losses import build_criterion
from models_kan import ModelSpec
from utils import Process, RunFolder, TrainingFailed, UserError, say

__all__ = ["get_args_parser", "main"]


def main(argv: Optional[list[str]] = None) -> int:
    """Run with these command-line words (None: the process's own). Returns the exit code: 0 done, 2 bad input or
    environment, 1 the training failed, 130 interrupted."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except TrainingFailed as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except torch.OutOfMemoryError:
        print("stopped: out of GPU memory: lower --batch-size (and raise --grad-accum), or add --grad-checkpointing",
              file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped: interrupted; --resume auto goes on from the last checkpoint", file=sys.stderr, flush=True)
        return 130
    finally:
        utils.end_process()


def run(argv: list[str]) -> int:
    config = parse_args(argv)
    if config.args.list_models:
        print(starting.model_table())
        return 0
    validate(config.args, utils.world_size_of_launch())
    process = utils.init_process(config.args.device, config.args.dist_url)
    with utils.main_process_first(process):     # one download, then the cached file
        start = starting.read_start(config)
    config = starting.settle(config, start, process)
    args = config.args
    validate(args, process.world_size)
    if args.eval and "amp_dtype" not in config.given:
        amp_dtype = torch.float32
    else:
        amp_dtype = choose_amp_dtype(args.amp_dtype, process.device)
    say(f"device: {process.device}, {process.world_size} process(es), {str(amp_dtype).removeprefix('torch.')}")
    say(describe_sources(config))

    loaders = build_loaders(args, process, start.class_names)
    utils.seed_everything(args.seed)
    model, spec = starting.build_model(starting.model_spec(config, start, loaders.nb_classes), config)
    table = starting.load_start(model, start)
    if table:
        say(f"weights from {start.path}:\n{table}")
    if args.eval:
        return evaluate_checkpoint(config, start, model.to(process.device), loaders, process, amp_dtype)
    return train(config, argv, start, model.to(process.device), spec, loaders, process, amp_dtype)


def evaluate_checkpoint(config: Config, start: starting.Start, model: torch.nn.Module, loaders: Loaders,
                        process: Process, amp_dtype: torch.dtype) -> int:
    """Evaluate `model` and `model_ema` of a checkpoint, or a model just made from --finetune."""
    keys = [key for key in ("model", "model_ema") if start.purpose == "eval" and start.checkpoint.get(key)]
    lines = []
    for key in keys or ["model"]:
        if start.purpose == "eval":
            models_kan.load_exactly(model, utils.weights_of(start.checkpoint, start.path, key),
                                    f"{key} in checkpoint {start.path}")
        result = evaluate(model, loaders.val, process, amp_dtype=amp_dtype, shared=config.args.dist_eval, title=key)
        if result["unreadable"] and not lines:
            say(f"{result['unreadable']} images could not be read and are left out")
        lines.append(summary(key, result))
    say("\n".join(lines))
    return 0


def train(config: Config, argv: list[str], start: starting.Start, model: torch.nn.Module, spec: ModelSpec,
          loaders: Loaders, process: Process, amp_dtype: torch.dtype) -> int:
    args = config.args
    folder = RunFolder(args.output_dir, process)
    if folder.folder and start.purpose != "resume" and (folder.folder / utils.CHECKPOINT).exists():
        raise UserError(f"--output_dir {args.output_dir} holds a run already: go on with it by --resume auto, or "
                        "choose another folder")
    if args.attn_only:
        starting.freeze_all_but_attention(model)
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                  args.mixup_mode, label_smoothing=args.smoothing, num_classes=loaders.nb_classes) if mixing else None
    teacher = starting.build_teacher(args, loaders.nb_classes, process.device)
    criterion = build_criterion(args, loaders.nb_classes, mixing, teacher)

    lr = starting.scaled_lr(args, process.world_size)
    optimizer = starting.build_optimizer(args, model, lr)
    updates = -(-len(loaders.train) // args.grad_accum)
    ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None) \
        if args.model_ema else None
    state = TrainState(model, optimizer, starting.build_scheduler(args, optimizer, updates),
                       torch.amp.GradScaler(process.device.type, enabled=amp_dtype == torch.float16), ema,
                       epoch=args.start_epoch)
    if start.purpose == "resume":
        models_kan.load_exactly(model, utils.weights_of(start.checkpoint, start.path), f"checkpoint {start.path}")
        state.load_state_dict(start.checkpoint)
        say(f"resumed from {start.path}: epoch {state.epoch}, best top-1 {state.max_accuracy:.2f}")
    if state.epoch >= args.epochs:
        say(f"the run has finished its {args.epochs} epochs: nothing left to do (raise --epochs to train on)")
        return 0
    net = DistributedDataParallel(model, [process.device] if process.device.type == "cuda" else None) \
        if process.world_size > 1 else model

    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{spec.name}: {models_kan.count_parameters(model):,} parameters, {n_parameters:,} trained; "
        f"{loaders.data_set}, {loaders.nb_classes} classes; lr {lr:.3g} for "
        f"{args.batch_size * process.world_size * args.grad_accum} images an update")
    folder.start(dump_yaml(args), argv, state.epoch)
    while state.epoch < args.epochs:
        epoch = state.epoch
        loaders.train_sampler.set_epoch(epoch)
        if args.sched != "plateau":
            state.scheduler.step(epoch)
        state.scheduler.step_update(epoch * updates)
        trained = train_one_epoch(
            net, state, criterion, loaders.train, process, epochs=args.epochs, seed=args.seed, amp_dtype=amp_dtype,
            accumulate=args.grad_accum, clip_grad=args.clip_grad, mixup=mixup, train_mode=args.train_mode,
            print_freq=args.print_freq)
        results = {"test": evaluate(model, loaders.val, process, amp_dtype=amp_dtype, shared=args.dist_eval)}
        say(summary("model", results["test"]))
        if state.ema is not None:
            results["ema_test"] = evaluate(ema_model(state, process.device), loaders.val, process,
                                           amp_dtype=amp_dtype, shared=args.dist_eval, title="ema")
            say(summary("model_ema", results["ema_test"]))
        state.epoch = epoch + 1
        if args.sched == "plateau":
            state.scheduler.step(state.epoch, results["test"]["acc1"])
        also = note_best(state, results)
        folder.log({"epoch": epoch, "train_loss": trained["loss"], "train_lr": trained["lr"],
                    **{f"{name}_{key}": value for name, result in results.items() for key, value in result.items()},
                    "train_unreadable": loaders.unreadable_train(), "n_parameters": n_parameters,
                    "epoch_seconds": trained["seconds"], "img_per_s": trained["img_per_s"]})
        folder.save(checkpoint_of(state, spec, config, loaders), also)
    folder.close()
    say(f"best top-1: model {state.max_accuracy:.2f}" + (f", model_ema {state.max_accuracy_ema:.2f}" if ema else ""))
    if folder.failed:
        raise UserError(f"{folder.failed}: the files there are from before; free some space and start again with "
                        "--resume auto")
    return 0


def note_best(state: TrainState, results: dict[str, dict[str, float]]) -> tuple[str, ...]:
    """Raise the best accuracies; returns the names under which this epoch's checkpoint is kept too."""
    also = []
    if results["test"]["acc1"] > state.max_accuracy:
        state.max_accuracy = results["test"]["acc1"]
        also.append("best_checkpoint.pth")
    if "ema_test" in results and results["ema_test"]["acc1"] > state.max_accuracy_ema:
        state.max_accuracy_ema = results["ema_test"]["acc1"]
        also.append("best_ema_checkpoint.pth")
    return tuple(also)


def checkpoint_of(state: TrainState, spec: ModelSpec, config: Config, loaders: Loaders) -> dict[str, Any]:
    """DeiT's keys (args as a dict), the model's description and what an exact resume needs; plain types only."""
    return {**state.state_dict(), "args": utils.plain({**vars(config.args), "nb_classes": loaders.nb_classes}),
            "model_args": utils.plain({"name": spec.name, "kwargs": spec.kwargs}),
            "class_names": loaders.class_names, "versions": utils.versions()}


if __name__ == "__main__":
    sys.exit(main())
