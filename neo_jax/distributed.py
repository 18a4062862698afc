"""Several hosts as one: each runs the same line and joins the others before it uses a device."""

import os

import jax

from neo_jax.errors import InputError


def join(is_pod: bool = False) -> None:
    """Joins the other processes, if this is one of several.

    Args:
      is_pod: ask the cloud who they are. It is asked too where its own variables say that there are
        several (GKE, multislice). Elsewhere JAX_COORDINATOR_ADDRESS (host:port of the first),
        JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.

    Raises:
      InputError: when variables are missing, or no pod is here.
    """
    environment = os.environ.get
    if address := environment("JAX_COORDINATOR_ADDRESS"):
        try:
            count, number = (int(os.environ[f"JAX_{n}"]) for n in ("NUM_PROCESSES", "PROCESS_ID"))
        except (KeyError, ValueError) as error:
            raise InputError(
                "JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID to "
                "numbers too"
            ) from error
        jax.distributed.initialize(address, count, number)
    elif (
        is_pod
        or "," in environment("TPU_WORKER_HOSTNAMES", "")
        or environment("MEGASCALE_COORDINATOR_ADDRESS")
    ):
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"no pod is here: {error}".split("\n")[0]) from error
