"""``densectx doctor``: the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from densectx.doctor.cluster import cluster
from densectx.doctor.findings import Finding, lines, worst
from densectx.doctor.group import findings, joined, local, place
from densectx.doctor.machine import machine
from densectx.errors import ConfigError, DistributedError
from densectx.parsing import Parser


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0; 5 for packages, 7 for processes that do not find each other, 8 for a folder that cannot be written.

    Raises:
        ConfigError: wrong usage.
    """
    parser = Parser(
        "doctor",
        description="Whether this machine can train: packages, devices, cores, memory, disks, variables of launchers.",
        epilog="Started by torchrun or srun, --ddp tests the process group of that very job: "
        "torchrun --nnodes 2 ... -m densectx doctor --ddp",
    )
    parser.add_argument("--ddp", action="store_true", help="also meet the other ranks (alone: two processes here)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for ranks (60)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), metavar="DIR", help="where runs are written (runs)"
    )
    parser.add_argument("--json", action="store_true", help='print one object with "format": 1')
    given = parser.parse_args(argv)
    if not given.timeout > 0:
        raise ConfigError(f"doctor: --timeout {given.timeout:g}: expected seconds above 0.")
    found = [*machine(given.folder), *cluster()]
    here = place() if given.ddp and not worst(found) else None
    if given.ddp and not worst(found):
        try:
            found += findings(local(given.timeout) if here is None else joined(here, given.timeout))
        except DistributedError as error:
            fix = "densectx doctor without --ddp, on every machine, shows addresses and interfaces"
            found.append(Finding("process group", str(error), "problem", fix, error.status))
    status = worst(found)
    if here is not None and here.rank > 0:  # one answer for the job; a rank that fails says so itself
        found = [finding for finding in found if finding.level == "problem"]
    if found:
        answer = {"format": 1, "status": status, "findings": [finding.to_json() for finding in found]}
        sys.stdout.write((json.dumps(answer) if given.json else "\n".join(lines(found))) + "\n")
    return status
