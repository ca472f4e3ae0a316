"""What the inputs of the nodes allow, written down once more: judge of what has to be refused.

ComfyUI itself turns values into numbers, text and booleans before a node sees them; that much is
taken from it.
"""

from sparse_video_attention import kernels, third_party

LAYERS = 2


BACKENDS = list(third_party.available())
KERNELS = ["torch", "triton", "hopper", "flash_attn4", "spas_sage_attn", "sparse_sageattn", "flex"]
WHOLE_BLOCKS_ONLY = ["flash_attn4", "spas_sage_attn", "sparse_sageattn", "flex"]
PRESETS = ["Wan2.1_1.3b/psa_topk", "CogVideo_5b/psa_4steps", "Wan2.2_5B/baseline", "Mine/own"]
MINE_YAML = """
Mine:
  default_attention: own
  attention_configs:
    own: {type: psa, mask_mode: topk, mask_ratios: {1: [0.0, 0.5]}, warmup_steps: 0}
"""
MINE_JSON = {"self_attn_1_type": "torch_sdpa", "cross_attn_1_type": "auto"}
FILES = {
    "PatchPSA": {"mine.yaml", "mine.yaml/", ' "mine.yaml" ', "mine.yaml\n"},
    "SetAttentionBackend": {"mine.json", "wan_i2v.json", "\tmine.json"},
}


def is_layer_list(text):
    """Whether a layer list fits a model of LAYERS layers."""
    known = {str(n): n % LAYERS for n in range(-LAYERS, LAYERS)}
    for part in text.split(","):
        part = part.strip()
        if part and part not in known:
            ends = [part.rpartition("-")] if part.count("-") == 1 else []
            if not any(
                a.strip() in known and b.strip() in known and known[a.strip()] <= known[b.strip()]
                for a, _, b in ends
            ):
                return False
    return True


def number(kind, low, high):
    def allows(value):
        converted = kind(value)
        return low <= converted <= high  # NaN is not

    return allows


def choice(*options):
    # True and 0.0 equal numbers, and are none of them.
    return lambda value: any(type(value) is type(o) and value == o for o in options)


def boolean(value):
    bool(value)
    return True


def file_of(node):
    return lambda value: not str(value).strip(' \t\n"') or str(value) in FILES[node]


def backend(*sparse):
    return choice("auto", *BACKENDS, *sparse)


SCHEDULE = {
    "dense_layers": lambda value: is_layer_list(str(value)),
    "last_dense_timesteps": number(int, -1, 100),
    "start_percent": number(float, 0, 1),
    "end_percent": number(float, 0, 1),
    "kernel": lambda v: v == "auto" or (v in KERNELS and kernels.available().get(v, "") is None),
    "precision": choice("auto", "native", "int8", "fp8"),
    "min_tokens": number(int, 0, 1_000_000),
    "dense_vace_blocks": boolean,
}
ALLOWS = {
    "PatchRadialAttention": SCHEDULE
    | {
        "dense_timesteps": number(int, -1, 100),
        "block_size": lambda value: int(value) in (128, 64),
        "decay_factor": number(float, 0, 2),
        "skipped_blocks": choice("drop", "pool", "weighted"),
    },
    "PatchPSA": SCHEDULE
    | {
        "preset": choice("auto", *PRESETS[:3]),
        "warmup_steps": number(int, -1, 100),
        "config_file": file_of("PatchPSA"),
        "skipped_blocks": choice("drop", "pool", "weighted"),
    },
    "PatchSpargeAttention": SCHEDULE
    | {
        "dense_timesteps": number(int, -1, 100),
        "sparge_ckpt": choice("none"),
        "topk": number(float, 0, 1),
        "simthreshd1": number(float, -1, 1),
        "cdfthreshd": number(float, 0, 1),
        "attention_sink": boolean,
        "block_order": choice("auto", "raster", "Gilbert"),
        "block_scores": choice("auto", "group means", "block means"),
        "block_shape": choice("auto", "128x64", "128x32", "64x32"),
        "skipped_blocks": choice("drop", "pool", "weighted"),
    },
    "SetAttentionBackend": {
        "self_attn_1_type": backend("radial_attn", "psa", "sparge_attn", "sparge", "sparge_ckpt"),
        "cross_attn_1_type": backend(),
        "cross_attn_2_type": backend(),
        "config_file": file_of("SetAttentionBackend"),
        "on_unavailable": choice("fallback", "error"),
    },
}


def leads_nowhere(value):
    """Whether ComfyUI stops at a value before it looks at any input: a link from nothing."""
    return isinstance(value, list) and len(value) == 2 and value != ["1", 0]


def unwrapped(value):
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value


def is_allowed(allows, value):
    if isinstance(value, list):  # a link, to a MODEL at best
        return False
    try:
        return allows(unwrapped(value))
    except (TypeError, ValueError, OverflowError):
        return False


def needs_pooling(node, given):
    """Whether a kernel has to attend to means of blocks for these inputs, all of them allowed."""
    if node == "PatchPSA" and given.get("preset", "auto") != "Mine/own":
        return given.get("preset", "auto") != "Wan2.2_5B/baseline"
    return given.get("skipped_blocks", "pool or weighted") != "drop"


def faults(node, inputs):
    """Names of the inputs that have to be refused."""
    wrong = {name for name, value in inputs.items() if not is_allowed(ALLOWS[node][name], value)}
    given = {name: unwrapped(value) for name, value in inputs.items()}
    if "kernel" in given and not wrong & {"kernel", "skipped_blocks"}:
        if given["kernel"] in WHOLE_BLOCKS_ONLY and needs_pooling(node, given):
            wrong |= {"kernel"}
    start, end = inputs.get("start_percent", 0.0), inputs.get("end_percent", 1.0)
    if not wrong & {"start_percent", "end_percent"}:
        if float(unwrapped(start)) >= float(unwrapped(end)):
            wrong |= {"start_percent", "end_percent"}
    if node == "PatchPSA" and inputs.get("preset") == "Mine/own":
        if str(inputs.get("config_file", "")) in FILES[node]:
            wrong -= {"preset"}
    if node == "SetAttentionBackend" and inputs.get("on_unavailable") == "error":
        missing = {name for name, why in third_party.available().items() if why is not None}
        wrong |= {name for name, v in inputs.items() if isinstance(v, str) and v in missing}
    return wrong
