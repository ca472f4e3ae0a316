"""2000 prompts with random and malformed inputs: each runs to its end, or names what is wrong."""

import json
import random
import time
import urllib.error
import uuid

import pytest
import torch

from devtools.server import WorkflowRejected

from .input_rules import ALLOWS, MINE_JSON, MINE_YAML, faults, leads_nowhere
from .random_inputs import PROMPTS_PER_NODE, all_inputs

SAMPLED_PER_NODE = 5


# Without an answer or a finished prompt in this time the server hangs.
PATIENCE_SECONDS = 300


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
