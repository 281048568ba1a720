"""What can be made of the toy method's tensors."""

from vblora_triton.tuner.contents import AdapterContents, Sizes, layers_with


class ToyContents(AdapterContents):
    @classmethod
    def stored_sizes(cls, config, tensors):
        B = dict(layers_with(tensors, "toy_B"))
        return {name: Sizes(A.shape[1], len(B[name])) for name, A in layers_with(tensors, "toy_A") if name in B}

    @classmethod
    def lora_factors(cls, config, tensors, layer, in_features, out_features):
        A, B = (tensors[f"base_model.model.{layer}.toy_{which}"].float() for which in "AB")
        return A, config.gain * B
