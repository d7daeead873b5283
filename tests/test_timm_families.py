"""Which of timm's networks can be dilated: one small model of every module of timm, and of families inside it.

Made on the meta device at strides 8 and 16. A change in timm shows here by name; families that a newer timm adds are
warned of, not refused.
"""

import warnings

import pytest
import timm
import torch
from torch import nn

from densectx.backbones.timm import Timm, probe
from densectx.errors import ConfigError
from densectx.nn.norm import PerInput, set_norm

warnings.filterwarnings("ignore", "Mapping deprecated model name")

EXACT = {
    "byobnet": ["repvgg_a0"],
    "cspnet": ["cs3darknet_s", "cspresnet50", "darknet17"],
    "efficientnet": ["efficientnet_lite0", "mnasnet_050", "mobilenet_edgetpu_v2_xs", "mobilenetv2_035"],
    "mobilenetv3": ["mobilenetv4_conv_small_035"],
    "regnet": ["regnetx_002"],
    "resnet": ["resnet18"],
    "resnetv2": ["resnetv2_18"],
    "xception_aligned": ["xception41"],
}
"""Dilated, the same function as strided, on the strided network's grid (with the same weights)."""

DILATED = {
    # averages over the picture (squeeze and excitation, attention): now over more cells
    "cspnext": ["cspnext_tiny"],
    "efficientnet": ["efficientnetv2_rw_t", "mixnet_s", "tinynet_e"],
    "hardcorenas": ["hardcorenas_a"],
    "mobilenetv3": ["fbnetv3_b", "lcnet_035", "mobilenetv3_small_050", "mobilenetv4_hybrid_medium_075"],
    "regnet": ["regnety_002", "regnetz_005"],
    "byobnet": ["gernet_s", "mobileone_s0", "regnetz_b16", "resnet50_clip", "test_byobnet"],  # some by timm's dilations
    "resnest": ["resnest14d"],
    "rexnet": ["rexnet_100"],
    "sknet": ["skresnet18"],
    # strided average pools or convolutions of even size, which timm pads in another way when they do not stride
    "convnext": ["convnext_atto", "convnextv2_atto"],
    "inception_next": ["inception_next_atto"],
    "nfnet": ["nf_regnet_b0", "nf_resnet26", "test_nfnet"],
    "res2net": ["res2net50_48w_2s"],
    "resnet": ["resnet10t"],
    "resnetv2": ["resnetv2_50x1_bit"],
    # attention over windows or patches of cells
    "byoanet": ["lambda_resnet26t"],
    "mobilevit": ["mobilevit_xxs"],
}
"""Can be dilated; the function is another one."""

NO_OPTION = {
    "beit": ["beit_base_patch16_224"],
    "cait": ["cait_xxs24_224"],
    "coat": ["coat_tiny"],
    "convit": ["convit_tiny"],
    "convmixer": ["convmixer_768_32"],
    "cpubone": ["cpubone_nano"],
    "crossvit": ["crossvit_tiny_240"],
    "csatv2": ["csatv2"],
    "davit": ["davit_tiny"],
    "deepseek_vit": ["deepseek_vit_412m"],
    "deit": ["deit_tiny_patch16_224"],
    "densenet": ["densenet121"],
    "edgenext": ["edgenext_xx_small"],
    "efficientformer": ["efficientformer_l1"],
    "efficientformer_v2": ["efficientformerv2_s0"],
    "efficientvim": ["efficientvim_m1"],
    "efficientvit_mit": ["efficientvit_b0"],
    "efficientvit_msra": ["efficientvit_m0"],
    "eva": ["eva02_tiny_patch14_224"],
    "fasternet": ["fasternet_t0"],
    "fastvit": ["fastvit_t8"],
    "focalnet": ["focalnet_tiny_srf"],
    "gcvit": ["gcvit_xxtiny"],
    "gemma4_vit": ["gemma4_vit_167m"],
    "hgnet": ["hgnetv2_b0"],
    "hiera": ["hiera_tiny_224"],
    "hieradet_sam2": ["hieradet_small"],
    "iformer": ["iformer_t"],
    "inception_v3": ["inception_v3"],
    "lcnetv2": ["lcnetv2_small"],
    "levit": ["levit_128s"],
    "lowformer": ["lowformer_b0"],
    "mambaout": ["mambaout_femto"],
    "maxxvit": ["coatnet_pico_rw_224", "maxvit_pico_rw_256"],
    "metaformer": ["convformer_s18", "poolformer_s12"],
    "mlp_mixer": ["mixer_s32_224"],
    "mobilenetv5": ["mobilenetv5_base"],
    "mvitv2": ["mvitv2_tiny"],
    "naflexvit": ["naflexvit_base_patch16_gap"],
    "nest": ["nest_tiny"],
    "nextvit": ["nextvit_small"],
    "pit": ["pit_ti_224"],
    "pvt_v2": ["pvt_v2_b0"],
    "qwen3_vit": ["qwen3_vit_88m"],
    "rdnet": ["rdnet_tiny"],
    "repvit": ["repvit_m0_9"],
    "selecsls": ["selecsls42"],
    "senet": ["legacy_seresnet18"],
    "sequencer": ["sequencer2d_s"],
    "shvit": ["shvit_s1"],
    "swin_transformer": ["swin_tiny_patch4_window7_224"],
    "swin_transformer_v2": ["swinv2_tiny_window8_256"],
    "swin_transformer_v2_cr": ["swinv2_cr_tiny_224"],
    "tiny_vit": ["tiny_vit_5m_224"],
    "tnt": ["tnt_s_patch16_224"],
    "tresnet": ["tresnet_m"],
    "twins": ["twins_svt_small"],
    "visformer": ["visformer_tiny"],
    "vision_transformer": ["test_vit"],
    "vision_transformer_hybrid": ["vit_tiny_r_s16_p8_224"],
    "vision_transformer_relpos": ["test_vit_relpos"],
    "vision_transformer_sam": ["samvit_base_patch16"],
    "vitamin": ["vitamin_small_224"],
    "volo": ["volo_d1_224"],
    "xception": ["legacy_xception"],
    "xcit": ["xcit_nano_12_p16_224"],
}
"""Refused: the network has no ``output_stride``."""

