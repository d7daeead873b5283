"""The output folder of ``densectx shard``: a new one, one to go on with, one that is finished, or somebody else's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from densectx.data.base import Dataset, FromFiles
from densectx.data.shards_index import INDEX, Index, SplitFiles
from densectx.data.shards_write import part_of, replace, write_split
from densectx.errors import ConfigError, DataError

FORMAT: Final = 1
SUMMARY: Final = "shards.json"
_JOURNAL: Final = ".shards.json"  # there while an output is not finished
_OURS: Final = re.compile(r"(train|val|test)(-\d{6,}\.tar|\.npz)|index\.json|\..*\.(part|new)")


def is_there(out: Path, inputs: str, sources: Mapping[str, Mapping[str, Dataset]], *, overwrite: bool) -> bool:
    """Whether the output is there already; refuses one of something else, prepares the folder for a new one.

    Only folders that a summary or journal of ours names are ever cleared, and none that the data are read from.

    Args:
        out: the folder.
        inputs: hash of what the output depends on.
        sources: the data sets of each source by split.
        overwrite: replace shards of something else.

    Raises:
        ConfigError: the folder has something else, and ``overwrite`` is not given or cannot help.
    """
    for name in (SUMMARY, _JOURNAL):
        try:
            text = (out / name).read_text(encoding="ascii")
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            text = ""
        try:
            found = json.loads(text)
            same = found["inputs"] == inputs
            ours = [folder for folder in found["sources"] if Path(folder).name == folder]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"-o {out}: its {name} is damaged; remove the folder, or choose another.") from None
        if same and not overwrite:
            whole = name == SUMMARY and _whole(out)
            for part in out.glob("*/.*.part") if whole else ():  # of a run that was stopped just before its end
                part.unlink()
            return whole
        if not overwrite:
            raise ConfigError(
                f"-o {out}: has shards of other data, another config or another --size ({name}); choose another"
                " folder, or --overwrite."
            )
        _clear(out, ours, sources)
        break
    else:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(
                f"-o {out}: exists and is no output of `densectx shard`, which is all that --overwrite replaces; choose"
                " another."
            )
    journal = {"format": FORMAT, "inputs": inputs, "sources": list(sources)}
    replace(out / _JOURNAL, json.dumps(journal).encode("ascii"))
    return False


def _whole(out: Path) -> bool:
    """Whether the files of a finished output are all there, of the right size."""
    sources = json.loads((out / SUMMARY).read_text(encoding="ascii"))["sources"]
    try:
        for name in sources:
            for files in Index.read(out / name / INDEX).splits.values():
                if not (out / name / files.table).is_file():
                    return False
                if any((out / name / shard.file).stat().st_size != shard.size for shard in files.shards):
                    return False
    except (DataError, OSError):
        return False
    return True


def _clear(out: Path, ours: Sequence[str], sources: Mapping[str, Mapping[str, Dataset]]) -> None:
    """Remove the summary first, then files of ours in our folders; other files stay."""
    folders = [out / name for name in ours if (out / name).is_dir() and not (out / name).is_symlink()]
    real = {folder.resolve() for folder in folders}
    for name, splits in sources.items():
        for dataset in splits.values():
            for file in dataset.all_files() if isinstance(dataset, FromFiles) else ():
                if not real.isdisjoint(Path(file).resolve().parents):
                    raise ConfigError(f"-o {out}: data.sources.{name} is read from there ({file}); choose another.")
    for name in (SUMMARY, _JOURNAL):
        (out / name).unlink(missing_ok=True)
    for folder in folders:
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and not path.is_dir():
                path.unlink()


def write_all(
    out: Path,
    sources: Mapping[str, Mapping[str, Dataset]],
    inputs: str,
    size: int,
    workers: int,
    progress: Callable[[str, int], Callable[[int], None]],
) -> dict[str, Any]:
    """All shards, then the tables and indices, then the summary; what is needed to go on is removed at the end."""
    summary: dict[str, Any] = {"format": FORMAT, "inputs": inputs, "size": size, "sources": {}}
    parts: list[Path] = []
    written: dict[Path, bytes] = {}
    for name, splits in sources.items():
        folder, files, counts = out / name, {}, {}
        for split, dataset in splits.items():
            shards, table, kept = write_split(
                folder, split, dataset, size, workers, progress(f"{name} {split}", len(dataset))
            )
            content = table.to_bytes()
            written[folder / f"{split}.npz"] = content
            files[split] = SplitFiles(f"{split}.npz", hashlib.sha256(content).hexdigest(), tuple(shards))
            parts += [part_of(folder / shard.file) for shard in shards]
            counts[split] = {
                "samples": len(dataset),
                "shards": len(shards),
                "bytes": sum(shard.size for shard in shards),
                "original_files": kept,
                "encoded": len(table.members) - kept,
            }
        written[folder / INDEX] = Index(next(iter(splits.values())).info, files).to_bytes()
        summary["sources"][name] = counts
    for path, content in written.items():
        replace(path, content)
    replace(out / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode("ascii"))
    for path in (*parts, out / _JOURNAL):
        path.unlink(missing_ok=True)
    return summary
