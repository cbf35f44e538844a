"""Arguments before Hydra reads them: texts that look like numbers stay what was typed."""

import pytest

import pusht_act
from pusht_act.config.arguments import check_arguments, quote_texts


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ("job_name=2025_01_03", "job_name='2025_01_03'"),
        ("output_dir=1e3", "output_dir='1e3'"),
        ("++output_dir=1_0", "++output_dir='1_0'"),
        ("wandb.notes=true", "wandb.notes='true'"),
        ("wandb.project=NaN", "wandb.project='NaN'"),
        ("wandb.entity=-inf", "wandb.entity='-inf'"),
        ("dataset.root=1.50", "dataset.root='1.50'"),
        ("dataset.revision=2.0", "dataset.revision='2.0'"),
        ("policy.repo_id=1e3", "policy.repo_id='1e3'"),
        ("+policy.pretrained_path=007", "+policy.pretrained_path='007'"),
        ("hydra.sweep.dir=2025_01_03", "hydra.sweep.dir='2025_01_03'"),
        ("job_name=2025_01_03,a,1e3", "job_name='2025_01_03',a,'1e3'"),
    ],
)
def test_a_text_that_hydra_would_read_as_a_number_is_quoted(given: str, quoted: str) -> None:
    assert quote_texts([given]) == [quoted]


@pytest.mark.parametrize(
    "given",
    [
        *("job_name=8", "job_name=a1e3", "job_name='1e3'", 'job_name="1e3"', "wandb.notes=null", "job_name=", "-m"),
        *("steps=1_000", "policy.optimizer_lr=1e-4", "wandb.notes='1e3,2'", "job_name=choice(1e3,2)", "--cfg", "~seed"),
    ],
)
def test_nothing_else_is_changed(given: str) -> None:
    assert quote_texts([given]) == [given]


def test_the_run_has_the_name_that_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    pusht_act.run(["job_name=2025_01_03", "output_dir=1e3", "print_lerobot_command=true"])
    printed = capsys.readouterr().out
    assert "2025_01_03" in printed
    assert "--output_dir=1e3 " in printed


def test_a_command_needs_no_arguments() -> None:
    check_arguments([])