NOT_BELOW_32 = {
    "dla": ["dla46_c"],
    "dpn": ["dpn68"],
    "ghostnet": ["ghostnet_050", "ghostnetv3_050"],
    "hrnet": ["hrnet_w18_small"],
    "inception_resnet_v2": ["inception_resnet_v2"],
    "inception_v4": ["inception_v4"],
    "nasnet": ["nasnetalarge"],
    "pnasnet": ["pnasnet5large"],
    "repghost": ["repghostnet_050"],
    "starnet": ["starnet_s050"],
    "swiftformer": ["swiftformer_xs"],
    "vgg": ["vgg11"],
    "vovnet": ["ese_vovnet19b_slim_dw"],
}
"""Refused: the network takes ``output_stride`` and asserts that it is 32."""

WINDOWS = {"byoanet": ["botnet26t_256", "halonet26t"], "mobilevit": ["mobilevitv2_050"]}
"""Refused: windows of attention or patches that not every multiple of the stride fits."""


def names(*tables):
    return sorted({name for table in tables for models in table.values() for name in models})


def options(stride):
    return {"features_only": True, "output_stride": stride, "in_chans": 3}


def test_every_module_of_timm_is_listed():
    modules = set().union(EXACT, DILATED, NO_OPTION, NOT_BELOW_32, WINDOWS)
    new = set(timm.list_modules()) - modules
    if new:
        warnings.warn(f"modules of timm that are not listed here: {', '.join(sorted(new))}", stacklevel=1)
    assert modules <= set(timm.list_modules())
    for table in (EXACT, DILATED, NO_OPTION, NOT_BELOW_32, WINDOWS):
        for module, models in table.items():
            assert set(models) <= set(timm.list_models(module=module)), module


@pytest.mark.parametrize("stride", [8, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", names(EXACT, DILATED))
def test_dilates(name, stride):
    features = probe(name, options(stride))
    assert [f.stride for f in features] == sorted(f.stride for f in features)
    assert features[-1].stride == features[-2].stride == stride


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", names(NO_OPTION))
def test_has_no_such_option(name, stride):
    with pytest.raises(ConfigError, match=f"{name}.*stride {stride}: .*unexpected keyword argument.*output_stride"):
        probe(name, options(stride))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", names(NOT_BELOW_32))
def test_refuses_to_be_dilated(name, stride):
    with pytest.raises(ConfigError, match=rf"{name}.*stride {stride}: .*(AssertionError|output_stride==32)"):
        probe(name, options(stride))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", names(WINDOWS))
def test_windows_do_not_fit_every_size(name, stride):
    with pytest.raises(ConfigError, match=f"{name}.*cannot be dilated to stride {stride}"):
        probe(name, options(stride))


def scrambled(name):
    """A network and its dilated form with the same weights, float64, whose norms and branches do something."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    strided = timm.create_model(name, **options(32)).double().eval()
    for module in strided.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=rng)
            module.running_var.uniform_(0.5, 1.5, generator=rng)
    for parameter in strided.parameters():  # residual branches that start at zero would hide what they compute
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    dilated = timm.create_model(name, **options(8)).double().eval()
    dilated.load_state_dict(strided.state_dict())
    return strided, dilated


def deviation(name):
    """Relative deviation of the last level on the grid of the strided network."""
    strided, dilated = scrambled(name)
    x = torch.randn(1, 3, 128, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        coarse, fine = strided(x)[-1], dilated(x)[-1]
    return ((fine[..., ::4, ::4] - coarse).abs().max() / coarse.abs().max()).item()


@pytest.mark.parametrize("name", names(EXACT))
def test_dilated_equals_strided_on_its_grid(name):
    assert deviation(name) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", names(DILATED))
def test_dilated_is_another_function(name):
    assert deviation(name) > 1e-10


@pytest.mark.parametrize("kind", ["group", "none", "frozen", "per_input"])
@pytest.mark.parametrize(
    "name", ["convnext_atto", "mobilenetv3_small_050", "mobilevit_xxs", "regnetx_002", "resnetv2_18", "test_byobnet"]
)
def test_norms_of_a_family_are_exchanged(name, kind):
    exchanged(name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["group", "none", "frozen", "per_input"])
@pytest.mark.parametrize("name", names(EXACT, DILATED))
def test_norms_of_every_family_are_exchanged(name, kind):
    exchanged(name, kind)


def exchanged(name, kind):
    """Shapes and finite values in training mode, with stochastic depth."""
    torch.manual_seed(0)
    net = Timm(name, drop_path=0.2)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    set_norm(net, kind, ["a", "b"])
    assert sum(isinstance(m, PerInput) for m in net.modules()) == (norms if kind == "per_input" else 0)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == (2 * norms if kind == "per_input" else 0)
    maps = net.train()(torch.rand(2, 3, 64, 40))
    assert [(m.shape[1], 64 // m.shape[2], 40 // m.shape[3]) for m in maps] == [(c, s, s) for c, s in net.features]
    assert all(m.isfinite().all() for m in maps)
