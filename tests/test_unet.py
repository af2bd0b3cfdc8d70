"""The U-Net against diffusers' UNet2DModel as the oracle; its config, initialisation, dropout addresses, FLOP count."""

import copy
import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

import fastddpm_kernels
from fastddpm import blocks
from fastddpm.blocks import Attention, Dropout, ResnetBlock
from fastddpm.errors import ConfigError
from fastddpm.flops import flops_per_image
from fastddpm.unet import DIFFUSERS_DEFAULTS, UNet, UNetConfig, UNetOutput, convert_old_keys

HO = UNetConfig()
DIGITS = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 64),
    layers_per_block=1,
    norm_num_groups=8,
)
ADM = UNetConfig(
    sample_size=(16, 24),
    out_channels=6,
    freq_shift=0,
    flip_sin_to_cos=True,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    block_out_channels=(32, 48, 64),
    downsample_padding=1,
    downsample_type="resnet",
    upsample_type="resnet",
    attention_head_dim=16,
    norm_num_groups=16,
    attn_norm_num_groups=8,
    norm_eps=1e-5,
    resnet_time_scale_shift="scale_shift",
    num_class_embeds=10,
)
TINY = dataclasses.replace(DIGITS, block_out_channels=(12, 24), norm_num_groups=4, in_channels=2)
VARIANTS = {
    "padding 1": {"downsample_padding": 1},
    "resnet resampling down, conv up": {"downsample_type": "resnet"},
    "resnet resampling up, conv down": {"upsample_type": "resnet", "downsample_padding": 1},
    "resnet blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    },
    "attention at the top": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "layers_per_block": 2,
    },
    "heads": {"attention_head_dim": 3},
    "head that leaves channels over": {"attention_head_dim": 10},
    "cos first": {"flip_sin_to_cos": True, "freq_shift": 0},
    "odd sinusoid": {"block_out_channels": (9, 24), "norm_num_groups": 3, "flip_sin_to_cos": True},
    "wide embedding": {"time_embedding_dim": 40},
    "centered": {"center_input_sample": True},
    "middle scaled": {"mid_block_scale_factor": math.sqrt(2)},
    "no middle attention": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "scale shift, middle attention without norm": {"resnet_time_scale_shift": "scale_shift"},
    "middle attention with groups of its own": {"attn_norm_num_groups": 2},
    "class timestep": {"class_embed_type": "timestep"},
    "class identity": {"class_embed_type": "identity"},
    "classes": {"num_class_embeds": 5, "act_fn": "swish"},
    "one level": {
        "block_out_channels": (12,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "three levels, not square": {
        "sample_size": (4, 12),
        "block_out_channels": (8, 12, 16),
        "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    },
}


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Every parameter at normal scale: N(0, 1), weights over the root of their inputs so that activations stay sane."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in))


class _CastTo(nn.Module):
    """The oracle feeds its fp32 sinusoid of a class to a float64 layer as it is, which torch refuses."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.inner, self.cast = inner, dtype

    def forward(self, t: Tensor) -> Tensor:
        return self.inner(t).to(self.cast)


def twins(config: UNetConfig, dtype: torch.dtype) -> tuple[UNet, UNet2DModel]:
    """Our net and the oracle with the same random weights, loaded strictly."""
    ours, theirs = UNet(config), UNet2DModel.from_config(config.to_diffusers())
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    theirs.time_proj = _CastTo(theirs.time_proj, dtype)
    return ours, theirs


def example(config: UNetConfig, batch: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_t, t (0 and T - 1 among them) and the class labels the config asks for."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, config.in_channels, *config.image_size, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.tensor([999, 0, 371, 20])[:batch]
    labels: Tensor | None = None
    if config.class_embed_type == "identity":
        labels = torch.randn(batch, config.time_channels, generator=generator, dtype=torch.float64).to(dtype)
    elif config.class_embed_type == "timestep":
        labels = torch.arange(batch) * 17
    elif config.conditional:
        labels = torch.arange(batch) + 2
    return x_t, t, labels


def assert_close(name: str, got: Tensor, truth: Tensor, tolerance: float, absolute: bool = False) -> None:
    error = (got - truth).abs().max().item()
    largest = 1.0 if absolute else truth.abs().max().item()
    assert largest > 0.0, f"{name}: the oracle gives nothing but zeros"
    assert error <= tolerance * largest, f"{name}: error {error:.3g}, largest entry {largest:.3g}"


def check_against_diffusers(config: UNetConfig, batch: int) -> None:
    ours, theirs = twins(config, torch.float64)
    x_t, t, labels = example(config, batch, torch.float64)
    results = []
    for net in (ours, theirs):
        inputs = [x_t.clone().requires_grad_(), *([labels.clone().requires_grad_()] if _is_float(labels) else [])]
        output = net(inputs[0], t, inputs[1] if len(inputs) > 1 else labels).sample
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        leaves = {"input": inputs[0], **{f"input {i}": x for i, x in enumerate(inputs[1:], 1)}}
        leaves |= dict(net.named_parameters())
        results.append((output, dict(zip(leaves, torch.autograd.grad(output, leaves.values(), upstream), strict=True))))
    (output, gradients), (true_output, true_gradients) = results
    assert output.shape == (batch, config.out_channels, *config.image_size)
    assert_close("output", output, true_output, 1e-9)
    assert gradients.keys() == true_gradients.keys()
    for name, truth in true_gradients.items():
        # softmax does not see a constant added to all keys, so both sides hold rounding errors there.
        assert_close(name, gradients[name], truth, 1e-9, absolute=name.endswith("to_k.bias"))


def _is_float(labels: Tensor | None) -> bool:
    return labels is not None and labels.is_floating_point()


@pytest.mark.parametrize(("config", "batch"), [(HO, 1), (ADM, 3), (DIGITS, 4)], ids=["ho", "adm", "digits"])
def test_float64_output_and_all_gradients_are_those_of_diffusers(config: UNetConfig, batch: int) -> None:
    check_against_diffusers(config, batch)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_option_gives_the_results_of_diffusers(changes: dict) -> None:
    check_against_diffusers(dataclasses.replace(TINY, **changes), batch=3)


@pytest.mark.parametrize("changes", [{}, {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}])
@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
def test_kernels_and_folded_biases_give_the_results_of_diffusers(
    impl: str, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the norms add biases, embeddings, residuals and skips (here in Triton's interpreter)."""
    if impl == "native" and (reason := fastddpm_kernels.native_available()):
        pytest.skip(reason)
    monkeypatch.setattr(blocks.Shared, "folds_bias", lambda self, x: True)
    config = dataclasses.replace(TINY, **changes)
    ours, theirs = twins(config, torch.float32)
    ours.shared.impl = impl
    x_t, t, _ = example(config, 2, torch.float32)
    results = []
    for net in (ours, theirs):
        output = net(x_t, t).sample
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        results.append((output, torch.autograd.grad(output, list(net.parameters()), upstream)))
    (output, gradients), (true_output, true_gradients) = results
    assert_close("output", output, true_output, 1e-5)
    for (name, _), gradient, truth in zip(ours.named_parameters(), gradients, true_gradients, strict=True):
        assert_close(name, gradient, truth, 1e-4, absolute=name.endswith("to_k.bias"))


@pytest.mark.parametrize(("config", "batch"), [(HO, 2), (ADM, 3), (DIGITS, 4)], ids=["ho", "adm", "digits"])
def test_fp32_output_is_that_of_diffusers(config: UNetConfig, batch: int) -> None:
    ours, theirs = twins(config, torch.float32)
    x_t, t, labels = example(config, batch, torch.float32)
    with torch.no_grad():
        assert_close("output", ours(x_t, t, labels).sample, theirs(x_t, t, labels).sample, 1e-5)


def test_names_and_shapes_of_hos_cifar10_net() -> None:
    lines = Path(__file__).with_name("data").joinpath("ddpm_cifar10_keys.txt").read_text().splitlines()
    expected = [(name, json.loads(shape)) for name, shape in (line.split("\t") for line in lines)]
    with torch.device("meta"):
        net = UNet(HO)
    assert [(name, list(tensor.shape)) for name, tensor in net.state_dict().items()] == expected
    assert len(expected) == 328
    assert sum(parameter.numel() for parameter in net.parameters()) == 35_746_307


@pytest.mark.parametrize("config", [HO, ADM, DIGITS], ids=["ho", "adm", "digits"])
def test_weights_go_both_ways_and_keep_their_order(config: UNetConfig) -> None:
    ours, theirs = UNet(config, seed=3), UNet2DModel.from_config(config.to_diffusers())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    theirs.load_state_dict(UNet(config, seed=4).state_dict(), strict=True)


def test_old_attention_names_are_converted() -> None:
    net = UNet(HO)
    randomise(net)
    new = net.state_dict()
    old = {}
    for name, tensor in new.items():
        for today, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{today}." in name:
                name = name.replace(f".{today}.", f".{before}.")
                if name.endswith("query.weight"):
                    tensor = tensor[:, :, None, None]  # 1x1 convolutions were stored so
        old[name] = tensor
    assert old.keys() != new.keys()
    converted = convert_old_keys(old)
    assert converted.keys() == new.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in new.items())
    again = convert_old_keys(new)
    assert again.keys() == new.keys() and all(again[name] is tensor for name, tensor in new.items())
    net.load_state_dict(converted, strict=True)


def test_config_goes_to_diffusers_and_back() -> None:
    for config in (HO, ADM, DIGITS, *(dataclasses.replace(TINY, **changes) for changes in VARIANTS.values())):
        model = UNet2DModel.from_config(json.loads(json.dumps(config.to_diffusers())))
        assert UNetConfig.from_diffusers(model.config) == config
        assert config.to_diffusers().keys() - {"_class_name"} == {k for k in model.config if not k.startswith("_")}
        with torch.device("meta"):
            assert list(UNet(config).state_dict()) == list(model.state_dict())


def test_missing_keys_get_the_defaults_of_diffusers() -> None:
    signature = inspect.signature(UNet2DModel.__init__).parameters
    assert {name: p.default for name, p in signature.items() if name != "self"} == DIFFUSERS_DEFAULTS
    config = UNetConfig.from_diffusers({"sample_size": 64, "_diffusers_version": "0.1.0", "not_born_yet": None})
    assert config.downsample_padding == 1 and config.flip_sin_to_cos and config.attention_head_dim == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_embedding_type": "fourier"}, ("time_embedding_type", "fourier", "positional")),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, ("SkipDownBlock2D", "AttnDownBlock2D")),
        ({"up_block_types": ("UpBlock2D", "AttnSkipUpBlock2D")}, ("AttnSkipUpBlock2D", "ResnetUpsampleBlock2D")),
        ({"down_block_types": ("DownBlock2D",)}, ("down_block_types", "1", "2")),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, ("mid_block_type", "UNetMidBlock2D")),
        ({"resnet_time_scale_shift": "spatial"}, ("resnet_time_scale_shift", "spatial", "scale_shift")),
        ({"downsample_padding": 2}, ("downsample_padding", "2", "0, 1")),
        ({"downsample_type": "fir"}, ("downsample_type", "fir", "conv, resnet")),
        ({"act_fn": "mish"}, ("act_fn", "mish", "silu")),
        ({"class_embed_type": "projection"}, ("class_embed_type", "projection", "identity")),
        ({"block_out_channels": (12, 30)}, ("block_out_channels", "30", "norm_num_groups")),
        ({"block_out_channels": ()}, ("block_out_channels",)),
        ({"norm_num_groups": None}, ("norm_num_groups", "None")),
        ({"attention_head_dim": 25}, ("attention_head_dim", "25", "24")),
        ({"attn_norm_num_groups": 5}, ("attn_norm_num_groups", "5", "24")),
        ({"layers_per_block": 0}, ("layers_per_block", "0")),
        ({"num_class_embeds": 0}, ("num_class_embeds", "0")),
        ({"freq_shift": 6}, ("freq_shift", "6", "12")),
        ({"dropout": 1.0}, ("dropout", "1.0")),
        ({"norm_eps": 0.0}, ("norm_eps", "0.0")),
        ({"mid_block_scale_factor": None}, ("mid_block_scale_factor", "None")),
        ({"sample_size": None}, ("sample_size", "None")),
        ({"sample_size": (8, 8, 8)}, ("sample_size", "height")),
        ({"sample_size": (8, 9)}, ("8x9", "2 levels", "multiples of 2")),
        ({"sample_size": 7}, ("7x7", "multiples of 2")),
    ],
)
def test_unsupported_values_are_named_with_the_valid_ones(changes: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as from_ours:
        dataclasses.replace(TINY, **changes)
    with pytest.raises(ConfigError) as from_theirs:
        UNetConfig.from_diffusers({**TINY.to_diffusers(), **changes})
    for error in (from_ours, from_theirs):
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message


def test_from_diffusers_refuses_other_models_and_keys() -> None:
    with pytest.raises(ConfigError, match=r"UNet2DConditionModel.*UNet2DModel"):
        UNetConfig.from_diffusers({"_class_name": "UNet2DConditionModel", "sample_size": 8})
    with pytest.raises(ConfigError, match=r"cross_attention_dim.*sample_size"):
        UNetConfig.from_diffusers({**TINY.to_diffusers(), "cross_attention_dim": 64})


def test_config_on_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sample-size", "16", "24", "--block-out-channels", "12", "24", "--norm-num-groups", "4"]
    config = tyro.cli(UNetConfig, default=TINY, args=arguments)
    assert config == dataclasses.replace(TINY, sample_size=(16, 24))
    with pytest.raises(ConfigError, match="17x17"):
        tyro.cli(UNetConfig, default=TINY, args=["--sample-size", "17"])
    with pytest.raises(SystemExit):
        tyro.cli(UNetConfig, args=["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(UNetConfig))


def test_every_config_field_has_a_docstring() -> None:
    lines = inspect.getsource(UNetConfig).splitlines()
    for field in dataclasses.fields(UNetConfig):
        (index,) = (i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[index + 1].startswith('    """'), field.name


def test_sizes_that_cannot_be_halved_are_refused_by_forward() -> None:
    net = UNet(TINY)
    with pytest.raises(ConfigError, match=r"10x9.*multiples of 2"):
        net(torch.zeros(1, 2, 10, 9), 0)
    assert net(torch.zeros(1, 2, 10, 6), 0).sample.shape == (1, 1, 10, 6)  # any size that halves will do


def test_initialisation_is_hos() -> None:
    net = UNet(dataclasses.replace(HO, num_class_embeds=100))
    zero_scale = {net.conv_out}
    zero_scale |= {m.conv2 for m in net.modules() if isinstance(m, ResnetBlock)}
    zero_scale |= {m.to_out[0] for m in net.modules() if isinstance(m, Attention)}
    assert len(zero_scale) == 1 + 22 + 6
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            fan_in = weight[0].numel()
            fan_avg = (fan_in + fan_in * weight.shape[0] / weight.shape[1]) / 2
            limit = math.sqrt(3 * (1e-10 if module in zero_scale else 1.0) / fan_avg)
            largest = weight.abs().max().item()
            assert 0.98 * limit < largest <= limit * (1 + 1e-6), name
            assert abs(weight.std().item() / (limit / math.sqrt(3)) - 1) < 0.05, name
            assert not module.bias.any(), name
        elif isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    assert abs(net.class_embedding.weight.std().item() - 1) < 0.02
    x_t, t, _ = example(HO, 1, torch.float32)
    with torch.no_grad():
        assert net(x_t, t, torch.tensor([1])).sample.abs().max() < 1e-3  # predicts (nearly) zero at first


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = UNet(ADM, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(6)
    again, other = UNet(ADM, seed=7).state_dict(), UNet(ADM, seed=8).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not torch.equal(other["conv_in.weight"], first["conv_in.weight"])
    torch.set_default_dtype(torch.float64)
    try:
        double = UNet(ADM, seed=7).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert double["conv_in.weight"].dtype == torch.float64
    assert all(torch.equal(double[name].float(), tensor) for name, tensor in first.items())


@pytest.mark.parametrize("in_channels", [1, 3])
def test_channels_last_throughout(in_channels: int) -> None:
    config = dataclasses.replace(ADM, in_channels=in_channels, num_class_embeds=None, downsample_type="conv")
    net = copy.deepcopy(UNet(config))
    net.load_state_dict({name: tensor.contiguous() for name, tensor in net.state_dict().items()})
    last = torch.channels_last
    assert all(p.is_contiguous(memory_format=last) for p in net.parameters() if p.ndim == 4)
    wrong = []

    def look(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and not output.is_contiguous(memory_format=last):
                wrong.append(name)

        return hook

    for name, module in net.named_modules():
        module.register_forward_hook(look(name))
    net(torch.randn(2, in_channels, *config.image_size), 1).sample.mean().backward()
    assert not wrong


def test_timesteps_labels_and_outputs_in_every_form() -> None:
    net = UNet(dataclasses.replace(TINY, num_class_embeds=5)).eval()
    randomise(net)
    x_t, _, _ = example(TINY, 3, torch.float32)
    labels = torch.tensor([0, 4, 2])
    expected = net(x_t, torch.full((3,), 20), labels)
    assert isinstance(expected, UNetOutput)
    for timestep in (20, 20.0, torch.tensor(20), torch.tensor([20]), torch.tensor(20.0), torch.full((3,), 20.0)):
        assert torch.equal(net(x_t, timestep, labels).sample, expected.sample)
    plain = net(x_t, 20, labels, return_dict=False)
    assert type(plain) is tuple and len(plain) == 1 and torch.equal(plain[0], expected.sample)
    assert not torch.equal(net(x_t, 21, labels).sample, expected.sample)
    with pytest.raises(ValueError, match="timestep"):
        net(x_t, torch.zeros(2), labels)
    with pytest.raises(ValueError, match="class_labels are missing"):
        net(x_t, 20)
    with pytest.raises(ValueError, match="unconditional"):
        UNet(TINY)(x_t, 20, labels)


@pytest.mark.parametrize("config", [ADM, DIGITS], ids=["adm", "digits"])
def test_half_precision(config: UNetConfig) -> None:
    net = UNet(config)
    randomise(net)
    x_t, t, labels = example(config, 3, torch.float32)
    truth = net(x_t, t, labels).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(x_t, t, labels).sample
    mixed.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters()
    )
    half = net.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.device == x_t.device
    pure = half(x_t.bfloat16(), t, labels).sample
    assert mixed.dtype == pure.dtype == torch.bfloat16
    for output in (mixed, pure):
        error = (output.float() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        assert 1e-4 < error < 0.1, error


def test_a_diffusers_pipeline_takes_the_net() -> None:
    ours, theirs = twins(dataclasses.replace(TINY, in_channels=1), torch.float32)
    images = []
    for net in (ours, theirs):
        pipeline = DDPMPipeline(net, DDPMScheduler(clip_sample=True))
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images)
    assert images[0].shape == (2, 8, 8, 1)
    assert abs(images[0] - images[1]).max() < 1e-4


def test_compiles_without_graph_breaks() -> None:
    net = UNet(dataclasses.replace(TINY, dropout=0.2))
    randomise(net)
    x_t, t, _ = example(TINY, 3, torch.float32)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    net.eval()
    assert torch.equal(compiled(x_t, t).sample, net(x_t, t).sample)
    net.train()
    with net.noise_address(3, torch.tensor([5, 6, 7])):
        assert torch.equal(compiled(x_t, t).sample, net(x_t, t).sample)


@pytest.mark.parametrize("config", [HO, ADM, DIGITS], ids=["ho", "adm", "digits"])
def test_flops_are_those_of_the_layers_shapes(config: UNetConfig) -> None:
    """Counted by hand: 2 x weights x output pixels of convolutions and linear layers, and 4 L^2 C of each attention."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += 2 * module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, nn.Linear):
            total += 2 * module.weight.numel() * (output.numel() // output.shape[-1])
        else:
            total += 4 * inputs[0].shape[2:].numel() ** 2 * module.to_q.out_features

    theirs = UNet2DModel.from_config(config.to_diffusers())
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) or type(module).__name__ == "Attention":
            module.register_forward_hook(count)
    x_t, t, labels = example(config, 1, torch.float32)
    with torch.no_grad():
        theirs(x_t, t, labels)
    assert flops_per_image(config) == total


def test_flops_of_hos_cifar10_net() -> None:
    assert flops_per_image(HO) / 1e9 == pytest.approx(12.44, abs=0.005)
    assert flops_per_image(dataclasses.replace(TINY, class_embed_type="identity")) > 0


# Dropout by address


def dropout_net(p: float = 0.25) -> UNet:
    net = UNet(dataclasses.replace(TINY, dropout=p))
    randomise(net)
    return net.train()


def masks(net: UNet, x_t: Tensor, ordinals: Tensor | None, seed: int = 11) -> list[Tensor]:
    """What each dropout layer keeps, bool [N, C, H, W], in the order of the layers' numbers."""
    kept: dict[int, Tensor] = {}
    norm_silu = blocks.norm_silu

    def record(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        y, total = norm_silu(*args, **kwargs)
        if kwargs.get("dropout") is not None:
            kept[kwargs["dropout"].layer] = y != 0
        return y, total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "norm_silu", record)
        if ordinals is None:
            net(x_t, 10)
        else:
            with net.noise_address(seed, ordinals):
                net(x_t, 10)
    return [kept[layer] for layer in sorted(kept)]


def test_dropout_layers_are_numbered_in_order_of_definition() -> None:
    for config, count in ((HO, 22), (TINY, 8), (ADM, 21)):
        with torch.device("meta"):
            net = UNet(config)
        assert [m.layer for m in net.modules() if isinstance(m, Dropout)] == list(range(count))
        assert {id(m.shared) for m in net.modules() if isinstance(m, ResnetBlock)} == {id(net.shared)}


def test_a_sample_has_its_own_masks_wherever_it_lies() -> None:
    net = dropout_net()
    x_t, t, _ = example(TINY, 4, torch.float32)
    ordinals = torch.tensor([7, 2**40 + 3, 0, 91])
    with net.noise_address(11, ordinals):
        batch = net(x_t, t).sample
        assert torch.equal(net(x_t, t).sample, batch)  # the same address gives the same masks
    order = torch.tensor([2, 0, 3, 1])
    with net.noise_address(11, ordinals[order]):
        torch.testing.assert_close(net(x_t[order], t[order]).sample, batch[order])
    for n in range(4):
        with net.noise_address(11, ordinals[n : n + 1]):
            torch.testing.assert_close(net(x_t[n : n + 1], t[n : n + 1]).sample, batch[n : n + 1])
    with net.noise_address(12, ordinals):
        assert not torch.allclose(net(x_t, t).sample, batch)
    with net.noise_address(11, ordinals + 1):
        assert not torch.allclose(net(x_t, t).sample, batch)


def test_masks_differ_between_layers_and_samples_and_keep_the_right_share() -> None:
    p = 0.25
    net = dropout_net(p)
    x_t = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).expand(64, -1, -1, -1)
    kept = masks(net, x_t, torch.arange(64))
    assert len(kept) == 8
    for i, mask in enumerate(kept):
        assert abs(mask.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel()), i
        assert len(torch.unique(mask.flatten(1), dim=0)) == 64
        for other in kept[:i]:
            if other.shape == mask.shape:
                agreement = (mask == other).float().mean().item()
                assert abs(agreement - (p * p + (1 - p) ** 2)) < 5 * 0.5 / math.sqrt(mask.numel())


def test_dropped_outputs_are_zero_and_kept_ones_are_scaled_up_forward_and_backward() -> None:
    net = dropout_net()
    layer = next(m for m in net.modules() if isinstance(m, ResnetBlock))
    x = torch.rand(5, 12, 6, 7, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    for ordinals in (torch.arange(5), None):
        h = blocks.Sum(x)
        with net.noise_address(1, ordinals):
            y, _ = blocks.norm_silu(h, layer.norm1, net.shared, dropout=layer.dropout)
        kept, _ = blocks.norm_silu(h, layer.norm1, net.shared)
        torch.testing.assert_close(y, torch.where(y != 0, kept / 0.75, 0.0))
    net.eval()
    assert torch.equal(blocks.norm_silu(h, layer.norm1, net.shared, dropout=layer.dropout)[0], kept)


def test_without_an_address_torch_draws_the_masks() -> None:
    net = dropout_net()
    x_t, _, _ = example(TINY, 4, torch.float32)
    torch.manual_seed(0)
    first = masks(net, x_t, None)
    second = masks(net, x_t, None)
    torch.manual_seed(0)
    assert all(map(torch.equal, masks(net, x_t, None), first))
    assert not any(map(torch.equal, second, first))
    state = torch.get_rng_state()
    masks(net, x_t, torch.arange(4))
    assert torch.equal(torch.get_rng_state(), state), "an addressed mask used the global generator"
    net.eval()
    with net.noise_address(1, torch.arange(4)):
        torch.testing.assert_close(net(x_t, 1).sample, net(x_t, 1).sample, rtol=0, atol=0)


def test_an_address_ends_with_its_block_and_belongs_to_one_net() -> None:
    net = dropout_net()
    ordinals = torch.arange(3)
    with net.noise_address(1, ordinals):
        with net.noise_address(2, ordinals + 1):
            assert net.shared.seed == 2
        assert net.shared.seed == 1 and net.shared.ordinals is ordinals
        copied = copy.deepcopy(net)
    assert net.shared.ordinals is None
    with pytest.raises(ZeroDivisionError), net.noise_address(1, ordinals):
        raise ZeroDivisionError
    assert net.shared.ordinals is None
    assert {id(m.shared) for m in copied.modules() if isinstance(m, ResnetBlock)} == {id(copied.shared)}
    assert copied.shared is not net.shared
    copied = copy.deepcopy(net)
    x_t, t, _ = example(TINY, 3, torch.float32)
    with net.noise_address(1, ordinals), copied.noise_address(1, ordinals):
        assert torch.equal(copied(x_t, t).sample, net(x_t, t).sample)
    with pytest.raises(ValueError, match=r"\(2,\).*batch of 3"), net.noise_address(1, ordinals[:2]):
        net(x_t, t)


def test_the_address_reaches_a_net_inside_distributed_data_parallel(tmp_path: Path) -> None:
    net = dropout_net()
    x_t, t, _ = example(TINY, 3, torch.float32)
    ordinals = torch.tensor([4, 1, 9])
    with net.noise_address(1, ordinals):
        expected = net(x_t, t).sample
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        with net.noise_address(1, ordinals):
            output = wrapped(x_t, t).sample
            output.square().mean().backward()
        assert torch.equal(output, expected)
        assert all(p.grad is not None for p in net.parameters())
        # Before the group: the last to hold gloo's threads must not wait for them with the interpreter locked.
        del wrapped, output
    finally:
        torch.distributed.destroy_process_group()


TOLD = dataclasses.replace(TINY, augment_channels=9)


@pytest.mark.parametrize("changes", [{}, {"num_class_embeds": 10}, {"resnet_time_scale_shift": "scale_shift"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_told_of_no_augmentation_a_net_is_bitwise_the_net_that_cannot_be_told(
    changes: dict, dtype: torch.dtype
) -> None:
    """Not told, told zeros, and without the layer, as diffusers loads it: an augmentation cannot leak into samples."""
    net, plain = UNet(dataclasses.replace(TOLD, **changes)), UNet(dataclasses.replace(TINY, **changes))
    randomise(net)
    weights = {name: tensor for name, tensor in net.state_dict().items() if name != "augment_embedding.weight"}
    plain.load_state_dict(weights, strict=True)
    net.compute_dtype = plain.compute_dtype = dtype
    x_t, t, labels = example(plain.config, 4, torch.float32)
    zeros = torch.zeros(4, 9)
    with torch.no_grad():
        outputs = [net(x_t, t, labels)[0], net(x_t, t, labels, augment=zeros)[0], plain(x_t, t, labels)[0]]
        told = net(x_t, t, labels, augment=zeros + torch.eye(4, 9))[0]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert all(torch.equal(output.view(bits), outputs[0].view(bits)) for output in outputs)
    assert all(not torch.equal(a, b) for a, b in zip(told, outputs[0], strict=True))


def test_a_net_that_can_be_told_starts_as_the_net_that_cannot() -> None:
    told, plain = UNet(TOLD, seed=3).state_dict(), UNet(TINY, seed=3).state_dict()
    assert not told.pop("augment_embedding.weight").any()
    assert told.keys() == plain.keys() and all(torch.equal(told[name], plain[name]) for name in plain)
    assert TOLD.to_diffusers() == TINY.to_diffusers()


def test_what_a_net_is_told_has_a_gradient_from_the_start() -> None:
    net = UNet(TOLD, seed=3)
    assert net.augment_embedding is not None
    x_t, t, _ = example(TOLD, 4, torch.float32)
    augment = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    augment[:, 2] = 0
    prediction = net(x_t, t, augment=augment)[0]
    prediction.backward(torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1)))
    gradient = net.augment_embedding.weight.grad
    assert gradient is not None and gradient[:, 2].abs().max() == 0
    assert all(gradient[:, i].abs().max() > 0 for i in range(9) if i != 2)


def test_an_augmentation_of_another_shape_or_not_wanted_is_refused() -> None:
    x_t, t, _ = example(TINY, 4, torch.float32)
    with pytest.raises(ValueError, match=r"augment has shape \(4, 9\): the net takes none"):
        UNet(TINY)(x_t, t, augment=torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"augment has shape \(1, 9\): the net takes \(4, 9\)"):
        UNet(TOLD)(x_t, t, augment=torch.zeros(1, 9))
    with pytest.raises(ConfigError, match="augment_channels is -1"):
        dataclasses.replace(TINY, augment_channels=-1)
