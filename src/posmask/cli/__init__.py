"""Command line: `commands` parses arguments, `printing` formats results for the terminal."""

from posmask.cli.commands import main

__all__ = ["main"]
