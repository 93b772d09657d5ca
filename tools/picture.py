"""README's picture, drawn from a record's figures: bytes of each format and what they cost.

An SVG file of its own has no page around it, so that every mark carries its colours, and a
background, since README is read on light and dark pages.
"""

from halfbyte.figures import Figure, Record, with_unit
from halfbyte.page import Mark, drawing

_WIDTH, _ROW, _TOP, _LEFT, _BAR = 720, 46, 58, 150, 300
_INK, _SOFT, _PAPER = "#1f2430", "#5c6470", "#ffffff"
_FILL = {"bf16": "#9aa5b1", "fp8": "#4c78a8", "mixed": "#2a9d8f"}
_SHOWN = {"bf16": "bf16", "fp8": "FP8", "mixed": "mixed FP8/NVFP4"}


def formats_picture(record: Record) -> str:
    """Bars of `weights on disk` with the KL divergence beside each, for the demo's record."""
    sizes = _by_weights(record, "weights on disk")
    losses = _by_weights(record, "KL divergence from bf16")
    largest = max(figure.value for figure in sizes.values())
    model = str(next(iter(sizes.values())).conditions["model"])
    height = _TOP + _ROW * len(sizes) + 34
    marks = [
        Mark("rect", {"x": 0, "y": 0, "width": _WIDTH, "height": height, "fill": _PAPER}),
        _text(20, 26, f"{model}: bytes on disk, and the price in nats a token", 16, _INK),
        _text(20, 45, "KL divergence from bf16 on held-out text, weights only", 12, _SOFT),
    ]
    for number, (weights, size) in enumerate(sizes.items()):
        y, bar = _TOP + _ROW * number, _BAR * size.value / largest
        loss = losses.get(weights)
        price = "the original" if loss is None else f"KL {loss.value_text}"
        marks += [
            _text(_LEFT - 12, y + 21, _SHOWN[weights], 14, _INK, anchor="end"),
            Mark("rect", {"x": _LEFT, "y": y + 4, "width": bar, "height": 26, "rx": 3,
                          "fill": _FILL[weights]}),
            _text(_LEFT + bar + 10, y + 21, f"{with_unit(size.value, size.unit)}, {price}", 14,
                  _INK),
        ]  # fmt: skip
    source = f"measured on {record.machine.text}, {record.date}; halfbyte demo"
    marks.append(_text(20, height - 14, source, 11, _SOFT))
    svg = str(drawing(_WIDTH, height, marks, title=f"{model}: bytes and KL divergence by format"))
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).strip() + "\n"


def _by_weights(record: Record, name: str) -> dict[str, Figure]:
    """Figures of one name by the weights that they are of, the rounded activations left aside."""
    return {
        str(figure.conditions["weights"]): figure
        for figure in record.figures
        if figure.name == name and "arithmetic" not in figure.conditions
    }


def _text(x: float, y: float, words: str, size: int, fill: str, anchor: str = "start") -> Mark:
    place: dict[str, str | float] = {
        "x": x, "y": y, "font-size": size, "font-family": "system-ui, sans-serif", "fill": fill,
        "text-anchor": anchor,
    }  # fmt: skip
    return Mark("text", place, words)
