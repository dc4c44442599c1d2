from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import SCENARIOS, inputs, mixed, schema
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode
from towers import SIZES, build, config

from msr_dist.config import kind_config

WIDTHS = SIZES["sass"]["widths"]
SIDES = ("user", "item")
SWITCHES = [
    {},
    {"share_gates": True},
    {"gate": "glu"},
    {"gate": "glu", "share_gates": True, "gated_layers": "last"},
    {"gated_layers": "last"},
    {"adaptive_gate": False},
    {"update_gate": False},
    {"adaptive_gate": False, "update_gate": False, "share_gates": True},
    {"global_network": False},
    {"bias_network": False},
    {"global_network": False, "bias_network": False},
    {"user_knowledge": False},
    {"scenario_knowledge": False},
    {"widths": (9,), "bias_widths": (24, 18)},
]
every_switch = pytest.mark.parametrize("settings", SWITCHES, ids=str)
every_side = pytest.mark.parametrize("side", SIDES)
NOTHING_KNOWN = schema().model_copy(update={"knowledge": None})


def everywhere(rows_each=3, scenarios=SCENARIOS):
    """Rows of all scenarios, in turn."""
    return inputs(torch.arange(scenarios * rows_each) % scenarios)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(model, batch, side, settings, known):
    """The equations, row by row."""
    state = {name.removeprefix(f"{side}_side."): x.double().numpy() for name, x in model.state_dict().items()}
    settings = config("sass", **settings)
    layers = len(settings.widths)
    features = batch.groups[side].detach().double().numpy()
    if side == "user" and known is not None and settings.user_knowledge:
        features = np.concatenate([features, batch.knowledge.double().numpy()], axis=1)

    def own(name, x, s):
        return x @ state[f"{name}.weight"][s] + state[f"{name}.bias"][s]

    def shared(name, x):
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def gate(name, g, h, s):
        both = np.concatenate([g, h])
        return shared(f"{name}.shared", both) if settings.share_gates else own(f"{name}.own", both, s)

    rows = []
    for x, s in zip(features, batch.scenario.tolist(), strict=True):
        g = z = x
        for layer in range(layers):
            h = np.maximum(own(f"own.{layer}", z, s), 0)
            z = h
            if not settings.global_network:
                continue
            g = np.maximum(shared(f"general.{layer}", g), 0)
            if settings.gated_layers == "last" and layer < layers - 1:
                continue
            name = f"gates.{0 if settings.gated_layers == 'last' else layer}"
            if settings.gate == "glu":
                z = h * sigmoid(gate(f"{name}.gate", g, h, s))
                continue
            a = sigmoid(gate(f"{name}.adaptive", g, h, s)) if settings.adaptive_gate else 1.0
            c = np.tanh(gate(f"{name}.candidate", a * g, h, s))
            if settings.update_gate:
                u = sigmoid(gate(f"{name}.update", g, h, s))
                z = (1 - u) * h + u * c
            else:
                z = h + c
        if settings.bias_network:
            says = known.scenarios[s] if known is not None and settings.scenario_knowledge else ()
            b = np.concatenate([state["bias.embedding"][s], np.array(says)])
            last = 2 * len(settings.bias_widths)
            for layer in range(0, last, 2):
                b = np.maximum(shared(f"bias.network.{layer}", b), 0)
            z = z + shared(f"bias.network.{last}", b)
        # Without bias and global network, z is what a ReLU left over: it may be 0, and then stays so.
        rows.append(z / max(np.sqrt((z**2).sum()), 1e-12))
    return np.stack(rows)


@every_side
@every_switch
@pytest.mark.parametrize("data", [schema(), NOTHING_KNOWN], ids=["known", "nothing known"])
def test_follows_its_equations(data, settings, side):
    model, batch = build("sass", data, **settings), mixed(36)
    if data.knowledge is None:
        batch = replace(batch, knowledge=None, user=None)
    found = getattr(model, side)(batch).detach().numpy()
    assert found.shape == (36, settings.get("widths", WIDTHS)[-1])
    np.testing.assert_allclose(found, by_hand(model, batch, side, settings, data.knowledge), atol=1e-5)


@every_side
@every_switch
def test_everything_learns_where_all_scenarios_are(settings, side):
    model, batch = build("sass", **settings), everywhere(9)
    vectors = getattr(model, side)(batch)
    (vectors * torch.randn_like(vectors)).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(side):
            assert parameter.grad.any(), name
            if len(parameter) == SCENARIOS:
                assert parameter.grad.flatten(1).any(dim=1).all(), name


@every_side
@every_switch
def test_rows_of_others_teach_a_scenario_nothing(settings, side):
    model, batch = build("sass", **settings), everywhere(9)
    vectors = getattr(model, side)(batch)
    (vectors * torch.randn_like(vectors))[batch.scenario != 2].sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(side) and len(parameter) == SCENARIOS:
            taught = (parameter.grad != 0).flatten(1).any(dim=1)
            assert taught.tolist() == [s != 2 for s in range(SCENARIOS)], name


