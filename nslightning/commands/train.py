"""``nslightning fit | validate | test | predict``: one run from its command line to its exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nslightning import runs
from nslightning.commands import wandb_run
from nslightning.commands.dashes import with_underscores
from nslightning.commands.endings import CallError, Ending, ending_of
from nslightning.commands.going_on import start
from nslightning.commands.process import own_process
from nslightning.commands.run_callbacks import SaveConfig
from nslightning.commands.run_place import RunPlace, rank
from nslightning.commands.stopping import Stopped, signals
from nslightning.commands.training_cli import Parser, TrainCLI
from nslightning.models.own import current_folder_importable

__all__ = ["main"]


def main(argv: Sequence[str], cli_class: type[TrainCLI] = TrainCLI) -> int:
    """Run ``fit``, ``validate``, ``test``, ``predict``, or a command that trains as ``fit`` does.

    Args:
        argv: The command line from the subcommand on.
        cli_class: The command line that runs it; a command that is not one of the four runs as ``fit``.

    Returns:
        The exit status: 0, 1 for data that are missing or damaged and for a full disk, 2 for a mistaken call, 130 after
        Ctrl-C and 143 after SIGTERM.
    """
    argv = with_underscores(argv)
    cli = cli_class.__new__(cli_class)
    cli.place = RunPlace()
    subcommand = argv[0] if argv[0] in cli.subcommands() else "fit"
    program = cli_class.program or argv[0]
    status = 1
    with own_process(argv), current_folder_importable(), signals() as cli.signals:
        try:
            cli.start, cli.task = start(argv, subcommand)
            if cli.task not in cli.tasks:
                tasks = " or ".join(f"--task={task}" for task in cli.tasks)
                raise CallError(f"--task={cli.task}: {argv[0]} takes {tasks}")
            cli.__init__(  # type: ignore[misc] # so that `close` has it when this raises
                *cli.tasks[cli.task][:2],
                subclass_mode_model=cli.task == "own",
                subclass_mode_data=True,
                save_config_callback=SaveConfig if subcommand == "fit" else None,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                parser_kwargs={
                    "prog": "nslightning",
                    subcommand: {"usage": f"nslightning {program} --config FILE [options]"},
                },
                auto_configure_optimizers=False,
                args=[subcommand, *cli.start.argv[1:]],
            )
            status = 0
        except Stopped as stop:
            status = _stopped(cli, stop, program)
        except SystemExit as stop:
            if cli.signals.signum is not None:  # Lightning's way to end after it
                status = _stopped(cli, Stopped(cli.signals.signum), program)
            elif not isinstance(stop.code, int):
                raise
            else:
                status = stop.code
        except Exception as error:
            if cli.signals.signum is not None:  # a loader's worker that the same signal ended, say
                status = _stopped(cli, Stopped(cli.signals.signum), program)
            else:
                go_on = cli.place.go_on(argv[0]) if cli.began else None
                gone = cli.place.gone(error, argv[0]) if cli.began else None
                ending = Ending(1, gone) if gone else ending_of(error, began=cli.began, go_on=go_on)
                if ending is None:
                    raise
                if rank() != 0 and _all_raise(error):
                    return 0  # as in `_stopped`; the first process says it
                print(f"nslightning {program}: error: {ending.message}", file=sys.stderr)
                status = ending.status
        finally:
            wandb_run.finish(failed=status == 1)
            cli.place.leave(keep=status == 0 or cli.began)
    return status


def _all_raise(error: Exception) -> bool:
    """Return whether all processes of a training raise an error together."""
    from nslightning.callbacks import NonFiniteError

    return isinstance(error, NonFiniteError)


def _stopped(cli: TrainCLI, stop: Stopped, program: str) -> int:
    """Say at which step a run was stopped, and how it goes on."""
    if rank() != 0:
        # Lightning's launcher takes a further process that ends otherwise for a failed one.
        return 0
    if cli.silent_stop:
        return stop.status
    line = f"\nnslightning {program}: stopped by {stop.by}"
    if cli.stopper is None or not cli.began:
        print(f"{line} before the first step", file=sys.stderr)
        return stop.status
    line += f" at step {cli.stopper.step}"
    if cli.place.folder is not None:
        runs.note_end(cli.place.folder, "stopped", cli.stopper.step)
    if (go_on := cli.place.go_on(program)) is None:
        line += "; there is no checkpoint to go on from"
    else:
        line += "; go on with" if cli.stopper.saved else ", without a checkpoint of it; go on from the last one with"
        line += f": {go_on}"
    print(line, file=sys.stderr)
    return stop.status
