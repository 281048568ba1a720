"""What cannot be is refused in words that say what it is, where it comes from, and what would do."""

import json
import time
from functools import partial

import pytest
import torch
from torch import nn

from tests.models import adapted_by, assert_unchanged, outputs, snapshot, tiny_llama
from vblora_triton import AdapterFileError, PeftConfig, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model
from vblora_triton.optim import parameter_groups

CONFIG = "adapter_config.json"
FIELDS = {
    "vblora": partial(VBLoRAConfig, r=2, num_vectors=6, vector_length=16),
    "vera": partial(VeraConfig, r=4),
}
SHARED = ("r", "num_vectors", "vector_length", "target_modules")
LLAMA = {"target_modules": ["q_proj"]}


@pytest.fixture(params=FIELDS)
def make_config(request):
    return FIELDS[request.param]


@pytest.fixture
def saved(make_config, tmp_path):
    adapted_by(make_config, LLAMA).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, *words) -> None:
    """Loading the folder in either way is an error of its configuration's file, and changes nothing."""
    base, model = tiny_llama(), adapted_by(FIELDS["vblora"], LLAMA)
    if PeftConfig.known[json.loads((folder / CONFIG).read_text())["peft_type"]] is VeraConfig:
        model = adapted_by(FIELDS["vera"], LLAMA)
    for there, load in ((base, PeftModel.from_pretrained), (model, lambda m, f: m.load_adapter(f, "new"))):
        before = snapshot(there)
        with pytest.raises(AdapterFileError) as caught:
            load(there, folder)
        assert_unchanged(there, before)
        for word in (CONFIG, *words):
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": None, "layers_to_transform": 77}, "`layers_to_transform`"),
        ({"modules_to_save": ["nowhere"]}, "nowhere"),
        ({"target_modules": "("}, "expression"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
    ],
    ids=str,
)
def test_a_configuration_that_fits_no_model_is_named_with_its_file(changes, word, saved):
    edit(saved, **changes)
    refused(saved, word)


# Alternatives that overlap, repeated: what fails at the end is tried in every other way.
HOSTILE = [r"(?:[a-z_.0-9]|\w|.)*!?\d\d\d", r"((.|\w)+)+\d\dproj", r"(?:(?:.|\w|\S)*)*q_projj?o"]


@pytest.mark.parametrize("changes", [{"target_modules": None}, {"exclude_modules": None}], ids=lambda c: next(iter(c)))
@pytest.mark.parametrize("expression", HOSTILE)
def test_an_expression_that_would_take_years_is_given_up(expression, changes, tmp_path):
    adapted_by(FIELDS["vblora"], LLAMA).save_pretrained(tmp_path)
    edit(tmp_path, **dict.fromkeys(changes, expression))
    start = time.process_time()
    with pytest.raises(AdapterFileError, match=rf"(?s){CONFIG}.*takes more than"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert time.process_time() - start < 20


def test_a_target_that_matches_nothing_beside_one_that_does_is_warned_of():
    model = tiny_llama()
    with pytest.warns(UserWarning, match=r"v_porj.*\bv_proj\b") as caught:
        get_peft_model(model, VBLoRAConfig(r=2, num_vectors=6, vector_length=16, target_modules=["q_proj", "v_porj"]))
    assert "q_proj, which" not in str(caught[0].message)


@pytest.mark.parametrize("names", [None, 5, [None], ["default", 5], {"default": 1}.items()], ids=str)
def test_what_is_no_adapters_name_is_called_so(names, make_config, saved):
    model = adapted_by(make_config, LLAMA)
    calls = {
        "set_adapter": lambda: model.set_adapter(names),
        "delete_adapter": lambda: model.delete_adapter(names),
        "add_adapter": lambda: model.add_adapter(names, make_config(**LLAMA)),
        "load_adapter": lambda: model.load_adapter(saved, names),
        "from_pretrained": lambda: PeftModel.from_pretrained(tiny_llama(), saved, names),
        "get_peft_model": lambda: get_peft_model(tiny_llama(), make_config(**LLAMA), names),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match="`adapter_name`"):
            print(name, call())


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "\ud800"], ids=["long", "many bytes", "surrogate"])
def test_names_that_no_folder_can_have_are_refused_before_training(name, make_config, tmp_path):
    model = adapted_by(make_config, LLAMA)
    before = snapshot(model)
    with pytest.raises(ValueError, match="`adapter_name`"):
        model.add_adapter(name, make_config(**LLAMA))
    assert_unchanged(model, before)
    longest = "x" * 255
    model.add_adapter(longest, make_config(**LLAMA))
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path / longest)


