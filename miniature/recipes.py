"""The recipes by name. `cpu` is what an hour or two of a small machine can do, `cpu-long` goes on
from there for ten to twelve more, `gpu` is for half an hour of a large card."""

from __future__ import annotations

from dataclasses import replace

from .recipe import Recipe, Stage

# Scenes that differ less, so that a small budget is enough for whole shapes and regular grounds.
_SETTLED, _ALIKE = 0.05, 0.2
# And shapes that keep to places of their own: drawn anywhere, three of them are one blob as often
# as not, and a model this small then learns blobs, or leaves a single shape out. Where they are is
# learned from pictures first, sixteen a step, then from clips.
_APART, _IN_PLACE = 0.25, 0.12
# Of every four clips one shows the hardest prompt, beside its share of the others.
_OFTEN = 0.25
# Of the rest so many show squares, beside their share of the others: corners are learned last.
_SQUARES = ("square", 0.3)
# Or what changes colour, discs and squares, which were taken for one another after that.
_RAINBOWS = ("rainbow", 0.35)


def _settled(steps: int, clips: int, frames: int, variety: float = _SETTLED) -> Stage:
    return Stage(steps, clips, frames, height=24, width=40, variety=variety)


def _apart(steps: int, clips: int, frames: int, placement: float = _APART) -> Stage:
    """Mostly of the stored prompts, which are what is shown."""
    stage = _settled(steps, clips, frames)
    return replace(stage, placement=placement, stored=0.75)


def _shown(
    steps: int,
    clips: int,
    frames: int,
    hardest: float = 0.0,
    often: tuple[str, float] = ("", 0.0),
) -> Stage:
    """Of nothing but the stored prompts."""
    stage = _apart(steps, clips, frames, placement=_IN_PLACE)
    word, share = often
    return replace(stage, stored=1.0, hardest=hardest, word=word, word_share=share)


_RECIPES: dict[str, Recipe] = {
    "wan-cpu": Recipe(
        family="wan",
        dim=256,
        ffn_dim=512,
        num_layers=4,
        stages=(
            Stage(600, clips=8, frames=3, height=16, width=24),
            Stage(1400, clips=6, frames=5, height=16, width=24),
            Stage(600, clips=2, frames=5, height=24, width=40),
            Stage(400, clips=1, frames=9, height=24, width=40),
            Stage(150, clips=1, frames=21, height=24, width=40),
        ),
    ),
    "wan-gpu": Recipe(
        family="wan",
        dim=256,
        ffn_dim=768,
        num_layers=6,
        stages=(
            _settled(2600, clips=128, frames=1, variety=_ALIKE),
            _settled(2500, clips=48, frames=5, variety=_ALIKE),
            _settled(3500, clips=32, frames=9, variety=_ALIKE),
            _settled(700, clips=16, frames=21, variety=_ALIKE),
            _apart(400, clips=128, frames=1, placement=_IN_PLACE),
            _apart(300, clips=32, frames=9, placement=_IN_PLACE),
            _apart(200, clips=16, frames=21, placement=_IN_PLACE),
        ),
        warmup=100,
        cooldown=1500,
        ema_steps=1000,
    ),
    "cogvideox-cpu": Recipe(
        family="cogvideox",
        dim=192,
        ffn_dim=768,
        num_layers=4,
        stages=(
            Stage(600, clips=8, frames=3, height=16, width=24),
            Stage(1400, clips=6, frames=5, height=16, width=24),
            Stage(600, clips=2, frames=5, height=24, width=40),
            Stage(300, clips=1, frames=13, height=24, width=40),
        ),
    ),
    "cogvideox-gpu": Recipe(
        family="cogvideox",
        dim=256,
        ffn_dim=1024,
        num_layers=5,
        stages=(
            _settled(2600, clips=128, frames=1, variety=_ALIKE),
            _settled(2500, clips=48, frames=5, variety=_ALIKE),
            _settled(2500, clips=32, frames=9, variety=_ALIKE),
            _settled(500, clips=16, frames=21, variety=_ALIKE),
            _apart(400, clips=128, frames=1, placement=_IN_PLACE),
            _apart(300, clips=32, frames=9, placement=_IN_PLACE),
            _apart(200, clips=16, frames=21, placement=_IN_PLACE),
        ),
        warmup=100,
        cooldown=1500,
        ema_steps=1000,
    ),
}

