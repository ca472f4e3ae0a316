"""Draw a radial mask: python -m sparse_video_attention.radial_attn 21 1560 --output mask.png"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..kernels import TokenLayout
from .policy import RadialPolicy


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="radial_attn", description="Draw a radial mask.")
    parser.add_argument("num_frames", type=int)
    parser.add_argument("tokens_per_frame", type=int)
    parser.add_argument("--prefix-tokens", type=int, default=0, help="text before the video")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--decay-factor", type=float, default=0.2)
    parser.add_argument("--output", default="radial_mask.png")
    args = parser.parse_args(arguments)
    try:
        layout = TokenLayout(args.num_frames, 1, args.tokens_per_frame, args.prefix_tokens)
        policy = RadialPolicy(args.block_size, args.decay_factor)
        plan = policy.static_plan(layout, "cpu")
        plan.to_image().save(args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{policy.describe()}: density {plan.density():.3f}, drawn to {args.output}")
    if (reason := policy.dense_reason(layout)) is not None:
        print(f"the nodes keep attention dense there: {reason}")


if __name__ == "__main__":
    main()
