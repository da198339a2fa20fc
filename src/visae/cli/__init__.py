"""The command line: parse, call, print; nothing else.

``visae --help`` imports no torch: every command imports what it needs when it runs.
"""

from visae.cli.app import main

__all__ = ["main"]
