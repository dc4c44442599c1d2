"""Rays of several nodes on this machine, started by this process."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def beside_own_ray() -> Iterator[None]:
    """Start and end them in here: Ray has one key-value client in a process, which both take from its own Ray."""
    from ray.experimental import internal_kv

    own = internal_kv.internal_kv_get_gcs_client()
    try:
        yield
    finally:
        if own is not None:
            internal_kv._initialize_internal_kv(own)
