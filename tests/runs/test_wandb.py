"""W&B: what a run, its evaluations and a sweep look like there, and that it is never in the way."""

import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf

import pusht_act
from pusht_act.runs.loggers import LoggerCollection
from pusht_act.runs.run_dir import RunDir
from pusht_act.sweeps.run_job import name_in_wandb
from tests.helpers.config import config
from tests.helpers.runs import TINY
from tests.helpers.wandb_runs import forget_settings, history, lines, log_once, offline_runs, records
from tests.helpers.wandb_server import Server


def test_wandb_keeps_an_offline_run_and_a_resume_continues_it(tmp_path: Path, nobody: None) -> None:
    run = tmp_path / "run"
    first = pusht_act.run([*TINY, f"output_dir={run}", "wandb.enable=true", "wandb.mode=offline"])
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=6", "wandb.enable=true"])
    state = json.loads((run / "checkpoints" / "last" / "training_state" / "pusht_act.json").read_text())
    files = offline_runs(run)
    assert first.step == 4
    assert len(files) == 2
    assert {path.stem for path in files} == {f"run-{state['wandb_run_id']}"}
    rows = [history(path) for path in files]
    assert [[row["step"] for row in part if "train/loss" in row] for part in rows] == [[1, 2, 3, 4], [5, 6]]
    logged = {row["step"]: row["train/loss"] for row in lines(run / "metrics.jsonl")}
    assert {row["step"]: row["train/loss"] for part in rows for row in part} == logged


def test_a_result_that_comes_late_is_drawn_at_its_own_step(tmp_path: Path, nobody: None) -> None:
    logged = [("train", 2), ("train", 3), ("eval", 2), ("train", 4), ("eval", 4)]
    with LoggerCollection(config("wandb.enable=true"), RunDir(tmp_path), 0, None) as metrics:
        for group, step in logged:
            metrics.log(group, {"value": float(step)}, step)
    rows = [{key: value for key, value in row.items() if key[0] != "_"} for row in history(offline_runs(tmp_path)[0])]
    assert rows == [{"step": step, f"{group}/value": step} for group, step in logged]
    axes = {record.metric.glob_name or record.metric.name: record.metric.step_metric
            for record in records(offline_runs(tmp_path)[0]) if record.HasField("metric")}  # fmt: skip
    assert axes.items() >= {("train/*", "step"), ("eval/*", "step"), ("rollback/*", "step")}


@pytest.mark.slow
def test_a_resume_without_wandb_keeps_the_run_for_a_later_one(tmp_path: Path, nobody: None) -> None:
    run = tmp_path / "run"
    pusht_act.run([*TINY, f"output_dir={run}", "wandb.enable=true"])
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=5", "wandb.enable=false"])
    assert len(offline_runs(run)) == 1
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=6", "logging=wandb"])
    assert len({path.stem for path in offline_runs(run)}) == 1


