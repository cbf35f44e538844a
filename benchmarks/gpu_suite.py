r"""The training step in all its ways: checks that they agree, then steps a second, on data of PushT's shapes.

    python benchmarks/gpu_suite.py                                          on a GPU, through gpu_suite.sh
    python benchmarks/gpu_suite.py --device cpu --tiny --no-compile --batch-sizes 4 --steps 3 \
        --precisions fp32                                                   to try the script

Rows, for each batch size and precision (fp32 is TF32 on a GPU):
    plain, compiled, captured, compiled + captured     ours: order, gather, normalization, step, sums for the log
    compute        the fastest of them on one batch over and over
    stock          lerobot-train's update_policy and processors on batches of a DataLoader (4 workers) that hold decoded
                   pictures: stock decodes video besides, so it is no faster than this

A row's memory is the highest allocated in it. The estimate is 100,000 steps, once alone and once with 40 evaluations of
--eval-s seconds each that training waits for; beside training they take less. What has not begun after --minutes is
left out, the first batch size and fp32 coming first.
"""

import argparse
import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import record, table

ASSUMED = {
    *("torch", "triton", "torchvision", "pillow", "numpy", "pandas", "pyarrow"),
    *("opencv-python", "opencv-python-headless"),
}
"""Packages that gpu_suite.sh takes to be on the GPU machine."""
NOT_CARRIED = {"pusht-act", "pip", "setuptools"}
LAZY = {"accelerate", "psutil", "dill"}
"""Packages imported only when used."""
EPISODES, LENGTH = 100, 125
STEPS, EVALUATIONS = 100_000, 40


def list_packages() -> None:
    """NAME==VERSION of what is loaded for the rows below, but for ASSUMED and what torch itself needs."""
    import re
    from importlib import metadata

    import lerobot.scripts.lerobot_train  # noqa: F401

    owners = metadata.packages_distributions()
    names = {name for module in list(sys.modules) for name in owners.get(module.partition(".")[0], ())} | LAZY
    of_torch = {
        re.split(r"[^\w.-]", need)[0].lower() for need in metadata.requires("torch") or () if "extra" not in need
    }
    for name in sorted({name.lower() for name in names} - ASSUMED - of_torch - NOT_CARRIED):
        print(f"{name}=={metadata.version(name)}")


