"""`privimage methods`: what can be run, as settings of one pipeline."""

import sys

from rich.console import Console
from rich.table import Table

from privimage.config.methods import METHODS


def show() -> None:
    """Print a row for each method; the table is 160 columns wide where the output is not a terminal."""
    table = Table("method", "", "pretraining data", "generator", "private", "stages")
    for name, method in METHODS.items():
        private = "yes" if method.private else "no"
        table.add_row(
            name, method.title, method.pretraining, method.generator, private, " ".join(method.stages)
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