@pytest.mark.parametrize("mode", ["null", "online"])
def test_without_a_login_the_run_is_kept_offline_in_one_line(
    mode: str, tmp_path: Path, nobody: None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("INFO"):
        log_once(tmp_path, f"wandb.mode={mode}")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pusht_act")]
    assert len(said) == 1
    assert "no login" in said[0]
    assert f"wandb sync --append {tmp_path}/wandb/offline-run-*" in said[0]
    assert capfd.readouterr() == ("", "")  # and W&B itself says nothing
    assert len(offline_runs(tmp_path)) == 1


def test_a_server_out_of_reach_puts_the_run_offline_at_once(
    tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    forget_settings(monkeypatch)
    with caplog.at_level("INFO"):
        log_once(tmp_path)
    assert "127.0.0.1:9 cannot be reached" in caplog.text
    assert len(offline_runs(tmp_path)) == 1


class Refusing(http.server.BaseHTTPRequestHandler):
    """A W&B server that does not know the login."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(401)
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


def test_a_login_that_is_refused_puts_the_run_offline(
    tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    forget_settings(monkeypatch)
    with caplog.at_level("INFO"):
        log_once(tmp_path)
    server.shutdown()
    server.server_close()
    assert "the run is kept here" in caplog.text
    assert len(offline_runs(tmp_path)) == 1


@pytest.mark.parametrize("how", ["option", "environment"])
def test_wandb_can_be_disabled(how: str, tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    assert log_once(tmp_path, *(["wandb.mode=disabled"] if how == "option" else [])) is None
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["step"], line["train/loss"]) == (1, 0.5)
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_that_ends_in_an_exception_has_failed_in_wandb(failed: bool, tmp_path: Path, nobody: None) -> None:
    with suppress(ValueError), LoggerCollection(config("wandb.enable=true"), RunDir(tmp_path), 0, None):
        if failed:
            raise ValueError("the loss became nan")
    (exit_,) = [record.exit for record in records(offline_runs(tmp_path)[0]) if record.HasField("exit")]
    assert exit_.exit_code == int(failed)


def test_the_options_of_wandb_reach_its_run(tmp_path: Path, nobody: None) -> None:
    shown = ["wandb.name=shown", "wandb.group=together", "wandb.tags=[paper,ablation]", "wandb.run_id=abc123"]
    log_once(
        tmp_path, "wandb.project=mine", "wandb.entity=lab", "wandb.notes=why", "seed=77", "train.mirror=0.5", *shown
    )
    (run,) = [record.run for record in records(offline_runs(tmp_path)[0]) if record.HasField("run")]
    assert (run.project, run.entity, run.notes, run.display_name) == ("mine", "lab", "why", "shown")
    assert (run.run_group, run.run_id, run.job_type) == ("together", "abc123", "train_eval")
    assert [*run.tags] == ["policy:act", "seed:77", "dataset:lerobot/pusht", "env:pusht", "paper", "ablation"]
    values = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (values["seed"], values["policy"]["dim_model"], values["train"]["mirror"]) == (77, 512, 0.5)
    assert {"demos", "eval", "train", "ema", "optimizer", "scheduler", "started"} <= values.keys()


def test_a_run_is_named_by_its_job_and_may_have_no_tags(tmp_path: Path, nobody: None) -> None:
    log_once(tmp_path, "job_name=named", "wandb.add_tags=false")
    (run,) = [record.run for record in records(offline_runs(tmp_path)[0]) if record.HasField("run")]
    assert (run.display_name, run.run_group, [*run.tags]) == ("named", "", [])


def test_the_jobs_of_a_sweep_are_a_group_and_named_by_what_varies(tmp_path: Path) -> None:
    sweep = tmp_path / "2026-11-27" / "20-15-00"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"overrides": ["mode=test", "seed=1,2"], "jobs": []}))
    overrides = ["mode=test", "seed=2", "output_dir=x"]
    cfg = OmegaConf.create({"job_name": "act", "wandb": {"group": None, "name": None}})
    name_in_wandb(cfg, sweep, overrides)
    assert cfg.wandb == {"group": "2026-11-27/20-15-00", "name": "act seed=2"}
    cfg = OmegaConf.create({"job_name": "act", "wandb": {"group": "mine", "name": "same"}})
    name_in_wandb(cfg, sweep, overrides)
    assert cfg.wandb == {"group": "mine", "name": "same"}


@pytest.mark.slow
def test_evaluations_videos_and_checkpoints_are_in_the_run(tmp_path: Path, nobody: None) -> None:
    run = tmp_path / "run"
    options = ["wandb.enable=true", "wandb.mode=offline", "eval_freq=4", "eval.n_videos=1", "save_freq=2"]
    pusht_act.run([*TINY, f"output_dir={run}", *options])
    evaluated = pusht_act.run(["mode=eval", f"checkpoint={run}", "eval.n_episodes=3"])
    pusht_act.run(["mode=eval", f"checkpoint={run}", "eval.n_episodes=3"])

    training, evaluation = offline_runs(run)  # what is stored is not logged again
    assert training.stem == evaluation.stem
    rows = history(training)
    (shown,) = [row for row in rows if "eval/video/_type" in row]
    assert (shown["step"], shown["eval/video/count"], shown["eval/film_strip/_type"]) == (4, 1, "image-file")
    artifacts = [record.artifact for record in records(training) if record.HasField("artifact")]
    assert [{*artifact.aliases} for artifact in artifacts] == [{"latest", "step-2"}, {"latest", "step-4"}]
    assert {entry.path for entry in artifacts[0].manifest.contents} >= {"model.safetensors", "config.json"}
    (tested, *_) = history(evaluation)
    assert (tested["step"], tested["test/pc_success"]) == (4, evaluated.metrics["pc_success"])


def test_checkpoints_can_be_kept_out_of_wandb(tmp_path: Path, nobody: None) -> None:
    pusht_act.run([*TINY, f"output_dir={tmp_path}", "wandb.enable=true", "wandb.disable_artifact=true"])
    assert not [record for record in records(offline_runs(tmp_path)[0]) if record.HasField("artifact")]


@pytest.mark.slow
def test_the_printed_command_sends_all_parts_of_a_resumed_run(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = None
    with caplog.at_level("INFO"):
        for step in (1, 2, 3):
            with LoggerCollection(
                config("logging=wandb", "wandb.mode=offline"), RunDir(tmp_path), 0, run_id
            ) as metrics:
                metrics.log("train", {"loss": 0.5}, step)
            run_id = metrics.wandb_run_id
    wandb.teardown()
    said = next(message for message in caplog.messages if "wandb sync" in message)
    command = said.split("`")[1]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    sent = subprocess.run(command, shell=True, env={**os.environ, **path}, capture_output=True, text=True, check=False)
    assert sent.returncode == 0, sent.stderr
    assert run_id is not None
    assert [json.loads(row)["step"] for row in server.rows[run_id]] == [1, 2, 3]
