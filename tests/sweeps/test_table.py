"""The table of a sweep: equal errors once, mean and range over seeds, the same as a CSV file."""

import csv
import io
from pathlib import Path

import pytest

import pusht_act
from pusht_act.sweeps.state import Job, write_job, write_json
from pusht_act.sweeps.table import format_csv, format_jobs, format_seeds

SCORES = {(50, 1): 40.0, (50, 2): 44.0, (50, 3): 51.0, (100, 1): 30.0}


def finished() -> list[Job]:
    return [
        Job(
            number, ["mode=test", f"policy.chunk_size={chunk}", f"seed={seed}"], "done", 1, step=7, objective=score,
            n_episodes=50, low=score - 9, high=score + 9, seconds=1.25, output_dir=f"sweep/{number}",
        )
        for number, ((chunk, seed), score) in enumerate(SCORES.items())
    ]  # fmt: skip


def test_a_score_has_its_episodes_and_its_interval() -> None:
    header, _, first, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in format_jobs(finished()))
    row = dict(zip(header, first, strict=True))
    assert (row["success"], row["n"], row["95 %"], row["overrides"]) == (
        "40.0 %", "50", "31.0 to 49.0", "policy.chunk_size=50 seed=1",
    )  # fmt: skip


def test_mean_and_range_over_seeds() -> None:
    assert format_seeds(finished()) == ["mean over 3 seeds: 45.0 % (from 40.0 % to 51.0 %), policy.chunk_size=50"]
    assert format_seeds(finished()[2:]) == [], "a seed each"
    assert format_seeds([Job(0, ["steps=1"], "done", 1, objective=3.0), Job(1, ["steps=2"], "done", 1)]) == []


def test_the_table_as_a_file() -> None:
    rows = list(csv.DictReader(io.StringIO(format_csv([*finished(), Job(4, ["mode=test", "seed=9"], error="a, b")]))))
    first, last = rows[1], rows[4]
    assert (first["pc_success"], first["n_episodes"], first["low"], first["high"]) == ("44.0", "50", "35.0", "53.0")
    over_seeds = [first[key] for key in ("n_seeds", "mean_over_seeds", "min_over_seeds", "max_over_seeds")]
    assert over_seeds == ["3", "45.0", "40.0", "51.0"]
    assert (first["policy.chunk_size"], first["seed"], first["output_dir"]) == ("50", "2", "sweep/1")
    assert (last["state"], last["pc_success"], last["n_seeds"], last["error"]) == ("waiting", "", "0", "a, b")


def test_what_several_jobs_failed_for_is_said_once() -> None:
    jobs = [Job(number, [f"seed={number}"], "failed", 1, error="x" if number else "y") for number in range(3)]
    assert format_jobs(jobs)[-2:] == ["job 0 failed: y", "job 1, job 2 failed: x"]


def test_a_folder_of_sweeps_is_listed(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, day in enumerate(("2026-01-01/10-00-00", "2026-01-02/09-00-00", "2026-01-02/10-00-00")):
        folder = in_tmp / "multirun" / day
        write_json(folder / "sweep.json", {"overrides": ["seed=1,2"], "jobs": [["seed=1"], ["seed=2"]]})
        write_job(folder, Job(0, ["seed=1"], "done", 1, objective=10.0 * number))
    (in_tmp / "multirun" / "2026-01-02" / "09-00-00" / "sweep.json").write_text("{")
    pusht_act.run(["mode=status", "dir=multirun"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[2] == ["multirun/2026-01-01/10-00-00", "2", "1 done, 1 waiting", "0.0 %", "seed=1,2"]
    assert rows[3][:3] == ["multirun/2026-01-02/09-00-00", "", "damaged"]
    assert rows[4][3] == "20.0 %"
    pusht_act.run(["mode=status", "dir=multirun/2026-01-02"])
    assert len(capsys.readouterr().out.splitlines()) == 4
