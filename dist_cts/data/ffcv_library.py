"""Imports FFCV late and without its side effects: only JPEG files and streamed tasks need it."""

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()  # the side effects are undone by one thread at a time


def import_ffcv() -> types.ModuleType:
    """Imports ffcv; every other module gets it from here. Safe to call from several threads.

    Raises:
        ImportError: ffcv or one of its system libraries is missing; the message says how to install them.
    """
    with _LOCK:
        threads = torch.get_num_threads()
        try:
            with _python_dict():
                import ffcv
        except (ImportError, OSError) as error:
            raise ImportError(
                f"cannot import ffcv ({' '.join(str(error).split())}); JPEG images and data.cache=stream need it. "
                "Install its system libraries with "
                "`apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++` "
                "or `conda install -c conda-forge pkg-config opencv libjpeg-turbo cxx-compiler`, "
                "then `pip install ffcv==1.0.2`"
            ) from error
        finally:
            torch.set_num_threads(threads)  # importing ffcv sets it to one for the entire process
    return ffcv


@contextmanager
def _python_dict() -> Iterator[None]:
    """A block in which numba's typed dictionary is Python's.

    FFCV fills one with two entries during its import and reads them from Python only; compiling numba's takes 3 s in
    every process.
    """
    import numba.typed

    typed, numba.typed.Dict = numba.typed.Dict, dict
    try:
        yield
    finally:
        numba.typed.Dict = typed
