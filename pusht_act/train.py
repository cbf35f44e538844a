"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

import json
import logging
import math
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pusht_act import checkpoint as checkpoints
from pusht_act.allocator import keep_freed_memory
from pusht_act.checkpoint import LoopState, TrainingObjects
from pusht_act.config import Config
from pusht_act.data import (
    SampleOrder,
    Samples,
    normalization_stats,
    open_dataset,
    policy_features,
    split_episodes,
)
from pusht_act.distributed import Word, rank, size, tell
from pusht_act.divergence import DivergedError, check
from pusht_act.dropout import Dropout, dropout_of
from pusht_act.evaluate import Evaluation
from pusht_act.evaluations import due, evaluating, unevaluated
from pusht_act.lerobot_config import LeRobotConfig
from pusht_act.metrics import Metrics, Window
from pusht_act.policy import (
    Processors,
    act_loss,
    autocast,
    emulates_bf16,
    load_policy,
    load_processors,
    make_optimizer,
    make_policy,
    make_processors,
    reapply_options,
)
from pusht_act.profiling import profiling
from pusht_act.pruning import Report
from pusht_act.run_dir import Checkpoint, RunDir, newest_sound
from pusht_act.saving import saving
from pusht_act.seeding import seed_initialisation, seed_training_noise
from pusht_act.signals import deferred
from pusht_act.step import Loss, TrainStep, loss_of, recorder_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What a finished run returns."""

    step: int
    metrics: dict[str, float]
    """Means of the last steps."""
    checkpoint: Checkpoint | None
    evaluation: Evaluation | None
    """The last one."""
    gave_up: bool = False
    """Whether it ended before its last step, as `Setup.report` had it."""


@dataclass(frozen=True)
class Setup:
    """Everything the loop needs, made once."""

    objects: TrainingObjects
    data: Samples
    order: SampleOrder
    loss: Loss
    dropout: Dropout
    held_out: Tensor
    """Frame numbers of the validation samples; empty without dataset.eval_split."""
    state: LoopState
    start: Checkpoint | None = None
    """Where `state` stood when this was made; None: the beginning."""
    unevaluated: Path | None = None
    """The weights of step `state.pending`, whose evaluation was cut short."""
    report: Report | None = None
    """Is told of each evaluation, and whether to go on."""


def set_up(config: Config, lerobot: LeRobotConfig, start: Checkpoint | None) -> Setup:
    """Data, policy, optimizer and the loop's state: fresh, or as they stood at checkpoint `start`.

    A fresh policy begins with the weights and the processors in `policy.pretrained_path`, if there is one: the
    statistics that its weights were trained with stay with them. Writes nothing but the cache.

    Raises:
        ValueError: a configuration that does not fit the data or the checkpoint.
    """
    frames = open_dataset(config, lerobot)
    train_episodes, eval_episodes = split_episodes(frames, lerobot.dataset.episodes, lerobot.dataset.eval_split)
    inputs, outputs = policy_features(frames)
    pretrained = lerobot.policy.pretrained_path
    loaded = start.model if start is not None else Path(pretrained) if pretrained is not None else None
    if loaded is not None:
        _check_fits(loaded, lerobot.policy, frames.repo_id, inputs, outputs)
    lerobot.policy.input_features, lerobot.policy.output_features = inputs, outputs
    order = SampleOrder(frames, train_episodes, config.seed)
    seed_initialisation(config.seed)
    if loaded is None:
        policy = make_policy(lerobot.policy)
        stats = normalization_stats(frames, lerobot.dataset.use_imagenet_stats)
        processors = make_processors(lerobot.policy, stats)
    else:
        policy = load_policy(lerobot.policy, loaded)
        processors = load_processors(lerobot.policy, loaded)
    if start is None:
        seed_training_noise(config.seed, rank())
    objects = _with_optimizer(config, lerobot, policy, processors)
    state = LoopState() if start is None else _resumed_state(config, lerobot, start, objects, order)
    held_out = torch.cat(
        [torch.arange(*frames.episodes[e]) for e in eval_episodes] or [torch.empty(0, dtype=torch.long)]
    )
    data = Samples(frames, lerobot.policy.chunk_size, str(lerobot.policy.device))
    log.info(
        "%s: %d episodes, %d frames%s; ACT with %.1f M parameters on %s%s",
        frames.repo_id, len(train_episodes), len(order),
        f" ({len(eval_episodes)} episodes held out)" if eval_episodes else "",
        sum(p.numel() for p in policy.parameters()) / 1e6, lerobot.policy.device,
        f", in {size()} processes with {config.batch_size // size()} samples of a batch each" if size() > 1 else "",
    )  # fmt: skip
    if emulates_bf16(lerobot.policy, config.train.precision):
        log.warning(
            "this CPU has no bf16 arithmetic and emulates it, many times slower than fp32: train.precision=fp32"
        )
    cut_short = unevaluated(start, state, config.steps) if start is not None else None
    loss = loss_of(config.train, torch.device(str(lerobot.policy.device)))
    dropout = dropout_of(config.train, lerobot.policy)
    return Setup(objects, data, order, loss, dropout, held_out, state, start, cut_short)


def roll_back(config: Config, lerobot: LeRobotConfig, setup: Setup, run: RunDir, diverged: DivergedError) -> Setup:
    """`setup` as it stood at the newest sound checkpoint of its run, with another order of the data from there on.

    Raises:
        DivergedError: there is none, or this would be once more than train.max_rollbacks.
    """
    number, most = setup.state.rollbacks + 1, config.train.max_rollbacks
    checkpoint = newest_sound(run, diverged.step)[0] or setup.start
    remedy = "lower policy.optimizer_lr, or see whether the data set has values that are no numbers"
    if checkpoint is None:
        message = f"{diverged}, and there is no checkpoint to go back to: {remedy}"
        raise DivergedError(message, diverged.step) from diverged
    if number > most:
        sound = f"{checkpoint.directory} is sound, mode=resume goes on from it"
        message = f"{diverged}, after train.max_rollbacks={most} roll-backs: {remedy}; {sound}"
        raise DivergedError(message, diverged.step) from diverged
    log.warning(
        "%s: going back to step %d, %s, and on with the data in another order (%d of train.max_rollbacks=%d)",
        diverged, checkpoint.step, checkpoint.directory, number, most,
    )  # fmt: skip
    tell(Word.ROLL_BACK, (checkpoint, number))
    return back_at(config, lerobot, setup, checkpoint, number)


def back_at(config: Config, lerobot: LeRobotConfig, setup: Setup, checkpoint: Checkpoint, number: int) -> Setup:
    """`setup` after roll-back `number`, to `checkpoint`."""
    policy = load_policy(lerobot.policy, checkpoint.model)
    processors = load_processors(lerobot.policy, checkpoint.model)
    objects = _with_optimizer(config, lerobot, policy, processors)
    state = _resumed_state(config, lerobot, checkpoint, objects, setup.order)
    state.rollbacks, state.skipped = number, 0
    setup.order.load_state_dict(setup.order.state_dict(), number)
    cut_short = unevaluated(checkpoint, state, config.steps)
    return replace(setup, objects=objects, state=state, start=checkpoint, unevaluated=cut_short)


def _with_optimizer(
    config: Config, lerobot: LeRobotConfig, policy: ACTPolicy, processors: Processors
) -> TrainingObjects:
    optimizer = make_optimizer(policy, lerobot.optimizer)
    scheduler = lerobot.scheduler.build(optimizer, config.steps) if lerobot.scheduler else None
    return TrainingObjects(policy, processors, optimizer, scheduler)


def _check_fits(model: Path, policy: ACTConfig, repo_id: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Refuse a checkpoint that observes something else than the data set, or normalizes otherwise than `policy` says.

    Its processors are loaded as they are, so another `policy.normalization_mapping` would do nothing.
    """
    try:
        saved = json.loads((model / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{model / 'config.json'} is damaged ({error}): give another checkpoint") from error
    has = {key: [feature.type.name, list(feature.shape)] for key, feature in (inputs | outputs).items()}
    features = (saved.get("input_features") or {}) | (saved.get("output_features") or {})
    if {key: [feature["type"], feature["shape"]] for key, feature in features.items()} != has:
        raise ValueError(
            f"dataset {repo_id} has {', '.join(has)}, the checkpoint's policy was made for {', '.join(features)}: "
            "give a data set that fits it"
        )
    mapping = {key: mode.name for key, mode in policy.normalization_mapping.items()}
    if mapping != saved.get("normalization_mapping", mapping):
        given, its = (json.dumps(each).replace('"', "") for each in (mapping, saved["normalization_mapping"]))
        raise ValueError(
            f"policy.normalization_mapping={given}, but {model} was trained with its own: "
            f"give '+policy.normalization_mapping={its}'"
        )


def _resumed_state(
    config: Config, lerobot: LeRobotConfig, start: Checkpoint, objects: TrainingObjects, order: SampleOrder
) -> LoopState:
    state = checkpoints.load(start, objects)
    reapply_options(objects.optimizer, objects.scheduler, lerobot.optimizer, lerobot.policy)
    if rank() and not checkpoints.load_random(start, rank()):
        seed_training_noise(config.seed, rank())
    if rank() == 0 and (then := checkpoints.processes_of(start)) != size():
        log.warning(
            "processes: %d, the checkpoint's were %d: the data order goes on where it was, dropout and VAE noise are "
            "others", size(), then,
        )  # fmt: skip
    batch_size, processes = checkpoints.written_with(start)
    if batch_size not in (None, config.batch_size) and rank() == 0:
        log.warning(
            "batch_size=%d, the checkpoint's was %d: the data order goes on where it was", config.batch_size, batch_size
        )
    position = state.sampler or order.state_at(state.step, batch_size or config.batch_size, processes)
    order.load_state_dict(position, state.rollbacks)
    return state


def train(config: Config, lerobot: LeRobotConfig, setup: Setup, run: RunDir, record: dict[str, Any]) -> Training:
    """Train from where `setup` stands to `config.steps`; everything written goes into `run`.

    `record` is kept in every checkpoint, so that it can be resumed and evaluated on its own.

    Raises:
        DivergedError: training did, and going back to a checkpoint has not helped or is not possible.
        OSError: the last checkpoint cannot be written; one before that fails is a warning.
        Stopped: by a signal, at the end of a step, which is saved.
    """
    state = setup.state
    with Metrics(config, run, state.step, state.wandb_run_id, state.pending, state.rollbacks) as metrics:
        while True:
            try:
                return _train(config, lerobot, setup, run, record, metrics)
            except DivergedError as diverged:
                setup = roll_back(config, lerobot, setup, run, diverged)
                state = setup.state
                metrics.rolled_back(state.step, state.pending, state.rollbacks, diverged.step)


def _train(
    config: Config, lerobot: LeRobotConfig, setup: Setup, run: RunDir, record: dict[str, Any], metrics: Metrics
) -> Training:
    objects, state, order = setup.objects, setup.state, setup.order
    window = Window(state.window)
    means: dict[str, float] = {}
    state.wandb_run_id = metrics.wandb_run_id
    take_step = make_step(config, lerobot, setup)
    with (
        _Progress(config, state.step) as progress,
        profiling(config.train.profile, run, objects) as profile,
        evaluating(config, lerobot.env, objects, state, run, metrics, setup.report) as evaluations,
        saving(config, lerobot, run, objects, state, record, evaluations) as saver,
        closing(setup.data.in_order(order, config.batch_size)) as inputs,
        deferred() as stop,
    ):
        if setup.unevaluated is not None:
            evaluations.begin_again(setup.unevaluated)
            if config.save_checkpoint and state.step == config.steps and state.pending is None:
                saver.begin()
        for step in range(state.step + 1, config.steps + 1):
            began = time.perf_counter()
            tell(Word.STEP)
            batch = take_step.batch(next(inputs))
            fetched = time.perf_counter()
            profile.end("data")
            losses = take_step(batch)
            profile.end("optimizer")
            skipped = losses.pop("skipped")
            window.add({**losses, "dataloading_s": fetched - began}, skipped)
            progress.update(time.perf_counter() - began)

            last = step == config.steps
            logs = due(step, config.log_freq) or last
            evaluates = evaluations.due(step)
            saves = due(step, config.save_freq) or last
            if logs or evaluates or saves:
                check(config.train, objects, state, window, batch if evaluates or saves else None, step)
            if logs:
                means = {**window.means(), "lr": objects.optimizer.param_groups[0]["lr"]}
                metrics.log("train", {**means, "samples_per_s": progress.rate * config.batch_size}, step)
                progress.report(step, means)
                window = Window()
            profile.end("logging")
            if due(step, config.eval_steps):
                _validate(config, setup, metrics, step)
            saver.collect(wait=evaluates)  # what was not saved cannot be the best
            evaluations.collect(wait=evaluates or last)
            if evaluates and not evaluations.gives_up(step):
                evaluations.begin(step)
            profile.end("eval")
            stops = stop.asked or evaluations.gives_up(step)  # from here on a signal is the next step's
            wanted = stop.wants_checkpoint() or stops
            if wanted and not saves:
                check(config.train, objects, state, window, batch, step)
            if config.save_checkpoint and (saves or evaluations.wants_checkpoint(step, wanted)):
                state.step, state.sampler, state.window = step, order.state_dict(), window.sums()
                saver.begin()
            profile.end_step("saving")
            if stops:
                stop.check(step, saver.finished())
                return Training(step, means, saver.newest, evaluations.newest, gave_up=True)
    return Training(config.steps, means, saver.newest, evaluations.newest)


def make_step(config: Config, lerobot: LeRobotConfig, setup: Setup) -> TrainStep:
    """The step of the loop, on the objects of `setup`."""
    keep_freed_memory()
    recorder = recorder_of(config.train, torch.device(str(lerobot.policy.device)))
    clip, precision = lerobot.optimizer.grad_clip_norm, config.train.precision
    return TrainStep(
        setup.objects, setup.data, config.batch_size // size(), clip, precision, setup.loss, recorder, setup.dropout
    )


def _validate(config: Config, setup: Setup, metrics: Metrics, step: int) -> None:
    loss = validation_loss(setup.objects, setup.data, setup.held_out, config.batch_size)
    metrics.log("eval", {"loss": loss}, step)
    log.info("step %d: validation loss %.4f", step, loss)


def validation_loss(objects: TrainingObjects, data: Samples, indices: Tensor, batch_size: int) -> float:
    """Mean loss over the held-out frames in eval mode, batch by batch as stock LeRobot takes it (no KL term)."""
    policy, pre = objects.policy.eval(), objects.processors.pre
    with torch.inference_mode(), autocast(policy):
        losses = [act_loss(policy, pre(data.batch(part)))[0] for part in torch.split(indices, batch_size)]
    policy.train()
    return float(torch.stack(losses).mean())


class _Progress:
    """A bar where there is a terminal; everywhere a line at each log step."""

    def __init__(self, config: Config, start: int) -> None:
        self._steps = config.steps
        self._bar: tqdm[Any] = tqdm(total=config.steps, initial=start, desc=config.job_name, unit="step", disable=None)
        self._redirect = logging_redirect_tqdm()
        self._count, self._seconds = 0, 0.0

    def update(self, seconds: float) -> None:
        """One step more, which took `seconds`; evaluations and saves are not steps."""
        self._bar.update()
        self._count += 1
        self._seconds += seconds

    @property
    def rate(self) -> float:
        """Steps a second since the last report."""
        return self._count / max(self._seconds, 1e-9)

    def report(self, step: int, means: dict[str, float]) -> None:
        """The means, the rate and the time left, as a line and beside the bar."""
        left = time.strftime("%H:%M:%S", time.gmtime((self._steps - step) / max(self.rate, 1e-9)))
        seen = {"loss": math.nan, "grad_norm": math.nan, "dataloading_s": 0.0, **means}  # all may have been skipped
        log.info(
            "step %d/%d: loss %.4f, gradient norm %.2f, lr %.1e, %.1f steps/s (data %.0f %%), %s left%s",
            step, self._steps, seen["loss"], seen["grad_norm"], seen["lr"], self.rate,
            100 * seen["dataloading_s"] * self.rate, left,
            f"; {seen['skipped']:.0f} skipped, their loss or gradient was not finite" if "skipped" in seen else "",
        )  # fmt: skip
        self._bar.set_postfix(loss=f"{seen['loss']:.4f}")
        self._count, self._seconds = 0, 0.0

    def __enter__(self) -> "_Progress":
        self._redirect.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)
