"""The schema of a run: every field of our own, typed, bounded and documented; the values live in `conf/`.

LeRobot's sections (`policy`, `env`, `dataset`, `optimizer`, `scheduler`) stay plain dictionaries here: LeRobot's own
dataclasses declare their fields, and `config.lerobot` decodes them. This module imports neither torch nor lerobot, so
that `--help`, `--cfg job` and a misspelt key answer at once. Hydra refuses a key that is not declared here or in conf/;
errors.py answers it with the key that was meant. docs/configuration.md is generated from this module.
"""

# ruff: noqa: RUF009  (`option` declares a field)

import warnings
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from pusht_act.config.options import Option, option
from pusht_act.config.optuna import OptunaConfig

PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONFIG_DIR = str(next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir()))


class Mode(Enum):
    """What one job does; the values of the config group `mode`."""

    test = "test"
    full = "full"
    resume = "resume"
    eval = "eval"
    demos = "demos"
    status = "status"


TRAIN_MODES = (Mode.test, Mode.full)
"""Modes that begin with new weights, or with those of policy.pretrained_path."""
TRAINING = (*TRAIN_MODES, Mode.resume)
"""Modes that train."""
ROLLOUTS = (*TRAINING, Mode.eval)
"""Modes that roll a policy out."""
NOT_STATUS = (*ROLLOUTS, Mode.demos)
"""Modes that write something."""
AUTO = "auto"
"""The value of an option that is decided where the job runs, and kept from then on (training/automatic.py)."""
AUTOMATIC = {"policy.pretrained_backbone_weights": AUTO, "train.precision": AUTO, "train.backbone_norm": None}
"""Options that may be decided so, and the value that leaves them open."""
EMBEDDED_REPO_ID = "pusht_act/demos"
MAX_DEMOS = 2000
PROFILED_STEPS = 25
"""Those that train.profile measures: the first of a run."""


@dataclass
class ResumeConfig:
    """What training resumes from."""

    path: str | None = option(None, modes=(Mode.resume,))
    """mode=resume: a checkpoint, `.../checkpoints/005000`, its `pretrained_model` or a run; null: output_dir's last."""
    auto: bool = option(modes=TRAIN_MODES, instead="mode=resume always continues")
    """mode=test and mode=full: resume from the latest valid checkpoint in output_dir if it is of the same
    configuration, and start afresh if there is none. The same command can then be given until the run is done."""


@dataclass
class SweepConfig:
    """Resuming a sweep (`-m`). Its folder holds its jobs and their results (see sweeps/state.py)."""

    resume: str | None = None
    """The folder of a sweep, hydra.sweep.dir, to resume with the overrides that it was started with."""
    max_tries: int = option(ge=1)
    """How often a job may fail. Each resume of the sweep tries it again."""


@dataclass
class ClusterConfig:
    """Sweeps on SLURM; the group `cluster` sets hydra.launcher's values."""

    dry_run: bool = MISSING
    """With -m: print the script that would be submitted to SLURM, and stop."""


@dataclass
class StatusConfig:
    """`mode=status`: a table of the jobs of a sweep, or of one run (see sweeps/status.py)."""

    every: float = option(ge=0)
    """Seconds between two updates on a terminal, until all jobs have ended. 0 and anything but a terminal: once."""


@dataclass
class CheckpointsConfig:
    """How long checkpoints stay. `last` and `best` always do."""

    keep_last: int = option(ge=0)
    """How many of the newest checkpoints are kept. The others are removed after each save. 0: all, as in stock
    LeRobot."""
    keep_every: int = option(ge=0)
    """Checkpoints at multiples of this number of steps are kept for ever, beside the newest; 0: none."""
    background: bool = MISSING
    """Write a copy of weights and moments in a thread while training continues; false: training waits. The files are
    the same."""


