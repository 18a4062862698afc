"""Progress of a run: loss, speed, fill of rows, model FLOPs utilisation (MFU)."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from neo_jax.data.mixture import Mixture
from neo_jax.errors import InputError
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import data_shard
from neo_jax.train.run_metrics import Metrics, flops_per_batch, peak_flops
from neo_jax.train.train_config import Config


class Progress:
    """Metrics of steps, read from the device after the next step was dispatched.

    Args:
      counts: numbers of records so far, which `BadRecords` keeps up to date.
    """

    def __init__(
        self,
        c: Config,
        model: ModelConfig,
        mesh: Mesh,
        mixture: Mixture,
        counts: Mapping[str, int],
        metrics: Metrics,
        bar: tqdm.tqdm,
        log: Callable[[str], None],
    ):
        self._c, self._model, self._mixture, self._counts = c, model, mixture, counts
        self._metrics, self._bar, self._log = metrics, bar, log
        self._share_count = data_shard(mesh)[1]  # processes that feed different records
        self._peak = peak_flops(mesh.size)
        self._pending: list = []  # (step, metrics on the device, numbers of its records)
        self._since, self._steps = time.perf_counter(), 0
        self._sums: Counter = Counter()

    def enqueue(
        self,
        step: int,
        numbers: Mapping[str, jax.Array],
        batch: Mapping[str, np.ndarray],
        waited: float,
    ) -> None:
        """Adds a step that runs now; `flush` reads its metrics.

        Args:
          numbers: its metrics, on the device.
          batch: of the host.
          waited: seconds until the batch was there.
        """
        self._pending.append((step, numbers, batch["records"]))
        is_text = batch["segments"] > 0
        self._sums.update(
            tokens=int(is_text.sum()),
            places=is_text.size,
            patches=4 * int(batch["is_image"].sum()),
            patch_places=batch["patches"].shape[0] * batch["patches"].shape[1],
            images=_count_images(batch["is_image"]),
            keys=_count_keys(batch),
            waited=waited,
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps compiling, saving and evaluating out of the speed."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def flush(self, upto: int) -> None:
        """Reads, checks and logs the metrics of steps before `upto`; waits for these steps.

        Raises:
          InputError: for a loss or gradient that is not finite, naming its records.
        """
        while self._pending and self._pending[0][0] < upto:
            step, numbers, records = self._pending.pop(0)
            numbers = {name: float(value) for name, value in numbers.items()}
            if not math.isfinite(numbers["loss"]) or not math.isfinite(numbers["grad_norm"]):
                where = [self._mixture.where(int(number) - 1) for number in records[records > 0]]
                raise InputError(
                    f"step {step + 1}: loss is {numbers['loss']}, the gradient's norm "
                    f"{numbers['grad_norm']}; nothing of it was saved. Its records: "
                    + ", ".join(where[:100])
                )
            self._steps += 1
            self._bar.update()
            self._bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            if (step + 1) % self._c.log_every == 0 or step + 1 == self._c.steps:
                self._write(step + 1, numbers)

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        sums, now = self._sums, time.perf_counter()
        seconds, shares = now - self._since, self._share_count
        numbers |= {
            "tokens_per_second": sums["tokens"] * shares / seconds,
            "images_per_second": sums["images"] * shares / seconds,
            "seconds_per_step": seconds / self._steps,
            "token_fill": sums["tokens"] / sums["places"],
            "patch_fill": sums["patches"] / max(sums["patch_places"], 1),
            "data_wait_seconds": sums["waited"] / self._steps,
            "records": self._counts["records"],
            "records_bad": self._counts["bad"],
            "records_too_long": self._counts["too long"],
        }
        if self._peak:
            trainable = () if self._c.lora.rank else self._c.trainable
            counted = (sums[name] for name in ("tokens", "patches", "keys"))
            flops = flops_per_batch(self._model, *counted, trainable)
            numbers["mfu"] = flops * shares / seconds / self._peak
        self._metrics.write(step, numbers)
        self._log(
            f"step {step}: loss {numbers['loss']:.4f}, grad norm {numbers['grad_norm']:.3f}, "
            f"lr {numbers['learning_rate']:.2e}, {numbers['tokens_per_second']:,.0f} tokens/s, "
            f"{numbers['images_per_second']:.1f} images/s, fill {numbers['token_fill']:.0%}, "
            f"waited {numbers['data_wait_seconds']:.3f} s"
            + (f", MFU {numbers['mfu']:.1%}" if "mfu" in numbers else "")
        )
        self._since, self._steps, self._sums = now, 0, Counter()


def _count_images(is_image: np.ndarray) -> int:
    starts = is_image[:, 1:] & ~is_image[:, :-1]
    return int(starts.sum() + is_image[:, 0].sum())


def _count_keys(batch: Mapping[str, np.ndarray]) -> int:
    """The number of keys that each token attends to, summed over tokens."""
    total = 0
    for segments, t in zip(batch["segments"], batch["thw"][..., 0], strict=True):
        for segment in np.unique(segments[segments > 0]):
            of_document = t[segments == segment]
            total += int(np.searchsorted(of_document, of_document, side="right").sum())
    return total
