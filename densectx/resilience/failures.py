"""What torch and Lightning raise, as the errors of :mod:`densectx.errors` with their exit status and advice."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from traceback import extract_tb
from types import TracebackType

import torch
from torch import distributed

from densectx.data.module import DataModule
from densectx.errors import ConfigError, DataError, DensectxError, DistributedError, MemoryLimitError, unknown
from densectx.resilience.open_files import too_many_open_files

_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|out of memory|bad_alloc", re.IGNORECASE)
_LOST = re.compile(
    r"\bgloo\b|\bnccl\b|Connection (?:closed|reset|refused)|Timed out waiting|TCPStore|EADDRINUSE|rendezvous"
    r"|pair closure",  # what gloo says, without its name, of all that was in flight beside a collective that timed out
    re.IGNORECASE,
)
_NONDETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
_NO_VALIDATION = re.compile(r"`val_check_interval` \((\d+)\) must be less than or equal to .*? batches \((\d+)\)")
_MONITOR = re.compile(r"Early stopping conditioned on metric `([^`]*)` which is not available.*? the following:(.*)")
_ONE_NUMBER = re.compile(
    r"Expected more than 1 value per channel when training, got input size (?:torch.Size\()?(\[[\d, ]+\])"
)
_KILLED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it: torch's signal handler raises anywhere, also where others catch what they can."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explained(error: BaseException, data: DataModule | None) -> DensectxError | None:
    """The same as an error that says what to do; None for what is not known.

    Args:
        error: as it was raised.
        data: knows what its loader processes were reading.
    """
    error = next((one for one in _chain(error) if _KILLED.search(str(one))), error)
    if isinstance(error, DensectxError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        _MEMORY.search(text) if isinstance(error, RuntimeError) else getattr(error, "errno", 0) == errno.ENOMEM
    ):
        return MemoryLimitError(_out_of_memory(text or type(error).__name__, data))
    if isinstance(error, OSError | RuntimeError) and (limit := too_many_open_files(text)):
        return MemoryLimitError(limit)
    if isinstance(error, ValueError) and (found := _NO_VALIDATION.search(text)):
        return ConfigError(
            f"{found[1]} batches, and an epoch has {found[2]}: nothing would be validated. Take fewer, or set"
            " check_val_every_n_epoch to null: batches are then counted over epochs.",
            "trainer.val_check_interval",
        )
    if isinstance(error, ValueError) and (found := _ONE_NUMBER.search(text)):
        return ConfigError(
            f"a batch norm cannot normalise one number a channel, as in a batch of {found[1]} (B, C, h, w). Take"
            " batches of 2 or more (data.sources.SOURCE.batch_size), or another norm: model.norm group or frozen, and"
            " group for that of a context or head.",
            "model.norm",
        )
    if not isinstance(error, RuntimeError):
        return None
    if found := _MONITOR.search(text):
        known = re.findall(r"`([^`]+)`", found[2])
        if not known:
            return ConfigError(
                f"EarlyStopping: nothing is measured yet where it looks for {found[1]}, as at the end of an epoch that"
                " a run goes on from; set check_on_train_epoch_end to false, so that it looks after each validation.",
                "trainer.callbacks",
            )
        return ConfigError(f"EarlyStopping: monitor: {unknown('metric', found[1], known)}", "trainer.callbacks")
    if found := _NONDETERMINISTIC.search(text):
        return ConfigError(
            f"{found.group(1)} has no deterministic implementation on this device; leave the part out that uses it, or"
            " set trainer.deterministic to warn (results may then differ from run to run) or null.",
            "trainer.deterministic",
        )
    reading = f" It was reading: {'; '.join(data.reading())}." if data and data.reading() else ""
    if found := _KILLED.search(text):
        signal = text.partition("killed by signal: ")[2].strip(" .")  # not always told
        return DataError(
            f"loader process {found.group(1)} ended unexpectedly{f' ({signal})' if signal else ''}.{reading} The system"
            " kills processes when memory runs out (see dmesg): fewer data.num_workers or smaller batches take less;"
            " data.num_workers 0 shows errors of the reader itself."
        )
    if "DataLoader timed out" in text:
        limit = f"{data.timeout:g} s (data.timeout)" if data else "its time"
        return DistributedError(
            f"no loader process delivered a batch within {limit}.{reading} See whether that file or its storage hangs;"
            " if reading is only slow, set data.timeout higher."
        )
    return None


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error is that of a process group whose ranks do not answer."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and not isinstance(error, DensectxError) and bool(_LOST.search(str(error)))


def reason_of(error: BaseException) -> str:
    """What gloo or NCCL say, without their place in the source and their advice."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^\[[^]]*\] ", "", text.partition(" This is typically caused by")[0]).rstrip(".")


def waited_for(trace: TracebackType | None) -> str:
    """The collective that an exception came out of, and who called it: ``all_reduce (densectx/module.py:257)``."""
    by = ""
    for frame in extract_tb(trace):
        if "/torch/autograd/" in frame.filename:
            return "the all-reduce of gradients in the backward pass"
        if "/torch/distributed/" in frame.filename and frame.name not in ("wrapper", "func_wrapper"):
            return f"{frame.name}{by}"
        if "/densectx/" in frame.filename or "/pytorch_lightning/" in frame.filename:
            by = f" ({'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno})"
    return f"a collective{by}"


def _out_of_memory(text: str, data: DataModule | None) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    device = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU" if torch.cuda.is_available() else ""
    wanted = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [GM]iB)", text)
    more = f" for {wanted.group(1) + ' bytes' if wanted.group(1) else wanted.group(2)} more" if wanted else ""
    if data is None:
        resident = f"at most {peak:.2f} GiB were resident{device}"
        return f"out of memory{more}: {resident}. Free some, take another device, or fewer or smaller pictures."
    sizes = ", ".join(f"{source} {size}" for source, size in data.batch_sizes.items())
    return (
        f"out of memory{more}: batch sizes {sizes}; at most {peak:.2f} GiB were resident{device}. Set"
        " data.sources.SOURCE.batch_size lower and trainer.accumulate_grad_batches higher, take smaller crops, or"
        " trainer.precision bf16-mixed."
    )
