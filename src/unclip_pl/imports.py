"""Imports without Python's search for garbage."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Put the garbage collector off while modules are imported, and keep what they made out of its later searches.

    Torch, open_clip and Lightning make a million objects that all stay. Looking through them again and again takes a
    sixth of an import's time.
    """
    collects, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collects:
            gc.enable()
