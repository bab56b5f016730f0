"""Start of a command: imports of torch, transformers and Lightning, without the garbage collector."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Pauses the garbage collector while packages are imported, and exempts what they create from later collections.

    Imports create hundreds of thousands of objects that live as long as the process, and the collector would walk all
    of them again and again: about a tenth of the time to the first batch (``benchmarks/startup.py``). In a process that
    has imported torch before, nothing is paused or exempted: its objects may be those of a caller.

    Example:
        >>> with importing():
        ...     import json
        >>> gc.isenabled()
        True
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