@every_side
@pytest.mark.parametrize("settings", [{}, {"gate": "glu"}, {"share_gates": True}], ids=str)
def test_nothing_flows_from_a_scenario_to_the_global_network(settings, side):
    model, batch = build("sass", **settings), everywhere()
    general = []
    for linear in getattr(model, f"{side}_side").general:
        linear.register_forward_hook(lambda _module, _inputs, out: general.append(out))
    before = getattr(model, side)(batch)
    for parameter in model.parameters():
        if len(parameter) == SCENARIOS:
            parameter.data[3] += 1
    after = getattr(model, side)(batch)
    changed = (before != after).any(dim=1)
    assert torch.equal(changed, batch.scenario == 3)
    assert len(general) == 2 * len(WIDTHS)
    assert all(map(torch.equal, general[: len(WIDTHS)], general[len(WIDTHS) :]))


@every_side
def test_the_global_network_learns_from_all_scenarios_and_reaches_them(side):
    model, batch = build("sass"), everywhere()
    vectors = getattr(model, side)(batch)
    first = getattr(model, f"{side}_side").general[0].weight
    weights = torch.randn_like(vectors)
    for s in range(SCENARIOS):
        (gradient,) = torch.autograd.grad((vectors * weights)[batch.scenario == s].sum(), first, retain_graph=True)
        assert gradient.any(), s


@every_side
@pytest.mark.parametrize("settings", [{}, {"gate": "glu"}, {"share_gates": True}], ids=str)
def test_a_row_costs_one_branch(settings, side):
    """However many scenarios there are: only the bias network's vectors, one for each, grow with them."""

    def operations(scenarios):
        model, batch = build("sass", schema(scenarios=scenarios), **settings), everywhere(12, scenarios=3)
        with FlopCounterMode(display=False) as flops:
            getattr(model, side)(batch).sum().backward()
        return flops.get_total_flops()

    few, some, many = (operations(scenarios) for scenarios in (3, 23, 43))
    assert many - some == some - few
    in_width, hidden, out = 3 + 10, SIZES["sass"]["bias_widths"][0], WIDTHS[-1]
    # Forward, by weight and by input; the scenarios' embeddings want a gradient, beside which their knowledge stands.
    assert some - few == 20 * 3 * 2 * (in_width * hidden + hidden * out)


def test_the_sides_share_no_parameters():
    model = build("sass")
    for one, other in (SIDES, SIDES[::-1]):
        assert {
            name.removeprefix(f"{one}_side.") for name in dict(model.named_parameters()) if name.startswith(one)
        } == {name.removeprefix(f"{other}_side.") for name in dict(model.named_parameters()) if name.startswith(other)}
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(storages)) == len(storages)


def test_switches_cost_the_parameters_that_they_say():
    def parameters(**settings):
        return sum(parameter.numel() for parameter in build("sass", NOTHING_KNOWN, **settings).parameters())

    gate = [2 * width * width + width for width in WIDTHS]
    own_gates = 2 * SCENARIOS * 3 * sum(gate)
    general = sum(i * o + o for D in (8, 12) for i, o in ((D, WIDTHS[0]), WIDTHS))
    full = parameters()
    assert full - parameters(share_gates=True) == own_gates - own_gates // SCENARIOS
    assert full - parameters(gate="glu") == own_gates * 2 // 3
    assert full - parameters(adaptive_gate=False) == own_gates // 3
    assert full - parameters(update_gate=False) == own_gates // 3
    assert full - parameters(gated_layers="last") == 2 * SCENARIOS * 3 * gate[0]
    assert full - parameters(global_network=False) == own_gates + general


def test_takes_knowledge_but_needs_none():
    settings = kind_config("msr_dist.models", "sass")
    assert settings.takes_knowledge
    assert not settings.reads_knowledge


def test_knowledge_of_scenarios_is_not_saved():
    """It belongs to the run's store; a checkpoint of parameters has no copy."""
    assert "user_side.bias.knowledge" in dict(build("sass").named_buffers())
    assert not any("knowledge" in name for name in build("sass").state_dict())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("share_gates", True),
        ("gate", "glu"),
        ("gated_layers", "last"),
        ("adaptive_gate", False),
        ("update_gate", False),
    ],
)
def test_without_a_global_network_there_is_nothing_to_gate(setting, value):
    with pytest.raises(ValidationError, match=f"global_network=false leaves nothing to gate: leave {setting} out"):
        config("sass", global_network=False, **{setting: value})
    plain = config("sass", global_network=False)
    assert config("sass", **plain.model_dump(exclude={"kind"})) == plain


@pytest.mark.parametrize("setting", ["adaptive_gate", "update_gate"])
def test_a_gated_linear_unit_has_no_other_gates(setting):
    with pytest.raises(ValidationError, match="gate 'glu' has neither an adaptive nor an update gate"):
        config("sass", gate="glu", **{setting: False})


@pytest.mark.parametrize(
    "settings", [{"widths": ()}, {"widths": (0,)}, {"bias_widths": (8, -1)}, {"dropout": 1.0}, {"scenario_width": 0}]
)
def test_faulty_settings_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        config("sass", **settings)
