"""The command line: one file per group of commands. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import click

from app.cli import alignments, comparing, jobs, keys, merging, owners, patches, service, verifying
from merge_core import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="weightsmith")
def main() -> None:
    """Merge model weights: POST a recipe, get a checkpoint."""


for _command in (
    *(service.serve, service.worker, service.migrate, service.reseal),
    *(merging.merge, merging.plan, merging.import_, verifying.verify),
    *(patches.patch, alignments.align, alignments.permutations, comparing.inspect),
    *(jobs.submit, jobs.jobs, keys.keys, owners.owners),
):
    main.add_command(_command)
