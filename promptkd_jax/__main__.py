"""`python -m promptkd_jax COMMAND …`, as `promptkd COMMAND …`."""

from promptkd_jax.cli.main import main

main()
