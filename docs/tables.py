"""Writes the tables of `benchmarks/results` into the README and the pages, between the marks that name them.

<!-- table NAME -->
<!-- end of table -->
"""

import re
from pathlib import Path

from mmemb_benchmarks.report.tables import headline, tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with its tables as the results are, each with its date, machine and commands below.

    Raises KeyError for a table that there is no result for.
    """
    results = ROOT / "benchmarks" / "results"
    made = tables(results) | {"headline": headline(results)}

    def table(found: re.Match[str]) -> str:
        shown = made[found[2]]
        return f"{found[1]}\n{shown.markdown}\n<small>{shown.caption}</small>\n\n{found[3]}"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))