@dataclass
class TrainConfig:
    """How training runs."""

    max_nonfinite: int = option(ge=0)
    """How many steps may have a loss or gradient that is not finite. Such a step changes nothing. After more of them,
    and before weights that are not finite would be evaluated or saved, the run rolls back to its latest valid
    checkpoint and continues with the data in another order."""
    max_rollbacks: int = option(ge=0)
    """How often the run may roll back in all, before it stops with an error."""
    precision: str | None = option(choices=("fp32", "bf16", AUTO))
    """Precision of training: fp32 (on a GPU with TF32 matrix products, as in stock LeRobot) or bf16 (autocast; weights
    and AdamW stay fp32). auto: bf16 where the device has it in hardware, else fp32; the run keeps what was chosen.
    null: bf16 with policy.use_amp=true, else fp32. Evaluations use policy.use_amp alone: mode=eval repeats them."""
    backbone_norm: str | None = option(choices=("batch", "frozen"))
    """Norm layers of the image backbone. frozen: LeRobot's, whose statistics never change; they fit ImageNet's weights.
    batch: batch norm, which random weights need to learn at all; its statistics are made exact over 1,536 training
    frames before each evaluation and save, and a checkpoint holds them as frozen layers, which stock LeRobot reads.
    null: batch for random weights, frozen for ImageNet's, what it was trained with for a checkpoint."""
    freeze_backbone_at: int | None = option(ge=1)
    """Step that is saved, and after which the image backbone (with ema.enable the average's) learns no more: features
    of all training frames are computed once and replace the images, on a CPU 10 times faster. null: never."""
    mirror: float = option(ge=0, le=1)
    """Probability with which a training sample is replaced by its mirror image, the reflection across the goal's axis.
    Statistics are then those of the samples and their mirror images. Of the 2,000 built-in demonstrations, 64 do not
    solve the task when they are reflected."""
    random_shift: int = option(ge=0)
    """Largest shift in pixels of each training image in each direction, drawn anew for each sample; 0: none. The border
    is repeated. Nothing is shifted in validation and evaluation."""
    state_noise: float = option(ge=0)
    """Standard deviation in px of normal noise on the agent's position in training; 0: none."""
    chunk_discount: float = option(gt=0, le=1)
    """Weight of a chunk's action relative to the one before it. 1: all weigh the same. Weights have mean 1."""
    compile: bool | None = MISSING
    """Compile the loss and its gradient to fused kernels, which takes a minute or more; null: on a GPU only. An epoch's
    last, short batch is not compiled. Dropout and VAE noise then draw different random numbers."""
    fast_dropout: bool | None = MISSING
    """Draw dropout masks from 16 random bits an element, which makes a step on a CPU a sixth to a fifth shorter. The
    masks differ from stock's; their probability is the same to 1e-5. null: with bf16 on a CPU, unless compiled."""
    profile: bool = MISSING
    """Profile a few steps. A line says where their time goes, and profile/trace.json in the run directory shows every
    operation (open it with chrome://tracing or ui.perfetto.dev). All steps then wait for the device after each phase
    and are not captured in a CUDA graph."""


@dataclass
class EmaConfig:
    """An exponential moving average (EMA) of the weights; LeRobot's names and schedule."""

    enable: bool = MISSING
    """Keep an average of the weights beside them, in the folder pretrained_model_ema of each checkpoint."""
    decay: float | None = option(None, ge=0, le=1)
    """Constant decay at every step, such as 0.999; null: a schedule, 1 - (1 + step / inv_gamma) ** -power."""
    update_after_step: int = option(ge=0)
    """Steps during which the average is a copy of the weights."""
    inv_gamma: float = option(gt=0)
    """Steps in which the schedule begins to rise."""
    power: float = option(gt=0)
    """How fast the schedule rises. 0.75 comes to 0.999 after 10,000 steps, 1 after 1,000."""
    min_decay: float = option(ge=0, le=1)
    """Lower end of the schedule."""
    max_decay: float = option(ge=0, le=1)
    """Upper end of the schedule."""
    use_for_eval: bool = MISSING
    """Evaluate the average, in training, by mode=eval and on the Hub; false: the weights themselves. A folder that is
    named, such as .../pretrained_model, is evaluated as it is."""