class Suite:
    """One machine's checks and rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from lerobot.configs.types import FeatureType, PolicyFeature
        from lerobot.policies.act.configuration_act import ACTConfig

        self.args, self.device = args, torch.device(args.device)
        self.on_cuda = self.device.type == "cuda"
        side = 32 if args.tiny else 96
        self.frames = made_up_frames(side)
        small = {"dim_model": 32, "n_heads": 4, "dim_feedforward": 64, "n_encoder_layers": 1, "chunk_size": 8}
        self.config = ACTConfig(
            device=args.device,
            input_features={
                "observation.image": PolicyFeature(FeatureType.VISUAL, (3, side, side)),
                "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
            pretrained_backbone_weights=None,
            kl_weight=10.0,
            **({**small, "n_action_steps": 8} if args.tiny else {"n_action_steps": 50}),
        )
        self.began = time.monotonic()

    def objects(self) -> Any:
        """Weights from the same seed each time, and the random numbers of training from another."""
        import torch
        from lerobot.optim import AdamWConfig

        from pusht_act.checkpoints.checkpoint_io import TrainComponents
        from pusht_act.data.open_dataset import normalization_stats
        from pusht_act.policy.act import make_policy, make_processors
        from pusht_act.policy.optim import make_optimizer

        torch.manual_seed(0)
        policy = make_policy(copy.deepcopy(self.config))
        processors = make_processors(self.config, normalization_stats(self.frames, True))
        torch.manual_seed(1)
        return TrainComponents(policy, processors, make_optimizer(policy, AdamWConfig(lr=1e-4)), None)

    def step(self, objects: Any, batch_size: int, precision: str, *, compiled: bool, captured: bool) -> tuple[Any, Any]:
        """Our step, and the inputs for it."""
        import torch

        from pusht_act.config.schema import TrainConfig
        from pusht_act.data.loader import BatchLoader
        from pusht_act.data.sampler import EpisodeSampler
        from pusht_act.policy.act import act_loss
        from pusht_act.training.cuda_graphs import CudaGraphs
        from pusht_act.training.train_step import StepOptions, TrainStep, compile_loss

        torch.backends.cudnn.benchmark = False  # as stock's row leaves it on
        samples = BatchLoader(self.frames, self.config.chunk_size, self.args.device)
        loss = compile_loss(act_loss, TrainConfig(compile=compiled), self.device)
        recorder = CudaGraphs(self.device) if captured else None
        order = EpisodeSampler(self.frames, list(range(EPISODES)), 0)
        take_step = TrainStep(
            objects, samples, batch_size, StepOptions(10.0, precision, full_batch_loss=loss), recorder
        )
        return take_step, samples.iter_batches(order, batch_size)

    def late(self) -> bool:
        """Whether nothing new is to begin."""
        return bool(time.monotonic() - self.began > 60 * self.args.minutes)

    def timed(self, once: Callable[[], None]) -> dict[str, float]:
        """Seconds a step, and peak memory; what is compiled, chosen and captured is so before the clock starts."""
        import torch

        for _ in range(self.args.warm_up):
            once()
        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(self.args.steps):
            once()
        if self.on_cuda:
            torch.cuda.synchronize()
        step_s = (time.perf_counter() - start) / self.args.steps
        reserved = torch.cuda.max_memory_reserved() / 2**20 if self.on_cuda else 0.0
        return {"step_s": step_s, "mib": reserved}


def made_up_frames(side: int) -> Any:
    """As many frames as half of PushT's, of noise."""
    import numpy as np

    from pusht_act.data.cache import FrameDataset

    n, rng = EPISODES * LENGTH, np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "observation.image": rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8),
        "observation.state": rng.uniform(0, 512, (n, 2)).astype(np.float32),
        "action": rng.uniform(0, 512, (n, 2)).astype(np.float32),
    }
    ends = np.arange(1, EPISODES + 1) * LENGTH
    plain = {"mean": [256.0, 256.0], "std": [148.0, 148.0], "min": [0.0, 0.0], "max": [512.0, 512.0]}
    picture = {"mean": [[[0.5]]] * 3, "std": [[[0.3]]] * 3, "min": [[[0.0]]] * 3, "max": [[[1.0]]] * 3}
    return FrameDataset(
        repo_id="made/up",
        arrays=arrays,
        episodes=np.stack([ends - LENGTH, ends], axis=1),
        tasks=["push"] * EPISODES,
        features={key: {"dtype": "image" if array.ndim == 4 else "float32"} for key, array in arrays.items()},
        stats={key: picture if array.ndim == 4 else plain for key, array in arrays.items()},
        fps=10,
    )


def rows(suite: Suite) -> Iterator[dict[str, Any]]:
    """The table, row by row."""
    args = suite.args
    ways = [(compiled, captured) for captured in (False, True) for compiled in (False, True)]
    for batch_size in args.batch_sizes:
        for precision in args.precisions:
            found: dict[tuple[bool, bool], float] = {}
            for compiled, captured in ways:
                if suite.late() or (captured and not suite.on_cuda) or (compiled and args.no_compile):
                    continue
                timing = suite.timed(_ours(suite, batch_size, precision, compiled, captured))
                found[compiled, captured] = timing["step_s"]
                name = " + ".join(["compiled"] * compiled + ["captured"] * captured) or "plain"
                yield _row(args, batch_size, precision, name, timing)
            if found and not suite.late():
                compiled, captured = min(found, key=lambda way: found[way])
                once = _compute(suite, batch_size, precision, compiled, captured)
                yield _row(args, batch_size, precision, "compute", suite.timed(once))
            if not suite.late():
                yield _row(args, batch_size, precision, "stock", suite.timed(_stock(suite, batch_size, precision)))


def _row(args: argparse.Namespace, batch_size: int, precision: str, side: str, timing: dict[str, float]) -> Any:
    step_s, hours = timing["step_s"], timing["step_s"] * STEPS / 3600
    return {
        "batch": batch_size,
        "precision": precision,
        "side": side,
        "step, ms": 1000 * step_s,
        "steps/s": 1 / step_s,
        "samples/s": batch_size / step_s,
        "memory, MiB": timing["mib"],
        "100,000 steps, h": hours,
        "with evaluations, h": hours + EVALUATIONS * args.eval_s / 3600,
    }


