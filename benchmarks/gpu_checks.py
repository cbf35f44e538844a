"""What gpu_suite.py checks before it times: that the ways of a step agree where no CPU can show it."""

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from pusht_act.data.loader import BatchLoader
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.policy.act import act_loss
from pusht_act.training import cuda_graphs as capture

BATCH, STEPS = 8, 12


def checks(suite: Any) -> dict[str, str]:
    """By name: ok, or what was found."""
    names: dict[str, Callable[[Any], str]] = {"pictures read ahead": _read_ahead}
    if suite.on_cuda:
        names |= {
            "a captured step, fp32": lambda suite: _captured(suite, "fp32"),
            "a captured step, bf16": lambda suite: _captured(suite, "bf16"),
            "a resumed run": _resumed,
            "no step waits for the device": _waits,
            "a capture beside an evaluation": _beside_an_evaluation,
            "a capture that fails": _fails,
        }
    results = {}
    for name, check in names.items():
        try:
            results[name] = check(suite)
        except Exception as error:  # the others are still worth knowing
            results[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return results


def _trained(
    suite: Any, objects: Any, steps: int, precision: str = "fp32", captured: bool = True, inputs: Any = None
) -> torch.Tensor:
    """The losses of `steps` steps, read when all are done."""
    take_step, fresh = suite.step(objects, BATCH, precision, compiled=False, captured=captured)
    inputs = inputs or fresh
    return torch.stack([take_step(take_step.batch(next(inputs)))["loss"].clone() for _ in range(steps)])


def _same(a: Any, b: Any) -> str:
    """Whether two policies have the same weights to the bit."""
    apart = [(x - y).abs().max().item() for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True)]
    return "ok" if max(apart) == 0.0 else f"weights are up to {max(apart):.1e} apart"


def _captured(suite: Any, precision: str) -> str:
    """Replays are the steps that warm up, launched operation by operation."""
    launched, captured, warm_up = suite.objects(), suite.objects(), capture.WARM_UP
    try:
        capture.WARM_UP = STEPS
        torch.cuda.manual_seed(1)
        expected = _trained(suite, launched, STEPS, precision)
    finally:
        capture.WARM_UP = warm_up
    torch.cuda.manual_seed(1)
    found = _trained(suite, captured, STEPS, precision)
    if not torch.equal(found, expected):
        return f"losses are up to {(found - expected).abs().max().item():.1e} apart"
    return _same(launched, captured) if len(set(found.tolist())) == STEPS else "losses repeat: noise or data is stuck"


def _resumed(suite: Any) -> str:
    """Stopped in the midst of replays and captured anew: weights, moments, order and random numbers go on."""
    whole, parts = suite.objects(), suite.objects()
    samples = BatchLoader(suite.frames, suite.config.chunk_size, suite.args.device)
    orders = [EpisodeSampler(suite.frames, list(range(10)), 0) for _ in range(2)]
    torch.cuda.manual_seed(1)
    _trained(suite, whole, 2 * STEPS, inputs=samples.iter_batches(orders[0], BATCH))
    torch.cuda.manual_seed(1)
    _trained(suite, parts, STEPS, inputs=samples.iter_batches(orders[1], BATCH))
    numbers, position = torch.cuda.get_rng_state(), orders[1].state_dict()
    weights, moments = copy.deepcopy(parts.policy.state_dict()), copy.deepcopy(parts.optimizer.state_dict())
    again, order = suite.objects(), EpisodeSampler(suite.frames, list(range(10)), 0)
    again.policy.load_state_dict(weights)
    again.optimizer.load_state_dict(moments)
    order.load_state_dict(position)
    torch.cuda.set_rng_state(numbers)
    _trained(suite, again, STEPS, inputs=samples.iter_batches(order, BATCH))
    return _same(whole, again)


def _waits(suite: Any) -> str:
    """PyTorch raises at what waits for the device."""
    for captured in (True, False):
        take_step, inputs = suite.step(suite.objects(), BATCH, "fp32", compiled=False, captured=captured)
        for step in range(STEPS):
            if step > capture.WARM_UP + 1:
                torch.cuda.set_sync_debug_mode("error")
            try:
                take_step(take_step.batch(next(inputs)))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return "ok"


def _beside_an_evaluation(suite: Any) -> str:
    """Another thread asks a copy of the policy, and waits for the device, all the while."""
    objects = suite.objects()
    seen = copy.deepcopy(objects.policy).eval()
    side = suite.frames.arrays["observation.image"].shape[-1]
    observation = {
        "observation.image": torch.rand(50, 3, side, side, device=suite.device),
        "observation.state": torch.rand(50, 2, device=suite.device),
    }
    over, answers, errors = threading.Event(), [], []

    def ask() -> None:
        try:
            with torch.inference_mode():
                while not over.is_set():
                    answers.append(seen.predict_action_chunk(observation).sum().item())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        warned = _warnings(lambda: _trained(suite, objects, STEPS))
    finally:
        over.set()
        thread.join()
    if errors:
        return f"the evaluation failed: {errors[0]}"
    return warned or ("ok" if len(set(answers)) == 1 else f"{len(set(answers))} answers of {len(answers)} differ")


def _fails(suite: Any) -> str:
    """A loss that waits for the device: said, taken operation by operation; the next run captures again."""

    def waiting(*arguments: Any) -> Any:
        value, parts = act_loss(*arguments)
        assert value.item() > 0
        return value, parts

    take_step, inputs = suite.step(suite.objects(), BATCH, "fp32", compiled=False, captured=True)
    take_step._loss = waiting
    warned = _warnings(lambda: [take_step(take_step.batch(next(inputs)))["loss"].item() for _ in range(STEPS)])
    if "cannot be a CUDA graph" not in warned:
        return f"no warning of it: {warned or 'none at all'}"
    return _captured(suite, "fp32")


def _read_ahead(suite: Any) -> str:
    streams = []
    for room in (None, 0.0):
        samples = BatchLoader(suite.frames, suite.config.chunk_size, suite.args.device, room)
        streams.append((samples, samples.iter_batches(EpisodeSampler(suite.frames, list(range(10)), 0), BATCH)))
    for _ in range(STEPS):
        first, second = (samples.gather(next(inputs)) for samples, inputs in streams)
        if not all(torch.equal(first[key], second[key]) for key in first):
            return "batches differ from those of pictures on the device"
    return "ok"


def _warnings(call: Callable[[], Any]) -> str:
    """What `call` logs as a warning, or nothing."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pusht_act").addHandler(handler)
    try:
        call()
    finally:
        logging.getLogger("pusht_act").removeHandler(handler)
    return "; ".join(said)
