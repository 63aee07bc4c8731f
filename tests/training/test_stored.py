"""Claims
1. config.json of a run comes back as it was, tuples as tuples.
2. Whatever is no config.json, or has a value of a wrong type, is refused by file and field.
"""

import json
from dataclasses import asdict, replace

import pytest

import distill
from training.config import Config
from training.stored import read_config


@pytest.mark.parametrize("text, words",
                         [("{", "Expecting"), ("[]", "expected an object"),
                          ("{}", "global_batch"), ('{"global_batch": true}', "global_batch"),
                          ('{"global_batch": 8, "arch": "vgg"}', "arch is 'vgg'"),
                          ('{"global_batch": 8, "patch_size": "__import__(1)"}', "patch_size"),
                          ('{"global_batch": 8, "epochs": 1.5}', "epochs is 1.5"),
                          ('{"global_batch": 8, "compile": 1}', "compile is 1"),
                          ('{"global_batch": 8, "mask_ratio": [0.1]}', "mask_ratio"),
                          ('{"global_batch": 8, "mask_ratio": [0.1, "x"]}', "mask_ratio"),
                          ('{"global_batch": 8, "given": [5]}', "given"),
                          ("[" * 100_000, "recursion")])
def test_a_config_from_anywhere(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: not the config.*{words}"):
        read_config(tmp_path / "config.json")


def test_a_config_comes_back(tmp_path):
    file = tmp_path / "config.json"
    config = replace(Config(), compile=None, lr=1, mask_ratio=(0.2, 0.4), given=("lr",))
    file.write_text(json.dumps(asdict(config) | {"global_batch": 64, "teacher": "a"}))
    assert read_config(file) == asdict(config) | {"global_batch": 64, "teacher": "a"}


def test_a_distillation_is_not_continued_without_its_teacher(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"global_batch": 8, "teacher": "runs/large"}))
    with pytest.raises(ValueError, match="a run of distill.py, with the teacher runs/large"):
        read_config(file, Config)
    assert read_config(file, distill.Config)["teacher"] == "runs/large"


def test_a_config_of_an_earlier_version_comes_back(tmp_path):
    """It knew fewer settings: the others have their defaults."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"global_batch": 8, "epochs": 3}))
    assert read_config(file) == asdict(replace(Config(), epochs=3)) | {"global_batch": 8}
