"""The pack inside a real ComfyUI server, as a browser or a script would use it."""

import json
import threading
import time
import uuid

import numpy as np
import pytest
import torch
import websocket

from demo.comparison import logged_density, logged_layout, pack_lines
from demo.frames import load_latent
from demo.workflow import PATCH
from devtools.errors import DevError
from devtools.server import WorkflowRejected

NODES = [
    *("PatchRadialAttention", "PatchPSA", "PatchSpargeAttention", "SetAttentionBackend"),
    "MeasureAttentionError",
]
# As published guides have it, letter for letter.
PUBLISHED = json.loads(
    '{"dense_layers": "0", "dense_timesteps": 7, "block_size": 128, "decay_factor": 0.2}'
)
# A few hundred tokens, sparse nevertheless.
QUICK = {"steps": 3, "min_tokens": 0, "dense_timesteps": 1, "block_size": 64}
# 16 x 16 x 16 tokens: the fewest that are sparse by default.
SMALLEST_SPARSE = {"width": 256, "height": 256, "length": 61}


def with_patch_inputs(workflow, inputs):
    """A workflow whose radial node has these inputs and the model, nothing else."""
    new = workflow.setting()
    patch = new.nodes[new.find(PATCH)]
    patch["inputs"] = {"model": patch["inputs"]["model"]} | inputs
    return new


class TestNodesAreThere:
    @pytest.mark.parametrize("node", NODES)
    def test_listed_with_an_explanation_of_everything(self, node, object_info):
        info = object_info[node]
        assert info["category"] == "model/patch/attention"
        assert info["description"] and info["output"] == ["MODEL"]
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert "model" in inputs
        unexplained = [name for name, (_, *options) in inputs.items() if not options[0]["tooltip"]]
        assert not unexplained

    def test_the_log_says_nothing_bad_about_the_pack(self, server, object_info):
        lines = server.log_text().splitlines()
        imported = [line for line in lines if "custom_nodes" in line and "sparse_video" in line]
        assert imported and not any("IMPORT FAILED" in line for line in imported)


class TestPublishedInputs:
    def test_run_verbatim_and_are_reported(self, run, tiny):
        workflow = with_patch_inputs(tiny(steps=8, **SMALLEST_SPARSE), PUBLISHED)
        result = run(workflow)
        (line,) = pack_lines(result.log)
        assert "1 of 2 layers sparse on 1 of 8 steps" in line
        assert "decay 0.2, block 128" in line
        assert logged_layout(result.log).num_tokens == 4096
        assert 0.2 < logged_density(result.log) < 1
        assert load_latent(result.files["latent"][0]).isfinite().all()


class TestRuns:
    @pytest.mark.core
    @pytest.mark.parametrize(
        ("stem", "model", "layout"),
        [
            ("wan_t2v_radial", "wan", (5, 8, 12, 0)),
            ("cogvideox_radial", "cogvideox", (5, 8, 12, 226)),
        ],
        ids=["wan", "cogvideox"],
    )
    def test_sparse_differs_from_dense_and_is_logged(self, stem, model, layout, run, tiny):
        sparse = tiny(stem, model, **QUICK)
        results = [run(sparse), run(sparse.without(PATCH))]
        latents = [load_latent(result.files["latent"][0]) for result in results]
        change = float((latents[0] - latents[1]).norm() / latents[1].norm())
        assert 1e-4 < change < 0.9
        (line,) = pack_lines(results[0].log)
        assert "1 of 2 layers sparse on 2 of 3 steps" in line
        found = logged_layout(results[0].log)
        assert (found.frames, found.height, found.width, found.prefix_tokens) == layout
        assert not pack_lines(results[1].log), "the dense run went through the pack"

    def test_the_same_seed_gives_the_same_latent_and_leaves_no_trace_behind(self, run, tiny):
        def latent(workflow):
            # Another prefix each time, or ComfyUI answers from its cache.
            prefix = f"again/{uuid.uuid4().hex}"
            return load_latent(run(workflow.setting(filename_prefix=prefix)).files["latent"][0])

        sparse = tiny(**QUICK)
        dense = sparse.without(PATCH)
        before = latent(dense.setting(seed=11))
        first = latent(sparse.setting(seed=11))
        assert torch.equal(latent(dense.setting(seed=11)), before)
        assert torch.equal(latent(sparse.setting(seed=11)), first)

    def test_too_few_tokens_stay_dense_and_the_log_says_so(self, run, tiny):
        result = run(tiny(steps=1))
        (line,) = pack_lines(result.log)
        assert "nothing ran sparse" in line and "480 tokens are fewer than min_tokens 4096" in line


