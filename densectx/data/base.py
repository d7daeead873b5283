"""The contract of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch.utils.data import Dataset as TorchDataset

from densectx.errors import DataError
from densectx.types import Sample, SourceInfo

Split: TypeAlias = Literal["train", "val", "test"]


class MissingSplitError(DataError):
    """The folder, list or table that names the images of a split is not there.

    A test split is not needed before ``densectx test``, so other commands do without one that is missing so; any other
    :class:`densectx.errors.DataError` is that of a split that is there and broken.
    """


class Dataset(TorchDataset[Sample], ABC):
    """Samples of one split of one source, in a fixed order.

    The constructor takes the options of the config and the runtime argument ``split``; it only stores them:
    files are first touched by ``len()`` or an item, so that an impossible config is refused before data is read.
    A data set draws nothing at random of its own: equal index, equal sample (augmentation comes after).

    Attributes:
        info: what a model must know of the source; the same for every split, known without reading data.
        key_path: where its options stand in the config, such as ``data.sources.voc``, for messages; set by who builds
            it from a config.
    """

    info: SourceInfo
    key_path: str = ""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples.

        Raises:
            MissingSplitError: the folder or list of the split's images is missing; the path is named.
            DataError: a folder or list is empty, or what belongs to the images is missing; the path is named.
        """

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """One sample, see :data:`densectx.types.Sample` (without ``key``).

        Raises:
            DataError: a file is broken or inconsistent; the file is named.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages and reports call a sample: its path, or an index."""


@runtime_checkable
class Located(Protocol):
    """A data set whose samples lie in files of their own, which ``densectx lint`` looks at."""

    def paths(self, index: int) -> Mapping[str, str]:
        """The files of a sample: ``image``, ``mask``, ``target``, those that it has in one file each."""


@runtime_checkable
class FromFiles(Protocol):
    """A data set whose samples depend on files, by which a changed data set is told (:mod:`.fingerprint`)."""

    def all_files(self) -> Iterable[str]:
        """Every file that the split is read from, in a fixed order: labels too.

        Raises:
            DataError: as ``len()``.
        """