@dataclass
class EvalConfig:
    """Rollouts in the environment, in training and in `mode=eval`."""

    n_episodes: int = option(ge=1, modes=ROLLOUTS)
    """Episodes of one evaluation."""
    batch_size: int = option(ge=1, modes=ROLLOUTS)
    """Environments stepped in parallel; the policy sees one batch of this size. It affects the results: a matrix
    product may round differently for another batch size."""
    start_seed: int = option(ge=0, modes=ROLLOUTS)
    """Episode i resets the environment with seed start_seed + i. Selection (in training) and test (mode=eval) use
    separate ranges, both apart from 0 to 205, where the human demonstrations started."""
    n_videos: int = option(ge=0, modes=ROLLOUTS)
    """How many episodes, the first ones, are written as mp4. A film strip shows the first."""
    workers: int = option(ge=0, modes=ROLLOUTS)
    """Worker processes that step the environments. 1: none, this process; 0: one for each core, fewer for a small
    batch. It does not affect the results."""
    background: bool = option(modes=TRAINING)
    """Evaluate a copy of the policy while training continues; false: training waits. The results are the same."""


@dataclass
class WandbConfig:
    """Weights & Biases; LeRobot's names where it has them."""

    enable: bool = MISSING
    """Log to W&B as well as to metrics.jsonl. Without a login the run is kept offline, and `wandb sync` sends it."""
    project: str = MISSING
    """Project of the run."""
    entity: str | None = None
    """User or team; null: the login's default."""
    mode: str | None = option(None, choices=("online", "offline", "disabled"))
    """online, offline or disabled; null: online with a login, else offline."""
    name: str | None = None
    """Name of the run; null: job_name, in a sweep followed by what varies there."""
    group: str | None = None
    """Name that runs share which belong together; null: the folder of a sweep, for its jobs."""
    notes: str | None = None
    """Free text shown with the run."""
    add_tags: bool = MISSING
    """Tag the run with its policy, seed, data set and environment, as LeRobot does."""
    tags: list[str] = field(default_factory=list)
    """More tags, such as [paper,ablation]."""
    run_id: str | None = None
    """W&B's id of a run to continue; null: the one of the checkpoint, or a new run."""
    disable_artifact: bool = option(modes=TRAINING)
    """Do not upload the checkpoints of save_freq, each with its weights and processors."""


@dataclass
class DemosConfig:
    """Scripted demonstrations: how many of the built-in ones `dataset=demos` uses, and what `mode=demos` generates."""

    n_episodes: int = option(ge=1, modes=(*TRAINING, Mode.demos))
    """dataset=demos: how many of the built-in ones to use (at most 2,000); mode=demos: how many to generate."""
    start_seed: int = option(ge=0, modes=(Mode.demos,))
    """mode=demos: the first reset seed to start from. A start that is not solved is left out. Apart from the seeds of
    evaluation (from 100,000 and 200,000 on) and of the built-in demonstrations (from 1,000,000 on)."""
    initial_states: str | None = option(modes=(Mode.demos,))
    """mode=demos: a CSV file of states to start from, each once and in order, with the header
    agent_x,agent_y,block_x,block_y,block_angle (px, rad); null: the environment's resets from start_seed on."""
    coverage: float = option(ge=0.95, lt=1, modes=(Mode.demos,), reason="the environment asks for 0.95")
    """Share of the goal to cover before an episode ends."""
    speed: float = option(ge=1, le=30, modes=(Mode.demos,))
    """Speed in px per step at which the planner moves around the T. It pushes at 7/9 of it."""
    smoothness: float = option(ge=0, modes=(Mode.demos,))
    """Weight on changes of speed and direction; 0 ignores them."""
    action_noise: float = option(ge=0, le=100, modes=(Mode.demos,))
    """Standard deviation in px of the noise on the executed actions. The recorded actions stay clean."""
    replan: int = option(ge=1, modes=(Mode.demos,))
    """Steps between two searches for a plan. With noise, 1 or 2 react best and take 2 to 3 times as long."""
    seed: int = option(ge=0, modes=(Mode.demos,))
    """Seed of the planner and the noise. Another one gives different demonstrations from the same starts."""
    workers: int = option(ge=0, modes=(Mode.demos,))
    """Worker processes that plan; 0: one for each core. It does not affect the result."""
    push_to_hub: bool = option(modes=(Mode.demos,))
    """Upload the finished data set, with a card, to the Hugging Face Hub."""
    repo_id: str | None = option(modes=(Mode.demos,))
    """Its name on the Hub, USER/NAME."""


