"""What a finished run reached on the published sets: one file a figure, ``benchmarks/results/NAME-SET-METRIC.json``.

    python benchmarks/results.py evaluate NAME RUN [--sets bsd68 set12] -- -c configs/recipes/denoise_gray.yaml [flags]
    python benchmarks/results.py evaluate NAME RUN --first RUN1 -- [arguments of RUN1] -- --init_from RUN1 [arguments]
    python benchmarks/results.py evaluate NAME RUN --before NAME1 -- --init_from FILE [arguments]
    python benchmarks/results.py readme

The first form evaluates the best checkpoint of a run folder, in float32, on the sets of ``benchmarks/report_sets.yaml``
that are for its tasks, by the tasks' own protocols. Behind ``--`` stand the arguments of the ``densectx fit`` that made
the run: they are refused where they do not give the run's own config. What the trivial answers reach on the same images
is written as well, as ``trivial-ANSWER-SET-METRIC``. Steps, seconds and curve of a run that took its weights from a run
folder are those of both (``--first``); where it took them from a model of the zoo, those of that model's results, which
must not have been replaced yet, are added (``--before``); of the earlier curve the points up to the step that was
taken. The last form writes ``benchmarks/README.md`` from the files, and what README.md quotes of it.

``wall_s`` is from the start of a fit to the last thing that it logged, summed over its starts where it was resumed;
``steps`` those of the checkpoint; ``macs_per_pixel`` of the task's input image; ``commit`` that of the evaluation,
unless ``--commit`` gives that of the training; ``machine`` what the run recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from record import RESULTS
from record import commit as this_commit
from result_table import write_readme, write_summary
from torch.utils.flop_counter import FlopCounterMode

from densectx.arguments import split_arguments
from densectx.checkpoint import from_header, load_weights, locate, read
from densectx.config import compose, load_yaml
from densectx.data.module import DataModule
from densectx.model import DenseModel
from densectx.report.history import Series, read_history
from densectx.report.measure import measure

KEYS = (
    *("name", "task", "data", "metric", "value", "per_class", "config", "command", "seed", "steps", "commit"),
    *("machine", "wall_s", "parameters", "macs_per_pixel", "curve"),
)
SETS = Path(__file__).parent / "report_sets.yaml"
TRIVIAL = ("noisy", "bicubic", "gray", "mean", "majority", "truth")
LEVELS = (15.0, 25.0, 50.0)  # of noise, where the model takes a range
SIDE = 64  # of the image that multiply-adds are counted on, a multiple of every stride


class Figure(NamedTuple):
    """A number of a model, or of a trivial answer, on a set."""

    suffix: str  # SET[-VARIANT]-METRIC
    key: str  # of the task in the model
    task: str
    data: str
    metric: str
    value: float
    per_class: dict[str, float]
    macs_per_pixel: int
    parameters: int
    trivial: str  # name of the answer, empty for the model's


def main() -> int:
    """Command line."""
    own, *fits = _parts(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("evaluate", help="evaluate a run", allow_abbrev=False)
    evaluate.add_argument("name", help="what the results are called: of the zoo, or of the recipe")
    evaluate.add_argument("run", type=Path, help="a run folder")
    evaluate.add_argument("--first", type=Path, help="the run folder that it took its weights from")
    evaluate.add_argument("--before", help="what the results are called of the model that it took its weights from")
    evaluate.add_argument("--sets", nargs="+", help="only these of report_sets.yaml")
    evaluate.add_argument("--commit", help="of the training, if it is not the one of the checkout")
    evaluate.add_argument("--wall_s", type=float, help="seconds of training, where the run's log does not tell")
    commands.add_parser("readme", help="write benchmarks/README.md, and README.md's table, from the result files")
    given = parser.parse_args(own)
    if given.command == "readme":
        write_readme()
        write_summary()
        return 0
    if given.first and given.before:
        parser.error("--first and --before exclude each other")
    if len(fits) != 1 + (given.first is not None):
        parser.error(
            "behind -- stand the arguments of the run's fit; with --first those of both, the first one's first"
        )
    first = None if given.first is None else Trained(given.first, fits[0])
    for path in record(given.name, given.run, fits[-1], given.sets, given.commit, given.wall_s, first, given.before):
        print(path)  # noqa: T201
    return 0


def _parts(arguments: list[str]) -> list[list[str]]:
    """What stands before, between and behind ``--``."""
    parts: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            parts.append([])
        else:
            parts[-1].append(argument)
    return parts


class Trained(NamedTuple):
    """A run folder, and the arguments of the fit that made it."""

    run: Path
    fit: list[str]

    def command(self) -> str:
        """Of a shell."""
        return "densectx fit " + shlex.join(self.fit)


def record(
    name: str,
    run: Path,
    fit: list[str],
    sets: list[str] | None,
    commit: str | None,
    wall: float | None,
    first: Trained | None = None,
    before: str | None = None,
) -> list[Path]:
    """Evaluate a run and write its files."""
    file, last = locate(run), Trained(run, fit)
    begun = _step(locate(first.run)) if first else 0
    earlier = _results(before) if before else {}
    runs = [first, last] if first else [last]
    for one in runs:
        _check_same(one.fit, load_yaml(one.run / "config.yaml"))
    config = load_yaml(run / "config.yaml")
    command, both, seconds = last.command(), f"-- {shlex.join(fit)}", wall
    if first:
        source = config.get("init_from")
        if source is None or Path(source).resolve() != first.run.resolve():
            raise SystemExit(f"{run} did not take its weights from {first.run}: init_from is {source}.")
        command = f"{first.command()} && {command.replace(source, 'RUN')}"
        config["init_from"] = "RUN"
        both = f"--first RUN1 -- {shlex.join(first.fit)} -- {shlex.join(fit).replace(source, 'RUN1')}"
    if seconds is None:
        seconds = sum(wall_seconds(one.run) for one in runs)
    common: dict[str, Any] = {
        "seed": config.get("seed_everything", 0),
        "commit": commit or this_commit(),
        "machine": _machine(run, first),
    }
    trained: dict[str, Any] = {
        "config": portable(config),
        "command": command,
        "steps": begun + _step(file),
        "wall_s": round(seconds),
    }
    if before:
        if not config.get("init_from"):
            raise SystemExit(f"{run} took no weights: init_from is not set, and --before {before} asks for it.")
        past = next(iter(earlier.values()))
        begun, trained["steps"] = past["steps"], past["steps"] + trained["steps"]
        trained["wall_s"] += past["wall_s"]
        about = {key: past[key] for key in ("command", "commit", "steps", "wall_s", "machine")}
        common["machine"] = {**common["machine"], "first": about}
        both = f"--before {before} {both}"
    again = f"python benchmarks/results.py evaluate {name} RUN {both}"
    logs = [(0, begun, read_history(first.run / "metrics.csv").series)] if first else []
    logs.append((begun, math.inf, read_history(run / "metrics.csv").series))
    written = []
    RESULTS.mkdir(exist_ok=True)
    for figure in figures(file, sets):
        column = f"val/{figure.key}/{figure.metric}"
        curve = [[start + n, v] for start, most, log in logs for n, v in _points(log.get(column)) if n <= most]
        older = earlier.get(figure.suffix, {}).get("curve", [])
        curve = [*([n, v] for n, v in older if n <= begun), *curve]
        own: dict[str, Any] = {**trained, "curve": curve}
        if figure.trivial:
            own = {"config": {}, "command": again, "seed": 0, "steps": 0, "wall_s": 0, "curve": []}
        stem = f"trivial-{figure.trivial}-{figure.suffix}" if figure.trivial else f"{name}-{figure.suffix}"
        found = {**figure._asdict(), **common, **own, "name": stem}
        path = RESULTS / f"{stem}.json"
        path.write_text(json.dumps({key: found[key] for key in KEYS}, indent=1) + "\n", encoding="utf-8")
        written.append(path)
    return written


def _results(name: str) -> dict[str, dict[str, Any]]:
    """The results of a model by what follows its name: SET[-VARIANT]-METRIC."""
    sets = tuple(f"{one}-" for one in report_sets())
    files = {path.stem.removeprefix(f"{name}-"): path for path in sorted(RESULTS.glob(f"{name}-*.json"))}
    texts = {suffix: path.read_text(encoding="utf-8") for suffix, path in files.items() if suffix.startswith(sets)}
    found = {suffix: json.loads(text) for suffix, text in texts.items()}
    if not found:
        raise SystemExit(f"{RESULTS} has no results of {name}.")
    return found


def figures(file: str | Path, names: list[str] | None = None) -> Iterator[Figure]:
    """Evaluate a model file on every set that is for one of its tasks.

    Args:
        file: a checkpoint or safetensors file.
        names: of the sets, null for all.
    """
    sets = report_sets()
    if unknown := set(names or ()) - sets.keys():
        raise SystemExit(f"no set called {', '.join(sorted(unknown))}; known: {', '.join(sets)}.")
    weights, info = read(file)
    for key, spec in info["model"]["tasks"].items():
        for name, one in sets.items():
            if spec is None or one["task"] != spec["name"] or (names and name not in names):
                continue
            for variant, words, options in _variants(spec):
                model = _model(info, weights, str(file), key, options)
                if model.channels(key) == one.get("channels", model.channels(key)):
                    suffix = "-".join(part for part in (name, variant) if part)
                    told = ", ".join(part for part in (one["data"], words) if part)
                    yield from _measured(model, key, one, suffix, told)


def report_sets() -> dict[str, Any]:
    """The content of report_sets.yaml, where the data lie put in."""
    return OmegaConf.to_container(OmegaConf.load(SETS), resolve=True)  # type: ignore[return-value]  # a mapping


def _variants(spec: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """How a task is evaluated: what that is called in names and in words, and the options of the task."""
    if spec["name"] == "denoising":
        sigma = spec.get("sigma", 25.0)
        levels = [s for s in LEVELS if sigma[0] <= s <= sigma[1]] if isinstance(sigma, list) else [float(sigma)]
        return [(f"sigma{level:g}", f"sigma {level:g}", {"test_sigma": level}) for level in levels]
    if spec["name"] == "super_resolution":
        return [(f"x{spec.get('scale', 2)}", f"x{spec.get('scale', 2)}", {})]
    return [("", "", {})]


def _model(
    info: Mapping[str, Any], weights: dict[str, torch.Tensor], file: str, key: str, options: Mapping[str, Any]
) -> DenseModel:
    """The model with one task left, and options of it changed."""
    config = {**info["model"], "tasks": dict(info["model"]["tasks"])}
    config["tasks"][key] = {**config["tasks"][key], **options}
    model = from_header({**info, "model": config}, file, weights)
    load_weights(model, weights, file)
    return model.to(memory_format=torch.channels_last).eval()


def _measured(model: DenseModel, key: str, one: Mapping[str, Any], suffix: str, told: str) -> Iterator[Figure]:
    task, parameters = model.task(key), sum(parameter.numel() for parameter in model.parameters())
    for other in [other for other in model.tasks if other != key]:
        del model.tasks[other]
    macs = macs_per_pixel(model, key)
    data = DataModule({task.source: one["source"]}, num_workers=0)
    values = measure(model, data, "test", seed=0)[key].values
    classes = {name.removeprefix("iou_"): v for name, v in values.items() if name.startswith("iou_")}
    classes = {name: v for name, v in classes.items() if not math.isnan(v)}  # in neither truth nor prediction
    for metric in one["metrics"]:
        per_class = classes if metric == "miou" else {}
        value = values[metric]
        found = Figure(f"{suffix}-{metric}", key, one["task"], told, metric, value, per_class, macs, parameters, "")
        yield found
        for name, value in values.items():
            answer = name.removeprefix(f"{metric}_")
            if answer in TRIVIAL and name != answer:
                yield found._replace(value=value, per_class={}, macs_per_pixel=0, parameters=0, trivial=answer)


def macs_per_pixel(model: DenseModel, key: str) -> int:
    """Multiply-adds of convolutions and matrix products that an answer takes for a pixel of the task's input image."""
    task = model.task(key)
    x = task.inputs(torch.rand(1, model.channels(key), SIDE, SIDE), dict.fromkeys(task.options, 0.0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task.postprocess(model({key: x})[key], x)
    return round(counter.get_total_flops() / 2 / SIDE**2)


def _check_same(fit: list[str], config: Mapping[str, Any]) -> None:
    """Refuse a command that does not give the config of the run."""
    given = split_arguments(fit, {"--name": "value", "--no-report": "nothing"})
    wanted, found = _flat(compose(given.files, given.flags).values), _flat(config)
    for own in (
        "trainer.default_root_dir",
        *(["trainer.precision"] if wanted.get("trainer.precision") == "auto" else []),
    ):
        wanted.pop(own, None)
        found.pop(own, None)
    if differ := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
        raise SystemExit(f"densectx fit {shlex.join(fit)} is not what made this run; different: {', '.join(differ)}.")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}" if path else str(key)).items()}


def portable(value: Any) -> Any:
    """A config without folders of this machine."""
    root = os.environ.get("DENSECTX_DATA")
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items() if key != "default_root_dir"}
    if isinstance(value, list):
        return [portable(item) for item in value]
    inside = root and isinstance(value, str) and value.startswith(root)
    return "${oc.env:DENSECTX_DATA,data}" + value[len(str(root)) :] if inside else value


