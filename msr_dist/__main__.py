"""The command `msr-dist`, which is `python -m msr_dist` as well."""

from msr_dist.cli import main
from msr_dist.launch import call_and_leave


def run() -> None:
    """What the command does, in a process of its own."""
    call_and_leave(main)


if __name__ == "__main__":
    run()
