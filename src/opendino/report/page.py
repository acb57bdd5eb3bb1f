# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: notes, tables, and pictures embedded so that the file can be passed on alone."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opendino.errors import MissingExtraError

TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{{ title }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h2{margin:2rem 0 .5rem}.table{overflow-x:auto}table{border-collapse:collapse}
td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right;overflow-wrap:anywhere}
td:first-child,th:first-child{text-align:left}img{max-width:100%;margin:.3rem .3rem .3rem 0}
figure{display:inline-block;max-width:100%;margin:.4rem .8rem .4rem 0;vertical-align:top}
figcaption{font-size:.85em;color:#555;max-width:34rem}
code{white-space:nowrap}pre{background:#f6f6f6;padding:.6rem .8rem;overflow-x:auto}summary{cursor:pointer;color:#555}
.note{border-left:.35rem solid;padding:.4rem .8rem;margin:.5rem 0}.note b{margin-right:.4rem}
.ok{border-color:#2a7a3b;background:#eef7f0}.watch{border-color:#c98a00;background:#fdf6e5}
.bad{border-color:#b3261e;background:#fbecea}</style>
<h1>{{ title }}</h1>
{% for s in sections %}<h2>{{ s.title }}</h2>
{% for n in s.notes %}<div class="note {{ n.level }}"><b>{{ n.label }}</b>{{ n.text | flags }}</div>{% endfor %}
{% for p in s.text %}<p>{{ p }}</p>{% endfor %}{% for c in s.commands %}<pre>{{ c }}</pre>{% endfor %}
{% if s.folded %}<details><summary>show</summary>{% endif %}
{% if s.rows %}<div class="table"><table><tr>{% for c in s.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for r in s.rows %}<tr>{% for c in r %}<td>{{ c }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
{% for f in s.figures %}
<figure{% if f.width %} style="width:{{ f.width }}px"{% endif %}><img alt="{{ f.caption }}" src="{{ f.uri }}">
<figcaption>{{ f.caption }}</figcaption></figure>{% endfor %}{% if s.folded %}</details>{% endif %}{% endfor %}</html>
"""
LABELS = {"ok": "Fine.", "watch": "Watch.", "bad": "Bad."}


@dataclass(frozen=True)
class Figure:
    """A PNG with its caption; `width` is the pixels it is shown at where there is room, None for its own."""

    png: bytes
    caption: str
    width: int | None = None

    @property
    def uri(self) -> str:
        """The picture as a data address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Note:
    """A sentence that stands out; `level` is "ok", "watch" or "bad"."""

    level: str
    text: str

    @property
    def label(self) -> str:
        """The level as a word, for readers who do not see the colour."""
        return LABELS.get(self.level, self.level)


@dataclass(frozen=True)
class Section:
    """A heading, its notes, paragraphs, command lines, a table and pictures, in this order.

    `folded` hides table and pictures until they are asked for.
    """

    title: str
    text: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figures: Sequence[Figure] = field(default_factory=list)
    notes: Sequence[Note] = ()
    commands: Sequence[str] = ()
    folded: bool = False


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Render the sections into one HTML file, written aside and renamed."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", "The report") from error
    from markupsafe import Markup, escape

    environment = jinja2.Environment(autoescape=True)
    # Command-line flags stay on one line and look like code.
    environment.filters["flags"] = lambda text: Markup(
        re.sub(r"(--[a-z][\w.-]*\w)", r"<code>\1</code>", str(escape(text)))
    )
    template = environment.from_string(TEMPLATE)
    aside = path.with_name(f".{path.name}")
    aside.write_text(template.render(title=title, sections=sections), encoding="utf-8")
    aside.rename(path)
