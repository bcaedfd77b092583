"""A sample of the inputs to come, counted in tokens and patches by the bundle's own preprocessing."""

from __future__ import annotations

from pathlib import Path

from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.embedder import row_encoder
from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.rows import Row
from mmemb_deploy.jobs.files import read_source


def read_traffic(bundle: Bundle, source: Path) -> list[Row]:
    """Read what `mmemb embed` reads. Raises OptionError for a source, InputError at the input that cannot be read."""
    manifest = bundle.manifest
    encoder = row_encoder(bundle)
    rows = []
    for index, content in enumerate(read_source(source).inputs):
        try:
            rows.append(encoder.row(parse(content, manifest.limits), manifest.prompt.query_instruction))
        except InputError as error:
            raise error.at(index) from error
    return rows
