"""Texts become sequences, the last of which are held out."""

import torch

from vblora_triton.finetune.data import Sequences, split


def test_held_out_sequences_are_the_end_of_the_text_and_at_most_256():
    tokens = torch.arange(2 * 3000 + 1)
    sequences = split(tokens, 2, "text")
    assert isinstance(sequences, Sequences)
    assert torch.equal(torch.cat([sequences.train, sequences.held_out]).flatten(), tokens[:6000])
    assert len(sequences.held_out) == 256
    assert len(split(tokens[:40], 2, "text").held_out) == 2
    assert len(split(tokens[:4], 2, "text").held_out) == 1
