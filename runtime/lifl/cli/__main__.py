"""`python -m lifl.cli` is `func`."""

from lifl.cli import console_main

console_main()
