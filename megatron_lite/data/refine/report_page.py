"""report.html: what each stage of the refinery took away, as bars, and samples of it. One file, nothing is loaded."""

from __future__ import annotations

import colorsys
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_lite.data.refine.tally import FAILED

_WIDTH, _LABEL, _ROW, _BAR = 960, 170, 30, 18
_NUMBERS = 330
"""Room for counts of hundreds of millions."""
_MOST_REASONS = 15
_KEPT, _ASIDE = "#4a7c59", "#555555"
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}svg{width:100%;height:auto;font:13px system-ui,sans-serif}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{text-align:right;padding:.2rem .6rem;border-bottom:1px
solid #ddd}td:first-child,th:first-child{text-align:left}.swatch{display:inline-block;width:.8em;height:.8em;
border-radius:2px;margin-right:.4em}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:.6rem;
border-radius:4px;font-size:.8rem;margin:.2rem 0 .8rem}summary{cursor:pointer;padding:.15rem 0}.place{color:#666;
font-size:.85rem}.options{color:#666;font-size:.85rem}.why td:nth-child(-n+2){text-align:left;
white-space:nowrap}.bar{width:50%}.bar div{height:1.1em;min-width:1px}
"""


def page(report: Mapping[str, Any]) -> str:
    """The page of a report, as `Report.plain` gives it."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>What the refinery did</title>',
            f"<style>{_STYLE}</style></head><body><h1>What the refinery did</h1>",
            f"<p>{_summary(report)}</p>",
            "<h2>Documents, stage by stage</h2>",
            _bars(report["stages"]),
            *_why(report["stages"]),
            "<h2>Counts and cost</h2>",
            _table(report),
            "<h2>Samples of what was dropped</h2>",
            *map(_stage, report["stages"]),
            "</body></html>\n",
        ]
    )


def _summary(report: Mapping[str, Any]) -> str:
    documents = report["documents"]
    parts = [
        f"{documents:,} documents were read",
        f"<b>{report['kept']:,} kept</b> ({_share(report['kept'], documents)})",
    ]
    parts.append(f"{report['dropped']:,} dropped")
    if report["quarantined"]:
        parts.append(f"{report['quarantined']:,} set aside in quarantine.jsonl, since a stage failed on them")
    return "; ".join(parts) + "."


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _colours(reasons: Sequence[str]) -> dict[str, str]:
    """A colour for each reason of a stage, from red to yellow."""
    found = {}
    for place, reason in enumerate(reasons):
        red, green, blue = colorsys.hls_to_rgb(
            0.02 + 0.11 * place / max(len(reasons), 1), 0.45 + 0.06 * (place % 3), 0.7
        )
        found[reason] = f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"
    return found


def _reasons(stage: Mapping[str, Any]) -> list[tuple[str, int]]:
    return sorted(stage["dropped"].items(), key=lambda item: (-item[1], item[0]))


def _bars(stages: Sequence[Mapping[str, Any]]) -> str:
    """One bar a stage, all to one scale: what it kept, then what it dropped by reason, most first."""
    most = max((stage["documents"] for stage in stages), default=0) or 1
    scale = (_WIDTH - _LABEL - _NUMBERS) / most
    height = _ROW * len(stages)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Documents kept and dropped by each stage">']
    for row, stage in enumerate(stages):
        top = row * _ROW + (_ROW - _BAR) / 2
        middle = row * _ROW + _ROW / 2
        parts.append(_text(_LABEL - 10, middle, stage["name"], "end"))
        at = float(_LABEL)
        reasons = _reasons(stage)
        colours = _colours([reason for reason, _ in reasons])
        pieces = [("kept", stage["kept"], _KEPT), *((why, count, colours[why]) for why, count in reasons)]
        if stage["quarantined"]:
            pieces.append((FAILED, stage["quarantined"], _ASIDE))
        for what, count, colour in pieces:
            title = f"<title>{html.escape(what)}: {count:,} ({_share(count, stage['documents'])})</title>"
            width = count * scale
            parts.append(
                f'<rect x="{at:.2f}" y="{top:g}" width="{width:.2f}" height="{_BAR}" fill="{colour}">{title}</rect>'
            )
            at += width
        gone = sum(count for _, count in reasons)
        said = f"{stage['kept']:,} kept" + (f", −{gone:,} ({_share(gone, stage['documents'])})" if gone else "")
        said += f", {stage['quarantined']:,} set aside" if stage["quarantined"] else ""
        parts.append(_text(at + 8, middle, said, "start"))
    return "\n".join([*parts, "</svg>"])


def _why(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The most frequent reasons of all stages, a bar each; nothing where nothing was dropped."""
    found = []
    for stage in stages:
        reasons = _reasons(stage)
        colours = _colours([reason for reason, _ in reasons])
        found += [(count, stage["name"], reason, colours[reason]) for reason, count in reasons]
    found.sort(key=lambda item: -item[0])
    if not found:
        return
    yield "<h2>Why documents were dropped</h2><table class='why'>"
    for count, stage, reason, colour in found[:_MOST_REASONS]:
        bar = f'<div style="width:{count / found[0][0]:.1%};background:{colour}"></div>'
        yield f'<tr><td>{stage}</td><td>{html.escape(reason)}</td><td class="bar">{bar}</td><td>{count:,}</td></tr>'
    if rest := found[_MOST_REASONS:]:
        left = sum(count for count, *_ in rest)
        yield f"<tr><td>{len(rest)} more reasons</td><td></td><td></td><td>{left:,}</td></tr>"
    yield "</table>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.2f}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="middle">{html.escape(text)}</text>'


def _table(report: Mapping[str, Any]) -> str:
    heads = (
        *("stage", "in", "kept", "edited", "dropped", "set aside"),
        *("characters in", "characters kept", "CPU seconds", "of all"),
    )
    seconds = {place: cost["seconds"] for place, cost in enumerate(report["cost"])}
    total = math.fsum(seconds.values())
    rows = []
    for place, stage in enumerate(report["stages"]):
        numbers = [stage[name] for name in ("documents", "kept", "edited")]
        numbers += [sum(stage["dropped"].values()), stage["quarantined"], stage["characters"], stage["kept_characters"]]
        cells = [*(f"{number:,}" for number in numbers), f"{seconds[place]:,.2f}", _share(seconds[place], total)]
        rows.append(f"<tr><td>{stage['name']}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _stage(stage: Mapping[str, Any]) -> str:
    """The reasons of a stage with their samples; nothing for one that took nothing away."""
    return "\n".join(_told(stage)) if stage["dropped"] or stage["quarantined"] else ""


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _told(stage: Mapping[str, Any]) -> Iterator[str]:
    options = ", ".join(f"{name} {_plain(value)}" for name, value in stage["options"].items())
    yield f'<h3>{stage["name"]}</h3><p class="options">{html.escape(options)}</p>'
    reasons = _reasons(stage)
    colours = _colours([reason for reason, _ in reasons]) | {FAILED: _ASIDE}
    if stage["quarantined"]:
        reasons.append((FAILED, stage["quarantined"]))
    for reason, count in reasons:
        swatch = f'<span class="swatch" style="background:{colours[reason]}"></span>'
        share = _share(count, stage["documents"])
        yield f"<details><summary>{swatch}{html.escape(reason)}: {count:,} ({share})</summary>"
        for _, place, detail, text in stage["samples"][reason]:
            yield f'<div class="place">{html.escape(place)}{": " + html.escape(detail) if detail else ""}</div>'
            yield f"<pre>{html.escape(text) or '(not readable)'}</pre>"
        yield "</details>"
