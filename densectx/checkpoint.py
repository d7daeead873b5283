"""Checkpoints that rebuild the model alone: our config beside the weights, in plain JSON types."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from densectx import __version__
from densectx.archive import check_header, damage, load_archive
from densectx.budget import Budget
from densectx.checkpoint_files import newest_first, newest_run, temporary_of
from densectx.distributions import how_to_install
from densectx.errors import CheckpointError, ConfigError, PluginError, StorageError, brief
from densectx.model import DenseModel, without_weights
from densectx.model_names import is_model_name, provided, where_to_get
from densectx.nn.norm import renamed, spread
from densectx.registry import BACKBONES, CONTEXTS, HEADS, LOSSES, MODELS, TASKS, Registry
from densectx.types import SourceInfo
from densectx.weights import load_weights as load_weights
from densectx.weights import parts_of

FORMAT = 1


def header(model: DenseModel, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint says of itself: ``{format, version, model, plugins, config}``."""
    return {
        "format": FORMAT,
        "version": __version__,
        "model": model.config,
        "plugins": plugins(model.config),
        "config": dict(config or {}),
    }


def plugins(config: Mapping[str, Any]) -> dict[str, str]:
    """{distribution: version} of the extension packages that a model config names."""
    found = {}
    for registry, spec in _parts(config):
        name = spec if isinstance(spec, str) else str(spec.get("name"))
        entry = None if ":" in name else registry.entry(name)
        if entry is not None and entry.entry_point is not None:
            found[entry.distribution] = entry.version
    return found


