"""The console script: dispatch, exit statuses, ``list`` and ``show``."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import densectx
from densectx.cli import COMMANDS, main
from densectx.parsing import STATUSES
from densectx.registry import REGISTRIES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(capsys):
    def run(*argv):
        status = main(list(argv))
        return status, *capsys.readouterr()

    return run


def statuses(output):
    return {entry["name"]: entry for entry in json.loads(output)["entries"]}


def test_help_offers_what_exists(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert all(f"  {command} " in out for command in COMMANDS)
    assert run("--version") == (0, f"densectx {densectx.__version__}\n", "")


@pytest.mark.parametrize("command", ["list", "show"])
def test_help_of_commands(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"densectx {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "no command"),
        (["lst"], "did you mean 'list'?"),
        (["--verison"], "did you mean '--version'?"),
        (["list", "taks"], "did you mean 'tasks'?"),
        (["list", "--jso"], "--jso"),
        (["list", "tasks", "heads"], "heads"),
        (["show", "tasks"], "NAME"),
        (["show", "tasks", "denoisin"], "did you mean 'denoising'?"),
        (["show", "task", "--x"], "densectx show --help"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(run, argv, part):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("densectx: error: ")
    assert part in err
    assert err.count("\n") == 1


def test_debug_adds_the_traceback(run):
    for argv in (["--debug", "list", "taks"], ["list", "taks", "--debug"]):
        status, _, err = run(*argv)
        assert status == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("densectx: error: unknown kind 'taks'")
    assert run("list", "losses", "--debug")[0] == 0


def test_other_exits(run, distribute):
    distribute("plug-a", {"tasks": {"broken": "Task"}}, "raise ValueError('no luck')")
    status, _, err = run("show", "tasks", "broken")
    assert status == 5
    assert "plug-a 1.0" in err
    distribute("plug-b", {"tasks": {"stopped": "Task"}}, "raise KeyboardInterrupt")
    assert run("show", "tasks", "stopped")[0] == 130
    source = "class M(type):\n    __signature__ = property(lambda self: 1 / 0)\nclass Task(metaclass=M): ..."
    distribute("plug-c", {"tasks": {"bug": "Task"}}, source)
    status, _, err = run("show", "tasks", "bug")
    assert status == 1
    assert "ZeroDivisionError" in err


def test_a_memory_that_is_too_small_has_a_status_of_its_own(run, monkeypatch):
    def full(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("densectx.report.command.main", full)
    status, _, err = run("report", "runs/x/0")
    assert status == 9
    assert "out of memory" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_training_commands_are_dispatched(run, command):
    status, _, err = run(command, "--modle.backbone", "plain")
    assert status == 2
    assert "did you mean '--model'?" in err


def test_a_closed_pipe_is_quiet():
    command = [sys.executable, "-m", "densectx", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("list >&-", 0, ""),
        ("list 2>&-", 0, ""),
        ("lst 2>&-", 2, ""),
        ("lst 2>/dev/full", 2, ""),
        ("list >/dev/full", 8, "densectx: error: standard output cannot be written: No space left on device"),
    ],
)
def test_closed_and_full_streams(command, status, said):
    program = f"{sys.executable} -m densectx {command}"
    process = subprocess.run(program, shell=True, stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr.partition(";")[0]) == (status, said)


def test_a_closed_pipe_takes_nothing_from_the_work(tmp_path):
    """What is written into it is lost, the first time and later; the status is that of the work."""
    program = f"""
import sys
from pathlib import Path
from densectx import cli

def work(arguments):
    for _ in range(3):
        for stream in (sys.stdout, sys.stderr):
            print("x" * 100000, file=stream, flush=True)
    Path({str(tmp_path / "made")!r}).touch()
    return 3

cli._run = work
cli.run()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        process.stdout.close()
    assert process.returncode == 3
    assert (tmp_path / "made").exists()


def test_a_full_disk_is_no_bug(run, monkeypatch):
    def full(arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "a.html")

    monkeypatch.setattr("densectx.report.command.main", full)
    said = "densectx: error: a.html: No space left on device; free space or write elsewhere.\n"
    assert run("report", "runs/x/0") == (8, "", said)


def test_list_is_fast():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "densectx", "list"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor: how long it takes depends on what else the machine does
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_list_is_aligned_and_complete(run):
    status, out, _ = run("list")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].split() == ["KIND", "NAME", "DISTRIBUTION", "VERSION", "STATUS"]
    assert len(lines) - 1 == sum(len(registry.entries()) for registry in REGISTRIES.values())
    starts = {line[lines[0].index("DISTRIBUTION") - 2 :][:2] for line in lines}
    assert starts == {"  "}


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_kinds_in_plural_and_singular(run, registry):
    plural, singular = run("list", registry.kind, "--json"), run("list", registry.singular, "--json")
    assert plural == singular
    found = json.loads(plural[1])
    assert found["format"] == 1
    assert sorted({entry["name"] for entry in found["entries"]}) == registry.names()