@dataclass
class Config:
    """One job."""

    mode: Mode = MISSING
    """Set by the group `mode`."""
    seed: int = option(ge=0, modes=TRAINING, instead="mode=eval has eval.start_seed=, mode=demos has demos.seed=")
    """Seed of initialisation, data order, dropout and VAE noise (see runtime/seeding.py), not of the evaluation."""
    steps: int = option(ge=1, modes=TRAINING)
    """Optimizer steps of the whole run, including those before a resume."""
    batch_size: int = option(ge=1, modes=TRAINING, instead="mode=eval has eval.batch_size=")
    """Samples of one optimizer step. With several ranks (torchrun) it is that of all together, and a multiple of
    them."""
    log_freq: int = option(ge=0, modes=TRAINING)
    """Steps between two lines of metrics; 0: never."""
    eval_freq: int = option(ge=0, modes=TRAINING)
    """Steps between two evaluations in the environment (LeRobot 0.6: env_eval_freq); 0: never."""
    eval_steps: int = option(ge=0, modes=TRAINING)
    """Steps between two validation losses on the episodes held out by dataset.eval_split; 0: never."""
    save_checkpoint: bool = option(modes=TRAINING)
    """Whether checkpoints are written at all."""
    save_freq: int = option(ge=0, modes=TRAINING)
    """Steps between two checkpoints; the last step always has one; 0: only the last step."""
    output_dir: str = option(nonempty=True, modes=NOT_STATUS)
    """The run directory; a job of a sweep gets its own under hydra.sweep.dir unless this is given."""
    job_name: str = option(nonempty=True, modes=ROLLOUTS)
    """Name of the run in logs, W&B and the model card; with -m also that of the jobs on SLURM, in any mode."""
    overwrite: bool = option(modes=NOT_STATUS)
    """Move an existing run directory aside (to output_dir.old-N) and start afresh. mode=eval: repeat an evaluation that
    is stored, and replace it."""
    print_lerobot_command: bool = option(modes=ROLLOUTS, instead="LeRobot does not generate demonstrations")
    """Print the equivalent stock command line and stop."""
    checkpoint: str | None = option(modes=(Mode.eval,), instead="resume.path= continues training")
    """What mode=eval evaluates: a path as for resume.path, or a model id on the Hub."""
    dir: str | None = option(None, modes=(Mode.status,))
    """What mode=status shows: the folder of a sweep, hydra.sweep.dir, or of several, such as multirun, or a run
    directory."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    status: StatusConfig = option(factory=StatusConfig, modes=(Mode.status,))
    checkpoints: CheckpointsConfig = option(factory=CheckpointsConfig, modes=TRAINING)
    train: TrainConfig = option(factory=TrainConfig, modes=TRAINING)
    ema: EmaConfig = option(factory=EmaConfig, modes=TRAINING)
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = option(factory=WandbConfig, modes=ROLLOUTS)
    demos: DemosConfig = field(default_factory=DemosConfig)
    # Not typed here: Hydra would take no names but those that conf/ has.
    rename_map: Any = option(None, modes=TRAINING)
    """Names of features in the data set and what they are called here, such as {observation.images.top:
    observation.image}."""
    policy: dict[str, Any] = option(modes=ROLLOUTS)
    """LeRobot's ACTConfig; `device: auto` takes cuda when there is one, else cpu."""
    env: dict[str, Any] = option(modes=NOT_STATUS)
    """LeRobot's PushtEnv."""
    dataset: dict[str, Any] = option(modes=TRAINING)
    """LeRobot's DatasetConfig; repo_id pusht_act/demos means the built-in demonstrations."""
    optimizer: dict[str, Any] = option(modes=TRAINING)
    """Fields of LeRobot's AdamWConfig that replace the policy's preset, e.g. grad_clip_norm."""
    scheduler: dict[str, Any] = option(modes=TRAINING)
    """LeRobot's LRSchedulerConfig, e.g. {type: cosine_decay_with_warmup, ...}; {}: a constant rate."""