def load(path: str | Path) -> DenseModel:
    """A trained model, in evaluation mode, on the CPU.

    Args:
        path: a checkpoint (``.ckpt``), a ``.safetensors`` file, a run folder (its ``best.ckpt``, else
            ``last.ckpt``), or the name of a model that a package provides.

    Raises:
        CheckpointError: missing, unreadable, foreign, of a newer format, or with weights that do not fit.
        PluginError: a package that the model needs is not installed.
    """
    weights, info = read(path)
    model = from_header(info, path, weights)
    load_weights(model, weights, str(path))
    return model.eval()


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of the model and the header of a checkpoint; see :func:`load`."""
    file = locate(path)
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe or device may never end
        raise CheckpointError(f"{file}: is not a regular file.")
    try:
        weights, info = _safetensors(file) if file.suffix == ".safetensors" else _archive(file)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: cannot be read as a checkpoint: {error}{_whole_beside(file)}") from error
    if not isinstance(info, dict) or "format" not in info:
        raise CheckpointError(f"{file}: no checkpoint of densectx (it does not say what model its weights belong to).")
    if not isinstance(info["format"], int) or info["format"] > FORMAT:
        raise CheckpointError(
            f"{file}: format {info['format']}, written by densectx {info.get('version')}; this is densectx"
            f" {__version__}, which reads formats up to {FORMAT}: update densectx."
        )
    return weights, info


def _archive(file: Path) -> tuple[dict[str, Tensor], Any]:
    content = load_archive(file)
    info = content.get("densectx") if isinstance(content, dict) else None
    state = content.get("state_dict", {}) if isinstance(content, dict) else {}
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}, info


def _safetensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    from safetensors import safe_open

    try:
        check_header(file)
        with safe_open(file, "pt") as opened:
            info = json.loads((opened.metadata() or {}).get("densectx", "null"))
            return {key: opened.get_tensor(key) for key in opened.keys()}, info  # noqa: SIM118 - not a mapping
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises many kinds for a damaged file
        raise CheckpointError(str(error).partition("\n")[0] or type(error).__name__) from error


def _whole_beside(file: Path) -> str:
    """The end of a refusal: the newest whole checkpoint of the same run, if there is one."""
    others = (other for other in newest_first(file.parent) if other != file.resolve() and not damage(other))
    found = next(others, None) if file.suffix == ".ckpt" else None
    return f" The newest whole one of this run is {found}." if found else ""


def locate(path: str | Path) -> Path:
    """The file of a checkpoint, a run folder or a model name.

    Raises:
        CheckpointError: there is none.
        PluginError: several packages provide the name, or the one that does cannot be used.
    """
    path = Path(path)
    if os.path.isdir(path):
        for name in ("best.ckpt", "last.ckpt"):
            for file in (path / "checkpoints" / name, path / name):
                if os.path.exists(file):
                    return file
        for folder in (path / "checkpoints", path):  # a kill came between the first file and its link
            if files := newest_first(folder):
                return files[0]
        if not is_model_name(str(path)):  # answers may lie in a folder of the model's name
            run = newest_run(path.parent, path.name)
            fix = f"; its newest run is {run}" if run else ""
            raise CheckpointError(f"{path}: a folder without checkpoints/best.ckpt or last.ckpt{fix}.")
    elif os.path.exists(path):
        return path
    if is_model_name(str(path)):
        found = provided(str(path))
        if isinstance(found, Path):
            return found
        raise CheckpointError(
            f"model {str(path)!r} comes without weights: it is a config to train, or to fill with published ones by"
            f" `densectx convert caffe|drn|vgg FILE --net {path} -o OUT.safetensors`."
        )
    known = f" Known model names: {', '.join(MODELS.names())}." if MODELS.names() else ""
    raise CheckpointError(f"{path}: no such file, run folder or model name.{where_to_get(str(path))}{known}")


def from_header(info: Mapping[str, Any], path: str | Path, weights: Mapping[str, Tensor] | None = None) -> DenseModel:
    """Build the model that a header describes, with fresh weights; the ones of the file, if given, bound its size.

    Raises:
        CheckpointError: it cannot be built, or is far larger than the weights.
        PluginError: a package that it needs is not installed.
    """
    try:
        _check_plugins(info.get("plugins") or {}, path)
        config = dict(info["model"])
        sources = {key: SourceInfo.from_config(value) for key, value in config.pop("sources", {}).items()}
        with nullcontext() if weights is None else Budget(weights.values()):
            return DenseModel.from_config(without_weights(config), sources)  # its own follow
    except PluginError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: its model cannot be built by densectx {__version__}: {error}") from error
    except Exception as error:  # what is written in a damaged header may be anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{path}: its header describes no model ({reason}).") from error


def _check_plugins(needed: Mapping[str, str], path: str | Path) -> None:
    for distribution, release in needed.items():
        try:
            version(distribution)
        except PackageNotFoundError:
            raise PluginError(
                f"{path}: the model needs {distribution} {release}, which is not installed:"
                f" {how_to_install(distribution)}."
                " Its weights can be had without it: densectx.checkpoint.to_safetensors."
            ) from None


def init_from(model: DenseModel, path: str | Path) -> str:
    """Take the weights that match by name and shape, leave the rest; returns what matched, for the log.

    Norm layers of another kind (``model.norm``) take what they have in common with the file's, see
    :func:`densectx.nn.norm.renamed`; those per kind of input that it does not have take those that it has, see
    :func:`densectx.nn.norm.spread`.

    Raises:
        CheckpointError: unreadable file, or nothing matches.
    """
    weights, _ = read(path)
    weights, own = spread(model, renamed(model, weights)), model.state_dict()
    taken = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if not taken:
        raise CheckpointError(f"init_from {path}: none of its {len(weights)} tensors matches this model.")
    model.load_state_dict(taken, strict=False)
    fresh, left = [k for k in own if k not in taken], [k for k in weights if k not in taken]
    said = f"init_from {path}: {len(taken)} of {len(own)} tensors taken"
    said += f"; fresh: {', '.join(parts_of(fresh))}" if fresh else ""
    return said + (f"; not used: {', '.join(parts_of(left))}" if left else "")


def save_safetensors(model: DenseModel, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
    """Weights and header as one safetensors file that :func:`load` reads.

    Raises:
        StorageError: the file system refuses; what the file was before is kept.
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    _save(weights, header(model, config), Path(path))


def to_safetensors(path: str | Path, out: str | Path) -> None:
    """Weights and header of a checkpoint as one safetensors file; builds nothing, so no package that it needs is asked.

    Args:
        path: as for :func:`load`.
        out: the file to write; :func:`load` reads it where the packages are installed.

    Raises:
        CheckpointError: as :func:`load`.
        StorageError: as :func:`save_safetensors`.
    """
    weights, info = read(path)
    _save({key: value.contiguous() for key, value in weights.items()}, info, Path(out))


def _save(weights: Mapping[str, Tensor], info: Mapping[str, Any], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = temporary_of(path)
    try:
        part.touch()
        mode = part.stat().st_mode  # the library writes files that only their owner may read
        save_file(dict(weights), part, metadata={"densectx": json.dumps(info)})
        part.chmod(mode)
        part.replace(path)
    except (OSError, SafetensorError) as error:  # of a full disk it raises the latter
        raise StorageError(f"{path}: cannot be written: {brief(error)}; free space or choose another file.") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[Registry[Any], Any]]:
    yield BACKBONES, config["backbone"]
    yield CONTEXTS, config.get("context") or "basic"
    for spec in config["tasks"].values():
        if spec is None:
            continue
        yield TASKS, spec
        if isinstance(spec, Mapping):
            if spec.get("head"):
                yield HEADS, spec["head"]
            losses = spec.get("loss") or []
            for loss in [losses] if isinstance(losses, str | Mapping) else losses:
                yield LOSSES, loss
