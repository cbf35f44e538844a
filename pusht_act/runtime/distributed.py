"""One training by several processes, as torchrun and SLURM begin them: each takes its share of every batch.

    process 0 says                                 the others, which wait for its word
    TRAIN      configuration, checkpoint       ->  set up what it sets up, together or not at all
    STEP                                       ->  their share of the next batch, gradients added up, the same update
    RANDOM                                     ->  hand in their random streams, for its checkpoint
    ROLL_BACK  checkpoint, number              ->  go back, as it does
    END        exit code                       ->  leave, after it where something was wrong

Whatever comes from disk, clock or configuration is decided by process 0 alone, which writes, logs and evaluates. With
each word it hears of the signals that the others were sent, so that all stop at the end of the same step.

Words go by gloo, gradients by nccl on GPUs. A process that ends closes its connections, which the others notice at
once; one whose machine went silent is given up after STEP_TIME, or WAIT_TIME between two words. Where there is one
process, everything here is the identity; torch is imported where there are more.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from pusht_act.runtime import signals
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import StopSignal

if TYPE_CHECKING:
    from torch import Tensor


STEP_TIMEOUT = timedelta(minutes=10)
"""What a process may be behind the others in a step, or in beginning at all: the first steps may be compiled."""
COMMAND_TIMEOUT = timedelta(hours=1)
"""What process 0 may take between two words: an evaluation that training waits for, say."""


class Word(IntEnum):
    """What process 0 says to the others."""

    TRAIN = 1
    STEP = 2
    RANDOM = 3
    ROLL_BACK = 4
    END = 5


WITHOUT_MORE = (Word.STEP, Word.RANDOM)
"""Words that say all; an object comes after the others."""


class PeerLostError(BaseException):
    """Another process of the job is gone. No `Exception`: this process cannot do a sweep's next job either."""

    def __init__(self, reason: str) -> None:
        remedy = "to go on from the last checkpoint: the same command with resume.auto=true, or mode=resume"
        super().__init__(f"process {_world.rank} of {_world.world_size} has lost another one ({reason}); {remedy}")
        self.reported = False
        """Whether a line has said so."""


class _Ended(BaseException):
    """Process 0 has said that the job is over."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class _World:
    """The processes of this job: there is one, as there is one process group."""

    rank: int = 0
    world_size: int = 1
    words: Any = None
    """The process group of all that is not a gradient."""
    gradients: Any = None


_world = _World()


def world_size() -> int:
    """How many processes train together."""
    return _world.world_size


def rank() -> int:
    """This one's number among them."""
    return _world.rank


@contextmanager
def distributed_context(errors: tuple[type[Exception], ...]) -> Iterator[bool]:
    """Within this the processes that were launched together work together; yields whether this is process 0.

    The others are to do `job.follow`, and leave when process 0 does: with its exit code if that ends by one of `errors`
    or by a signal. By any other exception it ends without a word.

    Raises:
        UserError: the environment does not say which of them this is.
        OSError: they cannot reach each other.
        StopSignal: process 0 was stopped by a signal.
        PeerLostError: another one is gone.
    """
    if _world.world_size > 1 or not _is_distributed_launch():
        yield True
        return
    _init_process_group()
    try:
        if _world.rank == 0:
            yield from _leading(errors)
        else:
            yield from _following()
    finally:
        _world.rank, _world.world_size, _world.words, _world.gradients = 0, 1, None, None


def _leading(errors: tuple[type[Exception], ...]) -> Iterator[bool]:
    code: int | None = 0
    try:
        yield True
    except BaseException as error:
        code = _code(error, errors)
        raise
    finally:
        if code is not None:
            with suppress(PeerLostError, StopSignal):  # a signal is acted upon already, or by `listening`
                tell(Word.END, code)
        if code == 0:
            _shutdown()


def _code(error: BaseException, errors: tuple[type[Exception], ...]) -> int | None:
    """What a job that ends by `error` leaves with; None: without a word to the others."""
    if isinstance(error, StopSignal):
        return error.code
    if isinstance(error, SystemExit):
        return 1 if error.code else 0
    return 1 if isinstance(error, errors) else None


def _following() -> Iterator[bool]:
    try:
        yield False
    except _Ended as ended:
        if ended.code == 0:
            _shutdown()
            return
        # A launcher takes the first to leave for the culprit, and may end process 0 before it has said what is wrong.
        import torch.distributed as dist

        with suppress(RuntimeError):
            dist.barrier()  # never comes to be: process 0 leaves
        if ended.code < 128:
            raise SystemExit(ended.code) from None
        stopped = StopSignal(ended.code - 128)
        stopped.reported = True
        raise stopped from None


def _is_distributed_launch() -> bool:
    """Whether the environment is that of one of several processes; submitit's is made torchrun's."""
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


