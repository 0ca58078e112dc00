"""Plots as SVG, to be read in light and dark: bars of quantiles, curves over logarithmic axes."""
import html
import math

WIDTH, LEFT, RIGHT, TOP = 860, 70, 120, 56
COLOURS = [
    ("#0a62c4", "#58a6ff"), ("#c2410c", "#f0883e"), ("#7c3aad", "#bc8cff"), ("#1a7f37", "#56d364"), ("#9a6700", "#d29922"),
    ("#bf3989", "#f778ba"), ("#57606a", "#9aa4ae"), ("#0e7490", "#39c5cf"), ("#a40e26", "#ff7b72"), ("#4d2d00", "#c69026"),
    ("#3d5a80", "#79c0ff"), ("#5a7d2a", "#a5d65a"),
]


def head(title, height):
    light = "\n".join(f"  .c{i} {{ stroke: {a}; }} .f{i} {{ fill: {a}; }}" for i, (a, _) in enumerate(COLOURS))
    dark = "\n".join(f"    .c{i} {{ stroke: {b}; }} .f{i} {{ fill: {b}; }}" for i, (_, b) in enumerate(COLOURS))
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">',
        f"<title>{html.escape(title)}</title>",
        "<style>\n  text { font: 12px system-ui, -apple-system, \"Segoe UI\", sans-serif; fill: #1f2328; }\n"
        "  .title { font-size: 15px; font-weight: 600; } .us { font-weight: 700; } .soft { fill: #59636e; }\n"
        "  .grid { stroke: #d8dee4; } .line { fill: none; stroke-width: 1.5; } .line.us { stroke-width: 3.5; }\n"
        "  .range { stroke-width: 1; opacity: 0.5; }\n" + light + "\n"
        "  @media (prefers-color-scheme: dark) {\n    text { fill: #e6edf3; } .soft { fill: #9aa4ae; } .grid { stroke: #30363d; }\n"
        + dark + "\n  }\n</style>",
        f'<text class="title" x="16" y="26">{html.escape(title)}</text>',
    ]


def decades(low, high):
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return first, max(last, first + 1)


def bars(title, rows, names, write, us):
    """Quantiles of each peer, one bar each, lengths logarithmic: rows of (peer, [values])."""
    rows = [(peer, values) for peer, values in rows if all(value > 0 for value in values)]
    if not rows:
        return None
    bar, gap, left = 9, 14, 110
    block = bar * len(names) + gap
    height = TOP + block * len(rows) + 40
    first, last = decades(min(min(v) for _, v in rows), max(max(v) for _, v in rows))
    x = lambda value: left + (math.log10(value) - first) / (last - first) * (WIDTH - left - 90)
    out = head(title, height)
    for n, name in enumerate(names):
        out.append(f'<rect class="f{n}" x="{WIDTH - 320 + 75 * n}" y="16" width="11" height="11"/>'
                   f'<text x="{WIDTH - 305 + 75 * n}" y="26">{name}</text>')
    for decade in range(first, last + 1):
        at = x(10**decade)
        out.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP - 8}" x2="{at:.1f}" y2="{height - 32}"/>'
                   f'<text class="soft" x="{at:.1f}" y="{height - 14}" text-anchor="middle">{write(10**decade)}</text>')
    for row, (peer, values) in enumerate(rows):
        top = TOP + row * block
        mark = ' class="us"' if peer == us else ""
        out.append(f'<text{mark} x="{left - 8}" y="{top + bar * len(names) / 2 + 4:.0f}" text-anchor="end">{peer}</text>')
        for n, value in enumerate(values):
            y = top + bar * n
            out.append(f'<rect class="f{n}" x="{left}" y="{y}" width="{max(1, x(value) - left):.1f}" height="{bar - 1}"/>')
            if n in (0, 2):
                out.append(f'<text class="soft" x="{x(value) + 4:.1f}" y="{y + 9}">{write(value)}</text>')
    return "\n".join(out) + "\n</svg>\n"


def curves(title, lines, x_title, write, us):
    """Lines of (x, y, low, high) for each peer, both axes logarithmic."""
    lines = {peer: [point for point in points if min(point) > 0] for peer, points in lines.items()}
    lines = {peer: points for peer, points in lines.items() if points}
    if sum(len(points) > 1 for points in lines.values()) == 0:
        return None
    height = 460
    bottom = height - 52
    xs = [point[0] for points in lines.values() for point in points]
    ys = [value for points in lines.values() for point in points for value in point[1:]]
    (x0, x1), (y0, y1) = decades(min(xs), max(xs)), decades(min(ys), max(ys))
    x0, x1 = math.log10(min(xs)), max(math.log10(max(xs)), math.log10(min(xs)) + 0.3)
    x = lambda value: LEFT + (math.log10(value) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
    y = lambda value: bottom - (math.log10(value) - y0) / (y1 - y0) * (bottom - TOP)
    out = head(title, height)
    for decade in range(y0, y1 + 1):
        at = y(10**decade)
        out.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>'
                   f'<text class="soft" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{write(10**decade)}</text>')
    ticks = sorted(set(xs)) if len(set(xs)) <= 8 else [10**d for d in range(math.ceil(x0), math.floor(x1) + 1)]
    for tick in ticks:
        out.append(f'<text class="soft" x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 10}" text-anchor="middle">{x_title}</text>')
    labels = []
    for n, (peer, points) in enumerate(sorted(lines.items(), key=lambda line: line[0] != us)):
        colour, mark = n % len(COLOURS), " us" if peer == us else ""
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py, _, _ in points)
        out.append(f'<polyline class="line c{colour}{mark}" points="{path}"/>')
        for px, py, low, high in points:
            out.append(f'<line class="range c{colour}" x1="{x(px):.1f}" y1="{y(low):.1f}" x2="{x(px):.1f}" y2="{y(high):.1f}"/>'
                       f'<circle class="f{colour}" cx="{x(px):.1f}" cy="{y(py):.1f}" r="{4 if mark else 2.5}"/>')
        labels.append([y(points[-1][1]), peer, colour, mark, x(points[-1][0])])
    labels.sort()
    for previous, label in zip([None] + labels, labels):
        if previous and label[0] < previous[0] + 14:
            label[0] = previous[0] + 14
    for at, peer, colour, mark, end in labels:
        out.append(f'<text class="f{colour}{mark}" x="{end + 9:.1f}" y="{at + 4:.1f}">{peer}</text>')
    return "\n".join(out) + "\n</svg>\n"
