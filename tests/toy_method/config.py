"""The configuration of the toy method."""

from dataclasses import dataclass
from typing import ClassVar

from vblora_triton.tuner.config import TargetedConfig
from vblora_triton.tuner.fields import check_int
from vblora_triton.tuner.method import FileForm, Method, Option, Part


@dataclass
class ToyConfig(TargetedConfig):
    """y = base(x) + gain * x A^T B^T, with an A (r, in) and a B (out, r) for each layer."""

    r: int = 2
    gain: int = 1
    save_half: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    type_name: ClassVar[str | None] = "TOY"
    method: ClassVar[Method] = Method(
        title="Toy LoRA",
        parts={"toy": Part("learning rate of A and B", ("toy_A", "toy_B"), 5e-2)},
        options={"r": Option("R", "rank of the update", 2), "gain": Option("G", "factor of the update", 3)},
        forms=(
            FileForm(fields={"save_half": False}),
            FileForm("half", "halved", "half file", {"save_half": True}, "A and B in float16: half as large"),
        ),
    )

    def check(self) -> None:
        check_int("r", self.r)
        check_int("gain", self.gain)
        super().check()