MAX_SIZE, MAX_LAYERS = 100_000, 1_000
"""Of a policy: what is larger fits into no memory, and is refused before that is tried."""
LEROBOT_OPTIONS: dict[str, Option] = {
    "policy.type": Option(choices=("act",)),
    "policy.n_obs_steps": Option(choices=(1,), reason="ACT looks at one observation"),
    **{
        f"policy.{name}": Option(kind=int, ge=1, le=MAX_SIZE, fixed=True)
        for name in ("chunk_size", "dim_model", "n_heads", "dim_feedforward", "latent_dim")
    },
    **{
        f"policy.{name}": Option(kind=int, ge=1, le=MAX_LAYERS, fixed=True)
        for name in ("n_encoder_layers", "n_decoder_layers", "n_vae_encoder_layers")
    },
    "policy.n_action_steps": Option(kind=int, ge=1, le=MAX_SIZE),
    **{
        f"policy.{name}": Option(fixed=True)
        for name in (
            *("use_vae", "pre_norm", "feedforward_activation", "vision_backbone", "pretrained_backbone_weights"),
            *("replace_final_stride_with_dilation", "normalization_mapping", "input_features", "output_features"),
        )
    },
    "policy.dropout": Option(modes=TRAINING),
    **{
        f"policy.{name}": Option(kind=float, ge=0, modes=TRAINING)
        for name in ("optimizer_lr", "optimizer_lr_backbone", "optimizer_weight_decay", "kl_weight")
    },
    "policy.pretrained_path": Option(modes=TRAIN_MODES, instead="mode=resume and mode=eval name their own checkpoint"),
    "policy.push_to_hub": Option(modes=TRAINING, instead="mode=demos has demos.push_to_hub="),
    "policy.repo_id": Option(modes=TRAINING, instead="mode=demos has demos.repo_id="),
    **{f"policy.{name}": Option(modes=TRAINING) for name in ("private", "tags", "license")},
    "env.obs_type": Option(fixed=True),
    **{
        f"env.{name}": Option(kind=int, ge=1, modes=ROLLOUTS)
        for name in ("episode_length", "fps", "visualization_width", "visualization_height")
    },
    "dataset.use_imagenet_stats": Option(fixed=True),
    "dataset.eval_split": Option(kind=float, ge=0, lt=1),
    "dataset.observations": Option(
        meaning="The observations to read, by the data set's names, such as [observation.image, observation.state]; "
        "null: all."
    ),
    "dataset.allow_change": Option(
        choices=(True, False),
        meaning="Let a run resume on a data set of other content. It keeps the statistics that it began with.",
    ),
    "optimizer.grad_clip_norm": Option(kind=float, ge=0),
    "optimizer.eps": Option(kind=float, ge=0),
    "scheduler.num_warmup_steps": Option(kind=int, ge=0),
    "scheduler.num_decay_steps": Option(kind=int, ge=1),
    "scheduler.num_vqvae_training_steps": Option(kind=int, ge=1),
    "scheduler.num_cycles": Option(kind=float, ge=0),
    "scheduler.peak_lr": Option(kind=float, gt=0, reason="LeRobot divides by it"),
    "scheduler.decay_lr": Option(kind=float, ge=0),
}
"""Bounds of LeRobot's fields, which are checked where a configuration names them, and options of ours among them."""
OUR_DATASET_KEYS = ("observations", "allow_change")
"""Options of `dataset` that LeRobot does not have."""


def register() -> None:
    """Give Hydra the schemas that conf/config.yaml and conf/hydra/sweeper/optuna.yaml extend."""
    ConfigStore.instance().store(name="schema", node=Config)
    ConfigStore.instance().store(group="hydra/sweeper", name="schema", node=OptunaConfig)
    # A value that is not a number is left to validation, which names its key.
    OmegaConf.register_new_resolver(
        "min", lambda *values: min(value for value in values if isinstance(value, int | float)), replace=True
    )
    # The presets in conf/hydra/launcher extend the plugin's nodes by having their names, which Hydra 1.3 frowns upon;
    # the other way, a defaults list, would need the plugin's nodes to have names of their own.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def to_dict(config: Config) -> dict[str, Any]:
    """Return `config` in plain types, to be written into a file."""
    return {**asdict(config), "mode": config.mode.value}


OUR_SECTIONS = {field.name for field in fields(Config) if is_dataclass(field.type)}
"""Typed here; the others are LeRobot's, whose defaults are its own."""
METADATA_FILE = "pusht_act.json"
"""In a checkpoint's two folders, what LeRobot does not keep."""
