"""The resolver, driven as vLLM drives it, gives folders that vLLM's parsing takes.

vLLM is not installed here. What it has of modules, classes and checks is written down below as version 0.33 has them:
docs/other-engines.md says what was run with vLLM's own.
"""

import asyncio
import json
import re
import shutil
import sys
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.exchange.adapters import CASES, save
from tests.models import outputs
from vblora_triton.exchange import convert

pytestmark = pytest.mark.filterwarnings("ignore:`save_projection` is False")
METHODS = ("vblora-topk-linear", "vera-full-linear", "vera-bare-linear")


class Registry(SimpleNamespace):
    """LoRAResolverRegistry, as far as plugins use it."""

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name, resolver):
        assert resolver_name not in self.resolvers
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name):
        return self.resolvers[resolver_name]


class LoRARequest(SimpleNamespace):
    """LoRARequest, with its checks."""

    def __init__(self, lora_name, lora_int_id, lora_path=""):
        assert lora_int_id >= 1
        assert lora_path
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


class LoRAResolver(ABC):
    """LoRAResolver."""

    @abstractmethod
    async def resolve_lora(self, base_model_name, lora_name): ...


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """Stand-ins for the modules of vLLM that a plugin sees, and its settings."""
    modules = {
        "vllm": {"envs": SimpleNamespace(VLLM_LORA_RESOLVER_CACHE_DIR=None, VLLM_CACHE_ROOT=str(tmp_path / "cache"))},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": Registry(resolvers={})},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["vllm"].envs


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A base model, and a folder of adapters for it of both methods."""
    folder = tmp_path_factory.mktemp("served")
    found = {}
    for case in METHODS:
        found[case] = save(folder / case, *CASES[case])
        shutil.copytree(found[case].adapter, folder / "adapters" / case)
        # All of them are made for one base model.
        path = folder / "adapters" / case / "adapter_config.json"
        base = found[METHODS[0]].base
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    return folder / "adapters", base, found


def registered(vllm, folder):
    """Load the plugin as vLLM does, twice, by the entry point; return the resolver that its server would ask."""
    vllm.VLLM_LORA_RESOLVER_CACHE_DIR = str(folder)
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (target,) = re.findall(r'\[project.entry-points."vllm.general_plugins"\]\n\w+ = "(.*)"\n', settings)
    for _ in range(2):
        resolve_name(target)()
    registry = import_module("vllm.lora.resolver").LoRAResolverRegistry
    (resolver,) = [registry.get_resolver(name) for name in registry.get_supported_resolvers()]
    assert isinstance(resolver, LoRAResolver)
    return resolver


def taken_by_vllm(folder, base, max_lora_rank=8):
    """Read a folder as vLLM's PEFTHelper and LoRAModel do; return layer -> (A, B), scaled."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert isinstance(config["r"], int)
    assert 0 < config["r"] <= max_lora_rank
    assert (config["peft_type"], config["bias"], config["base_model_name_or_path"]) == ("LORA", "none", base)
    unsupported = ["modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"]
    unsupported += ["use_bdlora", "use_qalora", "rank_pattern", "alpha_pattern", "use_rslora"]
    assert not any(config.get(name) for name in unsupported)
    assert config.get("init_lora_weights", True) is True
    factors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"]
        assert parts[-1] == "weight"
        assert parts[-2] in ("lora_A", "lora_B")
        assert parts[-3] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.shape[parts[-2] == "lora_B"] == config["r"]
        factors.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
    scale = config["lora_alpha"] / config["r"]
    return {name: (own["lora_A"].float(), scale * own["lora_B"].float()) for name, own in factors.items()}


@pytest.mark.parametrize("case", METHODS)
def test_two_requests_at_once_convert_once_and_vllm_takes_the_folder(case, served, vllm, monkeypatch, caplog):
    folder, base, found = served
    resolver, calls = registered(vllm, folder), []
    plain = convert.convert_to_lora
    monkeypatch.setattr(convert, "convert_to_lora", lambda *a, **k: (calls.append(a), plain(*a, **k))[1])

    async def ask():
        return await asyncio.gather(*(resolver.resolve_lora(base, case) for _ in range(2)))

    first, second = asyncio.run(ask())
    again = asyncio.run(resolver.resolve_lora(base, case))
    assert len(calls) == 1, caplog.text
    assert first.lora_path == second.lora_path == again.lora_path
    assert first.lora_name == case

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, (A, B) in taken_by_vllm(Path(first.lora_path), base).items():
            model.get_submodule(name).weight += B @ A
    # The factors have 8 bits.
    torch.testing.assert_close(outputs(model), found[case].logits, rtol=0, atol=0.02)


def test_what_is_none_of_ours_is_left_to_others(served, vllm, tmp_path, caplog):
    source, base, _ = served
    folder = tmp_path / "adapters"
    shutil.copytree(source, folder)
    name = METHODS[0]
    shutil.copytree(folder / name, folder / "lora")
    config = json.loads((folder / name / "adapter_config.json").read_text())
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    shutil.copytree(folder / name, folder / "cut")
    (folder / "cut" / "adapter_model.safetensors").write_bytes(b"cut")
    shutil.copytree(folder / name, tmp_path / "outside")
    resolver = registered(vllm, folder)
    for asked in ("missing", "lora", "cut", "", "../outside", str(tmp_path / "outside"), f"x/../{name}"):
        assert asyncio.run(resolver.resolve_lora(base, asked)) is None, asked
    assert asyncio.run(resolver.resolve_lora("another/model", name)) is None
    assert "'cut' cannot be served" in caplog.text
    assert "'another/model' is served" in caplog.text
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name != "vblora_triton"]


def test_an_adapter_that_changed_is_converted_again(served, vllm, tmp_path):
    source, base, _ = served
    shutil.copytree(source, tmp_path / "adapters")
    resolver = registered(vllm, tmp_path / "adapters")
    before = asyncio.run(resolver.resolve_lora(base, METHODS[1]))
    config = tmp_path / "adapters" / METHODS[1] / "adapter_config.json"
    config.write_text(config.read_text().replace('"d_initial": 0.1', '"d_initial": 0.2'))
    after = asyncio.run(resolver.resolve_lora(base, METHODS[1]))
    assert before.lora_path != after.lora_path


def test_without_its_folder_the_plugin_does_nothing(vllm):
    import_module("vblora_triton.integrations.vllm").register()
    assert not import_module("vllm.lora.resolver").LoRAResolverRegistry.resolvers
