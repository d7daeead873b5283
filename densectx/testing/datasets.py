"""``check_dataset``: everything that densectx expects of a data set."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final, final, get_args

from densectx.data.base import Dataset, Split
from densectx.data.collate import Collate
from densectx.data.sample_rules import rules
from densectx.errors import DataError
from densectx.registry import DATASETS
from densectx.testing.report import Check, expect, run_checks
from densectx.testing.states import changed, preserved, random_states, settings
from densectx.testing.subjects import Subject, called, check_documented, named
from densectx.testing.values import copied, same
from densectx.types import SourceInfo

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
KEYS: Final = ("image", "gray", "mask", "target", "valid")


@final
@dataclass(frozen=True)
class DatasetCase:
    """A data set under test.

    Attributes:
        subject: name, spec, class or factory.
        split: the split whose samples are read.
        samples: how many samples are read.
    """

    subject: Subject
    split: Split = "train"
    samples: int = 4

    def build(self, split: Split | None = None, **options: Any) -> Dataset:
        """A fresh one."""
        with named(DATASETS, self.subject) as spec:
            data: Dataset = DATASETS.build({**spec, **options}, split=split or self.split)
        return data

    def indices(self, data: Dataset) -> list[int]:
        """The first samples and the last one."""
        length = len(data)
        return sorted({*range(min(self.samples - 1, length)), length - 1})

    def options(self) -> dict[str, Any]:
        """The options that it is built with."""
        if isinstance(self.subject, partial):
            return dict(self.subject.keywords)
        return (
            {key: value for key, value in self.subject.items() if key != "name"}
            if isinstance(self.subject, Mapping)
            else {}
        )


def builds_and_has_samples(case: DatasetCase) -> None:
    """It is built for a split and has samples with names."""
    data = case.build()
    expect(isinstance(data, Dataset), f"it is a {type(data).__name__}", "derive it from densectx.data.base.Dataset")
    expect(
        isinstance(data.info, SourceInfo), f"info is a {type(data.info).__name__}", "set self.info = SourceInfo(...)"
    )
    length = len(data)
    expect(
        isinstance(length, int) and length > 0,
        f"len is {length}",
        f"check the options: split {case.split!r} has no sample",
    )
    for index in case.indices(data):
        name = data.name(index)
        expect(
            isinstance(name, str) and bool(name), f"name({index}) is {name!r}", "return the path of the file, or a text"
        )


def is_documented(case: DatasetCase) -> None:
    """A docstring, and options that a config can be checked against."""
    check_documented(DATASETS, case.subject, ("split", "self"))


def describes_itself_alike_for_every_split(case: DatasetCase) -> None:
    """``info`` is the same for every split, known without reading, plain enough for a checkpoint."""
    infos = [case.build(split).info for split in SPLITS]
    advice = "derive info from the options alone: the model is built from it"
    expect(infos.count(infos[0]) == len(SPLITS), f"info differs between splits: {infos}", advice)
    again = SourceInfo.from_config(infos[0].to_config())
    expect(
        again == infos[0],
        f"info does not survive a checkpoint: {infos[0]} becomes {again}",
        "use tuples and plain numbers",
    )
    info = infos[0]
    unknown = set(info.keys) - set(KEYS)
    expect(
        not unknown, f"info.keys has {sorted(unknown)}", f"samples have {', '.join(KEYS)}; see densectx.types.Sample"
    )
    expect("image" in info.keys, f"info.keys is {info.keys}", "every source delivers 'image'")
    expect(
        ("target" in info.keys) == (info.target != "none"),
        f"info.target is {info.target!r}",
        "say what kind 'target' is",
    )
    if "mask" in info.keys:
        expect(bool(info.classes), "info.classes is empty", "name the classes of the mask, index = id")
    sizes = (0, len(info.classes))
    expect(
        len(info.palette) in sizes, f"{len(info.palette)} colours for {sizes[1]} classes", "give one a class, or none"
    )


def reads_nothing_when_built(case: DatasetCase) -> None:
    """The constructor touches no file: files that do not exist are found missing by ``len`` or an item.

    An option that neither of them depends on, such as the folder of another split or of a cache, may name anything.
    """
    paths = [k for k, v in case.options().items() if isinstance(v, str | Path) and Path(v).expanduser().exists()]
    if not paths:
        return
    advice = "store options in the constructor and read in __len__ or __getitem__, so that a config is checked at once"
    with tempfile.TemporaryDirectory() as folder:  # whose caches may be made there
        missing: dict[str, Any] = {key: f"{folder}/nothing/{key}" for key in paths}
        try:
            data = case.build(**missing)
        except Exception as error:  # whatever reading a missing file raises
            expect(False, f"building with a missing {', '.join(paths)} raises {type(error).__name__}: {error}", advice)
            return
        whole = case.build()
        expect(data.info == whole.info, "info depends on whether files are there", advice)
        what, advice = "len", "raise densectx.errors.DataError with the path"
        without: Any
        expected: Any
        try:
            without, expected = len(data), len(whole)
            if without == expected:
                what = "the first item"
                without, expected = data[0], whole[0]
        except DataError as error:
            text = str(error)
            expect("nothing" in text, f"the message about missing files names none: {text}", advice)
        except Exception as error:  # whatever else is what the check reports
            expect(False, f"{what} without files raises {type(error).__name__}", advice)
        else:
            expect(same(without, expected), f"{what} without files raises nothing", advice)


def samples_are_as_declared(case: DatasetCase) -> None:
    """Keys, types, shapes and ranges are those of :data:`densectx.types.Sample` and of ``info``."""
    data = case.build()
    for index in case.indices(data):
        for rule in rules(data[index], data.info, f"sample {index}", training=case.split == "train"):
            expect(*rule)


def equal_index_equal_sample(case: DatasetCase) -> None:
    """A sample is the same every time, in any order, in any object, without global random numbers."""
    data, other = case.build(), case.build()
    indices = case.indices(data)
    with preserved():
        data[indices[0]]  # what is imported at the first use may do more
    states, kept = random_states(), settings()
    first = {index: copied(data[index]) for index in indices}
    used = changed(states, random_states())
    advice = "draw nothing, or from a generator seeded with (seed, index): augmentation comes after"
    expect(not used, f"reading uses {', '.join(used)}", advice)
    touched = changed(kept, settings())
    expect(not touched, f"reading changes {', '.join(touched)}", "leave settings of the process as they are")
    for index in reversed(indices):
        expect(same(data[index], first[index]), f"sample {index} is another one the second time", advice)
        expect(same(other[index], first[index]), f"sample {index} differs in a second object", advice)


def samples_are_fresh(case: DatasetCase) -> None:
    """What is done to a sample does not show the next time it is read."""
    data = case.build()
    index = case.indices(data)[0]
    before = copied(data[index])
    for value in data[index].values():
        advice = "return tensors of their own: clone() what is cached or mapped"
        try:
            value.zero_()
        except RuntimeError as error:  # expanded, or read-only memory
            expect(False, f"a tensor of sample {index} cannot be changed ({str(error).partition('.')[0]})", advice)
    expect(same(data[index], before), f"sample {index} changes when what was read before is changed", advice)


def works_in_loader_processes(case: DatasetCase) -> None:
    """It can be sent to a worker process, before and after it was read, and reads the same there."""
    data = case.build()
    index = case.indices(data)[0]
    for state in ("new", "used"):
        try:
            sent: Dataset = ForkingPickler.loads(ForkingPickler.dumps(data))  # as loaders do it
        except Exception as error:  # pickle raises many kinds
            expect(
                False,
                f"a {state} data set cannot be pickled ({type(error).__name__}: {error})",
                "keep no open files, lambdas or locks in attributes; open them when they are first needed",
            )
            return
        expect(
            same(sent[index], data[index]), f"a {state} data set reads differently after pickling", "keep all options"
        )


def samples_form_a_batch(case: DatasetCase) -> None:
    """Samples of one size stack, also beside one whose labels are missing."""
    data = case.build()
    sample = data[case.indices(data)[0]]
    bare = {key: value for key, value in sample.items() if key in ("image", "gray")}
    batch = Collate({"source": data.info}, "crop")([("source", sample), ("source", bare)])["source"]
    expect(set(batch) == {*sample, "gray"}, f"the batch has {sorted(batch)}", "let every key be a tensor of fixed type")


CHECKS: Final = (
    builds_and_has_samples,
    is_documented,
    describes_itself_alike_for_every_split,
    reads_nothing_when_built,
    samples_are_as_declared,
    equal_index_equal_sample,
    samples_are_fresh,
    works_in_loader_processes,
    samples_form_a_batch,
)


def dataset_checks(subject: Subject, *, split: Split = "train", samples: int = 4) -> list[Check]:
    """The checks of :func:`check_dataset` one by one, for ``pytest.mark.parametrize``; builds nothing yet."""
    case = DatasetCase(subject, split, samples)
    return [Check(function.__name__, partial(function, case)) for function in CHECKS]


def check_dataset(
    subject: Subject,
    *,
    split: Split = "train",
    samples: int = 4,
    expected_failed_checks: Mapping[str, str] | None = None,
) -> None:
    """Does a data set keep its contract (:class:`densectx.data.base.Dataset`)?

    Args:
        subject: registered name, spec with the options of a small copy (``{"name": "folder", "root": ...}``), class,
            or factory.
        split: whose samples are read.
        samples: how many of them.
        expected_failed_checks: {check: reason} that may fail; one that passes all the same is told.

    Raises:
        ChecksFailed: an AssertionError with every failed check, what it found and what to do.
    """
    checks = dataset_checks(subject, split=split, samples=samples)
    run_checks(called(DATASETS, subject), checks, expected_failed_checks or {})
