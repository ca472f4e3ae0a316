"""python -m sparse_video_attention.radial_attn: the mask as a picture, mistakes as a sentence."""

import pytest
import torch
from PIL import Image
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.radial_attn.__main__ import main
from torchvision.transforms.functional import pil_to_tensor


def test_draws_the_mask_of_the_nodes(tmp_path, capsys):
    file = tmp_path / "mask.png"
    main(
        ["9", "400", "--prefix-tokens", "226", "--block-size", "64", "--decay-factor", "0.5"]
        + ["--output", str(file)]
    )
    layout = TokenLayout(9, 1, 400, prefix_tokens=226)
    plan = RadialPolicy(64, 0.5).static_plan(layout, torch.device("cpu"))
    drawn = pil_to_tensor(Image.open(file))[0, ::2, ::2] > 0
    assert torch.equal(drawn, plan.to_levels()[0, 0] > 0)
    assert f"density {plan.density():.3f}, drawn to {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["0", "100"], "frames"),
        (["3", "100", "--block-size", "96"], "block_size"),
        (["3", "400", "--decay-factor", "nan"], "decay_factor"),
        (["3", "400", "--output", "mask.xyz"], "xyz"),
        (["3", "400", "--output", "gone/mask.png"], "gone"),
    ],
)
def test_a_mistake_is_a_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    said = capsys.readouterr().err
    assert error.value.code == 2 and sentence in said and "Traceback" not in said


@pytest.mark.parametrize("video", [("21", "42"), ("1", "1560")])
def test_what_the_nodes_leave_dense_is_said(video, tmp_path, capsys):
    main([*video, "--output", str(tmp_path / "mask.png")])
    layout = TokenLayout(int(video[0]), 1, int(video[1]))
    assert RadialPolicy().dense_reason(layout) in capsys.readouterr().out
