"""Whose weights the demo takes, and what it makes of the shipped workflows with them."""

import argparse
from pathlib import Path

import pytest

from demo import sources
from demo.families import COGVIDEOX, FAMILIES, WAN
from demo.methods import METHODS
from demo.options import add_options, forwarded


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Weights of WAN's miniature are in the repository, CogVideoX's are not."""
    path = tmp_path / "repository" / "wan_miniature.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"trained")
    monkeypatch.setattr(
        sources, "weights_path", lambda family: path.with_stem(f"{family}_miniature")
    )
    return path


def test_a_miniature_is_taken_where_it_is_unless_tiny_ones_are_asked_for(trained):
    assert sources.weights_of(WAN, options()) == "miniature"
    assert sources.weights_of(COGVIDEOX, options()) == "tiny"
    assert sources.weights_of(WAN, options("--tiny")) == "tiny"
    assert sources.weights_of(WAN, options("--unet", str(trained))) == "real"
    assert "--tiny" in forwarded(options("--tiny")) and "--tiny" not in forwarded(options())


def test_the_miniature_s_own_file_and_words_go_into_every_method_s_workflow(trained, tmp_path):
    made = sources.small_workflows(WAN, tmp_path / "base", options("--seed", "11"))
    assert [method for method, _ in made] == list(METHODS)
    for method, workflow in made:
        name = workflow.value("unet_name")
        path = tmp_path / "base" / "models" / "diffusion_models" / name
        assert path.read_bytes() == b"trained"
        prompt = workflow.nodes[workflow.linked_from("positive")]
        assert prompt["inputs"] == {"prompt": WAN.prompt.sentence}
        assert workflow.value("seed") == 11 and workflow.find(method.node)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_tiny_weights_go_with_random_text_and_a_quarter_of_the_steps_dense(family, tmp_path):
    made = sources.small_workflows(family, tmp_path, options("--tiny"))
    for method, workflow in made:
        kinds = {node["class_type"] for node in workflow.nodes.values()}
        assert "SeededConditioning" in kinds and "MiniaturePrompt" not in kinds
        inputs = workflow.nodes[workflow.find(method.node)]["inputs"]
        dense = inputs.get("dense_timesteps", inputs.get("warmup_steps"))
        assert dense in (-1, workflow.value("steps") // 4)
        assert inputs["last_dense_timesteps"] == 0
    names = {workflow.value("unet_name") for _, workflow in made}
    assert len(names) == 1
    assert (tmp_path / "models" / "diffusion_models" / names.pop()).is_file()


def test_real_weights_keep_the_shipped_settings_and_get_the_prompt(tmp_path):
    files = {}
    for part in ("unet", "clip", "vae"):
        files[part] = Path(tmp_path / f"{part}.safetensors")
        files[part].write_bytes(part.encode())
    given = [f"--{part}={path}" for part, path in files.items()]
    made = sources.real_workflows(WAN, tmp_path / "base", options(*given, "--prompt", "a cat"))
    for method, workflow in made:
        shipped = sources.method_workflow(sources.API_FORMS, "wan_t2v", method)
        node = workflow.find(method.node)
        assert workflow.nodes[node]["inputs"] == shipped.nodes[node]["inputs"]
        assert workflow.value("steps") == shipped.value("steps")
        assert workflow.nodes[workflow.linked_from("positive")]["inputs"]["text"] == "a cat"
        assert workflow.value("vae_name") == "vae.safetensors"


@pytest.mark.parametrize("missing", [(), ("symlink",), ("symlink", "link")], ids=str)
def test_weights_are_linked_where_the_machine_has_links(tmp_path, monkeypatch, missing):
    """Windows has the first for those with a privilege only, the second within one drive."""

    def refuses(*paths):
        raise OSError("a required privilege is not held by the client")

    for name in missing:
        monkeypatch.setattr(sources.os, name, refuses)
    source, target = tmp_path / "weights", tmp_path / "models" / "unet" / "weights"
    source.write_bytes(b"tens of GB")
    sources._link_or_copy(source, target)
    assert target.read_bytes() == b"tens of GB"
    assert target.is_symlink() == (not missing)
    assert target.samefile(source) == (len(missing) < 2)
