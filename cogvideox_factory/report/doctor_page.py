"""The page that `cogvideox doctor --html` leaves: what a data set holds and what becomes of every clip of it.

One file that fetches nothing. It is bounded however large the set is: what a list leaves out is counted below it, and
`--json` has every row.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cogvideox_factory.data.census import Census
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.reasons import printable
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.report import html
from cogvideox_factory.report.remarks import remarks, short

MAX_PICTURES = 120
"""Clips that are shown as pictures."""

_MAX_GROUPS, _MAX_MEMBERS = 12, 6
_MAX_LOST = 500
_MAX_SIZES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything the page tells."""

    manifest: Manifest
    census: Census
    spec: ClipSpec
    """What clips were looked at for."""
    pictures: Mapping[int | str, bytes]
    """`Clip.number` -> JPEG of the clip's first frame, for those of `numbers_to_show` that could be decoded."""
    skipped: tuple[str, ...] = ()
    """What was not looked at, and why."""
    buckets: Mapping[str, int] = field(default_factory=dict)
    """Clips of each bucket, where a run has several."""


def numbers_to_show(manifest: Manifest, census: Census, *, limit: int = MAX_PICTURES) -> list[int | str]:
    """Return the numbers of usable clips to show: what was remarked on first, then others spread over the whole set."""
    alike = [clip.number for group in _groups(manifest, census) for clip in group]
    chosen = dict.fromkeys(list(dict.fromkeys([*alike, *census.cut, *census.black]))[:limit])
    others = [clip.number for clip in manifest.usable if clip.number not in chosen]
    room = min(limit - len(chosen), len(others))
    spread = [others[place * len(others) // room] for place in range(room)]
    return [*chosen, *spread]


def _groups(manifest: Manifest, census: Census) -> list[list[Clip]]:
    """Return the clips of each group of near-duplicates, few of each and not too many groups."""
    by_row = {clip.row: clip for clip in manifest.rows}
    groups = (census.near_duplicates or [])[:_MAX_GROUPS]
    return [[by_row[row] for row in group[:_MAX_MEMBERS]] for group in groups]


def render(findings: Findings) -> str:
    """Return the whole page."""
    manifest, spec = findings.manifest, findings.spec
    lasting = f", {spec.fps:g} frames a second" if spec.num_frames > 1 else ""
    body = [
        html.heading(f"Data set {printable(manifest.source)}", 1),
        html.paragraph(
            f"Looked at for clips of {spec.num_frames} frame{'s' if spec.num_frames > 1 else ''}, "
            f"{spec.width}x{spec.height} pixels{lasting}. Nothing of it was changed."
        ),
        _cards(findings),
        html.heading("What becomes of every clip"),
        _states(manifest),
        *_buckets(findings.buckets),
        html.heading("Worth knowing"),
        _remarks(findings),
        html.heading("In numbers"),
        *_numbers(findings.census),
        *_alike(findings),
        html.heading("Clips"),
        *_clips(findings),
        *_lost(manifest),
    ]
    return html.document(f"Data set {printable(manifest.source)}", body)


def _cards(findings: Findings) -> str:
    manifest, census = findings.manifest, findings.census
    cards = [
        html.card(f"{len(manifest.clips):,}", "clips in all"),
        html.card(f"{len(manifest.usable):,}", "can be used"),
        html.card(f"{len(manifest.lost):,}", "cannot"),
    ]
    if census.near_duplicates is not None:
        cards.append(html.card(f"{sum(map(len, census.near_duplicates)):,}", "look like another"))
    if census.captions.max_tokens is not None:
        cards.append(html.card(f"{len(census.captions.too_long):,}", "captions are cut"))
    return html.row(cards)


def _states(manifest: Manifest) -> str:
    tally = Counter((clip.state, clip.reason or "") for clip in manifest.clips)
    examples: dict[tuple[str, str], str] = {}
    for clip in manifest.clips:
        examples.setdefault(
            (clip.state, clip.reason or ""), f"row {clip.number}: {printable(clip.detail or clip.name)}"
        )
    order = list(manifest.counts())
    rows = [
        (state, reason, count, examples[state, reason])
        for (state, reason), count in sorted(tally.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]
    table = html.table([*rows, ("total", "", len(manifest.clips), "")], ("state", "reason", "clips", "for example"))
    return "\n".join([table, *(html.paragraph(line, soft=True) for line in manifest.about_windows())])


def _buckets(buckets: Mapping[str, int]) -> list[str]:
    if not buckets:
        return []
    return [html.heading("Buckets", 3), html.table(list(buckets.items()), ("frames x height x width", "clips"))]


def _remarks(findings: Findings) -> str:
    rows = [tuple(remark) for remark in remarks(findings.manifest, findings.census)]
    rows += [("note", printable(note)) for note in findings.manifest.notes]
    rows += [("not looked at", printable(reason)) for reason in findings.skipped]
    return html.table(rows) if rows else html.paragraph("Nothing stands out.", soft=True)


def _numbers(census: Census) -> list[str]:
    measures = census.measures.values()
    rows = [
        (f"{m.title}, {m.unit}", len(m.values), float(m.values.min()), m.median, float(m.values.max()))
        for m in measures
    ]
    charts = []
    for measure in measures:
        counts, edges = measure.histogram()
        if len(counts) == 1:  # all the same: the table says it
            continue
        charts.append(html.histogram(counts.tolist(), edges.tolist(), f"{measure.title}, {measure.unit}"))
    sizes = list(census.sizes.items())
    parts = [html.table(rows, ("", "clips", "least", "median", "most")), html.row(charts)]
    if sizes:
        parts += [html.heading("Sizes", 3), html.table(sizes[:_MAX_SIZES], ("size", "clips"))]
    return [*parts, *_rest(len(sizes) - _MAX_SIZES, "other sizes")]


def _alike(findings: Findings) -> list[str]:
    groups = findings.census.near_duplicates or []
    if not groups:
        return []
    parts = [html.heading("Clips that look alike")]
    for group, clips in zip(groups, _groups(findings.manifest, findings.census)):
        parts.append(html.row([_thumb(findings, clip) for clip in clips]))
        parts += _rest(len(group) - _MAX_MEMBERS, "more in this group")
    return [*parts, *_rest(len(groups) - _MAX_GROUPS, "more groups")]


def _clips(findings: Findings) -> list[str]:
    alike = {clip.number for group in _groups(findings.manifest, findings.census) for clip in group}
    shown = set(numbers_to_show(findings.manifest, findings.census)) - alike
    figures = [_thumb(findings, clip) for clip in findings.manifest.usable if clip.number in shown]
    left = len(findings.manifest.usable) - len(figures) - len(alike)
    return [html.row(figures), *_rest(left, "more that can be used")]


def _thumb(findings: Findings, clip: Clip) -> str:
    notes = [
        "" if clip.number in findings.pictures else "no picture",
        f"window {clip.facts['window']}, from {clip.facts.get('start_seconds', 0):g} s"
        if "window" in clip.facts
        else "",
        f"cut at {', '.join(f'{s:g} s' for s in clip.facts['scene_cuts'])}" if clip.facts.get("scene_cuts") else "",
        f"{clip.facts['black_frames']} black" if clip.facts.get("black_frames") else "",
        f"{clip.facts['tokens_cut']} tokens cut" if "tokens_cut" in clip.facts else "",
    ]
    caption = f"{clip.number}. {printable(clip.name)} ({clip.state}): {short(clip.caption)}"
    return html.thumb(findings.pictures.get(clip.number), caption, note=", ".join(filter(None, notes)))


def _lost(manifest: Manifest) -> list[str]:
    if not manifest.lost:
        return []
    rows = [
        (c.number, printable(c.name), c.state, c.reason or "", printable(c.detail)) for c in manifest.lost[:_MAX_LOST]
    ]
    return [
        html.heading("Clips that cannot be used"),
        html.table(rows, ("row", "clip", "state", "reason", "what was found")),
        *_rest(len(manifest.lost) - _MAX_LOST, "more"),
    ]


def _rest(count: int, what: str) -> Iterable[str]:
    return [html.paragraph(f"… and {count:,} {what}", soft=True)] if count > 0 else []
