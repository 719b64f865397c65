"""The files in which a run keeps its key and its account, and where the ledgers are."""

import os
from pathlib import Path

from privimage.config import Config
from privimage.errors import UserError
from privimage.privacy.ledger import Head
from privimage.storage.files import read_json
from privimage.storage.rundir import RunDir

VERSION = 4  # of account.json


def ledger_folder(config: Config) -> Path:
    """Where the ledgers are kept.

    By default one folder for all runs of a user (XDG base directories).
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return (config.privacy.ledger or state / "privimage" / "ledgers").absolute()


def key_path(run: RunDir) -> Path:
    """Where the secret key of a run is kept until it is finished."""
    return run.private / "root.key"


def account_path(run: RunDir) -> Path:
    """Where the plan of a run is kept, its name in the ledger, and what it knows of that."""
    return run.path / "private" / "account.json"


def read_account(path: Path) -> dict:
    """What account.json holds.

    Raises UserError for one of another version.
    """
    record = read_json(path)
    if record.get("version") != VERSION:
        raise UserError(
            f"{path}: made by another version of privimage, whose plan and charges this one does not read; "
            "choose another run.dir"
        )
    return record


def known_head(record: dict) -> Head:
    """The state of the ledger that account.json has recorded."""
    head = record["ledger"]
    return Head(head["ledger"], head["entries"], head["size"], head["digest"])
