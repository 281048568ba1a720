"""Configurations and their files: what is written, what is read back, and what a broken file gives."""

import json
import os

import pytest

from vblora_triton import AdapterFileError, PeftConfig, VBLoRAConfig
from vblora_triton.tuner.config import replacing


def test_a_saved_config_reads_back_equal_through_either_class(tmp_path):
    config = VBLoRAConfig("CAUSAL_LM", r=2, topk=3, target_modules=["v", "q"], layers_to_transform=[0], revision="x")
    config.save_pretrained(tmp_path / "new" / "folder")
    assert PeftConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert VBLoRAConfig.from_pretrained(tmp_path / "new", subfolder="folder") == config
    text = (tmp_path / "new" / "folder" / "adapter_config.json").read_text()
    values = json.loads(text)
    assert values["target_modules"] == ["q", "v"]
    assert values["peft_type"] == "VBLORA"
    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"


def test_to_dict_is_a_copy():
    config = VBLoRAConfig(target_modules=["q"])
    config.to_dict()["target_modules"].add("v")
    assert config.target_modules == {"q"}
    assert VBLoRAConfig.from_dict(config.to_dict()) == config


def test_unknown_keys_are_dropped_with_a_warning_that_names_them():
    with pytest.warns(UserWarning, match="from_the_future"):
        config = PeftConfig.from_dict({"peft_type": "VBLORA", "r": 2, "from_the_future": 1})
    assert config == VBLoRAConfig(r=2)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("", "JSON"),
        ("[1]", "list"),
        ('{"r": 4}', "peft_type"),
        ('{"peft_type": "LORA"}', "'LORA'"),
        ('{"peft_type": ["VBLORA"]}', "peft_type"),
        ('{"peft_type": "VBLORA", "r": "four"}', "`r`"),
        ('{"peft_type": "VBLORA", "topk": 0}', "`topk`"),
        ("[" * 100_000, "JSON"),
        (b"\xff\xfe\x00", "JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_broken_file_gives_our_error_with_its_name(text, word, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdapterFileError) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert word in str(caught.value)


def test_a_folder_without_a_config_is_refused_by_name(tmp_path):
    with pytest.raises(AdapterFileError, match=r"no adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`save_directory`"):
        VBLoRAConfig().save_pretrained(tmp_path / "file")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_replaced_file_has_the_permissions_of_a_plain_one(tmp_path):
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "replaced") as temporary:
        temporary.write_text("")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_file_that_is_saved_over_keeps_its_permissions(mode, tmp_path):
    config = VBLoRAConfig()
    config.save_pretrained(tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    path = tmp_path / "adapter_config.json"
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(mode)
    config.save_pretrained(tmp_path)
    assert path.stat().st_mode & 0o777 == mode
