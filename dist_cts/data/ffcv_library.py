"""FFCV's import, late and without its side effects: those who do not stream never pay for it."""

import types
from collections.abc import Iterator
from contextlib import contextmanager


def import_ffcv() -> types.ModuleType:
    """Imports ffcv; the only place that does.

    Raises:
        ImportError: ffcv or one of its system libraries is missing; the message says how to install them.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        with _python_dict():
            import ffcv
    except (ImportError, OSError) as error:
        raise ImportError(
            f"ffcv cannot be imported ({' '.join(str(error).split())}). Install its system libraries with "
            "`apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++` "
            "or `conda install -c conda-forge pkg-config opencv libjpeg-turbo cxx-compiler`, "
            "then `pip install ffcv==1.0.2`"
        ) from error
    finally:
        torch.set_num_threads(threads)  # importing ffcv sets it to one for the whole process
    return ffcv


@contextmanager
def _python_dict() -> Iterator[None]:
    """A block in which numba's typed dictionary is Python's.

    FFCV makes one of two entries while it is imported and looks them up from Python alone; numba's costs 3 s of
    compiling in every process.
    """
    import numba.typed

    typed, numba.typed.Dict = numba.typed.Dict, dict
    try:
        yield
    finally:
        numba.typed.Dict = typed
