"""State dicts of attachments: everything that training changed, loaded strictly."""

import torch

from tests.injection.test_attachment import train_once
from tests.injection.toy import net, run, stir
from tests.raising import raises
from veneer.injection import LoadError, attach


def tuned_net(**options: object) -> tuple:
    model = net()
    return model, attach(model, "lora", where="conv attn.{q,out}", rank=2, **options)


def test_state_has_adapters_trained_parameters_and_changed_statistics() -> None:
    model, tuned = tuned_net(train="norm head")
    adapters = {f"{s}:{p}" for s in ("conv", "qkv.q", "read") for p in ("down", "up")}
    trained = {"norm.weight:weight", "head:weight", "head:bias"}
    assert set(tuned.state_dict()) == adapters | trained
    train_once(model)
    statistics = {f"norm:{b}" for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(tuned.state_dict()) == adapters | trained | statistics
    assert not any(t.requires_grad for t in tuned.state_dict().values())


def test_loading_gives_the_output_of_the_saved_one() -> None:
    model, tuned = tuned_net(train="norm head")
    train_once(model)
    stir(tuned)
    other_model, other = tuned_net(train="norm head")
    assert not torch.equal(run(other_model), run(model))
    report = other.load_state_dict({k: v.clone() for k, v in tuned.state_dict().items()})
    assert report.clean
    assert len(report.used) == len(tuned.state_dict())
    assert torch.equal(run(other_model), run(model))


def test_the_error_for_a_wrong_shape_names_the_tensor_and_nothing_is_changed() -> None:
    _, tuned = tuned_net()
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    state = {k: torch.ones_like(v) for k, v in before.items()}
    state["qkv.q:up"] = torch.ones(9, 9)
    state["no.such:tensor"] = state.pop("conv:down")
    with raises(LoadError, missing=("conv:down",), unused=("no.such:tensor",), misshapen={"qkv.q:up": ((9, 9), (6, 2))}):
        tuned.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())


def test_integer_and_floating_point_tensors_are_not_interchangeable() -> None:
    model, tuned = tuned_net(train="norm")
    train_once(model)
    state = {k: v.clone() for k, v in tuned.state_dict().items()}
    for key, dtype in (("conv:down", torch.int32), ("norm:num_batches_tracked", torch.float32)):
        with raises(LoadError, misshapen={key: (dtype, state[key].dtype)}):
            tuned.load_state_dict({**state, key: state[key].to(dtype)})
    assert tuned.load_state_dict({k: v.double() if v.is_floating_point() else v.int() for k, v in state.items()}).clean


def test_a_load_that_is_not_strict_loads_the_matching_tensors() -> None:
    _, tuned = tuned_net()
    report = tuned.load_state_dict({"read:up": torch.full((6, 2), 7.0), "other:up": torch.zeros(1)}, strict=False)
    assert (report.used, report.unused, len(report.missing)) == (("read:up",), ("other:up",), 5)
    assert not report.clean
    assert tuned.state_dict()["read:up"].unique().tolist() == [7.0]
