"""What the pages take from the code when they are built: the command line, the tree of errors, tables of fields."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Attribute, Class, Extension
from mkdocs.exceptions import PluginError

FROM_ELSEWHERE = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"'> ]+""")
EXAMPLE = re.compile(r"^Example:\n((?: {4}.*(?:\n|$))+)", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `{{ command line }}`, `{{ errors }}` and `{{ bounds }}` by what the code says of itself."""
    for name, made in {"command line": command_line, "errors": error_tree, "bounds": bounds}.items():
        placeholder = f"{{{{ {name} }}}}"
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, made())
    return markdown


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Refuse a page that would fetch a font, a script or a picture from elsewhere."""
    if found := FROM_ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {found[0]}")
    return output


def command_line() -> str:
    """Return every command of every package that is installed, with its arguments and options."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from mmemb_deploy.cli.main import application

    group: Any = get_command(application())
    context = group.make_context("mmemb", [], resilient_parsing=True)
    return get_docs_for_click(obj=group, ctx=context, name="mmemb", indent=1)


def error_tree() -> str:
    """Return the tree that the docstring of `mmemb_deploy.errors` draws."""
    from mmemb_deploy import errors

    _, tree = str(errors.__doc__).split("\n\n", 1)
    return f"```text\n{tree.rstrip()}\n```"


def bounds() -> str:
    """Return what a certificate must reach in each precision, as a table."""
    from mmemb_deploy.bundle.precision import PRECISIONS

    columns = {
        "minimum cosine": "min_cosine",
        "token agreement": "token_agreement",
        "gate flips, share of inputs": "gate_flips",
        "minimum cosine alone and in a batch": "batch_cosine",
    }
    rows = [[name, *(f"{getattr(facts, field):g}" for field in columns.values())] for name, facts in PRECISIONS.items()]
    lines = [["precision", *columns], ["---"] * (1 + len(columns)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class FieldTables(Extension):
    """Lists the fields of a class as one table, where each is described by its docstring or else by its comment."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Move what is said of the fields into the class's docstring, and show its example as code."""
        if cls.docstring is None:
            return
        said = EXAMPLE.sub(_as_code, cls.docstring.value)
        fields = [each for each in cls.members.values() if isinstance(each, Attribute) and _is_field(each)]
        if fields:
            said += "\n\nAttributes:\n" + "\n".join(f"    {field.name}: {_described(field)}" for field in fields)
        cls.docstring.value = said
        for field in fields:
            field.docstring = None


def _as_code(example: re.Match[str]) -> str:
    return f"```python\n{dedent(example[1]).rstrip()}\n```\n"


def _is_field(attribute: Attribute) -> bool:
    return attribute.annotation is not None and "property" not in attribute.labels and attribute.name[0] != "_"


def _described(field: Attribute) -> str:
    if field.docstring is not None:
        return " ".join(field.docstring.value.split())
    comment = field.source.partition("  # ")[2]
    return comment[:1].upper() + comment[1:]
