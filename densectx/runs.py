"""Run folders: ``runs/<config>/<version>/``, one a start, the same for every rank."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from densectx.errors import StorageError

_SHARED = "DENSECTX_RUN"  # Lightning's launcher starts the other ranks with this process's environment


def run_folder(root: Path, name: str) -> Path:
    """A new folder ``root/name/N``, N counting up; made by the first rank, read from the environment by the others.

    Raises:
        StorageError: the folder cannot be made.
    """
    if not first_rank():  # started by torchrun or srun it is not told the name, but only the first rank writes
        return Path(os.environ.get(_SHARED, root / name / "of-the-first-rank"))
    try:
        (root / name).mkdir(parents=True, exist_ok=True)
        for version in count():
            folder = root / name / str(version)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            os.environ[_SHARED] = str(folder.absolute())
            return folder
    except OSError as error:
        raise StorageError(
            f"run folder {root / name}: cannot be made: {error}; set trainer.default_root_dir."
        ) from error
    raise AssertionError("unreachable")


def first_rank() -> bool:
    """Whether this process is the first of its job, as the launchers say (torchrun, srun, Lightning's own)."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))
