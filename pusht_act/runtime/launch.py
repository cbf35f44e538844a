"""How a launcher, torchrun or submitit, tells a process its place among several."""

import os

from pusht_act.runtime.errors import UserError


def is_distributed_launch() -> bool:
    """Return whether the environment is that of one of several processes.

    Raises:
        UserError: it does not say which of them this is.
    """
    # submitit has variables of its own; from here on they are torchrun's.
    if "SUBMITIT_EXECUTOR" in os.environ and "WORLD_SIZE" not in os.environ:
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment, but no {', '.join(missing)}: launch several "
            "processes by torchrun, or unset WORLD_SIZE"
        )
    return True


def set_visible_gpu(local_rank: int) -> None:
    """Let this process see its own GPU alone, as `cuda`, in each of its threads."""
    import torch

    # Where a scheduler gives each process a single GPU, nothing is left to do.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else [str(each) for each in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank] if local_rank < len(gpus) else ""
