"""Daft, on this machine or on a Ray cluster: the only engine the pipeline has.

Everything in this package imports Daft from here or after it, so that its telemetry and its progress bars are
decided once, and so that a missing extra is one sentence.
"""

from __future__ import annotations

import logging
import os

from xray.data.errors import DataError

# read by Daft when it is imported
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("DAFT_PROGRESS_BAR", "0")

try:
    import daft
except ImportError as error:  # pragma: no cover
    raise DataError('curation needs Daft: pip install "xray-visual[curate]"') from error

ENGINES = ("native", "ray")
_running: str | None = None  # this process's engine


def start(engine: str, address: str = "") -> None:
    """Choose where frames are computed; a process can choose once.

    Args:
        engine: "native", this process and its cores, or "ray".
        address: of a Ray cluster, "" for the one that $RAY_ADDRESS names, else a new one on this machine.

    Raises:
        DataError: an unknown engine, Ray is not installed or not reached, or the process runs another engine already.
    """
    if engine not in ENGINES:
        raise DataError(f"engine is {engine!r}; one of {', '.join(ENGINES)} is needed")
    global _running
    if _running is not None:
        if _running != engine:
            raise DataError(f"engine is {engine!r}, but this process runs {_running!r} already; start another process")
        return
    if engine == "native":
        daft.set_runner_native()
        _running = engine
        return
    try:
        import ray
    except ImportError as error:
        raise DataError('engine=ray needs Ray: pip install "xray-visual[ray]"') from error
    if not ray.is_initialized():
        try:
            ray.init(address=address or None, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise DataError(f"no Ray cluster answers at {address or 'this machine'} ({error})") from error
    daft.set_runner_ray()
    _running = engine
