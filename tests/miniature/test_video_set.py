"""The procedural videos: the same for everyone, and showing what their words say."""

import math

import pytest
import torch

from miniature.latents import cogvideox_colours, wan_colours
from miniature.prompts import PROMPTS, TEXT_WIDTH, WORDS, Prompt, text_features
from miniature.scene import (
    GROUND_COLOURS,
    RADIUS,
    SETTLED_SPIN,
    SHAPE_COLOURS,
    SPIN,
    TILT,
    Draw,
    draw_scene,
    render,
)
from miniature.video_set import VideoSet

SIZE = {"frames": 8, "height": 24, "width": 40}


def prompt(**words):
    plain = {
        "count": "one",
        "colour": "red",
        "shape": "disc",
        "motion": "bounce",
        "ground_colour": "blue",
        "ground": "gradient",
        "camera": "still",
    }
    return Prompt(**(plain | words))


def covered(video, colour):
    """Pixels of about a colour of any shade, [frames, height, width]."""
    direction = torch.tensor(SHAPE_COLOURS[colour])
    direction = direction / direction.norm()
    return torch.nn.functional.cosine_similarity(video, direction, dim=-1) > 0.97


def centre(mask):
    """Mean x and y of the pixels of a frame."""
    y, x = torch.nonzero(mask, as_tuple=True)
    return x.float().mean(), y.float().mean()


class TestSeeds:
    def test_a_clip_is_the_same_every_time_and_depends_on_nothing_else(self):
        torch.manual_seed(1)
        words, video = VideoSet(3, **SIZE).clip(5)
        torch.manual_seed(2)
        again_words, again = VideoSet(3, **SIZE).clip(5)
        assert words == again_words and torch.equal(video, again)

    def test_drawing_leaves_the_global_generator_alone(self):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        VideoSet(0, **SIZE).clip(0)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("other", [(3, 6), (4, 5)], ids=["another-clip", "another-seed"])
    def test_other_numbers_give_other_videos(self, other):
        seed, index = other
        _, video = VideoSet(3, **SIZE).clip(5)
        assert not torch.allclose(video, VideoSet(seed, **SIZE).clip(index)[1], atol=0.05)

    @pytest.mark.parametrize("variety", [0.0, 0.05, 1.0])
    def test_variety_is_how_far_scenes_differ_from_the_middle(self, variety):
        words = prompt(colour="rainbow", ground="tiles", camera="zooms", motion="orbit")
        scenes = [draw_scene(words, Draw(seed), variety) for seed in range(40)]
        low, high = RADIUS
        for scene in scenes:
            radius = scene.shapes[0].radius
            assert abs(radius - (low + high) / 2) <= variety * (high - low) / 2 + 1e-9
            assert abs(scene.direction - math.pi) <= variety * math.pi + 1e-9
            spins = [(1 - variety) * SETTLED_SPIN + variety * spin for spin in SPIN]
            assert spins[0] <= abs(scene.shapes[0].spin) <= spins[1] + 1e-9
        for settled in ("wavelength", "zoom_period", "rainbow_period", "direction"):
            values = {getattr(scene, settled) for scene in scenes}
            assert len(values) == (1 if variety == 0 else 40)
        # Both ways around, and where everything begins, are always open.
        assert len({scene.texture_phase for scene in scenes}) == 40
        assert len({scene.orbit_period > 0 for scene in scenes}) == 2

    def test_the_smaller_the_placement_the_oftener_all_shapes_are_seen_whole(self):
        def whole(placement):
            pixels = torch.zeros(40)
            for seed in range(40):
                scene = draw_scene(prompt(count="three"), Draw(seed), 0.0, placement)
                video = render(scene, frames=1, height=24, width=40)
                pixels[seed] = covered(video, "red").sum()
            return int((pixels > 0.9 * pixels.max()).sum())

        counts = [whole(placement) for placement in (0.0, 0.25, 1.0)]
        assert counts[0] == 40 and counts[1] > counts[2] + 5

    @pytest.mark.parametrize("placement", [0.0, 0.25, 1.0])
    def test_placement_is_how_far_phases_differ_and_whether_ways_do(self, placement):
        words = prompt(count="three", colour="rainbow", camera="pans")
        scenes = [draw_scene(words, Draw(seed), placement=placement) for seed in range(40)]
        phases = [scene.texture_phase for scene in scenes]
        assert max(phases) - min(phases) <= placement + 1e-9
        assert len(set(phases)) == (1 if placement == 0 else 40)
        ways = {scene.pan > 0 for scene in scenes}
        ways |= {speed > 0 for s in scenes for shape in s.shapes for speed in shape.velocity}
        assert ways == ({True, False} if placement == 1 else {True})

    @pytest.mark.parametrize("placement", [0.0, 0.12, 0.25])
    def test_squares_in_places_of_their_own_stand_nearly_upright_and_turn_one_way(self, placement):
        words = prompt(count="three", shape="square")
        for seed in range(40):
            for shape in draw_scene(words, Draw(seed), 0.05, placement).shapes:
                assert abs(shape.angle - TILT) <= placement * math.pi / 4 + 1e-9
                assert shape.spin > 0

    def test_a_set_passes_its_placement_on(self):
        sets = [VideoSet(3, **SIZE, placement=placement) for placement in (0.25, 1.0)]
        assert not torch.allclose(*(clips.clip(5)[1] for clips in sets), atol=0.05)
        assert torch.equal(sets[1].clip(5)[1], VideoSet(3, **SIZE).clip(5)[1])

    def test_a_set_passes_its_variety_on(self):
        sets = [VideoSet(3, **SIZE, variety=variety) for variety in (0.0, 1.0)]
        assert not torch.allclose(*(clips.clip(5)[1] for clips in sets), atol=0.05)
        assert torch.equal(sets[1].clip(5)[1], VideoSet(3, **SIZE).clip(5)[1])

    def test_every_word_turns_up(self):
        seen = [VideoSet(0, 1, 8, 8).clip(index)[0] for index in range(80)]
        for slot, words in WORDS.items():
            assert {getattr(p, slot) for p in seen} == set(words)