def _init_process_group() -> None:
    import torch.distributed as dist

    _set_visible_gpu(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("gloo", timeout=STEP_TIMEOUT)
        words = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
    except RuntimeError as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OSError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others, which meet at "
            f"MASTER_ADDR:MASTER_PORT={at} ({_reason(error)}): see that they all begin, and that nothing else is there"
        ) from error
    _world.rank, _world.world_size, _world.words = dist.get_rank(), dist.get_world_size(), words


def _set_visible_gpu(local_rank: int) -> None:
    """Of the machine's GPUs this process sees its own alone, as `cuda`: so does each of its threads.

    Where a scheduler has seen to that already, nothing changes.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else [str(each) for each in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank] if local_rank < len(gpus) else ""


def _shutdown() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def tell(word: Word, more: Any = None) -> None:
    """Process 0: say `word` to the others, and `more` where it takes more.

    Raises:
        PeerLostError: one of them is gone.
    """
    if _world.world_size == 1:
        return
    with signals.block_signals():  # half a word would leave the others waiting
        _exchange(word)
        if word not in WITHOUT_MORE:
            _from_the_first(more)


def told() -> tuple[Word, Any]:
    """The others: what process 0 says next, and what comes with it."""
    word = _exchange()
    more: Any = None if word in WITHOUT_MORE else _from_the_first()
    if word is Word.END:
        raise _Ended(more)
    return word, more


def _exchange(word: int = 0) -> Word:
    """Process 0's word, to all; the others' signals, to process 0."""
    import torch
    import torch.distributed as dist

    said = torch.tensor([word, signals.received_signal() or 0])
    with _peer_errors():
        dist.all_reduce(said, dist.ReduceOp.MAX, group=_world.words)
    word, number = said.tolist()
    if _world.rank == 0 and number:
        signals.record_peer_signal(number)
    return Word(word)


def _from_the_first(more: Any = None) -> Any:
    import torch.distributed as dist

    objects = [more]
    with _peer_errors():
        dist.broadcast_object_list(objects, src=0, group=_world.words)
    return objects[0]


def gather_to_main(value: Any) -> list[Any]:
    """At process 0, the `value` of each process, in order; elsewhere nothing."""
    if _world.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _world.world_size
    with _peer_errors():
        dist.gather_object(value, values if _world.rank == 0 else None, group=_world.words)
    return values if _world.rank == 0 else []


@contextmanager
def raise_on_any_rank() -> Iterator[None]:
    """Within this each process does the same for itself; if one fails, process 0 says why and all leave.

    Raises:
        UserError: at process 0, when another one has failed.
    """
    if _world.world_size == 1:
        yield
        return
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
    reasons = _all_gather_object(None if failed is None else str(failed) or type(failed).__name__)
    ours_to_say = _world.rank == 0 or not isinstance(failed, UserError | OSError | StopSignal)
    if failed is not None and ours_to_say:
        raise failed
    if any(reasons):
        if _world.rank > 0:
            told()  # process 0 leaves
        which = next(number for number, reason in enumerate(reasons) if reason)
        raise UserError(f"process {which} of {_world.world_size}: {reasons[which]}")


def _all_gather_object(value: Any) -> list[Any]:
    import torch.distributed as dist

    values: list[Any] = [None] * _world.world_size
    with signals.block_signals(), _peer_errors():
        dist.all_gather_object(values, value, group=_world.words)
    return values


def connect(device: str, tensors: Iterable["Tensor"]) -> None:
    """Before the first step: let the processes' devices reach each other, and begin with process 0's `tensors`.

    Raises:
        UserError: some have a GPU and some have none.
        OSError: the GPUs cannot reach each other.
    """
    if _world.world_size == 1:
        return
    import torch
    import torch.distributed as dist

    kinds = _all_gather_object(torch.device(device).type)
    if len(set(kinds)) > 1:
        has = ", ".join(f"process {number} has {kind}" for number, kind in enumerate(kinds))
        raise UserError(f"{has}: begin as many processes on a machine as it has GPUs, or give policy.device=cpu")
    try:
        _world.gradients = dist.new_group(backend="nccl", timeout=STEP_TIMEOUT) if kinds[0] == "cuda" else None
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0, group=_world.gradients)
            tensor.detach().copy_(whole)
    except RuntimeError as error:
        raise OSError(f"the devices of this job's processes cannot reach each other ({_reason(error)})") from error


def shard(batch: "Tensor") -> "Tensor":
    """This process's rows of `batch`: as many as each other's, or one fewer; none where there are not enough."""
    return batch.tensor_split(_world.world_size)[_world.rank] if _world.world_size > 1 else batch


def all_reduce_sum(tensors: list["Tensor"]) -> None:
    """Replace each tensor by the sum of all processes', to the same bits everywhere, in one message.

    Raises:
        PeerLostError: one of them is gone.
    """
    if _world.world_size == 1:
        return
    import torch
    import torch.distributed as dist

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _peer_errors():
        dist.all_reduce(flat, group=_world.gradients)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        signals.ignore_signals()
        raise PeerLostError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """In a line, without the place in gloo's or nccl's source."""
    return re.sub(r"^\[[^]]*\]\s*", "", " ".join(str(error).split()))[:200]
