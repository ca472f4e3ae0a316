"""LightX2V files as people have them: what is read, and what each mistake says."""

import struct
from pathlib import Path

import pytest
from sparse_video_attention.patching.lightx2v import read_lightx2v

SELF = b'"self_attn_1_type": "flash_attn3"'

READ = {
    "BOM": b"\xef\xbb\xbf{" + SELF + b"}",
    "CRLF": b"{\r\n  " + SELF + b"\r\n}\r\n",
    "long-number": b"{" + SELF + b', "seed": ' + b"9" * 6000 + b"}",
    "NaN": b"{" + SELF + b', "shift": NaN}',
    "other-keys": b"{" + SELF + b', "infer_steps": 40, "mm_config": {"type": "fp8"}}',
}


@pytest.fixture
def config(tmp_path):
    def write(content):
        path = tmp_path / "wan.json"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("kind", READ)
def test_a_file_of_many_keys_is_read(kind, config):
    assert read_lightx2v(config(READ[kind])).types == {"self_attn_1_type": "flash_attn3"}


def test_keys_not_about_attention_are_kept_by_name(config):
    assert read_lightx2v(config(READ["other-keys"])).ignored == ("infer_steps", "mm_config")


def test_both_ways_to_ask_for_sparge(config):
    by_flag = read_lightx2v(config(b'{"sparge": true, "sparge_ckpt": "/a/b.pt"}'))
    assert (by_flag.sparge, by_flag.types) == (True, {})
    assert by_flag.sparge_ckpt == str(Path("/a/b.pt"))
    by_type = read_lightx2v(config(b'{"self_attn_1_type": "sparge_ckpt"}'))
    assert (by_type.sparge, by_type.types) == (False, {"self_attn_1_type": "sparge_ckpt"})


BROKEN = {
    "trailing-comma": (b"{" + SELF + b",}", "is not JSON: .* at line 1, column 3"),
    "single-quotes": (b"{'self_attn_1_type': 'auto'}", "at line 1, column 2"),
    "comment": (b"{\n// mine\n" + SELF + b"}", "at line 2, column 1"),
    "line-break-in-text": (b'{"self_attn_1_type": "au\nto"}', "character at line 1, column 25$"),
    "cut-off": (b'{"self_attn_1_type": "flash_a', "string starting at line 1, column 22$"),
    "two-objects": (b"{" + SELF + b"}{}", "Extra data at line 1, column 36"),
    "utf-16": ("{}".encode("utf-16"), "cannot be read as UTF-8 text"),
    "binary": (bytes(range(256)), "cannot be read as UTF-8 text"),
    "safetensors": (struct.pack("<Q", 20) + b'{"__metadata__":{}}  ', "is not JSON"),
    "blank": (b"  \n", "is not JSON: Expecting value at line 2, column 1"),
    "null": (b"null", "is not an object with self_attn_1_type"),
    "huge-number-as-type": (b'{"self_attn_1_type": ' + b"9" * 6000 + b"}", "inf is not text"),
    "list-as-type": (b'{"self_attn_1_type": ["auto"]}', "['auto'] is not text"),
    "flag-as-type": (b'{"cross_attn_2_type": true}', "cross_attn_2_type True is not text"),
    "number-as-flag": (b'{"sparge": 1}', "sparge 1 is not true or false"),
    "null-checkpoint": (b'{"sparge": true, "sparge_ckpt": null}', "None is not the path"),
    "capitals": (b'{"SELF_ATTN_1_TYPE": "auto"}', "did you mean 'self_attn_1_type'"),
    "space-in-key": (b'{"self_attn_1_type ": "auto"}', "did you mean 'self_attn_1_type'"),
    "misspelt-checkpoint": (b'{"sparge": true, "sparge_cktp": ""}', "did you mean 'sparge_ckpt'"),
    "one-level-down": (b'{"attention": {' + SELF + b"}}", "names no attention"),
    "checkpoint-alone": (b'{"sparge_ckpt": "/a.pt"}', "names no attention"),
    "key-twice": (b"{" + SELF + b", " + SELF + b"}", "'self_attn_1_type' is given twice"),
    "deep": (b'{"a":' * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_mistake_is_one_sentence_naming_the_file(kind, config):
    content, sentence = BROKEN[kind]
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[")) as refusal:
        read_lightx2v(config(content))
    assert str(refusal.value).startswith("config_file 'wan.json': ")
    assert "\n" not in str(refusal.value)


def test_a_folder_is_not_a_configuration(tmp_path):
    (tmp_path / "wan.json").mkdir()
    with pytest.raises(ValueError, match="config_file 'wan.json': cannot be read"):
        read_lightx2v(tmp_path / "wan.json")
