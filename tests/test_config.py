"""Composition of configs: the merge table, YAML's traps, interpolation, flags."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densectx.arguments import Arguments, split_arguments
from densectx.config import Composed, check_keys, compose, dump, load_yaml
from densectx.errors import ConfigError
from densectx.yamlfile import parse_yaml

BASE = """
model:
  backbone: plain
  tasks:
    denoising: {source: photos, sigma: 25, head: {name: decoder, width: 64}}
data:
  sources:
    photos: {name: mosaic, batch_size: 4}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="A.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def merged(write):
    """Values of files given as texts, then flags."""

    def merged(*texts, flags=()):
        files = [write(text, f"{index}.yaml") for index, text in enumerate(texts)]
        return compose(files, flags).values

    return merged


def refused(call, *parts):
    with pytest.raises(ConfigError) as error:
        call()
    for part in parts:
        assert part in str(error.value)


# merging ------------------------------------------------------------------------------------------------------------


def test_second_file_adds_a_task_and_keeps_siblings(merged):
    values = merged(BASE, "model: {tasks: {edges: {source: photos}, denoising: {sigma: 50}}}")
    assert list(values["model"]["tasks"]) == ["denoising", "edges"]
    assert values["model"]["tasks"]["denoising"] == {
        "source": "photos",
        "sigma": 50,
        "head": {"name": "decoder", "width": 64},
    }


def test_null_removes_entries_and_is_a_value_elsewhere(merged):
    values = merged(BASE, "{model: {tasks: {denoising: null}, backbone: null}, data: {sources: {photos: null}}}")
    assert values == {"model": {"backbone": None, "tasks": {}}, "data": {"sources": {}}}
    assert merged(BASE, flags=[("model.tasks.denoising", "null")])["model"]["tasks"] == {}


def test_removing_what_is_not_there_is_refused(merged):
    refused(lambda: merged(BASE, "model: {tasks: {denoisng: null}}"), "1.yaml", "model.tasks.denoisng", "'denoising'")


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        ("h: decoder", "h: {width: 3}", {"name": "decoder", "width": 3}),
        ("h: decoder", "h: {name: decoder, width: 3}", {"name": "decoder", "width": 3}),
        ("h: {name: decoder, width: 3}", "h: decoder", {"name": "decoder", "width": 3}),
        ("h: {name: decoder, width: 3}", "h: linear", {"name": "linear"}),
        ("h: decoder", "h: {name: linear, bias: true}", {"name": "linear", "bias": True}),
        ("h: decoder", "h: linear", "linear"),
        ("h: {width: 3}", "h: decoder", {"width": 3, "name": "decoder"}),
        ("h: {name: a, x: {name: b, y: 1}}", "h: {name: c, x: {z: 2}}", {"name": "c", "x": {"z": 2}}),
        ("h: {name: a, x: {name: b, y: 1}}", "h: {x: {name: c}}", {"name": "a", "x": {"name": "c"}}),
        ("h: {name: a, x: {name: b, y: 1}}", "h: {x: {z: 2}}", {"name": "a", "x": {"name": "b", "y": 1, "z": 2}}),
        (
            "h: {class_path: S, init_args: {lr: 1, wd: 2}}",
            "h: {init_args: {lr: 3}}",
            {"class_path": "S", "init_args": {"lr": 3, "wd": 2}},
        ),
        (
            "h: {class_path: S, init_args: {lr: 1, wd: 2}}",
            "h: {class_path: A, init_args: {lr: 3}}",
            {"class_path": "A", "init_args": {"lr": 3}},
        ),
        ("h: {name: a, x: 1}", "h: {class_path: A}", {"class_path": "A"}),
        ("h: [1, 2]", "h: [3]", [3]),
        ("h: [1, 2]", "h: {a: 1}", {"a": 1}),
        ("h: {a: 1}", "h: [3]", [3]),
        ("h: null", "h: {a: 1}", {"a": 1}),
        ("h: {a: 1}", "h: null", None),
    ],
)
def test_merge_table(merged, first, second, result):
    assert merged(first, second) == {"h": result}


