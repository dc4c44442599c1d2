"""SASS: two towers, in which every layer of a scenario's network takes what it can use of a global one.

"Scenario-adaptive and self-supervised model for multi-scenario personalized recommendation" (arXiv 2208.11457), its
multi-layer scenario adaptive transfer module. What is known of it names a global network, scenario networks, adaptive
and update gates and a bias network; no source gives the algebra, which is ours. One side, scenario s, layer l:

    g^l = relu(Wg g^(l-1) + bg)                            the global network, one for all scenarios; g^0 = x
    h^l = relu(Ws z^(l-1) + bs)                            the scenario's own; z^0 = x
    a   = sigmoid(Wa [g^l ; h^l] + ba)                     adaptive gate: which global units are of use here
    c   = tanh(Wc [a * g^l ; h^l] + bc)                    what would be taken over
    u   = sigmoid(Wu [g^l ; h^l] + bu)                     update gate: how much of it is let in
    z^l = (1 - u) * h^l + u * c
    r   = normalise(z^L + MLP([e_s ; k_s]))                the bias network: a scenario's own direction

Nothing flows back from a scenario to the global network but gradients. A row costs one branch, whatever the number of
scenarios. Both sides have the same form and weights of their own; tables are shared where features share them.

- Gates belong to the scenario, or with `share_gates` to all.
- `gate = "glu"` is the lighter unit that PERSCEN (KDD 2025) reports: z^l = h^l * sigmoid(W [g^l ; h^l] + b).
- k_s, the scenario's vector of a language model, is there where a run has knowledge; the user's joins the user's side.
- Pre-training and fine-tuning are the run's stages: see `msr_dist.models.objectives`. Without the first: SASS-Base.
"""

from itertools import pairwise
from typing import Literal, Self, final

import torch
from pydantic import model_validator
from torch import Tensor, nn

from msr_dist.models.base import Inputs, Rate, Width, Widths
from msr_dist.models.layers import Dropout, ScenarioGroups, ScenarioLinear
from msr_dist.models.towers import TowersConfig, TwoTower, side, unit
from msr_dist.schema import FeatureSchema


class Config(TowersConfig):
    """Settings of SASS; the switches are its ablations."""

    kind: Literal["sass"] = "sass"
    widths: Widths = (128, 64)
    """Units of each layer, the same in the global and the scenarios' networks; the last is the length of a vector."""
    share_gates: bool = False
    """All scenarios have the same gates."""
    gate: Literal["gru", "glu"] = "gru"
    """The paper's adaptive and update gates, or one gated linear unit in their place."""
    gated_layers: Literal["every", "last"] = "every"
    """Where the scenario's network takes from the global one."""
    global_network: bool = True
    """Off: scenarios learn alone, but for the tables that they share."""
    adaptive_gate: bool = True
    """Off: all of the global layer is offered, a = 1."""
    update_gate: bool = True
    """Off: what is offered is added, z = h + c."""
    bias_network: bool = True
    """Off: no direction of the scenario's own is added."""
    bias_widths: Widths = (32,)
    """Units of each hidden layer of the bias network."""
    scenario_width: Width = 16
    """Width of the scenario's embedding in the bias network."""
    user_knowledge: bool = True
    """Read the users' vectors of a language model, where a run has them."""
    scenario_knowledge: bool = True
    """Read the scenarios' vectors, where a run has them."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in the global and the scenarios' networks."""
    takes_knowledge = True

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        fields = ("share_gates", "gate", "gated_layers", "adaptive_gate", "update_gate")
        given = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if not self.global_network and given:
            raise ValueError(f"global_network=false leaves nothing to gate: leave {given[0]} out")
        if self.gate == "glu" and not (self.adaptive_gate and self.update_gate):
            raise ValueError("gate 'glu' has neither an adaptive nor an update gate: give no setting of them")
        return self

    def build(self, schema: FeatureSchema) -> "Sass":
        """The networks for this schema."""
        return Sass(self, schema)


