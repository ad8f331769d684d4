"""The compiled step of the depth decoder against the loop as it is."""

import shutil

import pytest
import torch
from test_inference_model import model_with_norms

from command_line import MissingRequirement
from inference_model import DepthLoop

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("int8", [False, True])
def test_compiled_it_draws_from_the_same_logits(int8):
    model, seen = model_with_norms(), {}
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, model.config.backbone.d_model, generator=random)
    loops = {compiled: DepthLoop(model, int8, compiled) for compiled in (False, True)}
    for stop in (6, 3):  # the cache of the second is longer than its codes
        for compiled, loop in loops.items():
            seen[compiled] = []
            with torch.inference_mode():
                loop.continue_frames(
                    hidden,
                    torch.tensor([[1]]),
                    stop,
                    lambda logits, own=seen[compiled]: own.append(logits) or logits.argmax(1),
                )
        torch.testing.assert_close(
            torch.stack(seen[True]), torch.stack(seen[False]), atol=2e-2 if int8 else 1e-5, rtol=1e-4
        )
    several = hidden.expand(3, -1), torch.tensor([[1]] * 3)
    with torch.inference_mode():  # what several conversations need at once goes the other way
        codes = [loop.continue_frames(*several, 6, lambda logits: logits.argmax(1)) for loop in loops.values()]
    assert torch.equal(*codes)


def test_without_a_compiler_one_line_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingRequirement, match="needs a C\\+\\+ compiler, one of g"):
        DepthLoop(model_with_norms(), compiled=True)
