"""Train, evaluate, resume or fine-tune a vision transformer: `python main.py --help`."""
import sys

from vision_kan.common import console

console.starting(__name__)
import torch

import models_kan
import utils
from datasets import build_loaders, calibration_batch
from engine import ema_model, evaluate, result_of, summary, train_one_epoch
from losses import build_criterion
from models_kan import ModelSpec
from vision_kan.common import peers
from vision_kan.common.errors import EXIT_PREEMPTED, Preempted, UserError
from vision_kan.common.interruption import UNREAD, Interruption, name_of
from vision_kan.common.process import Process, world_size_of_launch
from vision_kan.common.seeds import seed_everything
from vision_kan.common.text import say
from vision_kan.config.checks import validate
from vision_kan.config.flags import get_args_parser
from vision_kan.config.recipes import dump_yaml
from vision_kan.config.resolve import Config, describe_sources, parse_args
from vision_kan.data.device import on_device
from vision_kan.data.loaders import Loaders, validation_images
from vision_kan.data.transforms import build_mixup
from vision_kan.models.cost import count_flops, count_parameters
from vision_kan.models.infer import load_exactly
from vision_kan.run.build import (
    build_model,
    build_teacher,
    choose_backend,
    class_weights,
    load_start,
    model_spec,
    model_table,
)
from vision_kan.run.build import (
    description as describe_run,
)
from vision_kan.run.folder import RunFolder
from vision_kan.run.starting import Start, effective_config, read_start
from vision_kan.training import captured, speed
from vision_kan.training.debug_nan import KeptBatches
from vision_kan.training.optim import build_state, freeze_all_but_attention, scaled_lr, schedule_warnings
from vision_kan.training.precision import choose_amp_dtype
from vision_kan.training.speed import StepProfiler, compile_model
from vision_kan.training.state import TrainState, distributed
from vision_kan.training.updates import NonFinite, StopRequested, Wishes, replay_non_finite

