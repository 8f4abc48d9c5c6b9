"""Adapters and full fine-tuning on a pipeline folder: what is trained, snapshots, saved state, wrong layer names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from t2irl.errors import ConfigError
from t2irl.policy import Policy
from t2irl.train import Parts
from tests.invariants.toy import a_batch, toy_parts, toy_run

Folder = Callable[..., Path]
LORA = {"type": "lora", "rank": 4, "alpha": 8}
FULL = {"type": "full"}
BOTH = pytest.mark.parametrize("tune", [LORA, FULL], ids=["lora", "full"])
LAST_TEXT_QUERY = "transformer_blocks.1.attn.add_q_proj"
"""The last block drops the text's output, so nothing depends on this layer."""


def parts_of(folder: Path, tune: Mapping[str, Any], **others: Any) -> Parts:
    """Everything that an update needs."""
    model = {"type": "sd3", "path": folder, "max_sequence_length": 4, **others.pop("model", {})}
    sampling = {"prompts": 2, "group_size": 2, "batch_size": 4, "steps": 3}
    policy = {"tune": tune, **others.pop("policy", {})}
    return toy_parts(toy_run({"model": model, "rollout": sampling, "policy": policy, **others}))


def policy_of(folder: Path, tune: Mapping[str, Any], **others: Any) -> Policy:
    """A policy of the folder's model."""
    return parts_of(folder, tune, **others).policy


@torch.no_grad()
def velocity(policy: Policy) -> Tensor:
    """Of a fixed input."""
    x = torch.randn(2, *policy.family.latent_shape, generator=torch.Generator().manual_seed(1))
    return policy.velocity(x, torch.tensor([1.0, 0.4]), policy.text(["a red circle", "a blue square"]))


