"""The toy method on a whole model."""

from tests.toy_method.config import ToyConfig
from tests.toy_method.contents import ToyContents
from tests.toy_method.files import ToyFiles
from tests.toy_method.layer import Linear, ToyLayer
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.targets import LORA_TARGETS


class ToyModel(ToyFiles, ToyContents, BaseTuner):
    prefix = "toy_"
    config_class = ToyConfig
    tuner_layer_cls = ToyLayer
    linear_cls = Linear
    target_module_mapping = LORA_TARGETS

    @classmethod
    def layer_arguments(cls, config):
        return {"r": config.r, "gain": config.gain}
