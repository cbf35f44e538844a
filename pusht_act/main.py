"""The command `pusht-act` and its twin in Python: Hydra's entry, exit codes, ranks.

argv -> old names replaced -> Hydra composes -> a sweep's job, mode=status, or one job (job.py) -> exit code
"""

import logging
import os
import platform
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal import hydra as hydra_entry
from hydra._internal import utils as hydra_utils
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import pusht_act
from pusht_act.config.aliases import rename_overrides
from pusht_act.config.arguments import check_arguments, quote_texts
from pusht_act.config.errors import explain
from pusht_act.config.overrides import check_overrides, describe_modes, is_output_dir_typed, override
from pusht_act.config.schema import CONFIG_DIR as CONFIG_DIR  # noqa: PLC0414  (notebooks and tests compose from it)
from pusht_act.config.schema import TRAINING, Mode, register
from pusht_act.config.secrets_check import refuse_tokens
from pusht_act.config.validation import to_config
from pusht_act.runtime.distributed import PeerLostError, distributed_context, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.process_pool import refuse_in_starting_worker
from pusht_act.runtime.signals import StopSignal, signals
from pusht_act.sweeps.joblib_workers import stopping
from pusht_act.sweeps.pruning import reporter
from pusht_act.sweeps.report import sweep_summary
from pusht_act.sweeps.resume import expand_resume_args
from pusht_act.sweeps.run_job import run_sweep_job
from pusht_act.sweeps.slurm import requeue
from pusht_act.training.extensions import Extensions

if TYPE_CHECKING:
    from pusht_act.job import Result
    from pusht_act.training.extensions import ActionLoss, Transform

USER_ERRORS = (HydraException, OmegaConfBaseException, UserError, OSError)
# Whatever composes conf/ needs its schemas: this command, the processes of a launcher, `run`, a notebook.
register()


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="config")  # type: ignore[untyped-decorator]
def _task(cfg: DictConfig) -> Any:
    hydra_node = HydraConfig.get()
    try:
        if stopping():
            return None
        with distributed_context(USER_ERRORS) as leads:
            if not leads:
                _run_worker()
                return None
            if hydra_node.mode is RunMode.MULTIRUN:
                return run_sweep_job(cfg, hydra_node, _execute, lambda error: explain(error, CONFIG_DIR))
            return _execute(cfg, hydra_node).objective
    except USER_ERRORS as error:
        if _wants_traceback():
            raise
        # From here: were it raised, Hydra would print a line of its own above ours.
        _exit(error)
    except (StopSignal, PeerLostError) as stopped:
        # In the process of `main` the signal ends a sweep, too.
        if signals.is_active:
            raise
        # A launcher's process leaves it to the launcher what to do about the signal, such as to requeue the job.
        if isinstance(stopped, StopSignal):
            requeue(stopped.signal)
        if stopping():
            return None
        raise OSError(str(stopped)) from stopped


def run(overrides: list[str], *, loss: "ActionLoss | None" = None, transforms: "Sequence[Transform]" = ()) -> "Result":
    """Run what `pusht-act OVERRIDES` runs, from Python, and return its result.

    Args:
        overrides: What the command line would have, such as ["mode=test", "steps=200"].
        loss: (predicted, target), both [B, T, A] and normalized -> the error of each element, in place of ACT's L1.
        transforms: Applied to training batches before they are normalized, in this order (docs/extending.md).

    Raises:
        UserError, OSError: what the command line prints as one line.
        StopSignal, PeerLostError: a signal such as Ctrl-C stopped it, or another rank is gone. They are a SystemExit,
            so a script that does not catch them ends with the command's exit code and without a traceback.
    """
    refuse_in_starting_worker()
    extensions = Extensions(loss, transforms)
    with _callers_hydra_kept(), _log_shown():
        try:
            with signals.handle(), distributed_context(USER_ERRORS) as is_main:
                return _run(overrides, extensions) if is_main else _run_worker(extensions)
        except (StopSignal, PeerLostError) as stopped:
            _report(stopped)
            raise
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error, CONFIG_DIR)) from error
    # On another rank, where rank 0 had nothing to train.
    from pusht_act.job import Result

    return Result(Path())