def test_statuses_come_from_metadata(run, distribute):
    distribute("plug-fine", {"tasks": {"fine": "Task"}}, "raise ValueError", requires=["densectx>=0.1", "numpy"])
    distribute("plug-gone", {"tasks": {"gone": "Task"}}, None)
    distribute("plug-new", {"tasks": {"new": "Task"}}, requires=["DenseCtx[x] >= 99"])
    distribute("plug-extra", {"tasks": {"extra": "Task"}}, requires=['densectx>=99; extra == "x"', "==bad=="])
    distribute("plug-clash", {"tasks": {"denoising": "Task"}})
    status, out, _ = run("list", "tasks", "--json")
    assert status == 0
    found = statuses(out)
    expected = {
        "fine": "ok",
        "gone": "missing module",
        "new": "requirement not met",
        "extra": "ok",
        "denoising": "clash",
    }
    assert {name: found[name]["status"] for name in expected} == expected
    assert ">=99" in found["new"]["reason"]
    assert "plug_gone" in found["gone"]["reason"]
    clash = [e for e in json.loads(out)["entries"] if e["status"] == "clash"]
    assert [e["distribution"] for e in clash] == ["densectx", "plug-clash"]
    assert not {"plug_fine", "plug_new", "plug_extra", "plug_clash"} & set(sys.modules)
    assert "requirement not met: needs densectx>=99, this is" in run("list", "tasks")[1]


@pytest.mark.fault("P05")
@pytest.mark.parametrize("requirement", ["densectx>=99", "densectx<0", "densectx => 1"])
def test_what_is_made_for_another_version_is_listed_and_refused(run, distribute, requirement):
    distribute("plug-new", {"tasks": {"new": "Task"}}, "raise ValueError", requires=[requirement])
    status, out, _ = run("list", "tasks", "--json")
    assert status == 0
    assert statuses(out)["new"]["status"] == "requirement not met"
    assert statuses(run("list", "tasks", "--check", "--json")[1])["new"]["status"] == "requirement not met"
    status, out, err = run("show", "tasks", "new")
    assert (status, out) == (5, "")
    assert "plug-new 1.0" in err
    assert requirement in err
    assert run("show", "tasks", "denoising")[0] == 0


@pytest.mark.fault("P10")
def test_a_slow_import_is_only_waited_for_when_used(run, distribute, tmp_path):
    marker = tmp_path / "imported"
    source = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Task: ..."
    folder = distribute("plug-slow", {"tasks": {"slow": "Task"}}, source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    for arguments in (["--help"], ["list"], ["list", "tasks", "--json"], ["show", "contexts", "--help"]):
        command = [sys.executable, "-m", "densectx", *arguments]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        assert not marker.exists(), arguments
    assert "plug-slow" in run("list", "tasks")[1]
    assert not marker.exists()
    run("show", "tasks", "slow")
    assert marker.exists()


def test_a_check_runs_nothing_of_the_working_directory(run, distribute, tmp_path, monkeypatch):
    distribute("plug-a", {"tasks": {"edges": "Task"}})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "difflib.py").write_text("open('ran', 'w')")
    status, out, _ = run("list", "tasks", "--check", "--json")
    assert (status, statuses(out)["edges"]["status"]) == (0, "ok")
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault("P01")
def test_a_missing_dependency_of_one_plugin_harms_no_other(run, distribute):
    broken = {
        "plug-a": "raise ValueError('no')",
        "plug-b": "raise SystemExit(3)",
        "plug-c": "import not_there",
        "plug-d": "def f(:",
    }
    for name, source in broken.items():
        distribute(name, {"tasks": {name.replace("-", "_"): "Task"}}, source)
    distribute("plug-fine", {"tasks": {"fine": "Task"}})
    assert run("list")[0] == run("list", "tasks")[0] == 0
    for name in broken:
        status, out, err = run("show", "tasks", name.replace("-", "_"))
        assert (status, out, err.count("\n")) == (5, "", 1)
        assert f"{name} 1.0" in err
        assert "Traceback" not in err
        assert "Traceback" in run("--debug", "show", "tasks", name.replace("-", "_"))[2]
    assert run("show", "tasks", "fine")[0] == 0
    found = statuses(run("list", "tasks", "--check", "--json")[1])
    assert [found[name.replace("-", "_")]["status"] for name in broken] == ["broken"] * 4
    assert found["fine"]["status"] == found["denoising"]["status"] == "ok"


@pytest.mark.fault("P01")
def test_check_imports_external_entries(run, distribute):
    broken = {
        "raises": ("raise ValueError('no luck')", "no luck"),
        "exits": ("raise SystemExit(0)", "SystemExit"),
        "vanishes": ("import os\nos._exit(0)", "status 0"),
        "misspelt": ("def f(:", "SyntaxError"),
    }
    for name, (source, _) in broken.items():
        distribute(name, {"models": {name: "Task"}}, source)
    distribute("plug-a", {"models": {"works": "Task"}}, "print('noise')\nclass Task: ...")
    distribute("plug-b", {"models": {"works": "Task"}}, "class Task: ...")
    status, out, _ = run("list", "models", "--check", "--json")
    assert status == 0
    found = statuses(out)
    for name, (_, reason) in broken.items():
        assert found[name]["status"] == "broken"
        assert reason in found[name]["reason"]
    assert found["works"]["status"] == "clash"