@pytest.mark.parametrize("key", ["max_time", "val_check_interval", "strategy"])
def test_strings_and_mappings_of_the_trainer_replace_each_other(merged, key):
    """Lightning knows no ``name``: ``{minutes: 20, name: '00:00:05:00'}`` would mean nothing."""
    text, mapping = "00:00:05:00", {"minutes": 20}
    as_text, as_mapping = f"trainer: {{{key}: '{text}'}}", f"trainer: {{{key}: {{minutes: 20}}}}"
    flag = (f"trainer.{key}", text)
    assert merged(as_mapping, as_text) == merged(as_mapping, flags=[flag]) == {"trainer": {key: text}}
    assert merged(as_text, as_mapping) == {"trainer": {key: mapping}}
    assert merged(as_text, flags=[(f"trainer.{key}.minutes", "20")]) == {"trainer": {key: mapping}}
    refused(lambda: merged("{}", flags=[flag, (f"trainer.{key}.minutes", "20")]), "contradicts", f"trainer.{key}")
    reference = f"y: {{class_path: A}}\ntrainer: {{{key}: '${{y}}'}}"
    assert merged(reference, flags=[(f"trainer.{key}.init_args.a", "1")])["trainer"] == {
        key: {"class_path": "A", "init_args": {"a": 1}}
    }


def test_collections_have_keys_of_the_users_choice(merged):
    values = merged("model: {tasks: {name: {source: a}}}", "model: {tasks: {name: {source: b}, class_path: {x: 1}}}")
    assert values["model"]["tasks"] == {"name": {"source": "b"}, "class_path": {"x": 1}}


FLAGS = [
    ("model.tasks.denoising.head.name", "linear"),
    ("model.tasks.denoising.head.bias", "false"),
    ("model.tasks.denoising.sigma", "5e-1"),
    ("model.backbone.depth", "3"),
]


@pytest.mark.parametrize("flags", list(itertools.permutations(FLAGS)))
def test_flags_override_leaves_in_any_order(merged, flags):
    values = merged(BASE, flags=flags)
    assert values["model"]["tasks"]["denoising"] == {
        "source": "photos",
        "sigma": 0.5,
        "head": {"name": "linear", "bias": False},
    }
    assert values["model"]["backbone"] == {"name": "plain", "depth": 3}


@pytest.mark.parametrize("head", ["linear", "{name: linear, bias: true}", "{name: linear}"])
def test_flag_for_a_node_and_flag_below_it_in_both_orders(merged, head):
    flags = [("model.tasks.denoising.head", head), ("model.tasks.denoising.head.bias", "false")]
    for order in (flags, flags[::-1]):
        assert merged(BASE, flags=order)["model"]["tasks"]["denoising"]["head"] == {"name": "linear", "bias": False}


def test_last_of_equal_flags_wins(merged):
    assert merged(BASE, flags=[("data.num_workers", "1"), ("data.num_workers", "2")])["data"]["num_workers"] == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("[1,2]", [1, 2]),
        ("null", None),
        ("{name: plain}", {"name": "plain"}),
        ("", ""),
        ("-1", -1),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("010", "010"),
        ("true", True),
        ("/d/run #2", "/d/run #2"),
        ("#1", "#1"),
        ("'a #b'", "a #b"),
        ("{a: 1} # b", {"a": 1}),
        ("{subset}.txt", "{subset}.txt"),
        ("{class}", "{class}"),
    ],
)
def test_flag_values_are_yaml(text, value):
    assert compose([], [("data.x", text)]).values == {"data": {"x": value}}


def test_contradicting_flags_and_list_elements_are_refused(merged):
    refused(lambda: merged(BASE, flags=[("model.a", "3"), ("model.a.b", "1")]), "--model.a", "contradicts")
    refused(lambda: merged(BASE, flags=[("model.tasks.d", "null"), ("model.tasks.d.sigma", "1")]), "contradicts")
    refused(
        lambda: merged("trainer: {callbacks: [1]}", flags=[("trainer.callbacks.0", "2")]), "trainer.callbacks", "0.yaml"
    )
    refused(lambda: merged(BASE, flags=[("model..a", "3")]), "empty")
    refused(lambda: merged(BASE, flags=[("model.a", "[1")]), "--model.a")


