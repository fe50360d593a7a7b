"""Guarantees of hosts for their sites, on real models: they resolve, have their shapes, cover all parameters, have effect."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import nn

from tests.hosts.cases import ALL, TINY, UNCOMMON, Case, build, case, outputs
from veneer.injection.attention_sites import AttentionSite, SelfAttentionSite
from veneer.injection.registry import host_of
from veneer.injection.sites import (
    BranchSite,
    FeatureSite,
    ParamSite,
    PixelSite,
    Port,
    StreamSite,
    TokenSite,
    VocabularySite,
    WeightSite,
)
from veneer.testing.checks_host import is_product
from veneer.testing.roles import ROLES

every = pytest.mark.parametrize(("host", "key"), ALL, ids=[f"{h}-{k}" for h, k in ALL])
uncommon = pytest.mark.parametrize(("host", "key"), [*UNCOMMON], ids=[f"{h}-{k}" for h, k in UNCOMMON])
"""For what the conformance suite checks on the small models of each host, see `tests/matrix`."""


@uncommon
def test_exactly_one_host_matches(host: str, key: str) -> None:
    assert host_of(case(host, key).model).name == host


@every
def test_names_are_unique_and_plain(host: str, key: str) -> None:
    names = [s.name for s in case(host, key).sites]
    assert [n for n, count in Counter(names).items() if count > 1] == []
    assert [n for n in names if not n or ":" in n or "/" in n] == []


@every
def test_roles_and_labels_are_canonical(host: str, key: str) -> None:
    found = case(host, key)
    assert [(s.name, s.role) for s in found.sites if s.role not in ROLES[type(s)]] == []
    has_text = host == "open_clip" or key in ("CLIPModel", "SiglipModel")
    others = {"text", "joint"} | ({"decoder"} if key == "coca" else set()) if has_text else set()
    assert {s.tower for s in found.sites} == {found.host.tower} | others
    depths = sorted({s.depth for s in found.sites if s.depth is not None})
    assert depths == list(range(len(depths)))


@every
def test_weights_resolve_with_their_shapes(host: str, key: str) -> None:
    found = case(host, key)
    for site in found.sites:
        if not isinstance(site, WeightSite):
            continue
        module = found.model.get_submodule(site.path)
        weight = getattr(module, site.param)
        rows = slice(*site.rows) if site.rows else slice(None)
        assert tuple(weight[rows].shape) == site.weight_shape, site.name
        if site.param == "weight":
            assert not list(module.children()), f"{site.name} is a container"
            kind = {"linear": nn.Linear, "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d), "embedding": nn.Embedding}[site.kind]
            assert isinstance(module, kind), site.name
        if site.kind == "conv":
            geometry = (module.kernel_size, module.stride, module.dilation, module.groups)
            assert geometry == (site.kernel, site.stride, site.dilation, site.groups)


@uncommon
def test_called_is_what_tracing_shows(host: str, key: str) -> None:
    found = case(host, key)
    weights = [s for s in found.sites if isinstance(s, WeightSite)]
    layers = [s for s in weights if s.param == "weight"]
    assert [(s.name, s.called) for s in layers if _is_called(found, s) != s.called] == []
    assert [s.name for s in weights if s.called and s.param != "weight"] == []
    for site in weights:
        if site.called:
            x, y = found.tensors[site.path, "in"], found.tensors[site.path, "out"]
            dim = 1 if site.kind == "conv" else -1
            whole = site if site.rows is None else next(s for s in weights if s.path == site.path and s.rows is None)
            assert y.shape[dim] == whole.d_out, site.name
            assert site.kind == "embedding" or x.shape[dim] == site.d_in, site.name


def _is_called(found: Case, site: WeightSite) -> bool:
    """Whether hooks see the layer, and its output is a product with its weight; not with a standardized one."""
    return found.called(site.path) and is_product(found.model.get_submodule(site.path), *found.inputs[site.path, "in"])


@every
def test_a_convolution_is_one_of_its_sites_geometry(host: str, key: str) -> None:
    """On an input of odd height: one pixel's output at a time, from a window of the zero-padded input."""
    found = case(host, key)
    for site in found.sites:
        if isinstance(site, WeightSite) and len(site.kernel) == 2 and site.called:
            module = found.model.get_submodule(site.path)
            x = torch.randn(1, site.d_in, 7, 10, dtype=torch.float64) if max(site.kernel) < 7 else found.tensors[site.path, "in"]
            with torch.no_grad():
                got = module(x)
            before = [_before(n, *each) for n, each in zip(x.shape[2:], _dimensions(site), strict=True)]
            for row, column in {(0, 0), (got.shape[2] - 1, got.shape[3] - 1)}:
                window = torch.zeros(site.d_in, *site.kernel, dtype=torch.float64)
                for i, j in itertools.product(range(site.kernel[0]), range(site.kernel[1])):
                    y = row * site.stride[0] - before[0] + i * site.dilation[0]
                    z = column * site.stride[1] - before[1] + j * site.dilation[1]
                    if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                        window[:, i, j] = x[0, :, y, z]
                parts = zip(window.chunk(site.groups), module.weight.chunk(site.groups), strict=True)
                expected = torch.cat([torch.einsum("ihw,oihw->o", *pair) for pair in parts])
                expected = expected if module.bias is None else expected + module.bias
                torch.testing.assert_close(got[0, :, row, column], expected.detach(), msg=site.name)


