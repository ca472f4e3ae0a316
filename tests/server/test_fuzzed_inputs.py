"""2000 prompts with random and malformed inputs: each runs to its end, or names what is wrong.

What an input allows is written down here once more. ComfyUI itself turns values into numbers,
text and booleans before a node sees them; that much is taken from it.
"""

import json
import math
import random
import time
import urllib.error
import uuid

import pytest
import torch
from sparse_video_attention import kernels, third_party

from devtools.server import WorkflowRejected

PROMPTS_PER_NODE = 500
SAMPLED_PER_NODE = 5
LAYERS = 2
# Without an answer or a finished prompt in this time the server hangs.
PATIENCE_SECONDS = 300

BACKENDS = list(third_party.available())
KERNELS = ["torch", "triton", "hopper", "flash_attn4", "spas_sage_attn", "sparse_sageattn", "flex"]
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

TEXTS = [
    *("", " ", "0", "-1", "0-1", "0, 1", "auto", "none", "drop", "Gilbert", "true", "nan", "inf"),
    *("7", "0.5", "-0.5", "1e3", "0x10", "\u0663", "\u0660\u0661", "\u03bb", "\ud800"),
    *("\0", "a\0b.yaml", "\x1b[31m", "\u202e0", "\n", "0\n1", "'; DROP", "${HOME}", "{0}", "%s%n"),
    *("../../../etc/passwd", "../secret.yaml", "../secret.json", "/etc/passwd", "/nowhere/a.yaml"),
    *("..\\..\\secret.json", "sub/../../secret.yaml", "~nobody_at_all/a.yaml", "~/a.json", "."),
    *("C:\\a.json", "file:///etc/a.yaml", "mine.yaml", "mine.json", "MINE", "mine.yaml/"),
    *("x" * 5000, "9" * 400, "../" * 2000 + "a.yaml", "y" * 5000 + ".json", "1," * 2000),
    *("psa", "radial_attn", "sparge_attn", "torch_sdpa", "flash_attn2", "Mine/own", "/", "a/b/c"),
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 64, 100, 101, 128, 4096, 10**6, 10**6 + 1, 2**31, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 2.0000001, 128.0, 1e-300, 1e300, -1e300, 3.7),
    *(math.nan, math.inf, -math.inf),
]
OTHERS = [
    *(True, False, None, [], [1], [1, 2], ["1", 0], ["1", 7], ["2", 0], ["nothing", 0], ["1", "0"]),
    *({}, {"a": 1}, {"__value__": [0, 1]}, {"__value__": "0"}, [["1", 0]], [None, None], [[], {}]),
]


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
    # 128.0 and True equal an option, and are none.
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
    "last_dense_timesteps": number(int, 0, 100),
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
        "block_size": choice(128, 64),
        "decay_factor": number(float, 0, 2),
        "skipped_blocks": choice("drop", "pool"),
    },
    "PatchPSA": SCHEDULE
    | {
        "preset": choice("auto", *PRESETS[:3]),
        "warmup_steps": number(int, -1, 100),
        "config_file": file_of("PatchPSA"),
    },
    "PatchSpargeAttention": SCHEDULE
    | {
        "dense_timesteps": number(int, -1, 100),
        "sparge_ckpt": choice("none"),
        "topk": number(float, 0, 1),
        "simthreshd1": number(float, -1, 1),
        "cdfthreshd": number(float, 0, 1),
        "attention_sink": boolean,
        "block_order": choice("raster", "Gilbert"),
        "skipped_blocks": choice("drop", "pool"),
    },
    "SetAttentionBackend": {
        "self_attn_1_type": backend("radial_attn", "psa", "sparge_attn", "sparge", "sparge_ckpt"),
        "cross_attn_1_type": backend(),
        "cross_attn_2_type": backend(),
        "config_file": file_of("SetAttentionBackend"),
        "on_unavailable": choice("fallback", "error"),
    },
}
# What an input is likely to be given, so that half of the prompts are right.
LIKELY = {
    "dense_layers": ["", "0", "0-1", "-1", "1,0"],
    "kernel": ["auto", "torch", "flex"],
    "precision": ["auto", "native", "int8"],
    "block_size": [64, 128],
    "skipped_blocks": ["drop", "pool"],
    "block_order": ["raster", "Gilbert"],
    "sparge_ckpt": ["none", "broken.pt"],
    "preset": ["auto", *PRESETS],
    "on_unavailable": ["fallback", "error"],
    "self_attn_1_type": ["auto", "torch_sdpa", "flash_attn2", "psa", "sparge_ckpt"],
    "cross_attn_1_type": ["auto", "torch_sdpa", "xformers", "radial_attn"],
    "cross_attn_2_type": ["auto", "sage_attn2"],
    "config_file": ["", "mine.yaml", "mine.json", ' "mine.yaml" ', "mine.yaml\n", "\tmine.json"],
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


def faults(node, inputs):
    """Names of the inputs that have to be refused."""
    wrong = {name for name, value in inputs.items() if not is_allowed(ALLOWS[node][name], value)}
    start, end = inputs.get("start_percent", 0.0), inputs.get("end_percent", 1.0)
    if not wrong & {"start_percent", "end_percent"}:
        if float(unwrapped(start)) > float(unwrapped(end)):
            wrong |= {"start_percent", "end_percent"}
    if node == "PatchPSA" and inputs.get("preset") == "Mine/own":
        if str(inputs.get("config_file", "")) in FILES[node]:
            wrong -= {"preset"}
    if node == "SetAttentionBackend" and inputs.get("on_unavailable") == "error":
        missing = {name for name, why in third_party.available().items() if why is not None}
        wrong |= {name for name, v in inputs.items() if isinstance(v, str) and v in missing}
    return wrong


def random_inputs(dice, node):
    inputs = {}
    for name in dice.sample(sorted(ALLOWS[node]), dice.randint(1, 4)):
        pool = dice.choice([TEXTS, NUMBERS, OTHERS, None, None, None, None])
        likely = LIKELY.get(name, [0, 1, 0.5, "0.25", dice.uniform(-1, 3), dice.randint(-3, 130)])
        inputs[name] = dice.choice(likely if pool is None else pool)
    return inputs


def all_inputs(dice, node):
    """PROMPTS_PER_NODE of them: file names, one wrong input, then several inputs at once."""
    cases = [{"config_file": text} for text in TEXTS if "config_file" in ALLOWS[node]]
    alone = [{n: value} for n in sorted(ALLOWS[node]) for value in TEXTS + NUMBERS + OTHERS]
    cases += dice.sample(alone, 200)
    return cases + [random_inputs(dice, node) for _ in range(PROMPTS_PER_NODE - len(cases))]


def prompt_of(node, inputs):
    return {
        "1": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "wan.safetensors", "weight_dtype": "default"},
        },
        "2": {"class_type": node, "inputs": {"model": ["1", 0]} | inputs},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }


