"""Switches of speed and memory: what they change, what they leave, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl import registry, speed
from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.geometry import Geometry
from t2irl.launch import check_same
from t2irl.loading import dump_run
from t2irl.models.base import ModelFamily
from t2irl.policy import Policy
from t2irl.speed import Speed
from t2irl.train import Parts
from t2irl.types import TextEmbeds
from tests.families import CASES
from tests.invariants.toy import a_batch, toy_parts, toy_run

CPU = torch.device("cpu")
Folder = Callable[..., Path]


def load(tiny_folder: Folder, name: str, **settings: Any) -> ModelFamily:
    """The tiny checkpoint of a case."""
    config = registry.find("models", CASES[name].model["type"]).Config
    return registry.build("models", config(path=tiny_folder(name), **CASES[name].model | settings), CPU)


def inputs(family: ModelFamily) -> tuple[Tensor, Tensor, TextEmbeds]:
    """Latents, noise levels and texts of two images."""
    draws = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    return draws, torch.tensor([0.9, 0.5]), family.text(["a red circle", "a large blue square"])


@pytest.mark.parametrize("name", ["sd3", "sdxl", "qwen_image"])
@torch.no_grad()
def test_branches_one_after_the_other(tiny_folder: Folder, name: str) -> None:
    """The same velocity up to rounding, in two calls, with as many images through the denoiser."""
    family = load(tiny_folder, name)
    x, t, text = inputs(family)
    found = {}
    for together in (True, False):
        speed.apply(Speed(guidance_in_one_call=together), family)
        family.work.clear()
        found[together] = family.velocity(x, t, text, family.null("dark"), 4.0)
        assert family.work["denoiser_forward_calls"] == (1 if together else 2)
        assert family.work["denoiser_forward_images"] == 4
    torch.testing.assert_close(found[False], found[True], rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[True], family.velocity(x, t, text, None, 1.0))


@pytest.mark.parametrize("together", [True, False])
def test_the_first_ratio_is_1_and_the_plan_counts_the_calls(together: bool) -> None:
    """Rollout and update take the same way."""
    run = toy_run({"speed": {"guidance_in_one_call": together}, "rollout": {"guidance_scale": 3.0}})
    parts = toy_parts(run)
    speed.apply(run.speed, parts.family)
    batch = a_batch(run, parts)
    geometry = Geometry.of(run, 1)
    assert parts.family.work["denoiser_forward_calls"] == geometry.denoiser_calls_rollout
    assert geometry.denoiser_calls_rollout == run.rollout.steps * geometry.rollout_batches * (1 if together else 2)
    prediction = parts.policy.predict(batch)
    assert batch.log_prob is not None
    torch.testing.assert_close(prediction.log_prob.detach(), batch.log_prob, rtol=0, atol=1e-5)


def test_adapters_stay_apart_on_request() -> None:
    """Without `fuse_lora` the layers' weights are untouched inside; with it the adapters are in them."""
    for fuse in (True, False):
        run = toy_run({"speed": {"fuse_lora": fuse}})
        policy: Policy = toy_parts(run).policy
        with torch.no_grad():
            for p in policy.trained.values():
                p.add_(0.1)
        layer: Any = policy.family.denoiser.first.get_base_layer()
        before = layer.weight.clone()
        with policy.fused():
            assert torch.equal(layer.weight, before) != fuse
        assert torch.equal(layer.weight, before)


@torch.no_grad()
def disturbed(run: Run, fuse: bool | str) -> Parts:
    """A run's parts with adapters that do something."""
    parts = toy_parts(run.model_copy(update={"speed": Speed.model_validate({"fuse_lora": fuse})}))
    generator = torch.Generator().manual_seed(0)
    for p in parts.policy.trained.values():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return parts