class TestScenes:
    @pytest.mark.parametrize("count", WORDS["count"])
    def test_as_many_discs_as_the_prompt_says_at_their_size(self, count):
        number = WORDS["count"].index(count) + 1
        areas = []
        for seed in range(6):
            scene = draw_scene(prompt(count=count, motion="orbit"), Draw(seed))
            video = render(scene, frames=4, height=48, width=80)
            assert len(scene.shapes) == number
            expected = sum(math.pi * shape.radius**2 for shape in scene.shapes)
            areas.append(covered(video, "red").float().sum((1, 2)).mean() / expected)
        # Blended edges are not counted.
        assert 0.75 < float(torch.stack(areas).mean()) < 1.05

    @pytest.mark.parametrize("colour", ["red", "yellow", "green"])
    def test_shapes_have_the_colour_of_the_prompt(self, colour):
        _, video = VideoSet(0, **SIZE).clip(1, prompt(colour=colour))
        assert covered(video, colour).float().sum((1, 2)).min() > 15
        for other in {"red", "yellow", "green"} - {colour}:
            assert not covered(video, other).any()

    def test_a_rainbow_shape_changes_colour(self):
        scene = draw_scene(prompt(colour="rainbow", ground_colour="grey"), Draw(2))
        video = render(scene, **SIZE)
        saturation = video.amax(-1) - video.amin(-1)
        shape = [frame[mask].mean(0) for frame, mask in zip(video, saturation > 0.4, strict=True)]
        assert (shape[0] - shape[5]).norm() > 0.5

    def test_a_bouncing_disc_moves_at_its_speed_and_stays_inside(self):
        scene = draw_scene(prompt(), Draw(4))
        video = render(scene, frames=60, height=24, width=40)
        places = torch.stack([torch.stack(centre(mask)) for mask in covered(video, "red")])
        steps = (places[1:] - places[:-1]).abs()
        speed = torch.tensor(scene.shapes[0].velocity).abs()
        assert torch.allclose(steps.median(0).values, speed, atol=0.2)
        assert (steps.amax(0) < speed + 0.4).all(), "it jumps"
        low, high = places.amin(0), places.amax(0)
        assert (low > RADIUS[0] - 1).all() and high[0] < 40 - RADIUS[0] + 1
        assert high[1] < 24 - RADIUS[0] + 1

    def test_orbits_come_back_after_a_period(self):
        scene = draw_scene(prompt(motion="orbit", count="two"), Draw(1))
        period = abs(scene.orbit_period)
        start, later, half = (
            render(scene, frames=1, height=24, width=40, start=at)
            for at in (0.0, period, period / 2)
        )
        assert torch.allclose(start, later, atol=0.02)
        assert not torch.allclose(start, half, atol=0.3)

    @pytest.mark.parametrize("camera", WORDS["camera"])
    def test_only_a_moving_camera_moves_the_ground(self, camera):
        scene = draw_scene(prompt(camera=camera, ground="stripes"), Draw(3))
        video = render(scene, frames=3, height=24, width=40)
        ground = ~covered(video, "red").any(0)
        # A pixel around the disc is blended.
        ground = -torch.nn.functional.max_pool2d(-ground[None].float(), 5, 1, 2)[0] > 0.5
        moved = (video[2] - video[0]).abs().amax(-1)[ground].max()
        assert (moved > 0.05) == (camera != "still")

    @pytest.mark.parametrize("ground", WORDS["ground"])
    def test_the_ground_is_between_its_two_colours(self, ground):
        scene = draw_scene(prompt(ground=ground, ground_colour="brown"), Draw(5))
        video = render(scene, **SIZE)
        low, high = torch.tensor(GROUND_COLOURS["brown"])
        corner = video[~covered(video, "red")]
        share = ((corner - low) / (high - low)).median(0).values
        assert (share >= -0.01).all() and (share <= 1.01).all()

    def test_later_shapes_hide_earlier_ones(self):
        found = 0
        for seed in range(40):
            scene = draw_scene(prompt(count="three"), Draw(seed))
            video = render(scene, frames=20, height=16, width=16)
            discs = covered(video, "red").float().sum((1, 2))
            found += bool(discs.min() < 0.8 * discs.max())
        assert found > 20

    def test_a_word_that_does_not_exist_is_named(self):
        with pytest.raises(ValueError, match="shape 'cube': allowed are disc, square, ring"):
            prompt(shape="cube")