def test_a_distribution_is_checked_in_one_process(run, distribute, monkeypatch):
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda *args, real=subprocess.run, **more: started.append(1) or real(*args, **more)
    )
    source = "class Task: ...\nclass Half:\n    __abstractmethods__ = ('loss',)"
    distribute("plug-a", {"tasks": {"works": "Task", "gone": "Other"}, "models": {"half": "Half"}}, source)
    found = statuses(run("list", "--check", "--json")[1])
    assert len(started) == 1
    assert [found[name]["status"] for name in ("works", "gone", "half")] == ["ok", "broken", "broken"]
    assert "AttributeError" in found["gone"]["reason"]
    distribute("plug-b", {"models": {"fine": "plug_a:Task", "dies": "Task"}}, "import os\nos._exit(3)")
    found = statuses(run("list", "models", "--check", "--json")[1])
    assert len(started) == 1 + 1 + 3
    assert found["fine"]["status"] == "ok"
    assert "status 3" in found["dies"]["reason"]


def test_what_nothing_reads_is_listed(run, distribute):
    distribute("plug-a", {"task": {"edges": "Task"}, "heads": {"a/b": "Task"}})
    status, out, _ = run("list")
    assert status == 0
    assert re.search(
        r"task +edges +plug-a +1.0 +not read: nothing reads 'densectx.task'; did you mean 'densectx.tasks'", out
    )
    found = statuses(run("list", "heads", "--check", "--json")[1])
    assert found["a/b"]["status"] == found["edges"]["status"] == "not read"
    assert "its name may hold neither '/'" in found["a/b"]["reason"]


def test_show(run, distribute):
    distribute("plug-a", {"tasks": {"edges": "Task"}})
    for kind in ("tasks", "task"):
        status, out, _ = run("show", kind, "edges")
        assert status == 0
        assert out == (
            "task edges\nfrom plug-a 1.0 (plug_a:Task)\n\noptions:\n  weight: float = 1.0\n"
            "  mode = 'a'\n\nA task of a plugin.\n"
        )
    assert "(densectx.nn.context:basic)" in run("show", "contexts", "basic")[1]


def test_every_exit_status_is_told(run):
    from densectx import errors

    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.DensectxError):
            assert re.search(rf"\b{error.status} \w", STATUSES), error
    assert STATUSES in run("fit", "--help")[1]


def test_what_no_config_may_set_is_not_shown(run):
    for kind, name, kept, runtime in [
        ("tasks", "denoising", "sigma", ("features", "in_channels", "info")),
        ("datasets", "folder", "root", ("split",)),
        ("heads", "decoder", "width", ("features", "in_channels", "out_channels", "scale", "residual")),
        ("losses", "cross_entropy", "label_smoothing", ("ignore_index", "classes")),
        ("balancing", "gradnorm", "alpha", ("tasks",)),
    ]:
        out = run("show", kind, name)[1]
        assert len(re.findall(rf"^ +{kept}: ", out, re.MULTILINE)) == 2, "as an option and in the documentation"
        assert not re.search(rf"^ +({'|'.join(runtime)}): ", out, re.MULTILINE)
    assert "Args:" not in run("show", "contexts", "none")[1]


def test_tables_of_the_documentation_stay_aligned(run):
    lines = run("show", "tasks", "segmentation")[1].splitlines()
    first, _, last = (number for number, line in enumerate(lines) if line.startswith("===="))
    starts = [match.start() for match in re.finditer("=+", lines[first])]
    for line in lines[first + 1 : last]:
        assert all(line[start - 2 : start].strip() == "" for start in starts[1:]), line
        assert all(line[start] != " " for start in starts[1:]), line


def test_methods_of_balancing_are_listed_and_shown(run):
    status, out, _ = run("list", "balancing", "--json")
    assert status == 0
    assert {"fixed", "gradnorm", "upgrad"} <= set(statuses(out))
    status, out, _ = run("show", "balancing", "gradnorm")
    assert status == 0
    assert "  alpha: float = 1.5\n" in out
    assert "Chen et al. 2018" in out


def test_help_of_training_names_keys_and_options_without_markup(run):
    from densectx.data.transforms import _OPTIONS

    status, out, _ = run("fit", "--help")
    assert status == 0
    assert "  model.name " in out
    assert "densectx.data.transforms.Augment" in out
    assert all(f"\n  {option} " in out for option in _OPTIONS)
    assert not re.search(r"``|:\w+:`", out)


def test_shown_documentation_has_no_markup(run):
    status, out, _ = run("show", "datasets", "image_mask")
    assert status == 0
    assert "see densectx.data.reader.read_image" in out
    assert not re.search(r"``|:\w+:`", out)