def _ours(suite: Suite, batch_size: int, precision: str, compiled: bool, captured: bool) -> Callable[[], None]:
    from pusht_act.training.metric_accumulator import MetricAccumulator

    take_step, inputs = suite.step(suite.objects(), batch_size, precision, compiled=compiled, captured=captured)
    window = MetricAccumulator()

    def once() -> None:
        losses = take_step(take_step.batch(next(inputs)))
        window.add(losses, losses.pop("skipped"))

    return once


def _compute(suite: Suite, batch_size: int, precision: str, compiled: bool, captured: bool) -> Callable[[], None]:
    take_step, inputs = suite.step(suite.objects(), batch_size, precision, compiled=compiled, captured=captured)
    batch = take_step.batch(next(inputs))
    return lambda: take_step(batch)


def _stock(suite: Suite, batch_size: int, precision: str) -> Callable[[], None]:
    """The body of lerobot_train's loop, with its AdamW; use_amp on a GPU is fp16 there, and bf16 here."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from lerobot.optim import AdamWConfig
    from lerobot.scripts.lerobot_train import update_policy
    from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

    torch.backends.cudnn.benchmark = True
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the row before
    mixed = "bf16" if precision == "bf16" else "no"
    accelerator = Accelerator(cpu=not suite.on_cuda, mixed_precision=mixed, step_scheduler_with_optimizer=False)
    objects = suite.objects()
    optimizer = AdamWConfig(lr=1e-4).build(objects.policy.get_optim_params())
    workers = 0 if suite.args.tiny else 4
    pictures: Any = Pictures(suite.frames, suite.config.chunk_size)
    loader: Any = torch.utils.data.DataLoader(
        pictures, batch_size=batch_size, shuffle=True, num_workers=workers,
        pin_memory=suite.on_cuda, persistent_workers=workers > 0,
    )  # fmt: skip
    policy, optimizer, loader = accelerator.prepare(objects.policy, optimizer, loader)
    names = ("loss", "grad_norm", "lr", "update_s", "dataloading_s", "gpu_mem_gb")
    tracker = MetricsTracker(batch_size, len(suite.frames), EPISODES, {name: AverageMeter(name) for name in names})

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()

    def once() -> None:
        batch = next(batches)
        batch["observation.image"] = batch["observation.image"].to(dtype=torch.float32) / 255.0
        update_policy(tracker, policy, objects.processors.pre(batch), optimizer, 10.0, accelerator=accelerator)

    return once


class Pictures:
    """The samples as stock's data set gives them once their video is decoded."""

    def __init__(self, frames: Any, chunk_size: int) -> None:
        from pusht_act.data.loader import BatchLoader

        self._frames, self._samples = frames, BatchLoader(frames, chunk_size, "cpu")

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        sample = {key: value[0] for key, value in self._samples.batch(torch.tensor([index])).items()}
        sample["observation.image"] = torch.from_numpy(self._frames.arrays["observation.image"][index])
        return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 8, 64])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=100, help="under the clock, of each row")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before them")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no row is begun")
    parser.add_argument("--eval-s", type=float, default=30.0, help="seconds of one evaluation, for the estimate")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--tiny", action="store_true", help="a tiny ACT and small pictures, to try the script")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/gpu_suite.json"))
    parser.add_argument("--list-packages", action="store_true", help="what gpu_suite.sh --collect carries, and stop")
    args = parser.parse_args()
    if args.list_packages:
        list_packages()
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from benchmarks.gpu_checks import checks

    found = record(args)
    suite = Suite(args)
    results = checks(suite)
    done = []
    for row in rows(suite):
        print(f"{row['batch']} {row['precision']} {row['side']}: {row['step, ms']:.2f} ms", file=sys.stderr)
        done.append(row)
    print("\n".join(f"{name}: {result}" for name, result in results.items()), end="\n\n")
    print(table(done))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found | {"checks": results, "rows": done}, indent=2) + "\n")
    if any(result != "ok" for result in results.values()):
        sys.exit("a check failed")


if __name__ == "__main__":
    main()