def _dimensions(site: WeightSite) -> list[tuple[int, int, int, int | str]]:
    paddings = (site.padding,) * 2 if isinstance(site.padding, str) else site.padding
    return list(zip(site.kernel, site.stride, site.dilation, paddings, strict=True))


def _before(size: int, kernel: int, stride: int, dilation: int, padding: int | str) -> int:
    """Zeros before the first pixel; for "same", half of the padding that the last window needs, rounded down."""
    if padding != "same":
        return int(padding)
    last = (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1
    return max(last - size, 0) // 2


@every
def test_sites_are_in_the_order_of_the_forward_pass(host: str, key: str) -> None:
    found = case(host, key)
    paths = [_owner(found.model, s.path) for s in found.sites if isinstance(s, WeightSite) and s.called]
    paths = list(dict.fromkeys(paths))
    assert paths == sorted(paths, key=lambda path: found.order[path, "in"])


def _owner(model: nn.Module, path: str) -> str:
    """Processors and embedders differ in the order in which they call their layers; the modules themselves are in order."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        if hasattr(model.get_submodule(above), "get_processor") or parts[end - 1] in ("pool", "time_embedding"):
            return above
    return path


@every
def test_a_called_bias_is_added_last_along_its_dimension(host: str, key: str) -> None:
    found = case(host, key)
    for site in found.sites:
        if not isinstance(site, ParamSite) or not site.called:
            continue
        module = found.model.get_submodule(site.path)
        parameter, (args, kwargs) = getattr(module, site.param), found.inputs[site.path, "in"]
        delta = torch.zeros_like(parameter)
        delta[slice(*site.rows) if site.rows else slice(None)] = torch.linspace(1, 2, site.shape[0], dtype=delta.dtype)
        with torch.no_grad():
            before = module(*args, **kwargs)
            parameter += delta
            after = module(*args, **kwargs)
            parameter -= delta
        shape = [1] * before.dim()
        shape[site.channel_dim] = -1
        # Some norms compute in float32.
        torch.testing.assert_close(after, before + delta.reshape(shape).to(before), rtol=1e-6, atol=1e-6, msg=site.name)


@every
def test_every_parameter_is_offered_once(host: str, key: str) -> None:
    found = case(host, key)
    covered: dict[int, list[tuple[int, int]]] = {}
    for site in found.sites:
        if isinstance(site, (WeightSite, ParamSite)) and not getattr(site, "fused", False):
            tensor = getattr(found.model.get_submodule(site.path), site.param)
            assert isinstance(tensor, nn.Parameter), site.name
            if isinstance(site, ParamSite):
                assert math.prod(site.shape) == tensor[slice(*site.rows) if site.rows else ...].numel(), site.name
            length = tensor.shape[0] if tensor.dim() else 1
            covered.setdefault(id(tensor), []).append(site.rows or (0, length))
    unused = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"} if "fused" in key else set()
    if key == "levit":
        unused = {"attention_biases"}  # cached in evaluation mode
    if key == "unfused":
        unused = {"to_qkv", "to_kv"}
    missing = []
    for name, tensor in found.model.named_parameters():
        pieces = sorted(covered.get(id(tensor), []))
        flat = [edge for piece in pieces for edge in piece]
        if not pieces and unused.isdisjoint(name.split(".")):
            missing.append(name)
        elif pieces:
            assert flat[0] == 0, name
            assert flat[-1] == (tensor.shape[0] if tensor.dim() else 1), name
            assert flat[1:-1:2] == flat[2::2], name
    assert missing == []


@every
def test_fused_weights_are_offered_whole_and_in_slices(host: str, key: str) -> None:
    found = case(host, key)
    weights = [s for s in found.sites if isinstance(s, WeightSite)]
    whole = {s.path for s in weights if s.fused}
    assert whole == {s.path for s in weights if s.rows is not None}
    assert all(s.rows is None for s in weights if s.fused)
    assert max(Counter((s.path, s.param) for s in weights if s.rows is None).values()) == 1


@uncommon
def test_ports_fire_in_order_and_carry_the_width(host: str, key: str) -> None:
    found = case(host, key)
    for site in found.sites:
        if isinstance(site, (BranchSite, StreamSite, TokenSite)):
            read, write = _ports(site)
            assert found.order[read.path, read.side] < found.order[write.path, write.side], site.name
            dim = 1 if getattr(site, "layout", "NLC") == "NCHW" else -1
            for port, width in ((read, getattr(site, "d_in", 0) or site.width), (write, site.width)):
                assert found.tensors[port.path, port.side].shape[dim] == width, site.name
            if isinstance(site, StreamSite) and site.layout != "NLC":
                before, after = (found.tensors[port.path, port.side].movedim(dim, -1).shape[1:3] for port in (read, write))
                assert site.resamples == (before != after), site.name
        elif isinstance(site, (PixelSite, FeatureSite)):
            assert (site.port.path, site.port.side) in found.order
        elif isinstance(site, VocabularySite):
            args, named = found.inputs[site.ids.path, "in"]
            assert not (named[site.argument] if site.argument in named else args[0]).is_floating_point()


def _ports(site: BranchSite | StreamSite | TokenSite) -> tuple[Port, Port]:
    if isinstance(site, BranchSite):
        return site.read, site.write
    if isinstance(site, StreamSite):
        return Port(site.path, "in"), Port(site.path, "out")
    return site.enter, site.leave


@every
def test_branches_add_to_the_stream(host: str, key: str) -> None:
    """Zeroing a branch's write port changes the output; it is part of the model."""
    found = case(host, key)
    inputs = found.host.sample(found.model)
    with torch.no_grad():
        before = list(outputs(found.model(**inputs)))
        for site in found.sites:
            if isinstance(site, BranchSite):
                handle = found.model.get_submodule(site.write.path).register_forward_hook(_silence)
                after = list(outputs(found.model(**inputs)))
                handle.remove()
                assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), site.name