@pytest.mark.parametrize("name", ["vblora_vector_bank", "vblora_logits_A", "vera_lambda_b", "modules_to_save"])
def test_parameters_of_an_adapter_called_as_one_are_trained_at_their_own_rates(name, make_config):
    config = make_config(**LLAMA, modules_to_save=["lm_head"])
    groups = {
        group["name"]: sorted(parameter.shape for parameter in group["params"])
        for group in parameter_groups(get_peft_model(tiny_llama(), config, name))
    }
    plain = {
        group["name"]: sorted(parameter.shape for parameter in group["params"])
        for group in parameter_groups(get_peft_model(tiny_llama(), make_config(**LLAMA, modules_to_save=["lm_head"])))
    }
    assert groups == plain


def test_without_an_adapter_there_is_no_configuration_and_no_card(make_config, tmp_path):
    model = adapted_by(make_config, LLAMA)
    model.unload()
    with pytest.raises(ValueError, match="no active adapter"):
        _ = model.active_peft_config
    with pytest.raises(ValueError, match="no active adapter"):
        model.create_or_update_model_card(tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_a_path_for_a_model_is_called_so(make_config, saved):
    for call in (
        lambda: PeftModel.from_pretrained(str(saved), saved),
        lambda: get_peft_model(str(saved), make_config(**LLAMA)),
    ):
        with pytest.raises(TypeError, match=r"`model` is of type str.*AutoPeftModel"):
            call()


class Mean(nn.Module):
    """Refuses a batch without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x):
        if not len(x):
            raise IndexError("index 0 is out of bounds")
        return self.a(x)


def test_a_batch_without_rows_is_called_so_where_the_base_model_cannot_take_it(make_config):
    model = get_peft_model(Mean(), make_config(target_modules=["a"]))
    with pytest.raises(ValueError, match=r"batch is empty.*\(0, 16\).*Mean"):
        model(torch.zeros(0, 16))
    with pytest.raises(ValueError, match=r"features|weight"):
        model(torch.zeros(2, 5))
    plain = get_peft_model(nn.Sequential(nn.Linear(16, 16)), make_config(target_modules=["0"]))
    assert plain(torch.zeros(0, 16)).shape == (0, 16)


@pytest.mark.parametrize(
    "config",
    [
        VBLoRAConfig(r=10**9, num_vectors=6, vector_length=16, **LLAMA),
        VBLoRAConfig(r=2, num_vectors=10**12, vector_length=16, **LLAMA),
        VeraConfig(r=10**15, **LLAMA),
    ],
    ids=["r", "h", "vera"],
)
def test_sizes_that_no_machine_holds_are_refused_with_the_bytes(config):
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"takes [\d,]{12,} bytes of memory, and there are [\d,]{6,}"):
        get_peft_model(base, config)
    assert_unchanged(base, before)
    model = adapted_by(FIELDS["vblora"], LLAMA)
    with pytest.raises((ValueError, TypeError)):
        model.add_adapter("large", config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inference_mode", "yes"),
        ("fan_in_fan_out", "false"),
        ("auto_mapping", ["a"]),
        ("revision", 7),
        ("peft_version", 0.21),
        ("base_model_name_or_path", ["a"]),
    ],
)
def test_fields_that_are_only_kept_have_their_types_too(field, value, saved, make_config):
    with pytest.raises(TypeError, match=f"`{field}`"):
        make_config(**{field: value})
    edit(saved, **{field: value})
    refused(saved, field)


def test_files_of_peft_have_types_that_are_taken(saved, make_config, tmp_path):
    peft = pytest.importorskip("peft")
    kind = getattr(peft, type(make_config()).__name__)
    fields = {key: value for key, value in vars(make_config(**LLAMA)).items() if key in SHARED}
    theirs = peft.get_peft_model(tiny_llama(), kind(**fields))
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.isfinite(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs"))).all()