def _run(overrides: list[str], extensions: Extensions) -> "Result":
    from hydra import compose, initialize_config_dir

    _check_working_directory()
    if not isinstance(overrides, list | tuple) or not all(isinstance(each, str) for each in overrides):
        raise UserError(f"pusht_act.run({overrides!r}): give a list of texts, such as ['mode=test', 'steps=200']")
    if flags := [each for each in overrides if each.startswith("-")]:
        raise UserError(f"pusht_act.run takes no {flags[0]}: give KEY=VALUE, or use the command pusht-act")
    overrides = quote_texts(rename_overrides([*overrides]))
    check_arguments(overrides)
    with initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR), _hydras_value_errors_as_its_own():
        cfg = compose("config", overrides, return_hydra_config=True)
        hydra_node = cfg.hydra
        with_hydra = cfg.copy()
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        HydraConfig.instance().set_config(with_hydra)
    return _execute(cfg, hydra_node, extensions)


@contextmanager
def _callers_hydra_kept() -> Iterator[None]:
    """Compose apart from the Hydra application that the caller may be, and give it its configuration back."""
    config, runtime = HydraConfig.instance(), JobRuntime.instance()
    former = GlobalHydra.instance().hydra, config.cfg, runtime.conf
    GlobalHydra.instance().hydra, runtime.conf = None, OmegaConf.create()
    try:
        yield
    finally:
        # Hydra has put another object in the place of this one.
        GlobalHydra.instance().hydra, config.cfg, runtime.conf = former


@contextmanager
def _log_shown() -> Iterator[None]:
    """Show what the command shows where nobody has configured logging, as in a notebook."""
    root, ours = logging.getLogger(), logging.getLogger("pusht_act")
    if root.handlers:
        yield
        return
    handler, level = logging.StreamHandler(), ours.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level)


def _run_worker(extensions: Extensions | None = None) -> "Result":
    from pusht_act.job import run_worker

    return run_worker(extensions)


def _execute(cfg: DictConfig, hydra_node: Any, extensions: Extensions | None = None) -> "Result":
    overrides = list(hydra_node.overrides.task)
    if hydra_node.mode is RunMode.MULTIRUN and not is_output_dir_typed(overrides):
        # A job of a sweep has a folder of its own.
        overrides.append(override("output_dir", hydra_node.runtime.output_dir))
        cfg.output_dir = hydra_node.runtime.output_dir
    if extensions is not None:
        _check_used(extensions, cfg)
    with signals.handle():
        if cfg.mode is Mode.status:
            return _show_status(cfg, overrides)
        # Composing alone, as --cfg and --help do, needs no job.
        from pusht_act.job import run_job

        return run_job(cfg, overrides, dict(hydra_node.runtime.choices), reporter(hydra_node), extensions)


def _check_used(extensions: Extensions, cfg: DictConfig) -> None:
    """Refuse a loss or transforms where nothing is trained with them."""
    does = "print_lerobot_command=true" if cfg.print_lerobot_command else f"mode={cfg.mode.value}"
    if str(extensions) and (cfg.print_lerobot_command or cfg.mode not in TRAINING):
        raise UserError(f"{extensions} is for {describe_modes(TRAINING)}, not for {does}: leave it out")


def _show_status(cfg: DictConfig, overrides: list[str]) -> "Result":
    """Print the table of a sweep's jobs, or of one run. It is not a job, which never imports sweeps."""
    from pusht_act.job import Result
    from pusht_act.sweeps.status import show_status

    check_overrides(cfg, overrides)
    config = to_config(cfg)
    assert config.dir is not None
    show_status(Path(config.dir).expanduser(), config.status.every)
    return Result(Path(config.dir))


def command() -> None:
    """Run the command `pusht-act`, and leave as soon as its work is done."""
    main()
    # Only a job imports torch. Profilers and debuggers write down what they have seen as Python ends.
    if "torch" in sys.modules and sys.getprofile() is None and sys.gettrace() is None:
        _leave(0)