def _silence(module: nn.Module, args: object, output: object) -> object:
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


@uncommon
def test_inert_is_what_gradients_show(host: str, key: str) -> None:
    model = build(host, key)
    found = case(host, key)
    found.host.gradient_hooks(model)
    result = list(outputs(model(**found.host.sample(model))))
    torch.manual_seed(1)
    sum((y * torch.randn_like(y)).sum() for y in result).backward()
    wrong = []
    for site in found.sites:
        if isinstance(site, (WeightSite, ParamSite)):
            grad = getattr(model.get_submodule(site.path), site.param).grad
            size = 0.0 if grad is None else grad[slice(*site.rows) if site.rows else ...].abs().max().item()
            # Some softmaxes are computed in single precision, which leaves noise where the true gradient is zero.
            if (size > 1e-6) if site.inert else (size < 1e-11):
                wrong.append((site.name, site.inert, size))
    assert wrong == []


@every
def test_attention_sites_match_their_modules(host: str, key: str) -> None:
    found = case(host, key)
    attention = [s for s in found.sites if isinstance(s, AttentionSite)]
    if hasattr(found.model, "attn_processors"):
        order = list(found.model.attn_processors)
        assert {s.path: s.index for s in attention} == {n.removesuffix(".processor"): i for i, n in enumerate(order)}
    for site in attention:
        module = found.model.get_submodule(site.path)
        _, kwargs = found.inputs[site.path, "in"]
        context = kwargs.get("encoder_hidden_states")
        assert found.tensors[site.path, "in"].shape[1 if found.tensors[site.path, "in"].dim() == 4 else -1] == site.width
        assert context is None or context.shape[-1] == site.context_width, site.name
        assert not hasattr(module, "to_q") or module.to_q.out_features % site.heads == 0
        assert hasattr(module, "processor")


@every
def test_self_attention_receives_tokens_and_keeps_their_shape(host: str, key: str) -> None:
    found = case(host, key)
    for site in found.sites:
        if isinstance(site, SelfAttentionSite):
            tokens, out = found.tensors[site.path, "in"], found.tensors[site.path, "out"]
            assert tokens.dim() == 3, site.name
            assert tokens.shape == out.shape, site.name
            assert {part.d_out for part in (site.query, site.key, site.value)} == {site.out.d_in}, site.name
            assert site.out.d_out == site.width == tokens.shape[-1], site.name


@uncommon
def test_sample_is_fixed_and_leaves_the_global_generator_alone(host: str, key: str) -> None:
    found = case(host, key)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, second = found.host.sample(found.model), found.host.sample(found.model)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name])
            assert value.dtype == torch.float64 or not value.is_floating_point()
            assert name in ("img_ids", "txt_ids", "position_ids") or value.shape[0] == 2


@uncommon
def test_sample_fits_a_model_in_half_precision(host: str, key: str) -> None:
    model = build(host, key).to(torch.bfloat16)
    with torch.no_grad():
        result = list(outputs(model(**case(host, key).host.sample(model))))
    assert all(torch.isfinite(y).all() for y in result)


@pytest.mark.parametrize(("host", "key"), TINY)
def test_tiny_models_are_small(host: str, key: str) -> None:
    assert sum(p.numel() for p in case(host, key).model.parameters()) < 400_000
