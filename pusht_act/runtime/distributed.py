"""Data-parallel training: every rank gets a shard of each batch (launched by torchrun or SLURM).

Every rank runs the same code. What comes from disk, clock or command line is decided by rank 0 alone, which writes,
logs and evaluates. The others learn of it at a few named points, each a collective on the control group:

    broadcast_from_main()   the job before training; where a roll-back goes
    agree()                 at the end of each step: every rank's signals and what rank 0 wants, by a small all-reduce
    gather_to_main()        the ranks' random number generators, for a checkpoint
    raise_on_any_rank()     setting up: one rank's error ends the job on all

Rank 0 announces its exit code in the same small all-reduce, so the others leave with it wherever they wait for rank 0.

Control messages go by gloo, gradients by nccl on GPUs. A process that ends closes its connections, which the others
notice at once. One whose machine went silent is given up after STEP_TIMEOUT, or CONTROL_TIMEOUT where rank 0 is waited
for. With a single process everything here is the identity, and torch.distributed is not imported.
"""

import atexit
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from pusht_act.runtime.errors import UserError
from pusht_act.runtime.launch import is_distributed_launch, set_visible_gpu
from pusht_act.runtime.signals import StopSignal, signals

if TYPE_CHECKING:
    from torch import Tensor


STEP_TIMEOUT = timedelta(minutes=10)
"""What a process may be behind the others in a step, or in beginning at all: the first steps may be compiled."""
CONTROL_TIMEOUT = timedelta(hours=1)
"""How long the other ranks wait for rank 0, which may be evaluating."""


class Agreement(NamedTuple):
    """What all ranks agree on at the end of a step."""

    signal: int | None
    """The signal that stops the job, whichever rank was sent it."""
    checkpoint: bool
    """Whether some rank asks for a checkpoint."""
    end: bool
    """Whether rank 0 ends training before its last step."""


class PeerLostError(SystemExit):
    """Another process of the job is gone. No `Exception`: this process cannot do a sweep's next job either.

    As a SystemExit it ends a script that does not catch it with exit code 1, without a traceback.
    """

    code = 1

    def __init__(self, reason: str) -> None:
        super().__init__(f"rank {_world.rank} of {_world.world_size} has lost another one ({reason})")
        self.remedy = "see the first error in the others' output, then give the same command again"
        """What to do; a job that has begun to train knows better."""
        self.reported = False
        """Whether a line has said so."""

    def __str__(self) -> str:
        return f"{self.args[0]}; {self.remedy}"


class _MainExited(BaseException):
    """Rank 0 has left, with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class _World:
    """The processes of this job: there is one, as there is one process group."""

    rank: int = 0
    world_size: int = 1
    control_group: Any = None
    """The process group of all that is not a gradient."""
    grad_group: Any = None


_world = _World()


def world_size() -> int:
    """Return how many processes train together."""
    return _world.world_size


def rank() -> int:
    """Return this process's number among them."""
    return _world.rank


def is_main() -> bool:
    """Return whether this is rank 0, which alone writes, logs and evaluates."""
    return _world.rank == 0


@contextmanager
def distributed_context(errors: tuple[type[Exception], ...]) -> Iterator[bool]:
    """Join the processes that were launched together; yield whether this is rank 0.

    The other ranks leave when rank 0 does: with its exit code if that ends by one of `errors` or by a signal. If rank 0
    ends by any other exception, they lose a peer.

    Raises:
        UserError: the environment does not say which rank this is.
        OSError: the ranks cannot reach each other.
        StopSignal: the job was stopped by a signal.
        PeerLostError: another rank is gone.
    """
    if _world.world_size > 1 or not is_distributed_launch():
        yield True
        return
    _init_process_group()
    try:
        yield from _main_rank(errors) if is_main() else _other_rank()
    finally:
        _world.rank, _world.world_size, _world.control_group, _world.grad_group = 0, 1, None, None