_CPU_LONG = {
    "wan-cpu": (
        Stage(410, clips=4, frames=9, height=16, width=24),
        _settled(690, clips=3, frames=5),
        # Pictures show six times the scenes for the same work: what belongs together far apart
        # is learned from them, and how it moves again after.
        _settled(2450, clips=16, frames=1),
        _settled(600, clips=3, frames=5),
        _settled(1640, clips=2, frames=9),
        _settled(15, clips=1, frames=21),
        _settled(700, clips=2, frames=9),
        _settled(15, clips=1, frames=21),
        _apart(100, clips=16, frames=1),
        _apart(250, clips=2, frames=9),
        _apart(30, clips=1, frames=21),
        _apart(150, clips=2, frames=9),
        _apart(220, clips=2, frames=9, placement=_IN_PLACE),
        _apart(60, clips=1, frames=21, placement=_IN_PLACE),
        _apart(60, clips=2, frames=9, placement=_IN_PLACE),
        _apart(300, clips=16, frames=1, placement=_IN_PLACE),
        _apart(500, clips=2, frames=9, placement=_IN_PLACE),
        _apart(50, clips=1, frames=21, placement=_IN_PLACE),
        _apart(250, clips=2, frames=9, placement=_IN_PLACE),
        _shown(300, clips=16, frames=1),
        _shown(500, clips=2, frames=9),
        _shown(40, clips=1, frames=21),
        _shown(400, clips=2, frames=9),
        # How many shapes there are, and where, is decided in the most noise.
        replace(_shown(560, clips=2, frames=9, hardest=0.15), train_shift=8.0),
        _shown(200, clips=16, frames=1, often=_SQUARES),
        _shown(650, clips=2, frames=9, often=_SQUARES),
        _shown(40, clips=1, frames=21, often=_SQUARES),
        _shown(250, clips=2, frames=9, often=_SQUARES),
        _shown(260, clips=2, frames=9),
        _shown(393, clips=2, frames=9),
        _shown(430, clips=2, frames=9, often=_RAINBOWS),
        _shown(170, clips=2, frames=9),
    ),
    "cogvideox-cpu": (
        Stage(570, clips=4, frames=9, height=16, width=24),
        _settled(900, clips=3, frames=5),
        # Cut short: the clips that follow the pictures teach more.
        _settled(35, clips=2, frames=9),
        _settled(2400, clips=16, frames=1),
        _settled(1000, clips=3, frames=5),
        _settled(1000, clips=2, frames=9),
        _settled(20, clips=1, frames=21),
        _settled(1450, clips=2, frames=9),
        _settled(20, clips=1, frames=21),
        _settled(700, clips=2, frames=9),
        _settled(20, clips=1, frames=21),
        _apart(150, clips=16, frames=1),
        _apart(300, clips=2, frames=9),
        _apart(40, clips=1, frames=21),
        _apart(220, clips=2, frames=9),
        _apart(260, clips=2, frames=9, placement=_IN_PLACE),
        _apart(80, clips=1, frames=21, placement=_IN_PLACE),
        _apart(100, clips=2, frames=9, placement=_IN_PLACE),
        _apart(300, clips=16, frames=1, placement=_IN_PLACE),
        _apart(500, clips=2, frames=9, placement=_IN_PLACE),
        _apart(50, clips=1, frames=21, placement=_IN_PLACE),
        _apart(250, clips=2, frames=9, placement=_IN_PLACE),
        _shown(200, clips=16, frames=1, hardest=_OFTEN),
        _shown(550, clips=2, frames=9, hardest=_OFTEN),
        _shown(20, clips=1, frames=21, hardest=_OFTEN),
        _shown(250, clips=2, frames=9, hardest=_OFTEN),
        _shown(300, clips=16, frames=1),
        _shown(20, clips=1, frames=21),
        _shown(430, clips=2, frames=9),
        _shown(250, clips=16, frames=1, often=_SQUARES),
        _shown(750, clips=2, frames=9, often=_SQUARES),
        _shown(40, clips=1, frames=21, often=_SQUARES),
        _shown(400, clips=2, frames=9, often=_SQUARES),
        # All prompts alike again: the disc had begun to leave.
        _shown(360, clips=2, frames=9),
    ),
}

RECIPES: dict[str, Recipe] = _RECIPES | {
    f"{name}-long": replace(
        _RECIPES[name], stages=_RECIPES[name].stages + stages, cooldown=400, ema_steps=150
    )
    for name, stages in _CPU_LONG.items()
}
