"""One video of the procedural set: a textured ground, a camera, shapes that move and occlude.

Lengths are in pixels of the video, times in its frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .prompts import WORDS, Prompt

SHAPE_COLOURS = {
    "red": (0.95, 0.10, 0.10),
    "yellow": (1.00, 0.90, 0.10),
    "green": (0.10, 0.85, 0.20),
    "rainbow": (1.00, 1.00, 1.00),
}
# Two per ground: stripes and tiles alternate between them, a gradient goes from one to the other.
GROUND_COLOURS = {
    "blue": ((0.05, 0.08, 0.45), (0.20, 0.50, 0.95)),
    "brown": ((0.22, 0.10, 0.05), (0.70, 0.45, 0.25)),
    "grey": ((0.12, 0.12, 0.14), (0.75, 0.75, 0.75)),
}
RADIUS = (3.4, 4.6)
RING_WIDTH = 2.4
SPEED = (0.3, 0.6)
# Radians a frame, in scenes of full and of no variety: where every square turned at a rate of its
# own, small models showed the mean of all angles, which is a disc.
SPIN, SETTLED_SPIN = (0.1, 0.35), 0.03
# Radians, where shapes keep to places of their own: upright within the first frames.
TILT = -0.15
# In the middle of the first two, places of one phase are 2 pi tokens apart, the period of the
# fastest rotary frequency: one head can find them all.
_REGULAR = (4 * math.pi - 2, 4 * math.pi + 2)
TEXTURE_WAVELENGTH = {"stripes": _REGULAR, "tiles": _REGULAR, "gradient": (48.0, 64.0)}
# In frames. An orbit is as slow as what bounces: WAN's attention is relative and hardly knows which
# frame it is in, so in the frames of one clip shapes must not take the places of their neighbours.
# A video of 21 frames shows zooms and colours again.
ORBIT_PERIOD, ZOOM_PERIOD, RAINBOW_PERIOD = (110.0, 130.0), (8.0, 14.0), (24.0, 36.0)
PAN_SPEED = (0.6, 1.4)
ZOOM = 0.2


class Draw:
    """Numbers from one private generator."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self._generator))

    def integer(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self._generator))

    def sign(self) -> int:
        return 2 * self.integer(2) - 1


def draw_prompt(draw: Draw) -> Prompt:
    """A word of every property, all equally likely."""
    return Prompt(**{slot: words[draw.integer(len(words))] for slot, words in WORDS.items()})


@dataclass(frozen=True)
class _Shape:
    radius: float
    shade: float
    start: tuple[float, float]
    velocity: tuple[float, float]
    angle: float
    spin: float
    phase: float


@dataclass(frozen=True)
class Scene:
    """Everything that a prompt leaves open. Rendered at any size; the walls are the frame's."""

    prompt: Prompt
    shapes: tuple[_Shape, ...]
    wavelength: float
    direction: float
    pan: float
    texture_phase: float
    zoom_period: float
    zoom_phase: float
    orbit_period: float
    rainbow_period: float


def draw_scene(prompt: Prompt, draw: Draw, variety: float = 1.0, placement: float = 1.0) -> Scene:
    """A random scene that shows what the prompt says.

    Args:
        variety: how much sizes, wavelengths, directions of the ground, speeds and periods differ
            between scenes, 0 (not at all) to 1.
        placement: the same of places and phases. Below 1 shapes have places of their own, apart
            from each other, and everything moves the same way.
    """
    count = WORDS["count"].index(prompt.count) + 1

    def varied(low: float, high: float) -> float:
        middle = (low + high) / 2
        return middle + variety * (draw.uniform(low, high) - middle)

    def placed(period: float, home: float) -> float:
        away = (draw.uniform(0.0, period) - home + period / 2) % period - period / 2
        return home + placement * away

    def way() -> int:
        sign = draw.sign()
        return sign if placement == 1.0 else 1

    orbit_direction, orbit_phase = way(), placed(1.0, home=0.5)

    def shape(index: int) -> _Shape:
        across = (index + 0.5) / count
        down = 0.5 if count == 1 else (0.3, 0.7)[index % 2]
        return _Shape(
            radius=varied(*RADIUS),
            shade=draw.uniform(0.85, 1.0),
            start=(placed(2.0, home=across), placed(2.0, home=down)),
            velocity=(way() * varied(*SPEED), way() * varied(*SPEED)),
            angle=placed(math.pi / 2, home=TILT),
            spin=way() * (SETTLED_SPIN + variety * (draw.uniform(*SPIN) - SETTLED_SPIN)),
            phase=orbit_phase + index / count + draw.uniform(-0.04, 0.04),
        )

    return Scene(
        prompt=prompt,
        shapes=tuple(shape(index) for index in range(count)),
        wavelength=varied(*TEXTURE_WAVELENGTH[prompt.ground]),
        direction=varied(0.0, 2 * math.pi),
        pan=way() * varied(*PAN_SPEED) if prompt.camera == "pans" else 0.0,
        texture_phase=placed(1.0, home=0.5),
        zoom_period=varied(*ZOOM_PERIOD),
        zoom_phase=placed(1.0, home=0.5),
        orbit_period=orbit_direction * varied(*ORBIT_PERIOD),
        rainbow_period=varied(*RAINBOW_PERIOD),
    )


