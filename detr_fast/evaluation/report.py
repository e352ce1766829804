"""An evaluation as one HTML page that needs nothing beside it: numbers, tables, curves, pictures, a filter by class.

What goes into it is a `Page`, which the task makes; here it becomes text. Names from the data are escaped.
"""

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

_LONG_SIDE = 560  # of an embedded picture, in pixels
_QUALITY = 78
_CHART = (430, 330)  # width and height
_MARGIN = 42
_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df")

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first cell of a row is its name.

    Attributes:
        of_classes: the rows are classes, which the filter knows by these names.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    of_classes: bool = False


@dataclass(frozen=True)
class Curve:
    """Precision over recall, both in 0..1. `of_class`: shown only when the filter is set to its name."""

    name: str
    recall: Sequence[float]
    precision: Sequence[float]
    of_class: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Confusion:
    """Counts [K + 1, K + 1]: a row for each annotated class, a column for each predicted one; the last is nothing."""

    names: Sequence[str]
    counts: np.ndarray
    note: str


@dataclass(frozen=True)
class Page:
    """What there is to say about an evaluation.

    Attributes:
        tables: in the order in which they are shown.
        charts: of curves.
        confusion: None: there is none, and `notes` may say why.
        notes: sentences.
        scores: image id → how good its detections are, in 0..1; by it the worst and the best are chosen.
        results: image id → its detections, as the task's `draw_sample` takes them.
        names: category id → name, as the tables of classes have it.
        threshold: lowest score of the detections that are drawn.
    """

    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    confusion: Confusion | None = None
    notes: Sequence[str] = ()
    scores: Mapping[int, float] = field(default_factory=dict)
    results: Callable[[int], dict[str, Any]] | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    threshold: float = 0.5


@dataclass(frozen=True)
class Shown:
    """An image with its annotations, and with its detections. `classes`: names of what is in either."""

    caption: str
    truth: Image.Image
    found: Image.Image
    classes: Iterable[str] = ()


def render(title: str, subtitle: str, page: Page, pictures: Mapping[str, Sequence[Shown]]) -> str:
    """The page as HTML.

    Args:
        title, subtitle: plain text.
        page: the numbers.
        pictures: heading → pictures, of which each is embedded as JPEG with at most 560 pixels a side.
    """
    names = [str(row[0]) for table in page.tables if table.of_classes for row in table.rows]
    number_of = {name: n for n, name in enumerate(dict.fromkeys(names))}
    beside = [_table(table, number_of) for table in page.tables if not table.of_classes]
    beside += [_chart(chart, number_of) for chart in page.charts]
    parts = [f'<div class="side">{"".join(beside)}</div>']
    parts += [_table(table, number_of) for table in page.tables if table.of_classes]
    if page.confusion is not None:
        parts.append(_confusion(page.confusion))
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in page.notes]
    for heading, shown in pictures.items():
        figures = "".join(_figure(each, number_of) for each in shown)
        parts.append(f'<h2>{html.escape(heading)}</h2><div class="gallery">{figures}</div>')
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title), subtitle=html.escape(subtitle), filter=_filter(number_of), body="\n".join(parts)
    )


def _filter(number_of: Mapping[str, int]) -> str:
    if not number_of:
        return ""
    options = "".join(f'<option value="{n}">{html.escape(name)}</option>' for name, n in number_of.items())
    label = '<label for="class-filter">class </label>'
    return f'<div class="bar">{label}<select id="class-filter"><option value="">all</option>{options}</select></div>'


