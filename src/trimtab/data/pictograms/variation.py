"""Redrawing a drawing: another hand's shape, colours and outline for the same thing.

Models that learn from one artist's drawings learn the drawings. Varied ones (`twemoji-varied`) teach what stays the
same when a thing is drawn again: its parts and how they lie. Nothing is taken from the other style.
"""

from __future__ import annotations

import numpy as np

VARIANTS = 24  # redrawings of each drawing; the first is the drawing itself
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def vary(drawing: np.ndarray, rng: np.random.Generator, keep_hue: bool = False) -> np.ndarray:
    """Redraw one cut-out.

    Args:
        drawing: RGBA, uint8 of shape (H, W, 4), trimmed to its visible part.
        rng: source of all choices.
        keep_hue: leave the hues as they are, for things whose name states their colour.

    Returns:
        RGBA, uint8 of another shape (H', W', 4), trimmed to its visible part.
    """
    picture = _reshape(drawing.astype(np.float32) / 255, rng)
    colour, alpha = picture[..., :3], picture[..., 3:]
    lines = _lines(colour, alpha, rng.uniform(0.06, 0.25))
    colour = _recolour(colour, rng, keep_hue)
    if rng.random() < 0.25 and not keep_hue:  # line art: little of the fill is left
        colour = 1 - (1 - colour) * rng.uniform(0.0, 0.5)
    if rng.random() < 0.7:
        lines = lines * rng.uniform(0.5, 1.0)
        outside = _spread(alpha[..., 0]) * (rng.random() < 0.7)
        colour = colour * (1 - lines[..., None])
        alpha = np.maximum(alpha, outside[..., None])
        colour = np.where(picture[..., 3:] < 0.5, 0.0, colour)
    return _trim((np.concatenate([colour, alpha], -1).clip(0, 1) * 255).astype(np.uint8))


def _reshape(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored, turned, stretched, sheared and bent; sampled bilinearly, colours weighted by alpha."""
    height, width = picture.shape[:2]
    side = int(max(height, width) * 1.5)
    y, x = np.meshgrid(*[np.linspace(-0.75, 0.75, side, dtype=np.float32)] * 2, indexing="ij")
    angle, shear = rng.normal(0, 0.2), rng.normal(0, 0.12)
    stretch = np.exp(rng.normal(0, 0.15))
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
    matrix = matrix @ np.diag([stretch, 1 / stretch])
    u, v = matrix[0, 0] * x + matrix[0, 1] * y, matrix[1, 0] * x + matrix[1, 1] * y
    bend = rng.uniform(0, 0.05)
    for target, other in ((u, v), (v, u)):
        target += bend * np.sin(rng.uniform(2, 7) * other + rng.uniform(0, 6.3))
    u *= 1 if rng.random() < 0.5 else -1
    side_in = max(height, width)
    weighted = np.concatenate([picture[..., :3] * picture[..., 3:], picture[..., 3:]], -1)
    sampled = _sample(weighted, v * side_in + height / 2 - 0.5, u * side_in + width / 2 - 0.5)
    sampled[..., :3] /= np.maximum(sampled[..., 3:], 1e-3)
    return sampled


def _sample(picture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    padded = np.pad(picture, ((1, 2), (1, 2), (0, 0)))
    y, x = (y + 1).clip(0, picture.shape[0] + 1), (x + 1).clip(0, picture.shape[1] + 1)
    top, left = y.astype(int), x.astype(int)
    dy, dx = (y - top)[..., None], (x - left)[..., None]
    upper = padded[top, left] * (1 - dx) + padded[top, left + 1] * dx
    lower = padded[top + 1, left] * (1 - dx) + padded[top + 1, left + 1] * dx
    return (upper * (1 - dy) + lower * dy).astype(np.float32)


def _recolour(colour: np.ndarray, rng: np.random.Generator, keep_hue: bool) -> np.ndarray:
    grey = (colour @ _LUMA)[..., None]
    saturation = rng.uniform(0.7, 1.4) if keep_hue else rng.uniform(0.0, 1.6)
    colour = grey + (colour - grey) * saturation
    if not keep_hue:
        colour = colour @ _turn_hue(rng.normal(0, 0.5))
    colour = (colour.clip(0, 1) ** np.exp(rng.normal(0, 0.3))) * rng.uniform(0.8, 1.15)
    if rng.random() < 0.4:
        levels = rng.integers(2, 5)
        colour = np.round(colour * levels) / levels
    return colour.clip(0, 1)


def _turn_hue(angle: float) -> np.ndarray:
    """The matrix that turns colours about the grey axis by `angle` radians."""
    axis = np.ones(3) / np.sqrt(3)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross).astype(np.float32)


def _lines(colour: np.ndarray, alpha: np.ndarray, threshold: float) -> np.ndarray:
    """Where one patch of colour meets another or the ground: 0..1 of shape (H, W)."""
    shown = np.concatenate([colour * alpha, alpha], -1)
    step = np.zeros(shown.shape[:2], np.float32)
    step[:, 1:] = np.abs(np.diff(shown, axis=1)).max(-1)
    step[1:] = np.maximum(step[1:], np.abs(np.diff(shown, axis=0)).max(-1))
    return _spread((step > threshold).astype(np.float32)) * 0.9


def _spread(mask: np.ndarray) -> np.ndarray:
    """Each value becomes the largest of itself and its four neighbours."""
    out = mask.copy()
    out[1:], out[:-1] = np.maximum(out[1:], mask[:-1]), np.maximum(out[:-1], mask[1:])
    out[:, 1:], out[:, :-1] = np.maximum(out[:, 1:], mask[:, :-1]), np.maximum(out[:, :-1], mask[:, 1:])
    return out


def _trim(picture: np.ndarray) -> np.ndarray:
    seen = picture[..., 3] > 32
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
