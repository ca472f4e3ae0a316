"""ComfyUI's own sparse attention node as newer versions have it, written from its behaviour.

At patch time and again before every step it puts a new function on top of whatever is in the
override slot, unless what is there is one of its own. Calls that it does not take go to what it
found, or to ComfyUI's attention.
"""

from sparse_video_attention.patching.router import OVERRIDE_KEY


def make_override(core, found):
    """A function that closes over what it hands calls on to, as nobody can see."""

    def override(func, q, k, v, heads, mask=None, **rest):
        options = rest.get("transformer_options") or {}
        level = float(options["sigmas"][0])
        step = int((options["sample_sigmas"] > level + 1e-6).sum())
        if step in core.steps and q.shape == k.shape and mask is None:
            core.taken += 1
            return core.attend(q, k, v, heads)
        if found is None:
            return func(q, k, v, heads, mask=mask, **rest)
        return found(func, q, k, v, heads, mask=mask, **rest)

    return override


class CoreSparse:
    """Applied by patch(); `taken` counts the calls it computes itself.

    Args:
        from_step: the first of the steps whose calls it takes, by the schedule's noise levels.
    """

    def __init__(self, attend, from_step):
        self.attend = attend
        self.steps = range(from_step, 10**6)
        self.installed = set()
        self.taken = 0

    def patch(self, model):
        from comfy.patcher_extension import CallbacksMP

        patched = model.clone()
        self._install(patched.model_options["transformer_options"])
        patched.add_callback_with_key(
            CallbacksMP.ON_PREPARE_STATE,
            "block_sparse_attention",
            lambda patcher, timestep, options: self._install(options["transformer_options"]),
        )
        return patched

    def _install(self, options):
        current = options.get(OVERRIDE_KEY)
        if current in self.installed:
            return
        override = make_override(self, current)
        self.installed.add(override)
        options[OVERRIDE_KEY] = override
