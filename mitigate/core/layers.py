"""Layer ranges as users write them: ``all``, ``9-14``, ``2-``, ``6,7,8`` or depth fractions ``0.25-0.5``."""

from __future__ import annotations

from mitigate.errors import ConfigError


def parse_layers(text: str, depth: int, *, name: str = "layers") -> tuple[int, ...]:
    """Turn a layer range into the zero-based layer indices of a decoder.

    Parameters
    ----------
    text
        ``all``; comma-separated indices and inclusive ranges (``0-11``, ``6,7,8``; ``2-`` ends with the last layer); or
        an inclusive range of depth fractions (``0.25-0.5`` is ``round(0.25 * depth) .. round(0.5 * depth)``, cut at
        the last layer).
    depth
        Number of decoder layers.
    name
        Parameter to blame in the error.

    Raises
    ------
    ConfigError
        If the text cannot be read, is empty, or names a layer the decoder does not have.
    """
    if text == "all":
        return tuple(range(depth))
    chosen: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = (word.strip() for word in part.partition("-"))
            open_end = bool(dash and not last)
            if "." in part:
                low, high = float(first), 1.0 if open_end else float(last or first)
                if not 0.0 <= low <= high <= 1.0:
                    raise ValueError
                chosen.update(range(min(round(low * depth), depth - 1), min(round(high * depth), depth - 1) + 1))
            else:
                low_index = int(first)
                high_index = max(depth - 1, low_index) if open_end else int(last or first)
                if low_index > high_index:
                    raise ValueError
                chosen.update(range(low_index, high_index + 1))
    except ValueError:
        raise ConfigError(
            f"{name}={text!r} is no layer range; write 'all', '9-14', '6,7,8' or depth fractions such as '0.25-0.5'"
        ) from None
    outside = sorted(index for index in chosen if index >= depth)
    if outside:
        raise ConfigError(f"{name}={text!r} names layer {outside[0]}, but the decoder has layers 0-{depth - 1}")
    return tuple(sorted(chosen))
