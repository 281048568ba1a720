"""The linear layer of the toy method."""

from torch import nn

from vblora_triton.tuner.layer import BaseTunerLayer
from vblora_triton.tuner.linear import AdaptedLinear


class ToyLayer(BaseTunerLayer):
    adapter_layer_names = ("toy_A", "toy_B")
    other_param_names = ("r", "gain", "toy_dropout")
    dropout_name = "toy_dropout"

    def __init__(self, base_layer):
        self._wrap(base_layer, {})
        self.gain = {}

    def update_layer(self, adapter_name, r, gain):
        self.gain[adapter_name] = gain
        A, B = self._empty(r, self.in_features), self._empty(self.out_features, r)
        if not A.is_meta:
            nn.init.normal_(A, 0, 0.1)
            nn.init.zeros_(B)
        self._hold(adapter_name, r, 0.0, {"toy_A": A, "toy_B": B}, frozen=False)


class Linear(AdaptedLinear, ToyLayer):
    def __init__(self, base_layer, adapter_name, r, gain):
        nn.Module.__init__(self)
        ToyLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.train(base_layer.training)
        self.update_layer(adapter_name, r, gain)

    def _add_update(self, adapter, x, base):
        return base + self.gain[adapter] * (x @ self.toy_A[adapter].T @ self.toy_B[adapter].T)

    def _delta(self, adapter):
        return self.gain[adapter] * (self.toy_B[adapter].float() @ self.toy_A[adapter].float())
