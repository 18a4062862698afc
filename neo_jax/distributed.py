"""Multi-host runs: each host runs the same command and joins the others before it uses a device."""

import os

import jax

from neo_jax.errors import InputError


def join(is_pod: bool = False) -> None:
    """Joins the other processes, if this is one of several.

    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID name
    them. On Cloud TPU, JAX finds them itself.

    Args:
      is_pod: let JAX find the processes of a Cloud TPU pod. Not needed where the environment shows
        that there are several hosts (GKE, multislice).

    Raises:
      InputError: if variables are missing or wrong, or this is no pod.
    """
    variable = os.environ.get
    if address := variable("JAX_COORDINATOR_ADDRESS"):
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
        or "," in variable("TPU_WORKER_HOSTNAMES", "")
        or variable("MEGASCALE_COORDINATOR_ADDRESS")
    ):
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"no pod is here: {error}".split("\n")[0]) from error
