"""`vdrop train`: trains a model into its run folder; sinks consume the records."""

from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from vdrop_cli import checkpoint, files, ownership, stuck_starts, tasks
from vdrop_cli.device import choose_device, configure_process
from vdrop_cli.lock import Lock
from vdrop_cli.run_files import CONFIG, SHARED_DEVICE
from vdrop_cli.run_summary import (
    print_changed_names,
    print_if_finished,
    print_next_commands,
    print_result,
    print_run,
    print_start,
)
from vdrop_cli.settings.fields import plain
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import phase, require_installed, require_unfinished_log
from vdrop_cli.stuck_starts import StuckError
from vdrop_cli.training import Run, log_to_sinks, make_folder, require_fitting_schedule, resolve_auto


def run(
    settings: Train,
    report_started_over: Callable[[], object] = lambda: None,
    continues_shorter: bool = True,
    report_folder: Callable[[Path], object] = lambda folder: None,
    shares_device: bool = False,
) -> str:
    """Trains a model; returns the status: done, resumed or skipped.

    Calls `report_started_over` after `force` has removed the earlier run, and `report_folder` with the run
    folder. `continues_shorter`: whether a run of fewer epochs is continued; with `force` none is.
    `shares_device`: whether other runs may use the device at the same time, so that no table shows the speed
    of this run.
    """
    if settings.debug:
        settings = settings.for_debugging()
    require_installed(settings.logger.name)
    device = choose_device(settings.device)
    configure_process(device)
    settings = resolve_auto(settings, device)
    with phase("loading the data"):
        task = tasks.load(settings, device)
    folder = checkpoint.run_folder(settings, task.fingerprint)
    report_folder(folder)
    if not settings.force:
        ownership.require_regular_files(folder)
        if print_if_finished(settings, folder, task):
            return "skipped"
    require_fitting_schedule(settings, task)
    if not settings.force and (start := stuck_starts.remembered(folder, settings.stuck)) is not None:
        raise StuckError(folder, start)
    make_folder(folder, settings)
    with Lock(folder / ownership.LOCK, str(folder)):
        if settings.force:
            ownership.clear(folder)
            report_started_over()
        elif print_if_finished(settings, folder, task):  # since another process trained it meanwhile
            return "skipped"
        ownership.require_regular_files(folder, before_writing=True)
        files.remove_unfinished(folder, ownership.TRAINING)
        stuck_starts.forget(folder)
        training = Run(settings, task, folder)
        if training.step:
            print_changed_names(settings, folder)
        files.replace(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(plain(settings))).encode())
        if not settings.force:  # before a shorter run is copied here
            ownership.require_nothing_newer(folder, (training.progress.epoch, training.progress.batch))
            if training.step == 0:
                require_unfinished_log(folder)
        shorter = training.continue_shorter() if continues_shorter and not settings.force else None
        if shares_device:
            files.replace(folder / SHARED_DEVICE, b"a sweep ran jobs side by side\n")
        status = "resumed" if training.step else "done"
        print_run(training, shorter)
        print_start(settings, training)
        tasks.warn(task)
        print_result(log_to_sinks(training))
        print_next_commands(settings, folder)
        return status
