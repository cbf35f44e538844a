"""The private names of PyTorch that the package uses, and what other versions of it get to read."""

import importlib

import pytest

from pusht_act.policy import torch_internals
from pusht_act.runtime import versions


def test_the_private_name_is_there() -> None:
    assert torch_internals.cpu_has_bf16() in (True, False)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(versions, "version", lambda _name: "3.0.0")
        with pytest.raises(ValueError, match=r"^torch 3.0.0 is installed, .* private names of torch 2.11: install"):
            importlib.reload(torch_internals)
    importlib.reload(torch_internals)