def blue(picture):
    """Pixels of a report in the colours of sparse calls."""
    from PIL import Image
    from sparse_video_attention.patching.report_picture import density_colour

    shades = {density_colour(share / 1000) for share in range(1001)}
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3).tolist()
    return [pixel for pixel in pixels if tuple(pixel) in shades]


class TestReport:
    def test_shows_the_run_and_hands_the_latent_on(self, run, tiny):
        plain = tiny(**QUICK, seed=21)
        reported = plain.reporting(PATCH, "report")
        result = run(reported)
        (picture,) = result.files["report_picture"]
        assert logged_density(result.log) < 1
        # One of two layers was sparse in two of three steps, in cells of 18 x 36 pixels.
        assert len(blue(picture)) > 2 * 17 * 35
        (latent,), (expected,) = (
            done.files[workflow.find("SaveLatent")]
            for done, workflow in ((result, reported), (run(plain), plain))
        )
        assert torch.equal(load_latent(latent), load_latent(expected))
        # Without the patch the graph still runs.
        reported.nodes["report"]["inputs"]["model"] = [reported.find("UNETLoader"), 0]
        (picture,) = run(reported).files["report_picture"]
        assert not blue(picture)

    def test_is_listed_with_an_explanation_of_everything(self, object_info):
        info = object_info["AttentionReport"]
        assert info["category"] == "model/patch/attention" and info["output_node"]
        assert info["output"] == ["LATENT", "IMAGE", "STRING"] and all(info["output_tooltips"])
        assert all(options["tooltip"] for _, options in info["input"]["required"].values())


class TestPreview:
    def test_shows_the_mask_of_the_run_beside_it(self, run, tiny):
        workflow = tiny(**QUICK)
        sampler = workflow.nodes[workflow.sampler]["inputs"]
        latent = sampler.get("latent_image") or sampler["latent"]
        inputs = {"model": [workflow.find(PATCH), 0], "samples": latent, "steps": 3}
        workflow.nodes["preview"] = {"class_type": "PreviewAttentionMask", "inputs": inputs}
        inputs = {"images": ["preview", 0], "filename_prefix": "preview"}
        workflow.nodes["mask"] = {"class_type": "SaveImage", "inputs": inputs}
        result = run(workflow)
        (mask,) = result.files["mask"]
        # The first and the last shade: left out and kept.
        assert len(set(map(tuple, blue(mask)))) == 2
        assert logged_density(result.log) < 1

    def test_is_listed_with_an_explanation_of_everything(self, object_info):
        info = object_info["PreviewAttentionMask"]
        assert info["category"] == "model/patch/attention" and info["output_node"]
        assert info["output"] == ["IMAGE", "FLOAT", "FLOAT"] and all(info["output_tooltips"])
        assert info["output_name"] == ["IMAGE", "density", "speedup"]
        inputs = {**info["input"]["required"], **info["input"]["optional"]}
        assert all(options["tooltip"] for _, options in inputs.values())


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "said"),
        [("a,b", "'a' is not a layer"), ("5-2", "the range '5-2' runs backwards")],
        ids=["letters", "backwards"],
    )
    def test_a_layer_list_that_cannot_be_read_is_refused_when_queued(self, text, said, run, tiny):
        with pytest.raises(WorkflowRejected) as error:
            run(tiny(dense_layers=text))
        assert said in str(error.value) and PATCH in str(error.value)

    @pytest.mark.parametrize(
        ("text", "said"),
        [("99", "layer 99 is outside this model"), ("-9", "layer -9 is outside this model")],
        ids=["past-the-end", "before-the-start"],
    )
    def test_a_layer_outside_the_model_is_refused_before_sampling(self, text, said, run, tiny):
        steps = []
        with pytest.raises(DevError) as error:
            run(tiny(dense_layers=text), on_step=lambda done, total: steps.append(done))
        assert said in str(error.value) and "0 to 1" in str(error.value)
        assert str(error.value).startswith(PATCH) and not steps

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("dense_timesteps", 101),
            ("dense_timesteps", -2),
            ("block_size", 32),
            ("decay_factor", 2.5),
            ("skipped_blocks", "keep"),
            ("kernel", "fastest"),
        ],
    )
    def test_a_value_out_of_range_is_refused_with_its_name(self, name, value, run, tiny):
        with pytest.raises(WorkflowRejected) as error:
            run(tiny(**{name: value}))
        assert name in str(error.value) and str(value) in str(error.value)

    def test_a_block_size_between_the_two_is_refused_before_sampling(self, run, tiny):
        with pytest.raises(DevError, match="block_size 96: allowed are 128 and 64"):
            run(tiny(block_size=96))

    def test_a_model_that_is_not_supported_is_named(self, run, tiny):
        with pytest.raises(DevError) as error:
            run(tiny(unet_name="flux.safetensors"))
        assert "this model is a Flux" in str(error.value)
        assert "WAN and CogVideoX" in str(error.value)

    def test_a_kernel_that_cannot_run_here_says_why(self, run, tiny):
        with pytest.raises(DevError, match="kernel 'flash_attn4' cannot run here: "):
            run(tiny(kernel="flash_attn4", steps=2))

    def test_the_next_run_is_not_harmed(self, run, tiny):
        with pytest.raises(DevError):
            run(tiny(dense_layers="99", seed=21))
        assert run(tiny(steps=1, seed=21)).files["latent"]


