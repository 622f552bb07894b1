"""`python -m promptkd_jax.plan …`, as `promptkd plan …`."""

from promptkd_jax.plan.command import main

main()
