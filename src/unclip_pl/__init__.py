"""unCLIP (Ramesh et al. 2022, arXiv 2204.06125) as a PyTorch Lightning experiment suite."""

import ctypes
import os
import sys

# OpenMP's threads sleep while they wait for each other. By default they spin, and beside other work each spins on a
# core that another thread needs: steps then take several times as long. It counts only if it is set before torch is
# imported. Workers and subprocesses inherit it. A user's own value stays, and GOMP_SPINCOUNT wins over it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _keep_freed_memory() -> None:
    """Let glibc hand freed memory out again, up to 1 GiB of it, unless the user has set its allocator.

    By default it gives large blocks back to the system, which clears each page before it returns: 17,000 pages in an
    evaluation of the benchmarks' decoder, where they take 0.1 of the time, and 13,000 in a training step (0.03).
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the highest that glibc chooses by itself


_keep_freed_memory()
