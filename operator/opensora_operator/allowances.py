"""How often somebody may do something: so many times at once, and so many times a second in the long run."""

from __future__ import annotations

from collections.abc import Callable


class Allowances:
    """One allowance for each key. Keys that were not used for the longest time are forgotten beyond `max_keys`."""

    def __init__(self, *, burst: int, per_second: float, clock: Callable[[], float], max_keys: int = 10_000) -> None:
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._max_keys = max_keys
        self._spent: dict[str, tuple[float, float]] = {}
        """Key → what was spent, and when."""

    def seconds_left(self, key: str) -> float:
        """Until it may be done; 0 is now."""
        return max(0.0, (self._spent_now(key) + 1 - self._burst) / self._per_second)

    def take(self, key: str) -> bool:
        """Do it once, if it may be done now."""
        if self.seconds_left(key) > 0:
            return False
        spent = self._spent_now(key) + 1
        self._spent.pop(key, None)  # the longest unused come first
        while len(self._spent) >= self._max_keys:
            del self._spent[next(iter(self._spent))]
        self._spent[key] = spent, self._clock()
        return True

    def _spent_now(self, key: str) -> float:
        spent, since = self._spent.get(key, (0.0, 0.0))
        return max(0.0, spent - (self._clock() - since) * self._per_second)