def _triangle_wave(x: Tensor) -> Tensor:
    """0 to 1 and back, period 2."""
    return 1 - (x % 2 - 1).abs()


def _ground(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    """Between 0 and 1 at every point."""
    turn = 2 * math.pi / scene.wavelength
    cos, sin = math.cos(scene.direction), math.sin(scene.direction)
    along = turn * (x * cos + y * sin) + 2 * math.pi * scene.texture_phase
    if scene.prompt.ground == "gradient":
        return 0.5 + 0.5 * torch.sin(along)
    wave = torch.sin(along)
    if scene.prompt.ground == "tiles":
        wave = wave * torch.sin(turn * (y * cos - x * sin))
        return 0.5 + 0.5 * torch.tanh(4 * wave)
    return 0.5 + 0.5 * torch.tanh(2.5 * wave)


def _centre(scene: Scene, shape: _Shape, time: Tensor, height: int, width: int) -> list[Tensor]:
    """x and y per frame, fp32 [frames]."""
    if scene.prompt.motion == "orbit":
        angle = 2 * math.pi * (time / scene.orbit_period + shape.phase)
        reach = [side / 2 - shape.radius - 0.5 for side in (width, height)]
        # An ellipse that stays away from the walls.
        return [
            width / 2 + 0.8 * reach[0] * torch.cos(angle),
            height / 2 + 0.8 * reach[1] * torch.sin(angle),
        ]
    places = []
    for side, start, speed in zip((width, height), shape.start, shape.velocity, strict=True):
        room = side - 2 * shape.radius
        places.append(shape.radius + room * _triangle_wave(start + speed * time / room))
    return places


def _distance(scene: Scene, shape: _Shape, x: Tensor, y: Tensor, time: Tensor) -> Tensor:
    """Signed distance in pixels to the outline, negative inside."""
    if scene.prompt.shape == "square":
        angle = shape.angle + shape.spin * time
        cos, sin = torch.cos(angle), torch.sin(angle)
        half = 0.9 * shape.radius
        return torch.maximum((x * cos + y * sin).abs(), (y * cos - x * sin).abs()) - half
    away = torch.sqrt(x * x + y * y)
    if scene.prompt.shape == "ring":
        return (away - shape.radius + RING_WIDTH / 2).abs() - RING_WIDTH / 2
    return away - shape.radius


def _colour(scene: Scene, shape: _Shape, time: Tensor) -> Tensor:
    """fp32 [frames, 1, 1, 3]."""
    if scene.prompt.colour == "rainbow":
        hue = time / scene.rainbow_period + scene.texture_phase
        thirds = torch.tensor([0.0, 1 / 3, 2 / 3])
        colour = 0.5 + 0.5 * torch.cos(2 * math.pi * (hue[..., None] - thirds))
    else:
        colour = torch.tensor(SHAPE_COLOURS[scene.prompt.colour]).expand(*time.shape, 3)
    return colour * shape.shade


def render(scene: Scene, *, frames: int, height: int, width: int, start: float = 0.0) -> Tensor:
    """The video, fp32 [frames, height, width, 3] between 0 and 1.

    Args:
        start: time of the first frame.
    """
    time = (start + torch.arange(frames, dtype=torch.float32))[:, None, None]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x, y = x.expand(frames, -1, -1), y.expand(frames, -1, -1)
    zoom = torch.ones(())
    if scene.prompt.camera == "zooms":
        wave = torch.sin(2 * math.pi * (time / scene.zoom_period + scene.zoom_phase))
        zoom = torch.exp(ZOOM * wave)
    far_x = (x - width / 2) / zoom + scene.pan * time
    far_y = (y - height / 2) / zoom
    low, high = torch.tensor(GROUND_COLOURS[scene.prompt.ground_colour])
    image = low + _ground(scene, far_x, far_y)[..., None] * (high - low)
    for shape in scene.shapes:
        centre_x, centre_y = _centre(scene, shape, time, height, width)
        away = _distance(scene, shape, x - centre_x, y - centre_y, time)
        # One pixel of blended edge.
        cover = (0.5 - away).clamp(0, 1)[..., None]
        image = image + cover * (_colour(scene, shape, time) - image)
    return image.clamp(0, 1)