def _points(column: Series | None) -> list[tuple[int, float]]:
    """A learning curve: (steps, value)."""
    return [] if column is None else list(zip(column.steps, column.values, strict=True))


def _step(file: Path) -> int:
    """Of a checkpoint."""
    return int(file.resolve().stem.rpartition("-")[2])


def _machine(run: Path, first: Trained | None) -> dict[str, Any]:
    found = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    kept = {key: found[key] for key in ("device", "system", "python", "processes", "threads")}
    kept["torch"] = found["packages"]["torch"]
    if first is None:
        return kept
    before = _machine(first.run, None)
    return {**kept, "device": f"{before['device']}, then {kept['device']}", "first": before}


def wall_seconds(run: Path) -> float:
    """Seconds that the fits of a run took, from what TensorBoard was given when; validations are included.

    A run folder that was copied without TensorBoard's files, which hold pictures, tells it by the times of its others.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    spans = []
    for file in run.glob("events.out.tfevents.*"):
        times = [event.wall_time for event in EventFileLoader(str(file)).Load()]
        spans += [(min(times), max(times))] if times else []
    if not spans:
        seconds = (run / "metrics.csv").stat().st_mtime - (run / "environment.json").stat().st_mtime
        if seconds <= 0:
            raise SystemExit(f"{run}: does not tell when it was trained; give the seconds by --wall_s.")
        return seconds
    *earlier, last = sorted(spans)
    begin = min(last[0], (run / "environment.json").stat().st_mtime)  # written when a fit starts, before its first log
    begin = begin if not earlier or begin >= earlier[-1][1] else last[0]
    return last[1] - begin + sum(end - start for start, end in earlier)


if __name__ == "__main__":
    sys.exit(main())