def test_origins(write):
    first, second = write(BASE), write("model: {tasks: {denoising: {sigma: 50}}}", "B.yaml")
    composed = compose([first, second], [("model.tasks.denoising.head", "linear"), ("model.backbone.depth", "3")])
    assert composed.where("model.tasks.denoising.source") == f"file {first}"
    assert composed.where("model.tasks.denoising.sigma") == f"file {second}"
    assert composed.where("model.tasks.denoising.head.name") == "flag"
    assert composed.where("model.backbone.name") == f"file {first}"
    assert composed.where("model.backbone.depth") == "flag"
    assert "model.tasks.denoising.head.width" not in composed.origins  # forgotten with the decoder
    assert composed.where("data.sources.photos.list[0].x") == f"file {first}"
    assert composed.where("trainer.x") == "config"


KEYS = st.sampled_from(["a", "b", "name", "class_path"])
SPECS = st.recursive(
    st.one_of(st.integers(0, 3), st.sampled_from(["x", "y"]), st.none(), st.lists(st.integers(0, 2), max_size=2)),
    lambda inner: st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
LAYERS = st.dictionaries(st.sampled_from(["trainer", "data"]), SPECS, max_size=2)  # in model, a name is that of a model


def leaves(node, path=()):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    else:
        yield ".".join(path)


@settings(max_examples=60, deadline=None)
@given(LAYERS, LAYERS)
def test_merging_is_idempotent_and_every_leaf_has_an_origin(tmp_path_factory, one, two):
    folder = tmp_path_factory.mktemp("merge")
    files = [folder / "1.yaml", folder / "2.yaml"]
    for file, values in zip(files, (one, two), strict=True):
        file.write_text(dump(values))
    assert compose(files[:1]).values == one
    once, twice = compose(files), compose([*files, files[1]])
    assert once.values == twice.values
    assert all(leaf in once.origins for leaf in leaves(once.values) if leaf)
    assert compose([], []).values == {}


# interpolation ------------------------------------------------------------------------------------------------------


def test_interpolation_sees_flags_environment_and_nodes(merged, monkeypatch):
    monkeypatch.setenv("DENSECTX_TEST_ROOT", "/somewhere")
    text = """
model: {n: "${data.k}", text: "k=${data.k}", again: "${.n}", list: [{v: "${data.k}"}]}
data:
  k: 5
  root: ${oc.env:DENSECTX_TEST_ROOT}
  other: ${oc.env:DENSECTX_TEST_UNSET,default}
  sources: {train: {name: mosaic, batch_size: 4}, val: "${data.sources.train}"}
"""
    values = merged(text, flags=[("data.k", "7"), ("data.sources.val.batch_size", "1")])
    assert values["model"] == {"n": 7, "text": "k=7", "again": 7, "list": [{"v": 7}]}
    assert (values["data"]["root"], values["data"]["other"]) == ("/somewhere", "default")
    assert values["data"]["sources"]["train"] == {"name": "mosaic", "batch_size": 4}
    assert values["data"]["sources"]["val"] == {"name": "mosaic", "batch_size": 1}
    text = "model: {a: {name: x, head: decoder}, b: {name: '${model.a}', head: {width: 8}}}"
    assert merged(text)["model"]["b"] == {"name": "x", "head": {"name": "decoder", "width": 8}}


@pytest.mark.fault("C10")
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: {a: '${data.kk}'}\ndata: {k: 1}", "'data.k'"),
        ("model: {a: '${model.a}'}", "Recursive"),
        ("model: {a: '${oc.env:DENSECTX_TEST_UNSET}'}", "DENSECTX_TEST_UNSET"),
        ("model: {a: '${nosuch:3}'}", "nosuch"),
        ("model: {a: '${'}", "resolved"),
        ("model: {a: '???'}", "has to be given"),
        ("model: {a: '\\${b}'}", "may not"),
    ],
)
def test_unresolvable_interpolation_names_key_and_file(merged, text, part):
    refused(lambda: merged(text), "model.a", "0.yaml", part)


