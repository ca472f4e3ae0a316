"""Runs of ComfyUI's samplers on a tiny WAN, evaluation by evaluation, and sigmas to run them on."""

from sparse_video_attention.patching import run_history

LATENT = (1, 16, 1, 8, 8)
LAYERS = 4
SHIFT = 8.0  # of WAN 2.1 without ModelSamplingSD3


class Run:
    """What was recorded, evaluation by evaluation, and the sigmas that were evaluated."""

    def __init__(self, model):
        self.sigmas = []
        self.model = model.clone()

        def watch(apply_model, arguments):
            self.sigmas.append(float(arguments["timestep"][0]))
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        self.model.set_model_unet_function_wrapper(watch)

    @property
    def calls(self):
        record = run_history(self.model).latest
        assert len(record.calls) == LAYERS * len(self.sigmas)
        return record.calls[::LAYERS]

    @property
    def steps(self):
        return [call.step for call in self.calls]

    @property
    def sparse(self):
        return [call.reason is None for call in self.calls]

    @property
    def reasons(self):
        return [call.reason for call in self.calls]


UP_AND_DOWN = {
    "restarts": [1.0, 0.8, 0.5, 0.2, 0.5, 0.2, 0.5, 0.2, 0.0],
    "equal-neighbours": [1.0, 1.0, 0.8, 0.8, 0.8, 0.3, 0.3, 0.0],
    "equal-then-restart": [1.0, 0.6, 0.6, 0.3, 0.6, 0.6, 0.3, 0.0],
    "nearly-equal": [1.0, 0.8, 0.79999, 0.79998, 0.5, 0.0],
    "all-equal": [0.7, 0.7, 0.7, 0.7, 0.7],
    "rising": [0.1, 0.3, 0.5, 0.8, 1.0],
    "up-first": [0.5, 0.9, 0.7, 0.5, 0.2, 0.0],
    "ends-before-zero": [1.0, 0.9, 0.7, 0.6],
}


def level(percent, shift=SHIFT):
    """Noise level at a part of a flow schedule."""
    t = 1.0 - percent
    return shift * t / (1.0 + (shift - 1.0) * t)