__all__ = ["get_args_parser", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run with these command-line words (None: the process's own); returns the exit code of `peers.exit_code`."""
    return peers.exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    config = parse_args(argv)
    if config.args.list_models:
        say(model_table())
        return 0
    if not config.args.resume:      # else the checkpoint still fills in what is missing
        validate(config.args, world_size_of_launch())
    process = peers.init_process(config.args.device, config.args.dist_url, config.args.dist_timeout)
    with utils.stop_together(process):
        with utils.main_process_first(process):     # one download, then the cached file
            start = read_start(config)
        config = effective_config(config, start)
        args = config.args
        validate(args, process.world_size)
    if args.deterministic:
        utils.use_deterministic_kernels()
    exact = args.eval and "amp_dtype" not in config.given
    amp_dtype = torch.float32 if exact else choose_amp_dtype(args.amp_dtype, process.device)
    say(f"device: {process.device}, {process.world_size} process(es), {str(amp_dtype).removeprefix('torch.')}")
    say(describe_sources(config))

    with utils.stop_together(process):
        loaders = on_device(build_loaders(args, process, start.class_names), args, process)
        seed_everything(args.seed)
        model, spec = build_model(model_spec(config, start, loaders.nb_classes), config)
        choose_backend(config, spec, model, process.device)
        table = load_start(model, spec, start, lambda: calibration_batch(loaders, args.seed))
        if args.compile:
            compile_model(model, process.device, mode=args.compile)
    if table:
        say(f"weights from {start.checkpoint.path}:\n{table}")
    if args.eval:
        return evaluate_checkpoint(config, start, model.to(process.device), loaders, process, amp_dtype)
    return train(config, argv, start, model.to(process.device), spec, loaders, process, amp_dtype)


def evaluate_checkpoint(config: Config, start: Start, model: torch.nn.Module, loaders: Loaders,
                        process: Process, amp_dtype: torch.dtype) -> int:
    """Evaluate `model` and `model_ema` of a checkpoint, or a model just made from --finetune."""
    keys = [key for key in ("model", "model_ema") if start.purpose == "eval" and start.checkpoint.state.get(key)]
    lines: list[str] = []
    for key in keys or ["model"]:
        if start.purpose == "eval":
            load_exactly(model, start.checkpoint.weights(key), f"{key} in checkpoint {start.checkpoint.path}")
        result = evaluate(model, loaders.val, process, amp_dtype=amp_dtype, shared=config.args.dist_eval, title=key)
        with utils.stop_together(process):
            loaders.check_unreadable(together=True)
        if result["unreadable"] and not lines:
            say(f"{result['unreadable']} images could not be read and are left out")
        lines.append(summary(key, result))
    say("\n".join(lines))
    return 0


def train(config: Config, argv: list[str], start: Start, model: torch.nn.Module, spec: ModelSpec,
          loaders: Loaders, process: Process, amp_dtype: torch.dtype) -> int:
    args = config.args
    with utils.stop_together(process):
        folder = RunFolder(args.output_dir, process, args.keep, args.save_interval_minutes, args.track or (),
                           args.track_project)
        if folder.holds_another_run(start.checkpoint.path if start.purpose == "resume" else ""):
            raise UserError(f"--output_dir {args.output_dir} holds a run already: go on with it by --resume auto, or "
                            "choose another folder")
    if args.attn_only:
        freeze_all_but_attention(model)
    mixup = build_mixup(args, loaders.nb_classes)
    teacher = build_teacher(args, loaders.nb_classes, process.device)
    criterion = build_criterion(args, loaders.nb_classes, mixup is not None, teacher,
                                class_weights(args, loaders, process.device))
    lr = scaled_lr(args, process.world_size)
    updates = -(-len(loaders.train) // args.grad_accum)
    state = build_state(args, model, lr, updates, process.device, amp_dtype)
    if start.purpose == "resume":
        state.load_state_dict(start.checkpoint.state)
        loaders.load_unreadable_state(start.checkpoint.state.get("unreadable") or [])
        start.checkpoint.free()
        step = f", step {state.step}" if state.step else ""
        say(f"resumed from {start.checkpoint.path}: epoch {state.epoch}{step}, best top-1 {state.max_accuracy:.2f}")
    if state.epoch >= args.epochs:
        say(f"the run has finished its {args.epochs} epochs: nothing left to do (raise --epochs to train on)")
        folder.finished(state.epoch)
        return 0
    if state.patience_is_over(args.patience, process):
        say(f"the run has ended early, {stopped_early(state)}: nothing left to do (raise --patience to train on)")
        folder.finished(state.epoch, stopped_early(state))
        return 0
    if changed := state.fit_launch(args.batch_size, process):
        say(f"warning: {changed}", file=sys.stderr)
    net = distributed(model, process)
    with utils.stop_together(process):
        updater = captured.build_updater(args, net, state, criterion, process, amp_dtype)

    for warning in schedule_warnings(args, lr):
        say(f"warning: {warning}", file=sys.stderr)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = count_flops(model) if models_kan.split_name(spec.name)[0] else None
    cost = f", {flops.matmul / 1e6:,.1f} M matmul and {flops.elementwise / 1e6:,.2f} M elementwise FLOPs" if flops else ""
    say(f"{spec.name}: {count_parameters(model):,} parameters, {n_parameters:,} trained{cost}; "
        f"{loaders.data_set}, {loaders.nb_classes} classes; lr {lr:.3g} for "
        f"{args.batch_size * process.world_size * args.grad_accum} images an update")
    description = describe_run(config, spec, loaders)
    ideal_rate = speed.ideal_rate(flops and flops.matmul, process, amp_dtype)
    profiled = args.profile and process.is_main
    profiler = StepProfiler(args.output_dir, len(loaders.train), process.device) if profiled else None
    kept = KeptBatches(args.grad_accum) if args.debug_nan else None

    def save(also: tuple[str, ...] = ()) -> None:
        unreadable = loaders.unreadable_state()
        folder.save({**state.state_dict(), **description, "unreadable": unreadable}, also)
        folder.status("running", state.epoch, state.step)

    def wishes() -> Wishes:
        loaders.check_unreadable()
        return Wishes(interruption.signal, folder.wants_saving())

    with Interruption(lambda: folder.interrupted(state), process.is_main) as interruption, folder.telling(state):
        folder.start(dump_yaml(args), argv, state.epoch, state.step)
        while state.epoch < args.epochs:
            epoch = state.epoch
            loaders.train_sampler.set_epoch(epoch, state.position)
            if args.sched != "plateau":
                state.scheduler.step(epoch)
            state.scheduler.step_update(epoch * updates + -(-state.step // args.grad_accum))
            try:
                trained = train_one_epoch(
                    net, state, criterion, loaders.train, process, epochs=args.epochs, seed=args.seed, amp_dtype=amp_dtype,
                    accumulate=args.grad_accum, clip_grad=args.clip_grad, mixup=mixup, train_mode=args.train_mode,
                    print_freq=args.print_freq, ideal_rate=ideal_rate, after_step=profiler, wishes=wishes, save=save,
                    save_every=args.save_interval_steps, keep_batches=kept, updater=updater)
                results = {"test": evaluate(model, loaders.val, process, amp_dtype=amp_dtype, shared=args.dist_eval,
                                            wishes=wishes)}
                say(summary("model", results["test"]))
                if state.ema is not None:
                    results["ema_test"] = evaluate(ema_model(state, process.device), loaders.val, process, shared=args.dist_eval,
                                                   amp_dtype=amp_dtype, title="ema", wishes=wishes)
                    say(summary("model_ema", results["ema_test"]))
            except StopRequested as stop:
                save()
                code = console.EXIT_UNREAD if stop.signal == UNREAD else EXIT_PREEMPTED
                raise Preempted(folder.stopped_by(name_of(stop.signal), state), code) from None
            except NonFinite as error:
                if kept is not None:
                    found = replay_non_finite(error, state, criterion, kept, process, amp_dtype, args.seed, args.output_dir)
                    with console.readers_may_leave():
                        print(found, file=sys.stderr, flush=True)
                raise error
            loaders.check_unreadable(together=True)
            state.next_epoch()
            if args.sched == "plateau":
                state.scheduler.step(state.epoch, results["test"]["acc1"])
            also = state.note_best(results)
            state.results = {key: result_of(results[title], args)
                             for key, title in (("model", "test"), ("model_ema", "ema_test")) if title in results}
            folder.log({"epoch": epoch, "train_loss": trained["loss"], "train_lr": trained["lr"],
                        **{f"{name}_{key}": value for name, result in results.items() for key, value in result.items()},
                        "train_unreadable": loaders.unreadable_train(), "n_parameters": n_parameters,
                        **({"epochs_without_best": state.epochs_without_best} if args.patience else {}),
                        "epoch_seconds": trained["seconds"],
                        **{key: trained[key] for key in ("img_per_s", "mfu") if key in trained}})
            if args.log_kan and process.is_main and state.epoch % args.log_kan == 0:
                from vision_kan.analysis.training_log import log_functions  # matplotlib is slow to import
                peers.mark(f"the functions learned in epoch {epoch}")
                log_functions(model, validation_images(loaders), folder, epoch)
            save(also)
            if state.epoch < args.epochs and state.patience_is_over(args.patience, process):
                folder.ended_by = stopped_early(state)
                say(f"the run ends early: {folder.ended_by}")
                break
        folder.close()
        averaged = f", model_ema {state.max_accuracy_ema:.2f}" if state.ema else ""
        say(f"best top-1: model {state.max_accuracy:.2f}{averaged}")
        if folder.failed:
            raise UserError(f"{folder.failed}: the files there are from before; free some space and start again with "
                            "--resume auto")
    return 0


def stopped_early(state: TrainState) -> str:
    return f"no new best top-1 in {state.epochs_without_best} epochs (--patience)"


if __name__ == "__main__":
    sys.exit(main())