@pytest.fixture(scope="module")
def fuzzed_server(server):
    models = server.base / "models"
    for folder in ("psa", "attention_configs", "sparge"):
        (models / folder).mkdir(exist_ok=True)
    (models / "psa" / "mine.yaml").write_text(MINE_YAML)
    (models / "attention_configs" / "mine.json").write_text(json.dumps(MINE_JSON))
    # Outside of the folders in which names are looked up.
    (models / "secret.yaml").write_text(MINE_YAML)
    (models / "secret.json").write_text(json.dumps(MINE_JSON))
    (models / "sparge" / "broken.pt").write_bytes(b"no checkpoint")
    return server


def said_about(refusal):
    """What a person sees of a refused prompt: no tracebacks."""
    errors = [error for node in refusal["node_errors"].values() for error in node["errors"]]
    return "; ".join(
        f"{error['message']}: {error['details']} ({error['extra_info'].get('input_name')})"
        for error in errors
    )


def submit(server, prompt):
    """(prompt id, None) of an accepted prompt, (None, all that was said) of a refused one."""
    try:
        answer = server.post("/prompt", {"prompt": prompt, "client_id": "fuzz"})
    except urllib.error.HTTPError as error:
        assert error.code == 400, f"answer {error.code} to {prompt['2']}"
        return None, said_about(json.loads(error.read()))
    return answer["prompt_id"], None


def wait_for_queue(server):
    waiting, since = None, time.monotonic()
    while left := server.get("/prompt")["exec_info"]["queue_remaining"]:
        if left != waiting:
            waiting, since = left, time.monotonic()
        assert time.monotonic() - since < PATIENCE_SECONDS, f"{left} prompts do not end"
        time.sleep(0.2)


