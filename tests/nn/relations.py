"""What every layer and model must keep to, and weights with which they could break it."""

import torch


def randomise(module, shift=6.0):
    """`module` with all parameters random: fresh heads and output projections are zero, and hide the rest.

    Args:
        shift: scale of the shift projections, so that shifts reach tens of tokens.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = shift if "shift" in name else 1.0
            parameter.normal_(std=scale * parameter.shape[-1] ** -0.5)
    return module.eval()


@torch.no_grad()
def assert_causal(run, x, other, cuts):
    """run(x) up to row t stays the same, bit for bit, when all after t becomes `other`; for t in `cuts`."""
    wanted = run(x)
    assert wanted.isfinite().all()
    for t in cuts:
        changed = torch.cat([x[:, : t + 1], other[:, t + 1 :]], dim=1)
        got = run(changed)
        assert torch.equal(got[:, : t + 1], wanted[:, : t + 1]), f"the past of row {t} knows its future"
        assert not torch.equal(got[:, t + 1 :], wanted[:, t + 1 :]), "the change was none"


def assert_close(got, wanted, tolerance=1e-10):
    """Elementwise, within `tolerance` relative to the largest wanted number."""
    assert got.shape == wanted.shape
    error = (got - wanted).abs().max().item() if got.numel() else 0.0
    scale = max(1.0, wanted.abs().max().item()) if got.numel() else 1.0
    assert error <= tolerance * scale, f"off by {error:.3g}, largest number {scale:.3g}"


def unchecked(function):
    """`function` without the shape checks that the test run wraps around it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
