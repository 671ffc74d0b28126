"""Numbers as people read them: metrics, durations, sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def number(value: float | None) -> str:
    """A metric in 4 significant digits (`0.9120`), in full from 1,000 to a billion; `-` where there is none."""
    if value is None:
        return "-"
    if abs(value) >= 1e9:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".removesuffix(".")


def interval(ends: Sequence[float] | None) -> str:
    """`0.8853 to 0.9251`; `-` where there is none."""
    return "-" if ends is None else " to ".join(map(number, ends))


def metrics_line(metrics: Mapping[str, float]) -> str:
    """`accuracy 0.9375  loss 0.2143 (n = 640)`: what was measured, the loss with its denominator."""
    return "  ".join(f"{name} {number(value)}{denominator(metrics) if name == 'loss' else ''}" for name, value in metrics.items() if name != "loss_count")


def denominator(metrics: Mapping[str, float]) -> str:
    """What the loss is a mean over, ` (n = 640)`: the sum of the weights of all supervised items."""
    return f" (n = {metrics['loss_count']:,.6g})" if "loss_count" in metrics else ""


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `2 min 31 s`, `3 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def size(count: float) -> str:
    """Bytes in decimal units: `512 B`, `1.3 MB`."""
    from rich.filesize import decimal

    return decimal(int(count)).replace("bytes", "B").replace(" byte", " B")