class TestText:
    def test_the_features_are_those_that_were_trained_on(self):
        # From sha3's definition, by hand: bits of shake_256, low bit first.
        import hashlib

        digest = hashlib.shake_256(b"count two").digest(512)
        first = [1.0 if digest[0] >> bit & 1 else -1.0 for bit in range(8)]
        features = text_features(prompt(count="two"))
        assert features.shape == (7, TEXT_WIDTH) and features[0, :8].tolist() == first

    def test_one_word_changes_one_token_and_all_words_are_far_apart(self):
        one, other = text_features(prompt()), text_features(prompt(shape="ring"))
        differs = (one != other).float().mean(1)
        assert (differs[[0, 1, 3, 4, 5, 6]] == 0).all() and 0.4 < differs[2] < 0.6

    def test_prompts_read_like_sentences_and_are_told_apart(self):
        sentences = [p.sentence for p in PROMPTS]
        assert len(set(sentences)) == len(PROMPTS)
        assert PROMPTS[0].sentence == ("one red disc bounces over blue stripes, the camera pans")
        assert PROMPTS[1].sentence == (
            "three yellow discs orbit over a blue gradient, the camera stands still"
        )


@pytest.mark.parametrize("colours", [wan_colours, cogvideox_colours])
class TestLatents:
    def test_videos_come_back(self, colours):
        video = torch.rand(2, 3, 4, 6, 3, generator=torch.Generator().manual_seed(0))
        latent = colours().encode(video)
        assert latent.shape == (2, 16, 3, 4, 6)
        assert torch.allclose(colours().decode(latent), video, atol=1e-4)

    def test_what_is_no_colour_is_not_seen(self, colours):
        maps = colours()
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(16, 2, 4, 4, generator=generator)
        signal = maps.signal()
        seen = torch.einsum("cthw,cs,ds->dthw", latent, signal, signal)
        assert not torch.allclose(seen, latent, atol=0.1)
        assert torch.allclose(maps.decode(seen), maps.decode(latent), atol=1e-4)

    def test_latents_are_about_as_strong_as_noise(self, colours):
        maps = colours()
        clips = [VideoSet(0, 3, 16, 24).clip(index)[1] for index in range(12)]
        strength = (
            torch.einsum("bcthw,cs->sbthw", maps.encode(torch.stack(clips)), maps.signal())
            .flatten(1)
            .std(1)
        )
        assert (strength > 0.3).all() and (strength < 3.0).all()


@pytest.mark.comfy
def test_the_colours_are_comfyui_s_preview(comfyui):
    from comfy.latent_formats import Wan21

    maps, published = wan_colours(), Wan21()
    assert torch.equal(maps.factors, torch.tensor(published.latent_rgb_factors))
    assert torch.equal(maps.bias, torch.tensor(published.latent_rgb_factors_bias))
