# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: tables, and pictures embedded so that the file can be passed on alone."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opendino.errors import MissingExtraError

TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;margin:.3rem .3rem .3rem 0}
figure{display:inline-block;margin:.4rem .8rem .4rem 0;vertical-align:top}figcaption{font-size:.85em;color:#555}</style>
<h1>{{ title }}</h1>
{% for s in sections %}<h2>{{ s.title }}</h2>{% for p in s.text %}<p>{{ p }}</p>{% endfor %}
{% if s.rows %}<table><tr>{% for c in s.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for r in s.rows %}<tr>{% for c in r %}<td>{{ c }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% for f in s.figures %}<figure><img alt="{{ f.caption }}" src="{{ f.uri }}"><figcaption>{{ f.caption }}</figcaption>
</figure>{% endfor %}{% endfor %}</html>
"""


@dataclass(frozen=True)
class Figure:
    """A PNG with its caption."""

    png: bytes
    caption: str

    @property
    def uri(self) -> str:
        """The picture as a data address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """A heading, its paragraphs, a table and pictures, in this order."""

    title: str
    text: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figures: Sequence[Figure] = field(default_factory=list)


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Render the sections into one HTML file, written aside and renamed."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", "The report") from error
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    aside = path.with_name(f".{path.name}")
    aside.write_text(template.render(title=title, sections=sections), encoding="utf-8")
    aside.rename(path)
