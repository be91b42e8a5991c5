"""What HTML pages of one file have in common: their templates' settings, and texts that fit a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


def template(path: Path, **filters: Callable[..., Any]) -> jinja2.Template:
    """A Jinja template that escapes all that it is given, and fails where it is not given what it names.

    Args:
        path: of the template.
        filters: further filters, by name.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)


def shorten(text: str, longest: int) -> str:
    """At most `longest` characters on one line, cut with an ellipsis: a caption may have a million."""
    text = " ".join(text.split(None, longest)[:longest])  # so many words are too long already
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
