"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pusht_act import checkpoint as checkpoints
from pusht_act.checkpoint import LoopState, TrainingObjects
from pusht_act.config import Config
from pusht_act.data import (
    Batch,
    ResidentData,
    SampleOrder,
    normalization_stats,
    open_dataset,
    policy_features,
    split_episodes,
)
from pusht_act.evaluate import Evaluation
from pusht_act.evaluations import Evaluations, due, evaluating, unevaluated
from pusht_act.lerobot_config import LeRobotConfig, train_pipeline_config
from pusht_act.metrics import Metrics, Window
from pusht_act.policy import (
    Processors,
    act_loss,
    autocast,
    load_policy,
    load_processors,
    make_optimizer,
    make_policy,
    make_processors,
    reapply_options,
)
from pusht_act.profiling import profiling
from pusht_act.retention import prune
from pusht_act.run_dir import Checkpoint, RunDir
from pusht_act.seeding import seed_initialisation, seed_training_noise

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


@dataclass(frozen=True)
class Setup:
    """Everything the loop needs, made once."""

    objects: TrainingObjects
    data: ResidentData
    order: SampleOrder
    held_out: Tensor
    """Frame numbers of the validation samples; empty without dataset.eval_split."""
    state: LoopState
    unevaluated: Path | None = None
    """The weights of step `state.pending`, whose evaluation was cut short."""


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
        seed_training_noise(config.seed)
    optimizer = make_optimizer(policy, lerobot.optimizer)
    scheduler = lerobot.scheduler.build(optimizer, config.steps) if lerobot.scheduler else None
    objects = TrainingObjects(policy, processors, optimizer, scheduler)
    state = LoopState() if start is None else _resumed_state(config, lerobot, start, objects, order)
    held_out = torch.cat(
        [torch.arange(*frames.episodes[e]) for e in eval_episodes] or [torch.empty(0, dtype=torch.long)]
    )
    data = ResidentData(frames, lerobot.policy.chunk_size, str(lerobot.policy.device))
    log.info(
        "%s: %d episodes, %d frames%s; ACT with %.1f M parameters on %s",
        frames.repo_id, len(train_episodes), len(order),
        f" ({len(eval_episodes)} episodes held out)" if eval_episodes else "",
        sum(p.numel() for p in policy.parameters()) / 1e6, lerobot.policy.device,
    )  # fmt: skip
    cut_short = unevaluated(start, state, config.steps) if start is not None else None
    return Setup(objects, data, order, held_out, state, cut_short)


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
    batch_size, processes = checkpoints.written_with(start)
    if batch_size not in (None, config.batch_size):
        log.warning(
            "batch_size=%d, the checkpoint's was %d: the data order goes on where it was", config.batch_size, batch_size
        )
    order.load_state_dict(state.sampler or order.state_at(state.step, batch_size or config.batch_size, processes))
    return state


