"""Plots as SVG text that stands alone or inside a page, and follows the reader's light or dark theme.

Every picture takes its colours from the CSS variables of `PALETTE`, which it also carries with it.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from uni_x.model.plan import LayerSpec, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = """\
:root { color-scheme: light dark; --ux-paper: #fcfbf8; --ux-ink: #23262b; --ux-faint: #6a6c70; --ux-line: #dedbd2;
  --ux-text: #2b6a99; --ux-image: #a8650c; --ux-shared: #6a5a94; }
@media (prefers-color-scheme: dark) { :root { --ux-paper: #17191d; --ux-ink: #e6e3dc; --ux-faint: #9fa1a6;
  --ux-line: #363a41; --ux-text: #82b9e2; --ux-image: #e2ae60; --ux-shared: #b3a4e0; } }
"""
FONT = "ui-sans-serif, system-ui, 'Helvetica Neue', Arial, sans-serif"

# the plan picture: y of the two ways where they run apart and together, and heights of the bars on them
_APART, _TOGETHER = {"text": 34.0, "image": 146.0}, {"text": 79.0, "image": 101.0}
_BAR, _SHARED_BAR = 42.0, 58.0
_WAYS = {"text": "text", "image": "images"}
_SEES = {"own": "its own", "all": "all"}

# matplotlib knows colours, not variables: each of these stands for one until the SVG is written
COLOURS = {
    name: f"#0102{number:02x}" for number, name in enumerate(("ink", "faint", "line", "text", "image", "shared"))
}


def wrap_svg(body: str, width: float, height: float, label: str) -> str:
    """An `<svg>` of that size in pixels around `body`; `label` is what a screen reader says in its place."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}"><style>{PALETTE}</style>{body}</svg>'
    )


def loss_plot(steps: Sequence[float], losses: Sequence[float], modality: str) -> str:
    """The loss of one modality (`text` or `image`) over the training steps, in nats a token."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(4.6, 2.7))
    axes = figure.add_axes((0.09, 0.17, 0.78, 0.79))
    colour = COLOURS[modality]
    axes.plot(steps, losses, color=colour, linewidth=1.8, marker="o" if len(steps) < 12 else None, markersize=4)
    axes.plot(steps[-1:], losses[-1:], "o", color=colour, markersize=5, clip_on=False)
    axes.annotate(
        f"{losses[-1]:.2f}",
        (steps[-1], losses[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        weight="bold",
        size=10,
    )
    axes.set_ylim(0, max(losses) * 1.06 or 1)
    axes.set_xlim(0, max(steps) or 1)
    axes.set_xlabel("step", color=COLOURS["faint"], size=9, labelpad=4)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    axes.tick_params(length=0, labelsize=9, labelcolor=COLOURS["faint"], pad=5)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["line"])
    first, last = (f"{losses[place]:.2f} at step {steps[place]:,.0f}" for place in (0, -1))
    return figure_to_svg(figure, f"Loss on {modality} tokens, from {first} to {last}", f"loss-{modality}")


def figure_to_svg(figure: "Figure", label: str, name: str) -> str:
    """A matplotlib figure as SVG: the same text for the same figure, and ids of its own where `name` is its own."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    body = text[text.index('<g id="figure_1">') : text.rindex("</svg>")]
    body = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, body)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    for variable, stand_in in COLOURS.items():
        body = body.replace(stand_in, f"var(--ux-{variable})")
    width, height = figure.get_size_inches() * 72
    return wrap_svg(re.sub(r"\s*\n\s*", " ", body), width, height, label)


def plan_picture(plan: Plan) -> str:
    """A plan, drawn in the order in which tokens pass it: the way of text above, that of images below.

    A part that both use is one bar, on which their ways meet; one that each has of its own is two bars, apart. Between
    the projections one ring around both ways says that a token sees everything, a ring on each that it sees its own
    modality. Long plans show a layer, or a pattern of layers, once and say which layers it stands for. Layers
    count from 0, as in the names of parameters.
    """
    pen = _PlanPen()
    for block in fold(plan):
        start = pen.x
        for place, spec in enumerate(block.specs):
            left = pen.x
            pen.layer(spec)
            if block.times == 1:
                pen.caption(left, pen.x, f"layer {block.first + place}", f"sees {_SEES[spec.sees]}", 196)
            elif len(block.specs) == 1:
                pen.caption(left, pen.x, f"layers {block.first}–{block.last}", f"see {_SEES[spec.sees]}", 196)
            else:
                pen.caption(left, pen.x, "", f"sees {_SEES[spec.sees]}", 180)
        if block.times > 1 and len(block.specs) > 1:
            pen.brace(start, pen.x, f"layers {block.first}–{block.last}: {block.times} times")
    return pen.finish(describe_plan(plan))


def describe_plan(plan: Plan) -> str:
    """A plan in words: `layer 0: apart for text and images, sees its own; layers 1 to 2: shared, see all`."""
    phrases = []
    for block in fold(plan, longest=0):
        single = block.first == block.last
        layers = f"layer {block.first}" if single else f"layers {block.first} to {block.last}"
        verb = "sees" if single or len(block.specs) > 1 else "see"
        kinds = " and ".join(f"{_sharing(spec)}, {verb} {_SEES[spec.sees]}" for spec in block.specs)
        phrases.append(f"{layers}, in turn: {kinds}" if len(block.specs) > 1 else f"{layers}: {kinds}")
    return "; ".join(phrases)


@dataclass(frozen=True)
class Block:
    """A pattern of layers and how many times it follows itself; `first` is the index of its first layer."""

    specs: Plan
    times: int
    first: int

    @property
    def last(self) -> int:
        """Index of the last layer."""
        return self.first + len(self.specs) * self.times - 1


def fold(plan: Plan, longest: int = 6) -> list[Block]:
    """A plan as blocks: layer by layer where it is not longer than `longest`, else with its repetitions folded."""
    if len(plan) <= longest:
        return [Block((spec,), 1, index) for index, spec in enumerate(plan)]
    blocks, index = [], 0
    while index < len(plan):
        candidates = [
            Block(plan[index : index + period], _repeats(plan, index, period), index) for period in (1, 2, 3, 4)
        ]
        block = max(candidates, key=lambda block: (block.times > 1) * len(block.specs) * block.times)
        blocks.append(block)
        index = block.last + 1
    return blocks


def _repeats(plan: Plan, start: int, period: int) -> int:
    pattern, times = plan[start : start + period], 1
    while len(pattern) == period and plan[start + period * times : start + period * (times + 1)] == pattern:
        times += 1
    return times


def _sharing(spec: LayerSpec) -> str:
    own = [
        name for name, part in zip(("norms", "q/k/v", "output", "ffn"), spec.parts, strict=True) if part == "separate"
    ]
    if len(own) == 4 and spec.shared_ffn_size == 0:
        return "apart for text and images"
    words = f"{', '.join(own)} apart" if own else "shared"
    return words + (", a shared ffn beside" if spec.shared_ffn_size else "")


class _PlanPen:
    """Draws a plan from left to right; `x` is where the next part begins."""

    def __init__(self) -> None:
        self.x = 66.0
        self.at = _APART
        self.ways = {name: f"M58 {y:g}" for name, y in _APART.items()}
        self.shapes: list[str] = []
        for name, y in _APART.items():
            self._text(50, y, _WAYS[name], f"var(--ux-{name})", "end", 13)

    def layer(self, spec: LayerSpec) -> None:
        """Norm, projections, attention, output projection, norm, FFN."""
        self._go(20)
        self._part(spec.norms, 8)
        self._part(spec.qkv, 44, "q/k/v")
        self._attention(spec.sees == "all")
        self._part(spec.output, 36, "out")
        self._part(spec.norms, 8)
        self._ffn(spec)

    def caption(self, left: float, right: float, name: str, sight: str, y: float) -> None:
        """What stands below a layer."""
        if name:
            self._text((left + right) / 2 + 8, y, name, "var(--ux-ink)", "middle", 12)
        self._text((left + right) / 2 + 8, y + 16, sight, "var(--ux-faint)", "middle", 11)

    def brace(self, left: float, right: float, words: str) -> None:
        """A line below the layers of a pattern."""
        self.shapes.append(f'<path d="M{left + 16:g} 208H{right:g}" style="stroke:var(--ux-faint)"/>')
        self._text((left + right) / 2 + 8, 220, words, "var(--ux-ink)", "middle", 12)

    def finish(self, label: str) -> str:
        """The picture."""
        self._move_to(_APART, 18)
        self._go(12)
        ways = "".join(
            f'<path d="{way}" style="fill:none;stroke:var(--ux-{name});stroke-width:3;stroke-linecap:round"/>'
            for name, way in self.ways.items()
        )
        for name, y in _APART.items():
            self._text(self.x + 8, y, _WAYS[name], f"var(--ux-{name})", "start", 13)
        return wrap_svg(ways + "".join(self.shapes), self.x + 62, 228, label)

    def _part(self, sharing: str, width: float, word: str = "") -> None:
        self._move_to(_APART if sharing == "separate" else _TOGETHER)
        if sharing == "separate":
            for name, y in self.at.items():
                self._bar(y, width, _BAR, name, word)
        else:
            self._bar(90, width, _SHARED_BAR, "shared", word)
        self._go(width)

    def _ffn(self, spec: LayerSpec) -> None:
        names = {"text": "ffn", "image": "ffn", "shared": "ffn"}
        if spec.image_ffn_size:
            names["image"] = f"ffn {spec.image_ffn_size}"
        if spec.shared_ffn_size:
            names["shared"] = (
                f"ffn {spec.shared_ffn_size}" if spec.ffn == "separate" else f"ffn + {spec.shared_ffn_size}"
            )
        width = max(44.0, 14 + 6.2 * max(map(len, names.values())))
        if spec.ffn == "shared":
            self._part("shared", width, names["shared"])
            return
        self._move_to(_APART)
        if spec.shared_ffn_size:
            middle = self.x + width / 2
            self.shapes.append(f'<path d="M{middle:g} 34V146" style="stroke:var(--ux-shared);stroke-width:2"/>')
            self._bar(90, width, _BAR, "shared", names["shared"])
        for name, y in self.at.items():
            if name == "text" or spec.image_ffn_size != 0:
                self._bar(y, width, _BAR, name, names[name])
        self._go(width)

    def _attention(self, sees_all: bool) -> None:
        self._go(6)
        middle = self.x + 10
        style = "fill:var(--ux-paper);stroke:var(--ux-ink);stroke-width:1.5"
        if sees_all:
            top, bottom = self.at["text"] - 9, self.at["image"] + 9
            self.shapes.append(
                f'<rect x="{middle - 9:g}" y="{top:g}" width="18" height="{bottom - top:g}" rx="9" style="{style}"/>'
            )
        for name, y in self.at.items():
            if not sees_all:
                self.shapes.append(f'<circle cx="{middle:g}" cy="{y:g}" r="9" style="{style}"/>')
            self.shapes.append(f'<circle cx="{middle:g}" cy="{y:g}" r="4" style="fill:var(--ux-{name})"/>')
        self._go(20)

    def _bar(self, y: float, width: float, height: float, tone: str, word: str) -> None:
        self.shapes.append(
            f'<rect x="{self.x:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'style="fill:var(--ux-{tone})"/>'
        )
        if word:
            self._text(self.x + width / 2, y, word, "var(--ux-paper)", "middle", 11)

    def _text(self, x: float, y: float, words: str, fill: str, anchor: str, size: float) -> None:
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" dy="0.35em" style="fill:{fill};font:{size:g}px {FONT};text-anchor:{anchor}">'
            f"{escape(words)}</text>"
        )

    def _move_to(self, places: dict[str, float], gap: float = 6) -> None:
        """Leaves a gap to the next part, with a bend where the ways meet or part."""
        if places is not self.at:
            gap = 34
            for name, y in places.items():
                self.ways[name] += f"c{gap / 2:g} 0 {gap / 2:g} {y - self.at[name]:g} {gap:g} {y - self.at[name]:g}"
            self.at = places
            self.x += gap
        else:
            self._go(gap)

    def _go(self, width: float) -> None:
        self.x += width
        for name in self.ways:
            self.ways[name] += f"h{width:g}"
