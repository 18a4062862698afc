"""Traces some steps of a run with JAX's profiler, for TensorBoard or XProf."""

from collections.abc import Callable

import jax
from etils import epath


class Profiler:
    """Writes a trace of the steps `first` to `last` into a folder; (0, 0) traces none."""

    def __init__(self, steps: tuple[int, int], folder: epath.Path, log: Callable[[str], None]):
        self._first, self._last = steps
        self._folder, self._log = folder, log
        self._is_tracing = False

    def before_step(self, step: int) -> None:
        """Starts or stops the trace where it begins or ends."""
        if self._is_tracing and step > self._last:
            self.stop()
        elif self._last and self._first <= step <= self._last and not self._is_tracing:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True

    def stop(self) -> None:
        """Writes the trace, if one has begun."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
            self._log(f"steps {self._first} to {self._last} are traced in {self._folder}")
