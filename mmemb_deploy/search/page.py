"""One self-contained page of hits to look at: what was asked, and a card for each that was found."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import write_whole
from mmemb_deploy.inputs.formats import kind_of
from mmemb_deploy.inputs.images import data_uri
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.search.vectors import Hit

SIDE = 640  # pixels of a picture's longer side
SMALL = 96  # pixels below which a picture is shown with its own squares
EXCERPT, SHORT = 400, 60  # characters that are shown of a text, and of one that is shown large


def write_page(
    page: Path, query: str | None, image: Path | None, hits: list[Hit], source: Path, limits: Limits, note: str
) -> None:
    """Write a page that ends with a note; files of hits are relative to `source`, a folder or a file beside them.

    Raises OptionError for a hit's file that is not there, InputError for one that cannot be opened.
    """
    folder = source if source.is_dir() else source.parent
    asked = [] if image is None else [_picture(parse({"image": image}, limits).images[0])]
    asked += [] if query is None else [f"<h1>{escape(query)}</h1>"]
    template = Template((files("mmemb_deploy.search") / "page.html").read_text(encoding="utf-8"))
    cards = "\n".join(_card(hit, folder, limits) for hit in hits)
    title = escape(query or str(image))
    write_whole(page, template.substitute(title=title, asked="\n".join(asked), cards=cards, note=escape(note)))


def place(hit: Hit) -> str:
    """Return where in its file a hit is, as people say it: "page 3", "1:05"."""
    if hit.page is not None:
        return f"page {hit.page}"
    if hit.second is None:
        return ""
    minutes, seconds = divmod(int(hit.second), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _card(hit: Hit, folder: Path, limits: Limits) -> str:
    name, where = escape(Path(hit.file).name or hit.id), place(hit)
    width = 100 * min(max(hit.score, 0), 1)
    return (
        f'<li><div class="shown">{_shown(hit, folder, limits)}</div>'
        f'<p class="name" title="{escape(hit.id)}">{name}{f"<span>{where}</span>" if where else ""}</p>'
        f'<p class="score"><span><i style="width:{width:.1f}%"></i></span>{hit.score:.3f}</p></li>'
    )


def _shown(hit: Hit, folder: Path, limits: Limits) -> str:
    """Return what a hit looks like: its picture, its page, its frame, or how its text begins."""
    if not hit.file:
        return _text(hit.id)
    path = folder / hit.file
    if not path.is_file():
        raise OptionError(f"{path} is not there: pass --source, the folder or file that was embedded")
    kind = kind_of(path)
    if kind == "text":
        with path.open(encoding="utf-8", errors="replace") as file:
            return _text(file.read(EXCERPT))
    content: dict[str, Any] = {"image" if kind is None else kind: path}
    if kind == "document":
        content["pages"] = [hit.page or 1]
    if kind == "video":
        content |= {"start": hit.second or 0.0, "max_frames": 1}
    request = parse(content, limits)
    return _picture((*request.images, *request.frames)[0])


def _text(text: str) -> str:
    """Return words inside their tag, large where they are few."""
    words = text.strip()
    return f"<blockquote{' class=short' if len(words) <= SHORT else ''}>{escape(words)}</blockquote>"


def _picture(image: Image.Image) -> str:
    """Return a picture, made smaller, inside its tag."""
    small = max(image.size) < SMALL
    image.thumbnail((SIDE, SIDE))
    shown = data_uri(image) if small else data_uri(image, "JPEG", quality=88)
    return f'<img{" class=small" if small else ""} alt="" src="{shown}">'