# YAML ---------------------------------------------------------------------------------------------------------------


def test_empty_file_and_byte_order_mark(write):
    assert load_yaml(write("")) == load_yaml(write("# nothing\n")) == {}
    assert load_yaml(write(b"\xef\xbb\xbfa: 1")) == {"a": 1}


def test_numbers(write):
    values = load_yaml(write("a: [1e-3, 1E5, .5, 1., -2.5e+3, 1_000, 0x1f, 0, -7, .inf, 12e03]"))["a"]
    assert values == [1e-3, 1e5, 0.5, 1.0, -2500.0, 1000, 31, 0, -7, math.inf, 12000.0]
    assert [type(value) for value in values[:5]] == [float] * 5


def test_aliases_and_merge_keys(write):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {y: 4, <<: [*a, {x: 5, z: 6}]}"
    values = load_yaml(write(text))
    assert values["b"] == {"x": 1, "y": 3}
    assert values["c"] == {"x": 1, "y": 4, "z": 6}
    assert values["a"] == {"x": 1, "y": 2}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 8))


@pytest.mark.fault("C07")
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: {c: 1,\n c: 2}", ["line 3", "duplicate", "'c'"]),
        ("a: 1\nmodel.backbone: x", ["line 2", "model: {backbone: ...}"]),
        ("1: x", ["line 1", "1", "quote"]),
        ("? [a]\n: 1", ["line 1", "string"]),
        ("yes: 1", ["yes", "quote"]),
        ("- a", ["'key: value'", "list"]),
        ("text", ["'key: value'", "text"]),
        ("a:\n  b: !!python/object/apply:os.system ['touch x']", ["line 2", "!!python"]),
        ("a: !!python/name:os.system", ["!!python"]),
        ("a: !mine 3", ["!mine"]),
        ("a: !!set {x}", ["!!set"]),
        ("a: !!binary eA==", ["!!binary"]),
        ("a: !!int x", ["A.yaml"]),
        ("a: !!bool x", ["A.yaml"]),
        ("a: !!float ''", ["A.yaml"]),
        ("a: {<<: {x: 1}, <<: {y: 2}}", ["line 1", "<<"]),
        ("a: [1", ["line 1"]),
        ("a: 1\n---\nb: 1", ["line 2", "document"]),
        ("a:\n\tb: 1", ["line 2"]),
        ("a: *b", ["line 1", "b"]),
        ("a: \x00", ["A.yaml"]),
        (b"a: 1\nb: \xff\xfe", ["line 2", "UTF-8"]),
        ("#" * (1 << 20) + "\n", ["1 MiB"]),
        ("a: " + "[" * 20_000, ["64 levels"]),
        ("a: &a [*a]", ["alias of itself"]),
        ("a: &a x\nb: [" + "*a," * 101 + "]", ["100 aliases"]),
        (BOMB, ["aliases are expanded"]),
        ("a: [" + "1," * 30_000 + "]", ["20000 values"]),
        ("a:\n  lists: {subset}.txt", ["line 2", "quote a text that begins with {"]),
        ("a:\n  lists: {subset}", ["line 2", 'quote a text that begins with {: "{subset}"']),
    ],
    ids=range(30),
)
def test_refused_files(write, text, parts):
    start = time.process_time()
    refused(lambda: load_yaml(write(text)), "A.yaml", *parts)
    assert time.process_time() - start < 5


@pytest.mark.fault("C10")
def test_interpolation_bomb(write):
    text = "".join(f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}\n" for i in range(60)) + "a60: x"
    refused(lambda: compose([write(text)]), "larger than")
    chain = "".join(f"a{i}: ${{a{i + 1}}}\n" for i in range(3000)) + "a3000: x"
    refused(lambda: compose([write(chain)]), "chain")