def _main_rank(errors: tuple[type[Exception], ...]) -> Iterator[bool]:
    # Only the errors that are reported in a line are announced: after any other exception nobody knows what state this
    # process is in, and the others notice that it is gone.
    code: int | None = 0
    try:
        yield True
    except BaseException as error:
        code = _exit_code(error, errors)
        raise
    finally:
        if code is not None:
            # Whoever raises a signal's exception has been told of it already.
            with suppress(PeerLostError, StopSignal), signals.block():
                _exchange(exit_code=code)
        if code == 0:
            _shutdown()


def _exit_code(error: BaseException, errors: tuple[type[Exception], ...]) -> int | None:
    """Return the exit code of a job that ends by `error`; None if the other ranks are not told."""
    if isinstance(error, StopSignal):
        return error.code
    if isinstance(error, SystemExit) and not isinstance(error, PeerLostError):
        return 1 if error.code else 0
    return 1 if isinstance(error, errors) else None


def _other_rank() -> Iterator[bool]:
    try:
        # A signal stops all ranks after the same step; rank 0 says so, and how the job ends.
        with suppress(StopSignal):
            yield False
        while True:
            _exchange()
    except _MainExited as exited:
        if exited.code == 0:
            _shutdown()
            return
        # A launcher takes the first rank to leave for the culprit, and may kill rank 0 before it has printed its line.
        import torch.distributed as dist

        with suppress(RuntimeError):
            # Fails as soon as rank 0 has left.
            dist.barrier()
        if exited.code < 128:
            raise SystemExit(exited.code) from None
        stopped = StopSignal(exited.code - 128)
        stopped.reported = True
        raise stopped from None


def _init_process_group() -> None:
    import torch.distributed as dist

    set_visible_gpu(int(os.environ["LOCAL_RANK"]))
    # Two groups: gradients must not time out while rank 0 evaluates, and control messages must not wait for a GPU.
    try:
        dist.init_process_group("gloo", timeout=STEP_TIMEOUT)
        control_group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    except RuntimeError as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OSError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others, which meet at "
            f"MASTER_ADDR:MASTER_PORT={at} ({_reason(error)}): see that all are started, and that the port is free"
        ) from error
    _world.rank, _world.world_size, _world.control_group = dist.get_rank(), dist.get_world_size(), control_group
    # A thread of gloo that lets go of a tensor after Python has ended would end the process by abort().
    atexit.register(_shutdown)


def _shutdown() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def agree(checkpoint: bool = False, end: bool = False) -> Agreement:
    """Agree, at the end of a step, on a signal, a checkpoint and an early end: what any rank has, all have.

    Args:
        checkpoint: whether this rank asks for a checkpoint.
        end: whether this rank ends training early.

    Raises:
        PeerLostError: another rank is gone.
    """
    if _world.world_size == 1:
        return Agreement(signals.received, checkpoint, end)
    # The largest number wins: a wish of one rank is a wish of all.
    number, wanted, ends = _exchange(checkpoint, end)
    return Agreement(number or None, bool(wanted), bool(ends))


def broadcast_from_main(value: Any = None) -> Any:
    """Return rank 0's `value` on every rank.

    Raises:
        PeerLostError: another rank is gone.
    """
    if _world.world_size == 1:
        return value
    import torch.distributed as dist

    # The small message goes first: where rank 0 has failed instead, it carries its exit code.
    objects = [value]
    # Half a message would leave the others waiting.
    with signals.block() if is_main() else nullcontext():
        _exchange()
        with _peer_errors():
            dist.broadcast_object_list(objects, src=0, group=_world.control_group)
    return objects[0]


def _exchange(checkpoint: bool = False, end: bool = False, exit_code: int | None = None) -> tuple[int, int, int]:
    """Exchange one small message in which each number is the largest of any rank: (signal, checkpoint, end).

    Every message to or from rank 0 begins with this one, so that an exit code reaches a rank wherever it waits.
    """
    import torch
    import torch.distributed as dist

    # 0 stands for none, so that the largest number is the one that says something.
    exits = 0 if exit_code is None else exit_code + 1
    message = torch.tensor([signals.received or 0, int(checkpoint), int(end), exits])
    with _peer_errors():
        dist.all_reduce(message, dist.ReduceOp.MAX, group=_world.control_group)
    number, wanted, ends, exited = message.tolist()
    if exited and not is_main():
        raise _MainExited(exited - 1)
    if number:
        signals.record_peer(number)
    return number, wanted, ends


