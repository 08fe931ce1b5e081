from __future__ import annotations

from pipeline.config import Strict, unhashed


class LaunchSettings(Strict):
    """How stages become processes. Nothing here changes a fingerprint."""

    processes: int = unhashed(1, ge=1)
    """Processes (ranks) of a training stage, over all machines."""
    profile: str = unhashed("auto")
    """auto, or the name of a file of configs/accelerate/ (or a path), for several GPUs or machines."""
    machines: int | None = unhashed(None, ge=1)
    """Machines that share the processes, equally many each; null: as many as the profile says, else 1."""
    machine_rank: int = unhashed(0, ge=0)
    """Which machine this is: 0 leads the run, the others lend it their processes (same command, own rank)."""
    main_address: str = unhashed("127.0.0.1")
    """Address of machine 0, as the other machines reach it."""
    main_port: int = unhashed(29500, ge=1, le=65535)
    """Free port of machine 0 at which the machines meet."""
    threads: int | None = unhashed(None, ge=1)
    """CPU threads of each process; null leaves the choice to torch."""
    grace_seconds: int = unhashed(60, ge=1)
    """Time between the first signal to stop and the end by force."""
    timeout_seconds: int = unhashed(600, ge=10)
    """A rank that others wait for longer than this is given up."""
    keep_checkpoints: int = unhashed(2, ge=1)
    """Checkpoints kept per step; older ones are deleted after a new one is safe on disk."""