def disturb(policy: Policy, seed: int = 0) -> None:
    """Move trained weights, and their average elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in policy.trained.items():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
        if policy.average is not None:
            policy.average[name].add_(0.1 * torch.randn(p.shape, generator=generator))


# ------------------------------------------------------------------------------------------------------------- adapters
def test_fresh_adapters_add_nothing_and_come_from_the_seed(sd3_folder: Folder) -> None:
    base = velocity(policy_of(sd3_folder(), FULL))
    first, same, other = (policy_of(sd3_folder(), LORA, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(velocity(first), base)
    for name, p in first.trained.items():
        assert p.any() == (".lora_A." in name), name
        assert torch.equal(p, same.trained[name])
        assert torch.equal(p, other.trained[name]) == (".lora_B." in name)
        assert p.shape[0 if ".lora_A." in name else 1] == 4
    disturb(first)
    assert float((velocity(first) - base).abs().max()) > 0.01


class Casts(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs what it sees."""
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_inputs_of_adapters_are_cast_once(sd3_folder: Folder, precision: str) -> None:
    """What peft would cast to float32 for autocast to cast back: the same velocity and gradients to the bit, with fewer casts."""
    found, counts = [], []
    for peft_casts in (False, True):
        policy = policy_of(sd3_folder(), LORA, model={"precision": precision})
        disturb(policy)
        layers = [m for m in policy.family.denoiser.modules() if isinstance(m, Linear)]
        for layer in layers:
            assert not layer.cast_input_dtype_enabled
            layer.cast_input_dtype_enabled = peft_casts
        x = torch.randn(2, *policy.family.latent_shape, generator=torch.Generator().manual_seed(1))
        text = policy.text(["a red circle", "a blue square"])
        with Casts() as casts:
            v = policy.velocity(x, torch.tensor([1.0, 0.4]), text)
            v.square().mean().backward()
        counts.append(casts.count)
        found.append([v.detach(), *(p.grad for p in policy.trained.values() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(found[0]) > len(layers) and counts[1] >= counts[0] + 3 * len(layers)


def test_default_layers_are_all_of_attention(sd3_folder: Folder) -> None:
    names = {n.rsplit(".lora_", 1)[0] for n in policy_of(sd3_folder(), LORA).trained}
    image = [f"transformer_blocks.{i}.attn.{k}" for i in (0, 1) for k in ("to_q", "to_k", "to_v", "to_out.0")]
    text = [f"transformer_blocks.{i}.attn.add_{k}_proj" for i in (0, 1) for k in "qkv"]
    assert names == {*image, *text, "transformer_blocks.0.attn.to_add_out"}


def test_layers_of_ones_own_choice(sd3_folder: Folder) -> None:
    policy = policy_of(sd3_folder(), {**LORA, "targets": ["ff.net.2", "proj_out"]})
    names = {n.rsplit(".lora_", 1)[0] for n in policy.trained}
    assert names == {"transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2", "proj_out"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["attn.to_qq"], r"policy\.tune\.targets: no linear layer is called 'attn\.to_qq'\. Did you mean 'attn\.to_q'\?"),
        # peft would train to_k and say nothing.
        (["attn.to_k", "att.to_v"], r"policy\.tune\.targets: no .* called 'att\.to_v'\. Did you mean 'attn\.to_v'\?"),
        (["xyz"], r"called 'xyz'\. Layers: .*attn\.to_q, .*ff\.net\.2.*; null takes the usual ones"),
        (["attn"], r"policy\.tune\.targets: no linear layer is called 'attn'\."),
        ([], r"policy\.tune\.targets is empty\. Layers: "),
        (["0"], r"policy\.tune\.targets: '0' also matches transformer_blocks\.0, which is no linear layer"),
    ],
)  # fmt: skip
def test_wrong_layer_names_are_refused(sd3_folder: Folder, targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_of(sd3_folder(), {**LORA, "targets": targets})


# ------------------------------------------------------------------------------------------------------------ snapshots
@BOTH
def test_snapshots_are_swapped_in_and_out(sd3_folder: Folder, tune: Mapping[str, Any]) -> None:
    policy = policy_of(sd3_folder(), tune)
    base = velocity(policy)
    disturb(policy)
    own = {name: p.detach().clone() for name, p in policy.trained.items()}
    trained = velocity(policy)
    with policy.averaged():
        average = velocity(policy)
        with policy.reference():
            assert torch.equal(velocity(policy), base)
        assert torch.equal(velocity(policy), average)
    with pytest.raises(ZeroDivisionError), policy.reference():
        raise ZeroDivisionError
    assert torch.equal(velocity(policy), trained)
    assert all(torch.equal(p, own[name]) for name, p in policy.trained.items())
    assert all(p.requires_grad for p in policy.trained.values())
    pairs = [(trained, average), (trained, base), (average, base)]
    assert all(float((a - b).abs().max()) > 0.01 for a, b in pairs)


@BOTH
def test_an_update_moves_all_that_is_trained_and_nothing_else(sd3_folder: Folder, tune: Mapping[str, Any]) -> None:
    parts = parts_of(sd3_folder(t5=True), tune)
    policy, pipe = parts.policy, parts.policy.family.pipe
    modules = {"transformer": policy.family.denoiser, "vae": pipe.vae}
    modules |= {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    weights = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in weights.items()}
    batch = a_batch(toy_run({"rollout": {"prompts": 2, "group_size": 2, "steps": 3}}), parts)
    for _ in range(2):  # A has a gradient only when B is not 0 any more
        parts.optimizer.backward(parts.algorithm.loss(policy.predict(batch), batch).terms["policy"])
        parts.optimizer.step(parts.clock)
    changed = {name for name, p in weights.items() if not torch.equal(p, before[name])}
    expected = {f"transformer.{name}" for name in policy.trained if LAST_TEXT_QUERY not in name}
    assert changed == expected
    assert len(expected) >= len(policy.trained) - 2


# ----------------------------------------------------------------------------------------------------------------- state
@BOTH
def test_state_goes_round(sd3_folder: Folder, tune: Mapping[str, Any]) -> None:
    policy, other = (policy_of(sd3_folder(), tune, seed=seed) for seed in (0, 1))
    disturb(policy)
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    assert set(state) == {f"{kind}.{name}" for kind in ("trained", "average") for name in policy.trained}
    assert not torch.equal(velocity(other), velocity(policy))
    storage = {name: p.data_ptr() for name, p in other.trained.items()}
    other.load_state_dict(state)
    assert torch.equal(velocity(other), velocity(policy))
    with policy.averaged(), other.averaged():
        assert torch.equal(velocity(other), velocity(policy))
    assert all(p.data_ptr() == storage[name] for name, p in other.trained.items())  # the optimiser knows these


def test_state_that_does_not_fit_is_refused(sd3_folder: Folder) -> None:
    policy = policy_of(sd3_folder(), LORA)
    state = policy.state_dict()
    name = next(iter(policy.trained))
    with pytest.raises(KeyError, match=name):
        policy.load_state_dict({k: v for k, v in state.items() if k != f"trained.{name}"})
    with pytest.raises(KeyError, match="average"):
        policy.load_state_dict({k: v for k, v in state.items() if k.startswith("trained.")})
    with pytest.raises(ValueError, match=rf"trained\.{name} has shape \(3, 24\), expected \(4, 24\)"):
        policy.load_state_dict({**state, f"trained.{name}": torch.zeros(3, 24)})


def test_without_an_average(sd3_folder: Folder) -> None:
    policy = policy_of(sd3_folder(), LORA, policy={"ema": None})
    disturb(policy)
    assert policy.average is None
    assert all(name.startswith("trained.") for name in policy.state_dict())
    before = velocity(policy)
    policy.after_update(0)
    with policy.averaged():
        assert torch.equal(velocity(policy), before)
    policy.load_state_dict(policy_of(sd3_folder(), LORA).state_dict())
    assert not torch.equal(velocity(policy), before)