def gather_to_main(value: Any) -> list[Any]:
    """Return every rank's `value`, in order, on rank 0, and nothing on the others."""
    if _world.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _world.world_size
    with _peer_errors():
        dist.gather_object(value, values if is_main() else None, group=_world.control_group)
    return values if is_main() else []


@contextmanager
def raise_on_any_rank() -> Iterator[None]:
    """Run the block on every rank; if any rank raises, rank 0 reports it and all exit.

    Raises:
        UserError: on rank 0, when another rank has failed.
    """
    if _world.world_size == 1:
        yield
        return
    # Every rank takes part in the exchange below, whether it has failed or not: else the others would wait for it.
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
    reasons = _all_gather_object(None if failed is None else str(failed) or type(failed).__name__)
    ours_to_report = is_main() or not isinstance(failed, UserError | OSError | StopSignal)
    if failed is not None and ours_to_report:
        raise failed
    if any(reasons):
        while not is_main():
            _exchange()  # until rank 0 leaves
        which = next(number for number, reason in enumerate(reasons) if reason)
        raise UserError(f"rank {which} of {_world.world_size}: {reasons[which]}")


def _all_gather_object(value: Any) -> list[Any]:
    import torch.distributed as dist

    values: list[Any] = [None] * _world.world_size
    with signals.block(), _peer_errors():
        dist.all_gather_object(values, value, group=_world.control_group)
    return values


def init_gradient_group(device: str) -> None:
    """Create the process group of the gradients, before the first step.

    Raises:
        UserError: some ranks have a GPU and some have none.
        OSError: the GPUs cannot reach each other.
    """
    if _world.world_size == 1:
        return
    import torch
    import torch.distributed as dist

    # Ranks on different kinds of devices have no backend in common.
    kinds = _all_gather_object(torch.device(device).type)
    if len(set(kinds)) > 1:
        has = ", ".join(f"rank {number} has {kind}" for number, kind in enumerate(kinds))
        raise UserError(f"{has}: start as many processes on a machine as it has GPUs, or give policy.device=cpu")
    if kinds[0] != "cuda":
        return
    # To shut nccl down may wait for a rank that is gone.
    atexit.unregister(_shutdown)
    with _device_errors():
        _world.grad_group = dist.new_group(backend="nccl", timeout=STEP_TIMEOUT)


def broadcast_parameters(tensors: Iterable["Tensor"]) -> None:
    """Give every rank rank 0's `tensors`.

    Raises:
        OSError: the devices cannot reach each other.
    """
    if _world.world_size == 1:
        return
    import torch.distributed as dist

    with _device_errors():
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0, group=_world.grad_group)
            tensor.detach().copy_(whole)


@contextmanager
def _device_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"the devices of this job's ranks cannot reach each other ({_reason(error)})") from error


def shard(batch: "Tensor") -> "Tensor":
    """Return this rank's rows of `batch`: as many as any other's, or one fewer; none where there are not enough."""
    return batch.tensor_split(_world.world_size)[_world.rank] if _world.world_size > 1 else batch


def all_reduce_sum(tensors: list["Tensor"]) -> None:
    """Replace each tensor by its sum over all ranks, to the same bits on each, in one message.

    Raises:
        PeerLostError: another rank is gone.
    """
    if _world.world_size == 1:
        return
    import torch
    import torch.distributed as dist

    # One flat tensor: a message for each of some hundred parameters would cost more than the sum.
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _peer_errors():
        dist.all_reduce(flat, group=_world.grad_group)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # The launcher is about to send SIGTERM for the same reason, which would hide it.
        signals.ignore()
        raise PeerLostError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """In a line, without the place in gloo's or nccl's source."""
    return re.sub(r"^\[[^]]*\]\s*", "", " ".join(str(error).split()))[:200]