@final
class Sass(TwoTower):
    """Both sides."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self._groups = config.user_groups, config.item_groups
        user_width, item_width = config.widths_of(schema)
        known = schema.knowledge if config.user_knowledge else None
        self._knows_users = known is not None
        self.user_side = AdaptiveTransfer(config, schema, user_width + (0 if known is None else known.width + 1))
        self.item_side = AdaptiveTransfer(config, schema, item_width)

    def user(self, inputs: Inputs) -> Tensor:
        """`[B, d]`."""
        x = side(inputs, self._groups[0])
        if self._knows_users:
            assert inputs.knowledge is not None
            x = torch.cat([x, inputs.knowledge], dim=1)
        vector: Tensor = self.user_side(x, inputs)
        return vector

    def item(self, inputs: Inputs) -> Tensor:
        """`[B, d]`."""
        vector: Tensor = self.item_side(side(inputs, self._groups[1]), inputs)
        return vector


@final
class AdaptiveTransfer(nn.Module):
    """One side: `[B, D]` features -> `[B, d]`."""

    def __init__(self, config: Config, schema: FeatureSchema, in_width: int) -> None:
        super().__init__()
        self.scenarios = len(schema.scenarios)
        shapes = list(pairwise([in_width, *config.widths]))
        shared = shapes if config.global_network else []
        self.general = nn.ModuleList(nn.Linear(i, o) for i, o in shared)
        self.own = nn.ModuleList(ScenarioLinear(self.scenarios, i, o) for i, o in shapes)
        gated = config.widths[-1:] if config.gated_layers == "last" else config.widths
        unit_of = _Gru if config.gate == "gru" else _Glu
        self.gates = nn.ModuleList(unit_of(config, self.scenarios, width) for width in gated if config.global_network)
        self._first_gated = len(shapes) - len(self.gates)
        self.general_dropouts = nn.ModuleList(Dropout(config.dropout) for _ in shared)
        self.own_dropouts = nn.ModuleList(Dropout(config.dropout) for _ in shapes)
        self.bias = _Bias(config, schema) if config.bias_network else None

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Vectors of length 1."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, x = groups.group(inputs.row), groups.group(x)
        general = own = x
        for layer, (linear, dropout) in enumerate(zip(self.own, self.own_dropouts, strict=True)):
            own = dropout(torch.relu(linear(own, groups)), row)
            if len(self.general):
                general = self.general_dropouts[layer](torch.relu(self.general[layer](general)), row)
            if layer >= self._first_gated:
                own = self.gates[layer - self._first_gated](general, own, groups)
        if self.bias is not None:
            own = own + groups.spread(self.bias())
        return groups.restore(unit(own))


class _Gate(nn.Module):
    """A linear layer per scenario, or one for all."""

    def __init__(self, config: Config, scenarios: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.shared = nn.Linear(in_width, out_width) if config.share_gates else None
        self.own = None if config.share_gates else ScenarioLinear(scenarios, in_width, out_width)

    def forward(self, x: Tensor, groups: ScenarioGroups) -> Tensor:
        out: Tensor
        if self.shared is not None:
            out = self.shared(x)
        else:
            assert self.own is not None
            out = self.own(x, groups)
        return out


@final
class _Gru(nn.Module):
    """Adaptive gate, candidate and update gate."""

    def __init__(self, config: Config, scenarios: int, width: int) -> None:
        super().__init__()
        self.adaptive = _Gate(config, scenarios, 2 * width, width) if config.adaptive_gate else None
        self.update = _Gate(config, scenarios, 2 * width, width) if config.update_gate else None
        self.candidate = _Gate(config, scenarios, 2 * width, width)

    def forward(self, general: Tensor, own: Tensor, groups: ScenarioGroups) -> Tensor:
        both = torch.cat([general, own], dim=1)
        if self.adaptive is not None:
            offered = torch.sigmoid(self.adaptive(both, groups)) * general
            both_offered = torch.cat([offered, own], dim=1)
        else:
            both_offered = both
        candidate = torch.tanh(self.candidate(both_offered, groups))
        if self.update is None:
            added: Tensor = own + candidate
            return added
        update = torch.sigmoid(self.update(both, groups))
        fused: Tensor = own + update * (candidate - own)
        return fused


@final
class _Glu(nn.Module):
    """One gated linear unit."""

    def __init__(self, config: Config, scenarios: int, width: int) -> None:
        super().__init__()
        self.gate = _Gate(config, scenarios, 2 * width, width)

    def forward(self, general: Tensor, own: Tensor, groups: ScenarioGroups) -> Tensor:
        return own * torch.sigmoid(self.gate(torch.cat([general, own], dim=1), groups))


@final
class _Bias(nn.Module):
    """A vector for each scenario, `[S, d]`, from its embedding and what a language model says of it."""

    knowledge: Tensor

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        scenarios = len(schema.scenarios)
        known = schema.knowledge is not None and config.scenario_knowledge
        vectors = schema.knowledge.scenarios if schema.knowledge is not None and known else ((),) * scenarios
        self.register_buffer("knowledge", torch.tensor(vectors).view(scenarios, -1), persistent=False)
        self.embedding = nn.Parameter(torch.randn(scenarios, config.scenario_width))
        widths = [config.scenario_width + self.knowledge.shape[1], *config.bias_widths]
        hidden = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.network = nn.Sequential(*hidden, nn.Linear(widths[-1], config.widths[-1]))

    def forward(self) -> Tensor:
        vectors: Tensor = self.network(torch.cat([self.embedding, self.knowledge], dim=1))
        return vectors