@pytest.mark.fault("C07")
def test_tags_run_nothing(write, tmp_path):
    marker = tmp_path / "marker"
    refused(lambda: load_yaml(write(f"a: !!python/object/apply:os.system ['touch {marker}']")), "not allowed")
    assert not marker.exists()


@pytest.mark.fault("C10")
def test_missing_file_directory_and_unreadable(write, tmp_path):
    write("", "denoise.yaml")
    refused(lambda: load_yaml(tmp_path / "denoies.yaml"), "denoies.yaml", "did you mean", "denoise.yaml")
    refused(lambda: load_yaml(tmp_path), str(tmp_path), "directory")
    refused(lambda: load_yaml("a\x00b"), "cannot be read")
    refused(lambda: load_yaml(write("") / "below.yaml"), "cannot be read")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["1e-3", "yes", "null", "~", "1:30", "010", "2020-01-01", "", " ", "=", "<<", "0x1", ".5", "???", "- a"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


def without_dots(node):
    if isinstance(node, dict):
        return {key.replace(".", "_"): without_dots(value) for key, value in node.items()}
    return [without_dots(item) for item in node] if isinstance(node, list) else node


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), VALUES, max_size=4))
def test_dump_is_read_back(values):
    values = without_dots(values)
    assert (parse_yaml(dump(values), "x") or {}) == values


# keys ---------------------------------------------------------------------------------------------------------------


def test_check_keys(write):
    path = write("trainer: {max_epoch: 3}")
    composed = compose([path], [("trainer.devcies", "2")])
    known = ["max_epochs", "devices"]
    refused(
        lambda: check_keys({"max_epoch": 3}, known, "trainer", composed),
        f"file {path}",
        "'trainer.max_epoch'",
        "did you mean 'max_epochs'",
        "devices, max_epochs",
    )
    refused(lambda: check_keys({"devcies": 2}, known, "trainer", composed), "(flag)", "'trainer.devcies'", "'devices'")
    refused(lambda: check_keys({"x": 2}, known, ""), "'x'")
    check_keys({"devices": 2}, known, "trainer", Composed())


# arguments ----------------------------------------------------------------------------------------------------------

OPTIONS = {"--resume": "value", "--debug": "nothing", "--print_config": "nothing", "--allow-import": "values"}


def test_split_arguments():
    argv = ["-c", "A.yaml", "--config=B.yaml", "--model.tasks.denoising.sigma", "50", "--debug"]
    argv += ["--seed_everything", "-1", "--resume", "auto"]
    argv += ["--allow-import", "a", "--allow-import=b", "--data.x=[1, 2]", "--trainer", "{a: 1}", "--model.y", ""]
    assert split_arguments(argv, OPTIONS) == Arguments(
        files=("A.yaml", "B.yaml"),
        flags=(
            ("model.tasks.denoising.sigma", "50"),
            ("seed_everything", "-1"),
            ("data.x", "[1, 2]"),
            ("trainer", "{a: 1}"),
            ("model.y", ""),
        ),
        options={"--debug": [], "--resume": ["auto"], "--allow-import": ["a", "b"]},
    )


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["A.yaml"], ["A.yaml", "-c"]),
        (["--modle.tasks", "1"], ["--modle.tasks", "'--model'"]),
        (["--resum", "auto"], ["'--resume'"]),
        (["--res", "auto"], ["--res"]),
        (["--print-config"], ["'--print_config'"]),
        (["--seed_everything.x", "3"], ["--seed_everything.x"]),
        (["--seed", "3"], ["--seed"]),
        (["--model.x"], ["--model.x needs a value"]),
        (["--model.x", "--debug"], ["--model.x needs a value"]),
        (["--model.x", "-c", "A.yaml"], ["--model.x needs a value"]),
        (["-c"], ["-c needs a value"]),
        (["--debug=1"], ["takes no value"]),
        (["--resume", "a", "--resume", "b"], ["twice"]),
        (["-cA.yaml"], ["-cA.yaml"]),
        (["--"], ["'--'"]),
        (["-"], ["'-'"]),
    ],
)
def test_refused_arguments(argv, parts):
    refused(lambda: split_arguments(argv, OPTIONS), *parts)