def main() -> None:
    """Run what the command's arguments ask for; return if it succeeds, else exit with the command's code."""
    _open_missing_streams()
    if "--version" in sys.argv[1:]:
        print(f"pusht-act {pusht_act.__version__} (Python {platform.python_version()})")
        return
    try:
        with signals.handle(), distributed_context(USER_ERRORS) as leads:
            if leads:
                _lead()
            else:
                _run_worker()
    except (StopSignal, PeerLostError) as stopped:
        _report(stopped)
        _leave(stopped.code)
    except KeyboardInterrupt as interrupt:
        print(f"pusht-act: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        _leave(128 + signal.SIGINT)
    except USER_ERRORS as error:
        if _wants_traceback():
            raise
        _exit(error)


def _open_missing_streams() -> None:
    """Give a process that was started without standard streams (2>&-) empty ones: its files would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing == number:
                os.set_inheritable(nothing, True)
            setattr(sys, name, open(nothing, "r" if number == 0 else "w"))  # noqa: PTH123, SIM115  (it stays open)


def _lead() -> None:
    """On rank 0, or in the only process: read the command's arguments, and run the job or the sweep they describe."""
    _check_working_directory()
    # Before Hydra reads them: it would write down a sweep's, and show those that it cannot read.
    for argument in sys.argv[1:]:
        refuse_tokens(*argument.partition("=")[::2])
    if world_size() > 1 and not {"-m", "--multirun"}.isdisjoint(sys.argv):
        raise UserError(
            f"-m starts jobs from one process, and these are {world_size()}: give it without torchrun, and "
            f"hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node={world_size()} for jobs of several processes"
        )
    check_arguments(sys.argv[1:])
    sys.argv[1:] = expand_resume_args(quote_texts(rename_overrides(sys.argv[1:])))
    helps = not {"-h", "--help"}.isdisjoint(sys.argv)
    with sweep_summary(), _hydra_raises(), _config_store_shared() if helps else nullcontext():
        _task()


def _check_working_directory() -> None:
    """Refuse to work in a folder that was deleted: the system's error would name none."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        name = os.environ.get("PWD", "")
        raise UserError(f"the working directory {name} was deleted: change to a folder that exists") from error


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra raise its errors: the line that is printed is ours.

    HYDRA_FULL_ERROR=1 does that, too, but a process that a sweep or an evaluation starts would inherit it.
    """
    original = hydra_utils.run_and_report
    hydra_utils.run_and_report = hydra_entry.run_and_report = lambda function: function()
    try:
        with _hydras_value_errors_as_its_own():
            yield
    finally:
        hydra_utils.run_and_report = hydra_entry.run_and_report = original


@contextmanager
def _hydras_value_errors_as_its_own() -> Iterator[None]:
    """Raise as a HydraException what Hydra refuses with a plain ValueError, such as policy=3."""
    try:
        yield
    except ValueError as error:
        *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith("hydra."):
            # Hydra names the type of a wrong choice of a group, and neither the group nor the choice.
            given = frame.f_locals.get("override")
            named = f": {given.input_line}" if isinstance(given, Override) else ""
            raise HydraException(f"{error}{named}") from error
        raise


@contextmanager
def _config_store_shared() -> Iterator[None]:
    """Let Hydra share the store of schemas, which it copies for every group that --help lists.

    That is half of the time of --help (0.5 s in place of 1.1 s), and nobody writes to the copies.
    """
    ConfigStore.__deepcopy__ = lambda self, _: self
    try:
        yield
    finally:
        del ConfigStore.__deepcopy__


def _wants_traceback() -> bool:
    """Return whether the user asked for tracebacks; nothing here ever sets the variable."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _report(stopped: StopSignal | PeerLostError) -> None:
    """Print the line that says what ended the job, once."""
    if not stopped.reported:
        stopped.reported = True
        print(f"pusht-act: {stopped}", file=sys.stderr)


def _leave(code: int) -> NoReturn:
    """Exit without waiting for threads, or the seconds that the teardown of torch takes."""
    logging.shutdown()
    # joblib dismisses its workers as Python ends.
    if "joblib" in sys.modules:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit(error: Exception) -> NoReturn:
    logging.shutdown()
    sys.exit(f"pusht-act: {explain(error, CONFIG_DIR)}")


if __name__ == "__main__":
    command()
