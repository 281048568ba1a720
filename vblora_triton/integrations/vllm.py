"""vLLM serves VB-LoRA and VeRA adapters by name: a resolver that converts a folder to LoRA when it is first asked for.

`pip install` is enough: vLLM finds `register` by the entry point `vllm.general_plugins`. It does something where
VLLM_LORA_RESOLVER_CACHE_DIR names the folder of adapters, as for vLLM's own resolver of LoRA folders.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from vblora_triton.hub import CONFIG_NAME
from vblora_triton.tuner.config import PeftConfig

RESOLVER_NAME = "vblora-triton"

_logger = logging.getLogger(__name__)


class AdapterResolver:
    """Finds VB-LoRA and VeRA adapters in a folder, and hands vLLM their conversions.

    A conversion is kept in the cache under a name made of the adapter's bytes, so that a changed adapter is converted
    again; requests at once, of one process or several, convert once.

    Args:
        folder: the adapters, each in a folder of its own that has the name by which it is requested.
        cache: where conversions are kept; made if need be.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = Path(folder), Path(cache)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return a LoRARequest for an adapter, or None for what is none of ours or cannot be served.

        Args:
            base_model_name: what vLLM serves; the adapter's `base_model_name_or_path` must be the same.
            lora_name: as requested, the name of a folder.
        """
        folder = self._find(base_model_name, lora_name)
        if folder is None:
            return None
        try:
            # Off the loop: others are being served.
            converted = await asyncio.to_thread(self.convert, folder, base_model_name)
        except (ValueError, OSError) as error:
            _logger.warning("Adapter %r cannot be served: %s", lora_name, " ".join(str(error).split()))
            return None
        from vllm.lora.request import LoRARequest

        # vLLM counts adapters itself; this only has to be above 0.
        number = int.from_bytes(hashlib.sha256(lora_name.encode()).digest()[:4], "big") or 1
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(converted))

    def convert(self, folder: Path, base_model_name: str) -> Path:
        """Return the folder of an adapter's conversion, which is made if it is not there.

        Raises:
            AdapterFileError: a broken adapter.
            ValueError: one that vLLM would refuse.
        """
        from filelock import FileLock

        from vblora_triton.exchange.convert import convert_to_lora

        digest = hashlib.sha256(base_model_name.encode())
        for file in sorted(folder.glob("adapter_*")):
            digest.update(file.name.encode() + file.read_bytes())
        target = self.cache / digest.hexdigest()
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                done = convert_to_lora(folder, target, base=base_model_name, engine="vllm")
                _logger.info("Converted %s: %s", folder, "; ".join(done.notes))
        return target

    def _find(self, base_model_name: str, lora_name: str) -> Path | None:
        """Return the folder of an adapter of ours for this base model; a name never leads out of the folder."""
        if not lora_name or Path(lora_name).is_absolute() or ".." in Path(lora_name).parts:
            return None
        folder = self.folder / lora_name
        try:
            settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(settings, dict) or settings.get("peft_type") not in PeftConfig.known:
            return None
        base = settings.get("base_model_name_or_path")
        if base != base_model_name:
            _logger.warning("Adapter %r is for %r, and %r is served.", lora_name, base, base_model_name)
            return None
        return folder


def register() -> None:
    """Register the resolver with vLLM; vLLM calls this in each of its processes, possibly more than once."""
    from vllm import envs
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if envs.VLLM_LORA_RESOLVER_CACHE_DIR and RESOLVER_NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolver.register(AdapterResolver)
        cache = Path(envs.VLLM_CACHE_ROOT) / "vblora_triton"
        resolver = AdapterResolver(Path(envs.VLLM_LORA_RESOLVER_CACHE_DIR), cache)
        LoRAResolverRegistry.register_resolver(RESOLVER_NAME, resolver)
