"""A sweep.json of anybody: resuming it runs its jobs, and nothing else."""

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pusht_act.job import Result
from pusht_act.main import CONFIG_DIR, main
from pusht_act.runtime.errors import UserError
from pusht_act.sweeps.recorded import check_recorded
from pusht_act.sweeps.run_job import run_sweep_job
from pusht_act.sweeps.state import load_jobs

OURS = [
    *("mode=test", "seed=1,2", "policy.chunk_size=choice(8,16)", "experiment=[a,b]", "sweep=seeds", "cluster=slurm"),
    *(
        "+policy.dropout=0.2",
        "job_name=${policy.type}",
        "output_dir=/data/a b",
        "'policy.optimizer_lr=1e-4,1e-5'"[1:-1],
    ),
    *("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=60"),
    *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper={n_trials: 3, n_jobs: 2}"),
    *("hydra.sweeper.sampler.seed=3", "hydra.sweeper.params={seed: '1,2'}", "hydra.sweeper.params.seed=1"),
]
HOSTILE = [
    *("+hydra.callbacks.x._target_=os.mkdir", "hydra.callbacks={x: {_target_: os.mkdir}}", "~hydra.callbacks"),
    *("hydra={callbacks: {x: 1}}", "+hydra/callbacks=x", "++hydra.callbacks.x=1", "hydra.searchpath=[file:///tmp]"),
    *("hydra/job_logging=../../tmp/x", "hydra.job_logging.handlers.x.class=a", "hydra.hydra_logging.x=1"),
    *("hydra.launcher.setup=[touch pwned]", "hydra.launcher={setup: [touch pwned]}", "hydra.launcher._target_=os.x"),
    *("hydra.launcher.additional_parameters={wrap: x}", "hydra.job.env_set.LD_PRELOAD=x", "hydra.run.dir=/x"),
    *("experiment=../../../tmp/evil", "experiment=[a,../b]", "policy=/tmp/evil", "+experiment@hydra=quickstart"),
    *("hydra.sweeper.params={+hydra.callbacks.x: 1}", "hydra.sweeper.params.hydra.callbacks=1", "--config-dir=/tmp"),
    *("job_name=${oc.env:HF_TOKEN}", "+policy.x={_target_: os.mkdir}", "hydra.sweeper._target_=os.mkdir", "a b=["),
]


@pytest.mark.parametrize("override", OURS)
def test_what_a_sweep_of_ours_records_is_taken(override: str) -> None:
    check_recorded([override], [], "sweep")


@pytest.mark.parametrize("override", HOSTILE)
def test_what_could_run_anything_is_refused_unless_it_is_typed(override: str) -> None:
    with pytest.raises(UserError) as caught:
        check_recorded(["seed=1", override], ["-m"], "sweep")
    assert str(caught.value).startswith(f"sweep/sweep.json has {override!r}, which is taken from no file")
    check_recorded(["seed=1", override], ["-m", override], "sweep")


def test_the_command_refuses_it_and_runs_nothing(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "sweep").mkdir()
    overrides = ["seed=1,2", "+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x.path=pwned"]
    (in_tmp / "sweep/sweep.json").write_text(json.dumps({"overrides": overrides, "jobs": [["seed=1"], ["seed=2"]]}))
    monkeypatch.setattr(sys, "argv", ["pusht-act", "-m", "sweep.resume=sweep"])
    with pytest.raises(SystemExit) as left:
        main()
    assert "pusht-act: sweep/sweep.json has '+hydra.callbacks.x._target_=os.mkdir', which is taken" in str(left.value)
    assert sorted(path.name for path in in_tmp.rglob("*")) == ["sweep", "sweep.json"]


@pytest.mark.parametrize("content", ["", '{"number": 0, "sta', "[]", '{"number": 0, "overrides": [], "state": "dun"}'])
def test_a_job_whose_file_is_torn_is_resumed(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "sweep.json").write_text(json.dumps({"overrides": ["mode=test"], "jobs": [["mode=test"]]}))
    (tmp_path / "jobs/0.json").write_text(content)
    assert [(job.state, job.tries) for job in load_jobs(tmp_path)] == [("interrupted", 1)]
    assert f"{tmp_path}/jobs/0.json is damaged" in caplog.text
    with initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        cfg = compose("config", ["mode=test", "env=pusht_keypoints"])
    node = OmegaConf.create({"sweep": {"dir": str(tmp_path)}, "job": {"num": 0}, "overrides": {"task": ["mode=test"]},
                             "runtime": {"output_dir": str(tmp_path / "0"), "cwd": str(tmp_path)}})  # fmt: skip
    resumed = []
    run_sweep_job(cfg, node, lambda cfg, _: resumed.append(cfg.resume.auto) or Result(tmp_path), str)  # type: ignore[func-returns-value]
    assert resumed == [True], "a run that is finished returns its result"
    assert [(job.state, job.tries) for job in load_jobs(tmp_path)] == [("done", 2)]