def train_step(objects: TrainingObjects, batch: Batch, grad_clip_norm: float) -> dict[str, Tensor]:
    """One optimizer step on a normalized batch.

    Returns:
        loss, its parts and the gradient's norm before clipping, as tensors on the device: reading one waits for it.
    """
    policy = objects.policy.train()
    with autocast(policy):
        loss, parts = act_loss(policy, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    grad_norm = clip_grad_norm_(policy.parameters(), grad_clip_norm if grad_clip_norm > 0 else float("inf"))
    objects.optimizer.step()
    objects.optimizer.zero_grad()
    if objects.scheduler is not None:
        objects.scheduler.step()
    return {"loss": loss.detach(), **parts, "grad_norm": grad_norm}


def train(config: Config, lerobot: LeRobotConfig, setup: Setup, run: RunDir, record: dict[str, Any]) -> Training:
    """Train from where `setup` stands to `config.steps`; everything written goes into `run`.

    `record` is kept in every checkpoint, so that it can be resumed and evaluated on its own.

    Raises:
        ValueError: the loss is no longer finite.
        OSError: the last checkpoint cannot be written; one before that fails is a warning.
    """
    objects, state, order = setup.objects, setup.state, setup.order
    policy, processors = objects.policy, objects.processors
    window, saved = Window(state.window), None
    means: dict[str, float] = {}
    with (
        Metrics(config, run, state.step, state.wandb_run_id, state.pending) as metrics,
        _Progress(config, state.step) as progress,
        profiling(config.train.profile, run, objects) as profile,
        evaluating(config, lerobot.env, objects, state, run, metrics) as evaluations,
    ):
        state.wandb_run_id = metrics.wandb_run_id
        train_config = train_pipeline_config(config, lerobot, state.wandb_run_id)
        if setup.unevaluated is not None:
            evaluations.begin_again(setup.unevaluated)
        for step in range(state.step + 1, config.steps + 1):
            began = time.perf_counter()
            batch = processors.pre(setup.data.batch(order.next_batch(config.batch_size)))
            fetched = time.perf_counter()
            profile.end("data")
            losses = train_step(objects, batch, lerobot.optimizer.grad_clip_norm)
            profile.end("optimizer")
            window.add({**losses, "dataloading_s": fetched - began})
            progress.update(time.perf_counter() - began)

            last = step == config.steps
            if due(step, config.log_freq) or last:
                means = {**window.means(), "lr": objects.optimizer.param_groups[0]["lr"]}
                window.check_finite(step)
                metrics.log("train", {**means, "samples_per_s": progress.rate * config.batch_size}, step)
                progress.report(step, means)
                window = Window()
            profile.end("logging")
            if due(step, config.eval_steps):
                loss = validation_loss(policy, processors, setup.data, setup.held_out, config.batch_size)
                metrics.log("eval", {"loss": loss}, step)
                log.info("step %d: validation loss %.4f", step, loss)
            evaluates = due(step, config.eval_freq) or (last and config.eval_freq > 0)
            evaluations.collect(wait=evaluates or last)
            if evaluates:
                evaluations.begin(step)
            profile.end("eval")
            saves = due(step, config.save_freq) or last or evaluations.wants_checkpoint(step)
            if config.save_checkpoint and saves:
                window.check_finite(step)
                state.step, state.sampler, state.window = step, order.state_dict(), window.sums()
                saved = _save(config, run, objects, state, train_config, record, evaluations) or saved
            profile.end_step("saving")
    return Training(config.steps, means, saved, evaluations.newest)


def validation_loss(
    policy: ACTPolicy, processors: Processors, data: ResidentData, indices: Tensor, batch_size: int
) -> float:
    """Mean loss over the held-out frames in eval mode, batch by batch as stock LeRobot takes it (no KL term)."""
    policy.eval()
    with torch.inference_mode(), autocast(policy):
        losses = [act_loss(policy, processors.pre(data.batch(part)))[0] for part in torch.split(indices, batch_size)]
    policy.train()
    return float(torch.stack(losses).mean())


def _save(
    config: Config,
    run: RunDir,
    objects: TrainingObjects,
    state: LoopState,
    train_config: TrainPipelineConfig,
    record: dict[str, Any],
    evaluations: Evaluations,
) -> Checkpoint | None:
    """The checkpoint of `state`, saved; None, with a warning, where that fails and a later save can try again.

    Raises:
        OSError: the run's last checkpoint cannot be written.
    """
    try:
        saved = checkpoints.save(run, objects, state, train_config, record)
    except OSError as error:
        if state.step == config.steps:
            raise
        log.warning("step %d: %s; training goes on and the next save tries again", state.step, error)
        evaluations.not_saved(state.step)
        return None
    log.info("step %d: saved %s", state.step, saved.directory)
    evaluations.saved()
    prune(run, config.checkpoints, state.pending)
    return saved


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
        log.info(
            "step %d/%d: loss %.4f, gradient norm %.2f, lr %.1e, %.1f steps/s (data %.0f %%), %s left",
            step, self._steps, means["loss"], means["grad_norm"], means["lr"], self.rate,
            100 * means["dataloading_s"] * self.rate, left,
        )  # fmt: skip
        self._bar.set_postfix(loss=f"{means['loss']:.4f}")
        self._count, self._seconds = 0, 0.0

    def __enter__(self) -> "_Progress":
        self._redirect.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)