class TestInterrupt:
    def test_a_run_ends_at_once_is_logged_and_the_next_one_works(self, server, run, tiny):
        long = tiny(steps=200, min_tokens=0, dense_timesteps=0, block_size=64, seed=31)
        started = threading.Event()
        log_start = len(server.log_text())
        outcome = []

        def sample():
            with pytest.raises(DevError, match="interrupted"):
                run(long, on_step=lambda done, total: started.set())
            outcome.append("interrupted")

        thread = threading.Thread(target=sample)
        thread.start()
        assert started.wait(60)
        server.post("/interrupt", {})
        thread.join(30)
        assert outcome == ["interrupted"]
        deadline = time.monotonic() + 10
        while not (lines := pack_lines(server.log_text()[log_start:])):
            assert time.monotonic() < deadline, "an interrupted run was not logged"
            time.sleep(0.1)
        assert "the run ended early" in lines[-1]

        again = run(long.setting(steps=2))
        assert "the run ended early" not in "".join(pack_lines(again.log))
        assert "2 of 2 steps" in pack_lines(again.log)[-1]


def test_a_browser_s_messages_arrive_while_it_samples(server, tiny):
    """What the editor draws its progress from, read without the demo's own client."""
    client = uuid.uuid4().hex
    address = server.url.replace("http", "ws")
    socket = websocket.create_connection(f"{address}/ws?clientId={client}", timeout=120)
    try:
        # A value of its own, or ComfyUI takes the patched model from its cache.
        workflow = tiny(**QUICK | {"decay_factor": 0.35})
        prompt = server.submit(workflow.nodes, client)
        seen = []
        while not seen or seen[-1] != ("executing", None):
            message = socket.recv()
            if isinstance(message, str):
                event = json.loads(message)
                data = event["data"]
                if data.get("prompt_id") != prompt:
                    continue
                if event["type"] == "executing":
                    seen.append(("executing", data["node"]))
                elif event["type"] == "progress" and data["node"] == workflow.sampler:
                    seen.append(("progress", data["value"], data["max"]))
    finally:
        socket.close()
    assert ("executing", workflow.find(PATCH)) in seen
    # ComfyUI leaves out steps that follow each other within 100 ms, never the first or the last.
    steps = [entry[1:] for entry in seen if entry[0] == "progress"]
    assert (steps[0], steps[-1]) == ((1, 3), (3, 3))