def what_failed(entry):
    """What the last node said, None for a prompt that ran to its end."""
    if entry["status"]["status_str"] == "success":
        return None
    said = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    return said[-1]["exception_message"]


def stumbles(inputs, said):
    """Whether a check raised where it should have answered."""
    return "Exception when validating" in said and not any(map(leads_nowhere, inputs.values()))


def names_any(said, wrong):
    return any(name in said for name in wrong)


@pytest.fixture(scope="module", params=sorted(ALLOWS))
def fuzzed(request, fuzzed_server):
    """(node, [(inputs, what was said or None)]) after all prompts have ended."""
    node, dice = request.param, random.Random(request.param)
    cases = all_inputs(dice, node)
    answers = [submit(fuzzed_server, prompt_of(node, inputs)) for inputs in cases]
    wait_for_queue(fuzzed_server)
    history = fuzzed_server.get("/history")
    said = [refused or what_failed(history[prompt]) for prompt, refused in answers]
    return node, list(zip(cases, said, strict=True))


def test_what_is_wrong_is_refused_by_name_and_nothing_else(fuzzed):
    node, cases = fuzzed
    wrong = [(inputs, faults(node, inputs), said) for inputs, said in cases]
    broken = [(inputs, said) for inputs, names, said in wrong if said and stumbles(inputs, said)]
    assert not broken, f"{len(broken)} broke the check of inputs: {broken[:5]}"
    silent = [(inputs, names) for inputs, names, said in wrong if names and said is None]
    assert not silent, f"{len(silent)} accepted in silence: {silent[:5]}"
    groundless = [(inputs, said[:300]) for inputs, names, said in wrong if said and not names]
    assert not groundless, f"{len(groundless)} refused without reason: {groundless[:5]}"
    unnamed = [
        (inputs, names, said[:600])
        for inputs, names, said in wrong
        if names and not names_any(said, names)
        if not any(map(leads_nowhere, inputs.values()))
    ]
    assert not unnamed, f"{len(unnamed)} refused without a name: {unnamed[:5]}"
    # Neither side of the test is empty.
    accepted = sum(said is None for _, said in cases)
    assert 0.1 * PROMPTS_PER_NODE < accepted < 0.7 * PROMPTS_PER_NODE, accepted


def test_accepted_inputs_also_sample(fuzzed, fuzzed_server, tiny):
    node, cases = fuzzed
    good = [inputs for inputs, said in cases if said is None and len(inputs) > 1]
    base = tiny(steps=2, width=128, height=96, length=17)
    prompts = {}
    for inputs in good[:: len(good) // SAMPLED_PER_NODE][:SAMPLED_PER_NODE]:
        workflow = base.setting(filename_prefix=f"fuzz/{uuid.uuid4().hex}")
        patch = workflow.find("PatchRadialAttention")
        given = {"model": workflow.nodes[patch]["inputs"]["model"]} | inputs
        if node != "SetAttentionBackend":
            given |= {"min_tokens": 0}
        workflow.nodes[patch] = {"class_type": node, "inputs": given}
        prompts[fuzzed_server.submit(workflow.nodes, "fuzz")] = inputs
    wait_for_queue(fuzzed_server)
    history = fuzzed_server.get("/history")
    assert {p: what_failed(history[p]) for p in prompts} == dict.fromkeys(prompts)
    assert all(history[p]["outputs"] for p in prompts)


@pytest.mark.parametrize(
    "link",
    [["2", 0], ["nothing", 0], ["1", 9], ["1", "0"], [], ["1"], [["1", 0], 0], None, 5],
    ids=repr,
)
@pytest.mark.parametrize("node", sorted(ALLOWS))
def test_a_model_that_is_none_is_refused(fuzzed_server, node, link):
    prompt = prompt_of(node, {})
    prompt["2"]["inputs"]["model"] = link
    accepted, said = submit(fuzzed_server, prompt)
    if accepted is not None:
        wait_for_queue(fuzzed_server)
        said = what_failed(fuzzed_server.get("/history")[accepted])
    assert said


def test_after_all_that_the_next_good_prompt_runs(fuzzed_server, run, tiny):
    from demo.frames import load_latent

    result = run(tiny(steps=1, seed=77, min_tokens=0, block_size=64, dense_timesteps=0))
    assert torch.isfinite(load_latent(result.files["latent"][0])).all()
    with pytest.raises(WorkflowRejected, match="dense_layers"):
        run(tiny(dense_layers="\ud800"))