def _table(table: Table, number_of: Mapping[str, int]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in table.headings)
    rows = []
    for row in table.rows:
        mark = f' data-classes="{number_of[str(row[0])]}"' if table.of_classes else ""
        rows.append(f"<tr{mark}>{''.join(_cell(value) for value in row)}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<section><h2>{html.escape(table.title)}</h2>{note}<div class="scroll">{body}</div></section>'


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        missing = math.isnan(value)
        return f'<td data-value="{-1 if missing else value}">{"–" if missing else f"{value:.3f}"}</td>'
    text = html.escape(str(value))
    return f'<td data-value="{text}">{text}</td>'


def _chart(chart: Chart, number_of: Mapping[str, int]) -> str:
    width, height = _CHART
    inner_width, inner_height = width - _MARGIN - 10, height - _MARGIN - 10
    lines = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = _MARGIN + tick * inner_width, 10 + (1 - tick) * inner_height
        lines.append(f'<path d="M{x} 10V{10 + inner_height}M{_MARGIN} {y}H{_MARGIN + inner_width}" stroke="#e2e6ec"/>')
        lines.append(f'<text x="{x}" y="{height - 18}" text-anchor="middle">{tick:g}</text>')
        lines.append(f'<text x="{_MARGIN - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    lines.append(f'<text x="{_MARGIN + inner_width / 2}" y="{height - 3}" text-anchor="middle">recall</text>')
    lines.append(f'<text transform="translate(11 {10 + inner_height / 2}) rotate(-90)">precision</text>')
    legend, general = [], 0
    for curve in chart.curves:
        points = " ".join(
            f"{_MARGIN + x * inner_width:.1f},{10 + (1 - y) * inner_height:.1f}"
            for x, y in zip(curve.recall, curve.precision, strict=True)
        )
        name = html.escape(curve.name)
        if curve.of_class:
            mark = f' class="hidden" data-only-filtered data-classes="{number_of[curve.name]}"'
            lines.append(f'<polyline points="{points}" stroke="#111"{mark}><title>{name}</title></polyline>')
            continue
        colour = _COLOURS[general % len(_COLOURS)]
        general += 1
        lines.append(f'<polyline points="{points}" stroke="{colour}"><title>{name}</title></polyline>')
        legend.append(f'<span style="color:{colour}">■</span> {name}')
    legend += ['<span style="color:#111">■</span> the chosen class'] if general < len(chart.curves) else []
    picture = f'<svg width="{width}" height="{height}" role="img">{"".join(lines)}</svg>'
    return f"<section><h2>{html.escape(chart.title)}</h2>{picture}<div>{' &nbsp; '.join(legend)}</div></section>"


def _confusion(confusion: Confusion) -> str:
    counts, nothing = confusion.counts, len(confusion.names)
    # Classes that neither occur nor are predicted would only widen it.
    kept = [k for k in range(nothing) if counts[k].any() or counts[:, k].any()] + [nothing]
    names = [*confusion.names, "nothing"]
    head = "".join(f"<th>{html.escape(names[k])}</th>" for k in kept)
    rows = []
    for k in kept:
        total = max(int(counts[k].sum()), 1)
        cells = []
        for other in kept:
            share, colour = counts[k, other] / total, "31,111,235" if k == other else "209,36,47"
            style = f' style="background:rgba({colour},{share:.2f})"' if counts[k, other] else ""
            cells.append(f"<td{style}>{counts[k, other] or ''}</td>")
        rows.append(f"<tr><th>{html.escape(names[k])}</th>{''.join(cells)}</tr>")
    body = f'<table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    note = f'<p class="note">{html.escape(confusion.note)}</p>'
    return f'<section><h2>confusion</h2>{note}<div class="scroll">{body}</div></section>'


def _figure(shown: Shown, number_of: Mapping[str, int]) -> str:
    classes = " ".join(str(number_of[name]) for name in sorted(set(shown.classes)) if name in number_of)
    images = "".join(
        f'<img src="{_as_uri(image)}" alt="{text}" title="{text}"> '
        for image, text in ((shown.truth, "annotated"), (shown.found, "predicted"))
    )
    mark = f' data-classes="{classes}"' if number_of else ""
    return f"<figure{mark}><figcaption>{html.escape(shown.caption)}</figcaption>{images}</figure>"


def _as_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_LONG_SIDE, _LONG_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
