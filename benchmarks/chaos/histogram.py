"""Draws a histogram of stalls as SVG. Pure."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

# The upper bound of each bar in seconds. Each is twice the one before.
BOUNDS_S = tuple(0.01 * 2**i for i in range(12))
_WIDTH, _HEIGHT, _MARGIN, _BASE = 720, 300, 48, 240
_STYLE = "font-family:sans-serif;font-size:12px;fill:#333"


def draw_histogram(title: str, undisturbed_s: Sequence[float], hit_s: Sequence[float]) -> str:
    """Two bars for each range of stalls: the share of streams without and with a fault."""
    groups = [("no fault", "#9bb8d3", undisturbed_s), ("during a fault", "#c0504d", hit_s)]
    step = (_WIDTH - 2 * _MARGIN) / (len(BOUNDS_S) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"'
        f' style="{_STYLE}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_MARGIN}" y="20">{escape(title)}</text>',
    ]
    for place, (name, colour, stalls_s) in enumerate(groups):
        parts.append(_legend(place, f"{name}: {len(stalls_s)} streams", colour))
        for i, count in enumerate(counts(stalls_s)):
            share = count / max(1, len(stalls_s))
            x = _MARGIN + i * step + 2 + place * (step / 2 - 2)
            parts.append(_bar(x, step / 2 - 3, share, colour, count))
    parts += [_label(_MARGIN + (i + 1) * step, bound_s) for i, bound_s in enumerate(BOUNDS_S)]
    parts.append(
        f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">'
        "longest wait for a token</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


def counts(stalls_s: Sequence[float]) -> list[int]:
    """The number of stalls in each range; the last number is of those above all bounds."""
    found = [0] * (len(BOUNDS_S) + 1)
    for stall_s in stalls_s:
        found[sum(stall_s > bound_s for bound_s in BOUNDS_S)] += 1
    return found


def _bar(x: float, width: float, share: float, colour: str, count: int) -> str:
    height = share * (_BASE - 60)
    text = ""
    if count:
        text = (
            f'<text x="{x + width / 2:.1f}" y="{_BASE - height - 3:.1f}" text-anchor="middle"'
            f' style="font-size:9px">{count}</text>'
        )
    return (
        f'<rect x="{x:.1f}" y="{_BASE - height:.1f}" width="{width:.1f}" height="{height:.1f}"'
        f' fill="{colour}"/>{text}'
    )


def _label(x: float, bound_s: float) -> str:
    text = f"{1000 * bound_s:.0f} ms" if bound_s < 1 else f"{bound_s:.1f} s"
    place = f'x="{x:.1f}" y="{_BASE + 16}" text-anchor="middle"'
    return f'<text {place} style="font-size:10px">{text}</text>'


def _legend(place: int, text: str, colour: str) -> str:
    y = 16 + 16 * place
    x = _WIDTH - 220
    return (
        f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
        f'<text x="{x + 16}" y="{y}">{escape(text)}</text>'
    )