def test_adapters_are_fused_outside_the_window() -> None:
    """Everywhere: other states by rounding, recorded densities those of the update to the bit; else rollouts are as they were."""
    run, states = toy_run({"rollout": {"window": {"start": 2, "size": 1}}}), {}
    for fuse in (False, True, "everywhere"):
        parts = disturbed(run, fuse)
        batch = a_batch(run, parts)
        assert batch.log_prob is not None
        assert torch.equal(parts.policy.predict(batch).log_prob.detach(), batch.log_prob)
        states[fuse] = batch.x
    assert torch.equal(states[True], states[False]) and not torch.equal(states["everywhere"], states[False])
    torch.testing.assert_close(states["everywhere"], states[False], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux_dev"])
@torch.no_grad()
def test_fused_layers_below_float32(tiny_folder: Folder, name: str) -> None:
    """Everywhere: nearer to layers with adapters apart than these are to float32, back to the bit; else nothing is done."""
    found, weights = {}, {}
    for precision, fuse in (("fp32", False), ("bf16", False), ("bf16", True), ("bf16", "everywhere")):
        model = CASES[name].model | {"path": tiny_folder(name), "precision": precision}
        policy = disturbed(toy_run({"model": model}), fuse).policy
        before = {name: p.clone() for name, p in policy.family.denoiser.named_parameters()}
        x, t, text = inputs(policy.family)
        with policy.fused():
            found[precision, fuse] = policy.velocity(x, t, text)
            with policy.apart():
                apart = policy.velocity(x, t, text)
        weights = dict(policy.family.denoiser.named_parameters())
        assert all(
            torch.equal(p, before[name]) and p.requires_grad == (name in policy.trained) for name, p in weights.items()
        )
    exact, plain, fused = found["fp32", False], found["bf16", False], found["bf16", "everywhere"]
    assert torch.equal(found["bf16", True], plain) and torch.equal(apart, plain)
    assert 0 < float((fused - plain).norm()) < float((plain - exact).norm())
    assert float((fused - exact).norm()) < 1.2 * float((plain - exact).norm())


@pytest.mark.parametrize("name", ["sd3", "flux_dev", "sana", "qwen_image"])
def test_parts_that_rest_give_the_same_pictures(tiny_folder: Folder, name: str) -> None:
    """To the bit; moved for each encoding and each decoding, once a text is known only the decoder is."""
    found = {}
    for offload in ("none", "text", "all"):
        family = load(tiny_folder, name, offload=offload)
        x, t, text = inputs(family)
        with torch.no_grad():
            found[offload] = family.pictures(x - family.velocity(x, t, text, family.null(""), 2.0))
        encoders = sum(getattr(family.pipe, e) is not None for e in family.encoders)  # type: ignore[attr-defined]
        # Prompts in one go, then the empty text of the unconditional branch.
        assert family.work["moved_parts"] == {"none": 0, "text": 2 * encoders, "all": 2 * encoders + 1}[offload]
        family.text(["a red circle"])
        family.pictures(x)
        assert family.work["moved_parts"] == {"none": 0, "text": 2 * encoders, "all": 2 * encoders + 2}[offload]
    assert torch.equal(found["text"], found["none"]) and torch.equal(found["all"], found["none"])


def test_parts_rest_elsewhere(tiny_folder: Folder) -> None:
    """On a device without numbers: parts that rest stay on the CPU, all others went there."""
    config = registry.find("models", "sd3").Config
    family: Any = registry.build(
        "models", config(path=tiny_folder("sd3"), **CASES["sd3"].model | {"offload": "all"}), torch.device("meta")
    )
    at = {name: part.device.type for name, part in family.pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert at.pop("transformer") == "meta"
    assert set(at) == {"vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert set(at.values()) == {"cpu"}


def test_offload_may_change_when_a_run_goes_on(tmp_path: Path, tiny_folder: Folder) -> None:
    """It is the one setting of the model that may."""
    from t2irl.config import Run

    def run(**model: Any) -> Run:
        data = {"prompts": "p.txt", "heldout": "h.txt"}
        return Run.model_validate(
            {"model": {"type": "sd3", "path": "x", **model}, "data": data, "rewards": {"v": {"type": "vividness"}}}
        )

    (tmp_path / "config.yaml").write_text(dump_run(run()))
    check_same(tmp_path, run(offload="all"))
    with pytest.raises(ConfigError, match=r"model\.precision"):
        check_same(tmp_path, run(offload="all", precision="bf16"))


@pytest.mark.parametrize("name", sorted(CASES))
def test_blocks_to_compile(tiny_folder: Folder, name: str) -> None:
    """Every family has some, and traced blocks compute what they did, with gradient as without."""
    family = load(tiny_folder, name)
    names = speed.repeated_blocks(family.denoiser)
    assert names and all("Block" in n for n in names)
    if name != "sd3":
        return
    x, t, text = inputs(family)
    family.denoiser.requires_grad_(True)
    plain = family.velocity(x, t, text, None, 1.0)
    speed.compile_blocks(family, backend="eager")  # traced alone: building code takes a compiler, and minutes
    assert family.compiled
    traced = family.velocity(x, t, text, None, 1.0)
    assert torch.equal(traced, plain)
    with torch.no_grad():
        assert torch.equal(family.velocity(x, t, text, None, 1.0), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["qwen_image", "sana", "z_image", "flux_dev"])
@torch.no_grad()
def test_compiled_texts_have_few_lengths(tiny_folder: Folder, name: str) -> None:
    """Whole units where there is a mask, for the same velocity up to rounding; without a mask, nothing is added."""
    family = load(tiny_folder, name)
    x, t, _ = inputs(family)
    lengths: dict[bool, set[int]] = {False: set(), True: set()}

    def denoise(latents: Tensor, t: Tensor, text: TextEmbeds, denoise: Any = family.denoise) -> Tensor:
        lengths[family.compiled].add(text.tokens.shape[1])
        return denoise(latents, t, text)

    family.denoise = denoise
    for prompt in ("red", "a red circle", "a red circle and a blue square", "two red circles " * 3):
        text, found = family.text([prompt, "red"]), []
        for family.compiled in (False, True):
            found.append(family.velocity(x, t, text, None, 1.0))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    if text.mask is None:
        assert lengths[True] == lengths[False]
    else:
        assert len(lengths[True]) < len(lengths[False]) and all(n % 32 == 0 for n in lengths[True])


def test_texts_of_other_lengths_are_not_compiled_anew(tiny_folder: Folder) -> None:
    """As long as they have as many units of tokens."""
    family = load(tiny_folder, "qwen_image")
    x, t, _ = inputs(family)
    texts = [family.text([prompt, "red"]) for prompt in ("red circle", "a red circle")]
    assert len({text.tokens.shape[1] for text in texts}) == 2
    torch._dynamo.utils.counters.clear()
    try:
        speed.compile_blocks(family, backend="eager")
        graphs = []
        for text in texts:
            family.velocity(x, t, text, None, 1.0)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    finally:
        torch._dynamo.reset()
    assert graphs[0] == graphs[1] > 0


def test_what_cannot_be_compiled() -> None:
    """A denoiser without repeated blocks."""
    run = toy_run({})
    with pytest.raises(ConfigError, match=r"speed\.compile: ToyDenoiser has no repeated blocks"):
        speed.apply(Speed(compile=True), toy_parts(run).family)


def fake(family: ModelFamily, device: str, precision: str) -> Any:
    """The family as it would stand on another device."""
    settings = SimpleNamespace(precision=precision)
    return SimpleNamespace(device=torch.device(device), config=settings, denoiser=family.denoiser)


def test_attention_that_cannot_be_had(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason by name, with what to do."""
    family = load(tiny_folder, "flux_dev")
    with pytest.raises(ConfigError, match=r"speed\.attention = flash: needs an NVIDIA GPU, and this run is on cpu"):
        speed.apply(Speed(attention="flash"), family)
    with pytest.raises(ConfigError, match="bf16 and fp16 only"):
        speed.use_attention("flash", fake(family, "cuda", "fp32"))
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    for backend in ("flash", "xformers"):
        with pytest.raises(ConfigError, match=f"not installed. Install it: pip install {backend}"):
            speed.use_attention(backend, fake(family, "cuda", "bf16"))


def test_which_model_can_have_which_attention(tiny_folder: Folder) -> None:
    """What diffusers can exchange; masks and linear attention cannot."""
    able = {name: load(tiny_folder, name).denoiser for name in CASES}
    flash = {name for name, d in able.items() if speed.attention_problem("flash", d) is None}
    xformers = {name for name, d in able.items() if speed.attention_problem("xformers", d) is None}
    assert flash == {"flux_dev", "flux_schnell", "flux2_klein"}
    assert xformers == flash | {"sd3", "sd15", "sd21", "sdxl"}


def test_tf32_is_put_back() -> None:
    """Null touches nothing; otherwise products and convolutions are switched together, until undone."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [p.allow_tf32 for p in places]
    speed.use_tf32(None)()
    assert [p.allow_tf32 for p in places] == before
    for value in (True, False):
        undo = speed.use_tf32(value)
        assert [p.allow_tf32 for p in places] == [value] * 2
        undo()
        assert [p.allow_tf32 for p in places] == before
