"""PEPNet: gated embeddings below gated towers.

Chang et al., 2023, "PEPNet: parameter and embedding personalized network for infusing with personalized prior
information":

    e'      = GateNU([p_s ; stopgrad(e)]) * e                  EPNet: see `epnet`
    d^l     = GateNU^l([o ; stopgrad(e')])                     PPNet: see `ppnet`
    h_t^l   = d_t^l * relu(h_t^(l-1) W_t^l + b_t^l)            h_t^0 = e', l = 1 .. L
    logit_t = h_t^L w_t + c_t                                  t a label; the scenarios share the towers

Shapes: e, e' `[B, D]` joined groups; p_s `[B, P]` embedding of the scenario; o `[B, O]` the priors, as they are before
EPNet scales them; d^l, h^l `[B, T, width of layer l]`; logits `[B, T]`.

What the paper leaves open, and the deviations, are those of `epnet` and `ppnet`, but one: the scenario comes in by
EPNet alone, as in the paper, and the towers' gates know it by e'.
"""

from typing import Literal, final

from torch import Tensor

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.epnet import EmbeddingGate
from msr_dist.models.ppnet import GatedTowers, Priors
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of PEPNet."""

    kind: Literal["pepnet"] = "pepnet"
    widths: Widths = (128, 64)
    """Units of each hidden layer of a label's tower."""
    gate_width: Width = 64
    """Hidden units of every gate."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, which the embeddings' gate reads."""
    priors: tuple[str, ...] = ()
    """Features whose embeddings the towers' gates read and train; without any, the schema's user and item."""
    scenario_towers: tuple[Width, ...] = ()
    """Units of each hidden layer of a tower per scenario and label, without gates, on top of the gated ones."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in the towers."""

    def build(self, schema: FeatureSchema) -> "Pepnet":
        """The network for this schema."""
        return Pepnet(self, schema)


@final
class Pepnet(Backbone):
    """EPNet below PPNet."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.priors = Priors(schema, config.priors)
        self.embedding_gate = EmbeddingGate(schema, config.scenario_width, config.gate_width)
        self.towers = GatedTowers(
            schema,
            self.embedding_gate.out_width,
            config.widths,
            self.priors.width,
            config.gate_width,
            config.scenario_towers,
            config.dropout,
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        logits: Tensor = self.towers(self.embedding_gate(inputs), self.priors.of(inputs), inputs)
        return logits
