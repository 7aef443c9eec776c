"""`python -m moecc`."""

from moecc.cli import main

main()
