"""Duration of a run and of its phases, over all of its attempts."""

import time
from collections import Counter
from typing import Any

from hfprune.utils.progress import Timings


class RunTime:
    """Seconds of a run from now on; a resumed run adds those of its earlier attempts.

    Example:
        >>> resumed = RunTime()
        >>> resumed.load_state_dict({"seconds": 60.0, "timing": {"calibrating": 40.0}, "started": 0.0})
        >>> resumed.seconds >= 60, resumed.timing
        (True, {'calibrating': 40.0})
    """

    def __init__(self) -> None:
        self._started, self._timings = time.time(), Timings()
        self._earlier: dict[str, Any] = {"seconds": 0.0, "timing": {}}

    @property
    def seconds(self) -> float:
        """Duration of all attempts until now."""
        return float(self._earlier["seconds"]) + time.time() - self._started

    @property
    def timing(self) -> dict[str, float]:
        """Phase -> seconds of all attempts, in the order of their first ends."""
        return self._with_earlier(self._timings.seconds)

    def _with_earlier(self, seconds: dict[str, float]) -> dict[str, float]:
        found = Counter(self._earlier["timing"])
        found.update(seconds)
        return dict(found)

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds until now, those of the current phases included, as plain data."""
        timing = self._with_earlier(self._timings.so_far())
        return {"seconds": self.seconds, "timing": timing, "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Adds the earlier attempts of a run; nothing for a checkpoint of this attempt, or without seconds.

        Args:
            state: Result of :meth:`state_dict`; empty in checkpoints of earlier versions.
        """
        if state and state["started"] != self._started:
            self._earlier = {"seconds": state["seconds"], "timing": dict(state["timing"])}
