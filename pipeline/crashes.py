"""What a crash means to a person: a full disk, too little memory, a rank that is gone; or its own words."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from pipeline.errors import StageError, ToolkitError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
# safetensors and tokenizers tell the number of the system's error in their text only
_BY_NUMBER = re.compile(r"\(os error (\d+)\)")
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.I)
_NO_PARTNER = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|timed out waiting|"
    r"application timeout|watchdog|ncclremoteerror|socket timeout|store .*timed? ?out",
    re.I,
)
_LESS_MEMORY = {
    "pretrain": "raise pretrain.accumulation_steps (the same result from smaller micro-batches), or lower"
    " pretrain.sequence_length",
    "sft": "raise sft.accumulation_steps (the same result from smaller micro-batches), or lower sft.max_length",
    "reward": "raise reward.accumulation_steps, or lower reward.max_length",
    "ppo": "lower ppo.rows_per_rank (memory only, the same result), or ppo.max_response_tokens, or set"
    " ppo.lora.rank",
    "dpo": "raise dpo.accumulation_steps, or lower dpo.max_length",
    "kto": "raise kto.accumulation_steps, or lower kto.max_length",
    "grpo": "lower grpo.rows_per_rank, or raise grpo.accumulation_steps",
    "rloo": "lower rloo.rows_per_rank, or raise rloo.accumulation_steps",
    "sample": "lower sample.rows_per_rank (memory only, the same result)",
    "evaluate": "lower evaluate.rows_per_rank (memory only, the same result)",
    "answers": "lower evaluate.rows_per_rank (memory only, the same result)",
}


def explain(error: BaseException, step: str, stage: str, log: Path) -> StageError:
    """The error for people; `log`: where its traceback is."""
    cause = first_line(error)
    number = _system_error(error)
    story = f"The whole story is in {log}"
    if number in _NO_SPACE:
        return StageError(
            f"{step}: the disk of {log.parent} is full ({_free(log.parent)} free)",
            "Free some space; `prefline resume` then goes on from the last checkpoint, which is whole.",
        )
    if number == errno.EFBIG:
        return StageError(
            f"{step}: a file would become larger than this system allows ({cause})",
            "See `ulimit -f`; `prefline resume` then goes on from the last checkpoint, which is whole.",
        )
    if isinstance(error, OSError) and number in _FORBIDDEN:
        return StageError(f"{step}: not allowed to write or read: {cause}", story)
    if is_out_of_memory(error):
        return StageError(f"{step}: out of memory: {cause}", memory_hint(stage))
    return StageError(f"{step}: {type(error).__name__}: {cause}", story)


def explain_system(error: OSError) -> ToolkitError:
    """The same for the command itself, which is about no step."""
    what = os.strerror(error.errno) if error.errno else str(error)
    if error.filename:
        what += f": {Path(os.fsdecode(error.filename)).absolute()}"
    if error.errno in _NO_SPACE:
        return ToolkitError(
            what, "Free some space and give the command again; what is done stays done."
        )
    if error.errno in _FORBIDDEN:
        return ToolkitError(what, "See whose the directory is, and whether it may be written to.")
    return ToolkitError(what)


def memory_hint(stage: str) -> str:
    """Which setting of a stage to lower, in a sentence."""
    how = less_memory(stage)
    return (
        f"{how[0].upper()}{how[1:]} (`prefline plan RUN` says what takes it); `prefline resume` goes on from"
        " the last checkpoint."
    )


def less_memory(stage: str) -> str:
    """Which setting of a stage to change so that it needs less memory."""
    return _LESS_MEMORY.get(stage, "use fewer or shorter rows")


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or of a GPU; torch is not imported here, so its class is known by name."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"} or _system_error(error) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def is_lost_partner(error: BaseException) -> bool:
    """Whether a rank failed only because another one is gone or does not answer."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_NO_PARTNER.search(str(error)))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _system_error(error: BaseException) -> int | None:
    """The errno behind an error, or behind what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return seen.errno
        found = _BY_NUMBER.search(str(seen))
        if found:
            return int(found.group(1))
        seen = seen.__cause__ or seen.__context__
    return None


def _free(place: Path) -> str:
    try:
        return f"{shutil.disk_usage(place).free / 2**20:.1f} MiB"
    except OSError:
        return os.strerror(errno.EIO)
