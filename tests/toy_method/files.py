"""The files of the toy method: A and B of each layer, in float32 or float16."""

from vblora_triton.tuner.file_keys import AdapterFiles


class ToyFiles(AdapterFiles):
    @classmethod
    def adapter_shapes(cls, plan):
        shapes = {}
        for name, (in_features, out_features) in plan.features().items():
            shapes[f"base_model.model.{name}.toy_A"] = (plan.config.r, in_features)
            shapes[f"base_model.model.{name}.toy_B"] = (out_features, plan.config.r)
        return shapes

    @classmethod
    def pack(cls, config, tensors):
        return {key: t.half() if config.save_half and ".toy_" in key else t for key, t in tensors.items()}
