"""The needs of a run on TPUs that are not rented yet; see docs/plan.md.

command       reads the command line, searches meshes, compares slices
launched      a command that is about to be launched, checked
abstract_run  a run's state and batch, of shapes alone
ahead, hlo    compiled for chips that nobody has; what such a program sends
roofline      memory, work and traffic, counted
remat         what the backward pass may keep, by the memory of the devices that are here
chips         what a chip has and costs, which slices there are
architectures the shapes of well-known models
tables        for the terminal
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """`promptkd plan …`. Counting (`roofline`) needs none of what the command imports."""
    from promptkd_jax.plan.command import main

    main(argv)
