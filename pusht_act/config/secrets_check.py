"""Tokens stay out of what is written: a job whose command or configuration holds one is refused before anything is.

What is written in many places (config.yaml, runs.jsonl, checkpoints, cards, W&B, a sweep's multirun.yaml) is checked in
one, and a configuration that is read again is the one that was composed.
"""

import os
import re
from typing import Any

from pusht_act.runtime.errors import UserError

SECRET_NAMES = re.compile(r"(TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$")
"""Of environment variables whose value is a secret."""
SHORTEST = 12
"""Characters of such a value; a shorter one, such as "false", may be part of any text."""
SECRETS = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|wandb_v1_\w{20,})"  # the Hub's, W&B's
    r"|(?i:token|key|secret|password)\w*['\"]?\s*[=:]\s*['\"]?[0-9a-fA-F]{40}(?![0-9a-fA-F])"  # W&B's of old
)


def refuse_tokens(key: str, value: Any) -> None:
    """Refuse a `value`, of plain types and any depth, that holds a token; `key` says where it stands.

    Raises:
        UserError: naming the key, without the value.
    """
    # A key may hold a token, too: somebody pastes it before the equals sign.
    if isinstance(value, dict):
        for name, inner in value.items():
            refuse_tokens(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            refuse_tokens(key, inner)
    elif found := _token(f"{key}={value}"):
        where = "the command line" if _token(key) else key
        raise UserError(
            f"{where} holds {found}, which would be written into files of the run: take it out; tokens are read from "
            "the environment (HF_TOKEN, WANDB_API_KEY) or a login (`hf auth login`, `wandb login`)"
        )


def _token(text: str) -> str | None:
    """Return what kind of token is in `text`."""
    # The user's own secrets first: they are certain, where a pattern can only guess.
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_NAMES.search(name) and value in text:
            return f"the value of {name}"
    return "what looks like a token" if SECRETS.search(text) else None
