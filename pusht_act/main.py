"""The Hydra entry: compose -> Config -> match mode."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pusht_act.config.errors import explain, is_hydras
from pusht_act.config.overrides import check_overrides
from pusht_act.config.schema import Mode, register
from pusht_act.config.secrets_check import refuse_tokens
from pusht_act.config.validation import to_config
from pusht_act.job import Result, run_job, run_worker
from pusht_act.runtime.distributed import PeerLostError, distributed_context, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import StopSignal, handle_signals, handling_signals
from pusht_act.sweeps.joblib_workers import stopping
from pusht_act.sweeps.pruning import reporter
from pusht_act.sweeps.report import sweep_summary
from pusht_act.sweeps.resume import expand_resume_args
from pusht_act.sweeps.run_job import run_sweep_job
from pusht_act.sweeps.status import show_status
from pusht_act.training.extensions import Extensions

if TYPE_CHECKING:
    from pusht_act.training.extensions import ActionLoss, Transform

PACKAGE = Path(__file__).parent
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONFIG_DIR = str(next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir()))
USER_ERRORS = (HydraException, OmegaConfBaseException, UserError, OSError)
WANT_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
register()


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="config")  # type: ignore[untyped-decorator]
def _task(cfg: DictConfig) -> Any:
    hydra_node = HydraConfig.get()
    try:
        if stopping():
            return None
        with distributed_context(USER_ERRORS) as leads:
            if not leads:
                run_worker()
                return None
            if hydra_node.mode is RunMode.MULTIRUN:
                return run_sweep_job(cfg, hydra_node, _execute, lambda error: explain(error, CONFIG_DIR))
            return _execute(cfg, hydra_node).objective
    except USER_ERRORS as error:
        if WANT_TRACEBACK:
            raise
        _exit(error)  # from here: Hydra would print a line of its own above ours
    except (StopSignal, PeerLostError) as stopped:
        if handling_signals():  # that of `main`, where it ends a sweep too
            raise
        # A process of a launcher's: what it does about the signal, such as to have the job queued again, is its own.
        if isinstance(stopped, StopSignal):
            signal.raise_signal(stopped.signal)
        if stopping():
            return None
        raise OSError(str(stopped)) from stopped


def run(overrides: list[str], *, loss: "ActionLoss | None" = None, transforms: "Sequence[Transform]" = ()) -> Result:
    """Do what `pusht-act OVERRIDES` does, from Python, and return its result.

    Args:
        overrides: as on the command line, without -m.
        loss: (predicted, target), both [B, T, A] and normalized -> the error of each element, in place of ACT's L1.
        transforms: applied to training batches before they are normalized, in this order (docs/extending.md).

    Raises:
        UserError, OSError: what the command line prints as one line.
        StopSignal: by a signal, such as Ctrl-C; no `Exception`.
    """
    extensions = Extensions(loss, transforms)
    with distributed_context(USER_ERRORS) as leads:
        if not leads:
            return run_worker(extensions)
        return _run(overrides, extensions)


def _run(overrides: list[str], extensions: Extensions) -> Result:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        cfg = compose("config", overrides, return_hydra_config=True)
        hydra_node = cfg.hydra
        with_hydra = cfg.copy()
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        HydraConfig.instance().set_config(with_hydra)
    return _execute(cfg, hydra_node, extensions)


def _execute(cfg: DictConfig, hydra_node: Any, extensions: Extensions | None = None) -> Result:
    overrides = list(hydra_node.overrides.task)
    if hydra_node.mode is RunMode.MULTIRUN and not any(o.startswith("output_dir=") for o in overrides):
        overrides.append(f"output_dir={hydra_node.runtime.output_dir}")
        cfg.output_dir = hydra_node.runtime.output_dir
    with handle_signals():
        if cfg.mode is Mode.status:
            return _show_status(cfg, overrides)
        return run_job(cfg, overrides, dict(hydra_node.runtime.choices), reporter(hydra_node), extensions)


def _show_status(cfg: DictConfig, overrides: list[str]) -> Result:
    """Print the table of a sweep's jobs, or of one run; no job does this, so a job never imports sweeps."""
    check_overrides(cfg, overrides)
    config = to_config(cfg)
    assert config.dir is not None
    show_status(Path(config.dir).expanduser(), config.status.every)
    return Result(Path(config.dir))


def main() -> None:
    """The command `pusht-act`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the line printed is ours
    try:
        with handle_signals(), distributed_context(USER_ERRORS) as leads:
            if leads:
                _lead()
            else:
                run_worker()
    except StopSignal as stopped:
        if not stopped.reported:
            print(f"pusht-act: {stopped}", file=sys.stderr)
        _leave(stopped.code)
    except PeerLostError as lost:
        if not lost.reported:
            print(f"pusht-act: {lost}", file=sys.stderr)
        _leave(1)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except USER_ERRORS as error:
        if WANT_TRACEBACK:
            raise
        _exit(error)
    except ValueError as error:
        # Hydra objects to some values, such as policy=3, by an error of no class of its own. Any other is a bug.
        if WANT_TRACEBACK or not is_hydras(error):
            raise
        _exit(error)


def _lead() -> None:
    """The command's arguments, and the job or the sweep that they describe."""
    for argument in sys.argv[1:]:  # before Hydra: it would write a sweep's, and show what it cannot read
        refuse_tokens(*argument.partition("=")[::2])
    if world_size() > 1 and not {"-m", "--multirun"}.isdisjoint(sys.argv):
        raise UserError(
            f"-m begins jobs from one process, and these are {world_size()}: give it without torchrun, and "
            f"hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node={world_size()} for jobs of several processes"
        )
    sys.argv[1:] = expand_resume_args(sys.argv[1:])
    with sweep_summary():
        _task()


def _leave(code: int) -> NoReturn:
    """Without waiting for threads, or the seconds that taking torch apart takes."""
    logging.shutdown()
    if "joblib" in sys.modules:  # its workers are dismissed as Python ends
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit(error: Exception) -> NoReturn:
    logging.shutdown()
    sys.exit(f"pusht-act: {explain(error, CONFIG_DIR)}")


if __name__ == "__main__":
    main()
