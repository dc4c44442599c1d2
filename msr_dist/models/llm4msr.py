"""LLM4MSR: meta networks that read a language model's vectors, around any other model.

Wang et al., 2024, "LLM4MSR: an LLM-enhanced paradigm for multi-scenario recommendation". The full text of the paper was
not at hand. From its abstract, its README and public reviews: a frozen language model gives one vector per user and one
per scenario; two hierarchical meta networks turn them into weights and biases of meta layers; those of the user stand
at the bottom, those of the scenario parallel to the backbone; they learn together with the backbone, whichever it is.
The algebra is a reconstruction, and the paper's own may differ:

    z_u    = LN(W_u [h_u ; known])                         code of the user; known is 0 for one without a vector
    z_s    = LN(W_s h_s)                                   code of the scenario
    p, q   = relu(A z), relu(C z)                          of each meta layer: what its weights and biases are made from
    K(z)   = K_0 + sum_j p_j K_j
    b(z)   = b_0 + sum_j q_j b_j

    x_l    = relu(((x_{l-1} V_l) K_l(z_u) + b_l(z_u)) U_l) user level, l = 1 .. L, no relu in the last; x_0 = e
    e~     = e + known x_L
    v_l    = relu(v_{l-1} K'_l(z_s) + b'_l(z_s))           scenario level, no relu in the last layer; v_0 = e~
    logits = backbone(e~) + v_last                         or (1 - a) backbone(e~) + a v_last, a learned, [T]

Shapes: h_u and h_s as they come; z `[k]`; e `[B, D]` joined groups, and e~ is handed on as the same groups; V `[D, r]`
and U `[r, D]` are shared, K `[r, r]` and b `[r]` generated; K' `[in, out]`, b' `[out]`; p, q `[m]`. With rank "full"
there are neither V nor U, and K is `[D, D]`.

The start is the backbone, exactly: its parameters are drawn first and as without the meta networks, and K_0, K_j, b_0,
b_j of both last layers are 0 (with learned shares it is a that is 0). Nothing else is, so that after one step
everything has a gradient. What is drawn later, such as the attention over lists, is drawn as without the meta networks.

What is ours:
- Rank: a matrix D x D per user takes m D^2 products, tens to hundreds of times as many as a row takes in a small
  backbone. The core of rank r is that of APG, as is the bias in its space.
- e + x_L: without it, a generator at its start would destroy e. With `residual` off the sum is e S + x_L, where S
  `[D, D]` is learned from the identity on.
- A user without a vector is left to the backbone: LN would make a code of full length out of nothing, and training
  has hardly any rows that could teach it, while most rows of a test by time may be of new users.
- The scenarios' vectors are centred and scaled over the scenarios: prompts of one kind have most in common.
- e~ replaces the groups alone; lists of behaviours, which some backbones read beside them, stay as they are.
- Dropout, off by default.
- `as_features`, for comparison: the codes join the backbone's input as one more group, divided by sqrt(k), so about as
  long as the tables' vectors. There are no meta layers then, and the start is not that of the backbone alone.

How the user level runs. All forms make codes, p and q once per user of the batch, and are equal but for rounding:
- "grouped": K once per user, and a product for each user over that user's rows.
- "gathered": K once per user, and each row multiplied by a copy of its own, `[B, r, r]`.
- "bilinear": sum_j p_j (x K_j), so no K at all, but `[B, m r]` in between.
Which is fastest was measured with `benchmarks/serving.py --forms`: 2,048 rows, forward and backward, m = 64, D = 128,
CPU milliseconds of one thread. `fastest` decides by it; what it takes is marked.

    rows per user                  1       2       4       8      16      32     128
    rank 16     grouped           35      20      12     9.2     5.9    6.8*    5.4*
                gathered         13*    8.4*    7.2*    6.3*    5.5*     7.2     5.8
                bilinear          18      18      16      16      15      17      16
    rank 32     grouped           51      28      17     12*    7.7*    5.1*    7.2*
                gathered         24*     14*     16*      11     7.4     6.0      12
                bilinear          28      26      27      30      30      19      26
    rank full   grouped          447    227*    124*     57*     30*     15*    9.1*
                gathered         555     367     291     206     204     192     189
                bilinear        243*     239     248     250     245     251     257

So with a core of low rank the bilinear form never is: it takes as many products as making K, m r^2 a row, and holds
more, m r against r^2. It is for wide layers and batches with hardly two rows of a user.

The scenario level makes S weight sets once per step. In evaluation without gradients they are made once and kept until
`train` or `eval` is called or a parameter changes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self, final

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from msr_dist.config import component
from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Objective, Rate, Width, Widths, predicting
from msr_dist.models.layers import Dropout, ScenarioGroups, grouped_linear
from msr_dist.models.star import Config as Star
from msr_dist.schema import Feature, FeatureSchema, Table

GROUP = "knowledge"
"""The feature group of the codes, where they are features."""

Form = Literal["grouped", "gathered", "bilinear"]


class Config(BackboneConfig):
    """Settings of LLM4MSR."""

    reads_knowledge: ClassVar[bool] = True

    kind: Literal["llm4msr"] = "llm4msr"
    backbone: Annotated[component("msr_dist.models"), AfterValidator(predicting)] = Star()  # type: ignore[valid-type]
    """The model in the middle, any but this one."""
    vectors: Literal["knowledge", "random", "shuffled", "trained"] = "knowledge"
    """Those of the language model, or a control that a gain has to beat: fixed random vectors of users and scenarios,
    each user with another user's vector, or trained embeddings of users and scenarios of the same width."""
    user_level: bool = True
    """Whether the users' vectors take part."""
    scenario_level: bool = True
    """Whether the scenarios' vectors take part."""
    as_features: bool = False
    """The vectors that take part become features of the backbone, in place of making meta layers."""
    code_width: int = Field(default=64, ge=4, multiple_of=4)
    """Length of a code, k."""
    generator_width: Width = 64
    """Hidden units that a layer's weights are made from, m, and as many for its biases."""
    user_layers: Width = 1
    """Meta layers of the user level, L."""
    rank: Width | Literal["full"] = 16
    """Units of the user level's core, r; or a core as wide as the input, which costs accordingly."""
    residual: bool = True
    """The user level adds to its input; else to a learned map of it, which starts as the identity."""
    scenario_widths: Widths = (64,)
    """Units of each hidden meta layer of the scenario level."""
    fusion: Literal["sum", "weighted"] = "sum"
    """How the logits of backbone and scenario level become one: their sum, or shares that are learned per label."""
    execution: Literal["measured", "grouped", "gathered", "bilinear"] = "measured"
    """How the user level runs; "measured" takes what measurement found fastest for each batch."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in the scenario level."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.user_level or self.scenario_level):
            raise ValueError(
                f"neither user_level nor scenario_level: that is the backbone alone, kind = {self.backbone.kind!r}"
            )
        if isinstance(self.backbone, Config):
            raise ValueError("backbone.kind is 'llm4msr' again: give the model that the meta networks stand around")
        return self

    def adapt(self, schema: FeatureSchema) -> FeatureSchema:
        """The schema as the backbone wants it, with the chosen vectors."""
        schema = self.backbone.adapt(schema)
        if schema.knowledge is None:
            return schema
        return schema.model_copy(update={"knowledge": schema.knowledge.model_copy(update={"vectors": self.vectors})})

    def build(self, schema: FeatureSchema) -> "Llm4msr":
        """The backbone and its meta networks; ValueError where the schema has no knowledge."""
        return Llm4msr(self, schema)


class MetaLinear(nn.Module):
    """A linear layer whose weights and biases are made from a code."""

    def __init__(self, config: Config, in_width: int, out_width: int, from_zero: bool) -> None:
        super().__init__()
        hidden, bound = config.generator_width, in_width**-0.5
        self.hidden = nn.Linear(config.code_width, 2 * hidden)
        self.weight = nn.Parameter(torch.empty(in_width, out_width).uniform_(-bound, bound))
        basis = torch.empty(hidden, in_width, out_width).uniform_(-bound, bound)
        self.weight_basis = nn.Parameter(basis * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.bias_basis = nn.Parameter(torch.zeros(hidden, out_width))
        if from_zero:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.weight_basis)

    def coefficients(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, k]` -> what weights and biases are made from, `[N, m]` each."""
        of_weight, of_bias = torch.relu(self.hidden(code)).chunk(2, dim=1)
        return of_weight, of_bias

    def generated(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, k]` -> weights `[N, in, out]` and biases `[N, out]`."""
        of_weight, of_bias = self.coefficients(code)
        weight = self.weight + torch.tensordot(of_weight.float(), self.weight_basis, dims=1)
        return weight, self.bias + of_bias @ self.bias_basis


@dataclass(frozen=True)
class Users:
    """The users of a batch, `U` of them, and how their layers are to run."""

    codes: Tensor
    """`[U, k]`."""
    of_row: Tensor
    """`[B]`: the place of each row's user in `codes`."""
    form: Form
    groups: ScenarioGroups | None
    """The rows by user, where the form is "grouped" and there is not one user alone."""

    def through(self, layer: MetaLinear, x: Tensor) -> Tensor:
        """`[B, in]` -> `[B, out]`: each row through its own user's layer."""
        if self.form == "bilinear":
            of_weight, of_bias = (F.embedding(self.of_row, each) for each in layer.coefficients(self.codes))
            products = (x @ layer.weight_basis.transpose(0, 1).flatten(1)).view(*of_weight.shape, len(layer.bias))
            made = torch.bmm(of_weight[:, None, :], products).squeeze(1)
            return made + torch.addmm(layer.bias, x, layer.weight) + of_bias @ layer.bias_basis
        weight, bias = layer.generated(self.codes)
        if len(self.codes) == 1:
            # A request of one user: there is nothing to sort.
            return torch.addmm(bias[0], x, weight[0])
        if self.groups is not None:
            return self.groups.restore(grouped_linear(self.groups.group(x), weight, bias, self.groups))
        own = F.embedding(self.of_row, weight.flatten(1)).view(len(x), *weight.shape[1:])
        return torch.baddbmm(F.embedding(self.of_row, bias)[:, None, :], x[:, None, :], own).squeeze(1)


def fastest(rows: int, users: int, width: int, generator_width: int) -> Form:
    """The form to run a layer of `width` units for so many rows of so many users; see the module."""
    if width > generator_width and rows < 2 * users:
        return "bilinear"
    return "grouped" if rows * width**2 >= 8192 * users else "gathered"


class UserLayer(nn.Module):
    """Into the core's space, through the core that the user makes, and back."""

    def __init__(self, config: Config, width: int, core_width: int, from_zero: bool) -> None:
        super().__init__()
        full = config.rank == "full"
        self.enter = nn.Identity() if full else nn.Linear(width, core_width, bias=False)
        self.core = MetaLinear(config, core_width, core_width, from_zero)
        self.leave = nn.Identity() if full else nn.Linear(core_width, width, bias=False)

    def forward(self, x: Tensor, users: Users) -> Tensor:
        """`[B, D]` -> `[B, D]`."""
        out: Tensor = self.leave(users.through(self.core, self.enter(x)))
        return out


@final
class UserLevel(nn.Module):
    """Meta layers of the user, below the backbone."""

    def __init__(self, config: Config, knowledge_width: int, width: int) -> None:
        super().__init__()
        self.execution = config.execution
        self.core_width = width if config.rank == "full" else config.rank
        self.generator_width = config.generator_width
        self.code = _encoder(knowledge_width + 1, config.code_width)
        last = config.user_layers - 1
        self.layers = nn.ModuleList(
            UserLayer(config, width, self.core_width, from_zero=layer == last) for layer in range(last + 1)
        )
        self.shortcut = None if config.residual else nn.Parameter(torch.eye(width))

    def forward(self, x: Tensor, user: Tensor, knowledge: Tensor) -> Tensor:
        """`[B, D]` of the users `user` `[B]`, with `knowledge` `[B, K + 1]` -> `[B, D]`."""
        users = self._users(user, knowledge)
        added = x
        for layer in self.layers[:-1]:
            added = torch.relu(layer(added, users))
        known = knowledge[:, -1:]
        changed: Tensor = self.layers[-1](added, users) * known + (x if self.shortcut is None else x @ self.shortcut)
        return changed

    def _users(self, user: Tensor, knowledge: Tensor) -> Users:
        each, of_row = torch.unique(user, return_inverse=True)
        rows = torch.arange(len(user), device=user.device)
        first = rows.new_full(each.shape, len(user)).scatter_reduce(0, of_row, rows, "amin")
        codes = self.code(knowledge.index_select(0, first))
        chosen = self.execution
        form = fastest(len(user), len(each), self.core_width, self.generator_width) if chosen == "measured" else chosen
        # Groups of rows are groups of rows: here by user.
        groups = ScenarioGroups.of(of_row, len(each)) if form == "grouped" and len(each) != 1 else None
        return Users(codes, of_row, form, groups)


@final
class ScenarioCodes(nn.Module):
    """The scenarios' vectors, made into codes."""

    vectors: Tensor

    def __init__(self, config: Config, vectors: Tensor) -> None:
        super().__init__()
        # Aside, so that all else starts the same with any vectors, and runs of one seed are pairs.
        with _aside():
            drawn = torch.randn_like(vectors)
        if config.vectors == "trained":
            self.vectors = nn.Parameter(drawn)
        else:
            self.register_buffer("vectors", _standardised(drawn if config.vectors == "random" else vectors))
        self.code = _encoder(vectors.shape[1], config.code_width)

    def forward(self) -> Tensor:
        """`[S, k]`."""
        codes: Tensor = self.code(self.vectors)
        return codes


@final
class ScenarioLevel(nn.Module):
    """Meta layers of the scenario, parallel to the backbone."""

    def __init__(self, config: Config, vectors: Tensor, width: int, labels: int) -> None:
        super().__init__()
        self.scenarios = len(vectors)
        self.codes = ScenarioCodes(config, vectors)
        shapes = list(pairwise([width, *config.scenario_widths]))
        self.hidden = nn.ModuleList(MetaLinear(config, i, o, from_zero=False) for i, o in shapes)
        self.dropouts = nn.ModuleList(Dropout(config.dropout) for _ in shapes)
        # A weighted sum starts with the share at 0; two zeros would have no gradient.
        self.last = MetaLinear(config, shapes[-1][1], labels, from_zero=config.fusion == "sum")
        self._kept: tuple[list[tuple[int, int]], list[tuple[Tensor, Tensor]]] | None = None

    def forward(self, x: Tensor, scenario: Tensor, row: Tensor) -> Tensor:
        """`[B, D]` of the scenarios `scenario` `[B]` -> `[B, T]`."""
        groups = ScenarioGroups.of(scenario, self.scenarios)
        row, x = groups.group(row), groups.group(x)
        *hidden, last = self.weights()
        for (weight, bias), dropout in zip(hidden, self.dropouts, strict=True):
            x = dropout(torch.relu(grouped_linear(x, weight, bias, groups)), row)
        return groups.restore(grouped_linear(x, *last, groups))

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, weights `[S, in, out]` and biases `[S, out]`; in evaluation without gradients made once."""
        if self.training or torch.is_grad_enabled():
            return self._generated()
        # A change in place counts up the version, another tensor lies elsewhere.
        state = [(x.data_ptr(), x._version) for x in (*self.parameters(), *self.buffers())]
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._generated())
        return self._kept[1]

    def _generated(self) -> list[tuple[Tensor, Tensor]]:
        codes = self.codes()
        return [layer.generated(codes) for layer in (*self.hidden, self.last)]

    def train(self, mode: bool = True) -> Self:
        """As any module; weights that were kept are forgotten."""
        self._kept = None
        return super().train(mode)


@dataclass(frozen=True)
class Parts:
    """What each part of the model does with a batch."""

    before: Tensor
    """`[B, D]`: the joined groups."""
    after: Tensor
    """`[B, D]`: the same behind the user level."""
    backbone: Objective
    """The backbone's own, of `after`."""
    scenario: Tensor | None
    """`[B, T]`: the scenario level's logits, where there is one."""
    logits: Tensor
    """`[B, T]`: the model's."""


@final
class Llm4msr(Backbone):
    """A backbone between the meta layers of the user and of the scenario."""

    user_code: nn.Sequential | None
    user_level: UserLevel | None
    scenario_codes: ScenarioCodes | None
    scenario_level: ScenarioLevel | None
    share: nn.Parameter | None

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        knowledge, widths = schema.knowledge, schema.group_widths()
        if knowledge is None:
            raise ValueError(
                "model.kind 'llm4msr' needs vectors of users and scenarios, and the run has none: "
                "add a section [knowledge] with the store that `msr-dist extract` has made"
            )
        if len(knowledge.scenarios) != len(schema.scenarios):
            raise ValueError(
                f"vectors of {len(knowledge.scenarios)} scenarios, but the schema has {len(schema.scenarios)}: "
                "extract the vectors from these data, and put llm4msr around other models, not inside of one"
            )
        if config.vectors == "trained" and schema.copies(schema.user_table) > 1:
            raise ValueError(
                "model.vectors = 'trained' is one vector per user, but the users' table has one for every scenario: "
                "choose another model.backbone or embeddings.per_scenario = false"
            )
        if config.as_features and GROUP in widths:
            raise ValueError(f"model.as_features: the data have a feature group {GROUP!r} already; rename it")
        self.as_features = config.as_features
        self.backbone = config.backbone.build(_with_codes(schema, config) if config.as_features else schema)
        vectors, labels = torch.tensor(knowledge.scenarios), len(schema.labels)
        self.user_code = self.user_level = self.scenario_codes = self.scenario_level = self.share = None
        with _aside():
            if config.as_features:
                self.user_code = _encoder(knowledge.width + 1, config.code_width) if config.user_level else None
                self.scenario_codes = ScenarioCodes(config, vectors) if config.scenario_level else None
                return
            if config.user_level:
                self.user_level = UserLevel(config, knowledge.width, schema.input_width)
            if config.scenario_level:
                self.scenario_level = ScenarioLevel(config, vectors, schema.input_width, labels)
                self.share = nn.Parameter(torch.zeros(labels)) if config.fusion == "weighted" else None

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        return self.parts(inputs).logits

    def objective(self, inputs: Inputs) -> Objective:
        """The backbone's own, with the logits of the whole."""
        parts = self.parts(inputs)
        return replace(parts.backbone, logits=parts.logits)

    def parts(self, inputs: Inputs) -> Parts:
        """The logits, and what they come from."""
        before = after = inputs.joined()
        if self.as_features:
            inputs = replace(inputs, groups={**inputs.groups, GROUP: self._features(inputs)}, whole=None)
        if self.user_level is not None:
            assert inputs.user is not None
            assert inputs.knowledge is not None
            after = self.user_level(before, inputs.user, inputs.knowledge)
            inputs = inputs.with_whole(after)
        backbone = self.backbone.objective(inputs)
        if self.scenario_level is None:
            return Parts(before, after, backbone, None, backbone.logits)
        scenario = self.scenario_level(after, inputs.scenario, inputs.row)
        if self.share is None:
            return Parts(before, after, backbone, scenario, backbone.logits + scenario)
        logits = (1 - self.share) * backbone.logits + self.share * scenario
        return Parts(before, after, backbone, scenario, logits)

    def _features(self, inputs: Inputs) -> Tensor:
        """`[B, k or 2 k]`: the codes that take part."""
        codes = []
        if self.user_code is not None:
            assert inputs.knowledge is not None
            codes.append(self.user_code(inputs.knowledge) * inputs.knowledge[:, -1:])
        if self.scenario_codes is not None:
            codes.append(F.embedding(inputs.scenario, self.scenario_codes()))
        return torch.cat(codes, dim=1) / math.sqrt(codes[0].shape[1])


def _encoder(in_width: int, code_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, code_width), nn.LayerNorm(code_width))


def _standardised(vectors: Tensor) -> Tensor:
    """`[S, d]`: what distinguishes the scenarios, of mean square 1; a single scenario's vector is only scaled."""
    centred = vectors - vectors.mean(dim=0) if len(vectors) > 1 else vectors
    return centred / centred.square().mean().sqrt().clamp(min=torch.finfo(vectors.dtype).tiny)


def _with_codes(schema: FeatureSchema, config: Config) -> FeatureSchema:
    """The schema of a backbone that reads the codes as two more features; nothing looks them up."""
    names = ["user"] * config.user_level + ["scenario"] * config.scenario_level
    tables = tuple(Table(name=f"{GROUP} of the {name}", rows=1, width=config.code_width) for name in names)
    features = tuple(Feature(name=table.name, table=table.name, group=GROUP) for table in tables)
    return schema.model_copy(update={"tables": (*schema.tables, *tables), "features": (*schema.features, *features)})


@contextmanager
def _aside() -> Iterator[None]:
    """What is drawn within depends on torch's generator, and leaves it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, ())))
        yield
