"""`python -m uni_x`, for launchers that start a module."""

from uni_x.cli import main

main()
