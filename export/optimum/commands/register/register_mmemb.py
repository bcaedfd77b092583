"""`optimum-cli export mmemb ...`, which is `mmemb export ...`: optimum's command line finds this file by its folder.

`optimum` and the folders under it are namespace packages, which several distributions fill.
"""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class MmembExportCommand(BaseOptimumCLICommand):
    """Hands its arguments on as they are."""

    COMMAND = CommandInfo(name="mmemb", help="Export an MMEmb-R1 or Qwen3-VL-Embedding checkpoint to a bundle.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Leave every argument to `mmemb export`."""
        parser.add_argument("checkpoint", help="checkpoint folder; `mmemb export --help` lists the options")
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="bundle folder to write, and options")

    def run(self) -> None:
        """Run `mmemb export`, with its exit codes."""
        from mmemb_deploy.cli.main import main

        main(["export", self.args.checkpoint, *self.args.arguments])


REGISTER_COMMANDS = [(MmembExportCommand, ExportCommand)]
