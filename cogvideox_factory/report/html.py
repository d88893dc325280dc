"""Parts of a self-contained HTML page: no script, no font, no picture comes from anywhere else.

Every function returns a string of HTML; text that is not ours is escaped where it enters.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_MEDIA = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --card: #f7f7f9; --paper: #fff;
        --good: #18794e; --before: #8b8d98; --after: #3e63dd; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #b0b4ba; --line: #363a3f; --card: #1c1d20;
        --paper: #111113; --good: #3dd68c; --before: #8b8d98; --after: #849dff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; color: var(--ink); background: var(--paper);
       font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.soft, figcaption, th { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1.1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; }
figure { margin: 0; width: 9rem; }
figure.pair { width: 17rem; }
figure video, figure img { width: 8.2rem; height: 8.2rem; border-radius: .4rem; image-rendering: pixelated;
       background: var(--line); object-fit: cover; }
figure.thumb { width: 9.2rem; } figure.thumb img, figure.thumb .blank { display: block; width: auto; height: auto;
       max-width: 9.2rem; max-height: 9.2rem; image-rendering: auto; }
figure.thumb .blank { width: 9.2rem; height: 5.2rem; border-radius: .4rem; background: var(--line); }
figcaption { overflow-wrap: anywhere; font-size: .8rem; line-height: 1.3; margin-top: .3rem; }
.no { color: var(--before); } .yes { color: var(--good); }
table { border-collapse: collapse; margin-bottom: 1rem; font-size: .92rem; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line);
         font-weight: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem;
      overflow-x: auto; font-size: .85rem; line-height: 1.5; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
"""


def document(title: str, body: Sequence[str]) -> str:
    """Return a whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """Return a paragraph of plain text."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def row(parts: Sequence[str]) -> str:
    """Return `parts` side by side, wrapping."""
    return f'<div class="row">{"".join(parts)}</div>'


def card(number: str, label: str) -> str:
    """Return one large figure with what it is."""
    return f'<div class="card"><b>{escape(number)}</b><span class="soft">{escape(label)}</span></div>'


def figure(media: Sequence[Path], caption: str, *, note: str = "", good: bool | None = None) -> str:
    """Return one picture or looping video, or a pair, over its caption; the files' bytes are part of the page."""
    kind = "" if len(media) == 1 else ' class="pair"'
    mark = "" if good is None else f' <span class="{"yes" if good else "no"}">{escape(note)}</span>'
    pictures = " ".join(_medium(path) for path in media)
    return f"<figure{kind}>{pictures}<figcaption>{escape(caption)}{mark}</figcaption></figure>"


def thumb(jpeg: bytes | None, caption: str, *, note: str = "") -> str:
    """Return a small JPEG in its own shape over its caption, or a blank where there is no picture."""
    picture = '<span class="blank"></span>'
    if jpeg is not None:
        picture = f'<img src="{_data_uri("image/jpeg", jpeg)}" alt="">'
    mark = f'<br><span class="no">{escape(note)}</span>' if note else ""
    return f'<figure class="thumb">{picture}<figcaption>{escape(caption)}{mark}</figcaption></figure>'


def table(rows: Sequence[Sequence[str | float | int]], header: Sequence[str] = ()) -> str:
    """Return a table; numbers are aligned right."""
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(_cell(value) for value in values)}</tr>" for values in rows)
    return f"<table>{head}{body}</table>"


def commands(lines: Sequence[str]) -> str:
    """Return shell commands to copy."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    width: int = 720,
    height: int = 260,
    x_label: str = "",
    colours: Sequence[str] = (),
) -> str:
    """Return an SVG of lines through (x, y) points, y from 0.

    The first series is drawn pale, as background, and each is named below; with `colours`, one a series, all are drawn
    alike and named nowhere (see `legend`).
    """
    points = [point for line in series.values() for point in line]
    assert points, "nothing to draw"
    left, bottom, top = 48, 30, 12
    x_most, y_most = max(x for x, _ in points) or 1, max(y for _, y in points) * 1.05 or 1

    def place(x: float, y: float) -> str:
        across, up = x / x_most * (width - left - 12), y / y_most * (height - bottom - top)
        return f"{left + across:.1f},{height - bottom - up:.1f}"

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = y_most * share
        y = float(place(0, value).split(",")[1])
        parts.append(f'<line x1="{left}" x2="{width - 12}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:.2g}</text>')
    for index, (name, line) in enumerate(series.items()):
        colour = colours[index] if colours else ("var(--before)", "var(--after)", "var(--good)")[index % 3]
        path = " ".join(place(x, y) for x, y in line)
        thickness = 1.6 if colours else 1.2 if index == 0 else 2.2
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thickness}"/>')
        if colours:
            continue
        parts.append(
            f'<text x="{left + 60 + 180 * index}" y="{height - 8}" style="fill:{colour}">{escape(name)}</text>'
        )
    parts.append(f'<text x="{left}" y="{height - 8}">0</text>')
    parts.append(f'<text x="{width - 12}" y="{height - 8}" text-anchor="end">{x_most:g} {escape(x_label)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(parts)}</svg>'


def legend(colours: Mapping[str, str]) -> str:
    """Return names, each behind a square of its colour."""
    return row(
        [f'<span><span style="color:{colour}">■</span> {escape(name)}</span>' for name, colour in colours.items()]
    )


def histogram(counts: Sequence[int], edges: Sequence[float], title: str, *, width: int = 300, height: int = 130) -> str:
    """Return an SVG of bars, `counts[i]` high, from `edges[i]` to `edges[i + 1]` (one bar may have no width)."""
    assert len(edges) == len(counts) + 1, "a bar has two edges"
    left, bottom, top = 10, 20, 26
    most = max([*counts, 1])
    span = (width - 2 * left) / len(counts)
    parts = [f'<text x="{left}" y="14">{escape(title)}</text>']
    for place, count in enumerate(counts):
        tall = (height - bottom - top) * count / most
        x, y = left + place * span, height - bottom - tall
        tip = f"{edges[place]:.4g} to {edges[place + 1]:.4g}: {count:,}"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, span - 1):.1f}" height="{tall:.1f}" fill="var(--after)">'
            f"<title>{tip}</title></rect>"
        )
    axis = height - bottom
    parts.append(f'<line x1="{left}" x2="{width - left}" y1="{axis}" y2="{axis}" stroke="var(--line)"/>')
    parts.append(f'<text x="{left}" y="{height - 5}">{edges[0]:.4g}</text>')
    parts.append(f'<text x="{width - left}" y="{height - 5}" text-anchor="end">{edges[-1]:.4g}</text>')
    parts.append(f'<text x="{width - left}" y="14" text-anchor="end">{most:,} at most</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(parts)}</svg>'


def _cell(value: str | float | int) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="number">{value:,}</td>' if isinstance(value, int) else f'<td class="number">{value:.3g}</td>'


def _medium(path: Path) -> str:
    kind = _MEDIA[path.suffix]
    source = _data_uri(kind, path.read_bytes())
    if kind.startswith("image"):
        return f'<img src="{source}" alt="">'
    return f'<video src="{source}" autoplay loop muted playsinline></video>'


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
