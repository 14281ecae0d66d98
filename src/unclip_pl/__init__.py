"""unCLIP (Ramesh et al. 2022, arXiv 2204.06125) as a PyTorch Lightning experiment suite."""

import os

# OpenMP's threads sleep while they wait for each other. By default they spin, and beside other work each spins on a
# core that another thread needs: steps then take several times as long. It counts only if it is set before torch is
# imported. Workers and subprocesses inherit it. A user's own value stays, and GOMP_SPINCOUNT wins over it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
