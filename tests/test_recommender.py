from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

import canonical
from msr_dist.batch import ScenarioBatch
from msr_dist.models.base import Backbone, Inputs
from msr_dist.recommender import (
    EmbeddingsConfig,
    FeatureOverride,
    Head,
    Recommender,
    TableOverride,
    module_name,
)
from msr_dist.schema import FeatureSchema, Knowledge


class Remembering(Backbone):
    """Logits of zero; keeps what it was given."""

    def forward(self, inputs: Inputs) -> Tensor:
        self.seen = inputs
        return torch.zeros(len(inputs.scenario), 2, requires_grad=True)


def batch(users: tuple[int, int] = (1, 2)) -> ScenarioBatch:
    return ScenarioBatch(
        ids=KeyedJaggedTensor(
            keys=["user", "item", "history", "tags"],
            values=torch.tensor([*users, 3, 4, 5, 6, 7, 8, 9]),
            lengths=torch.tensor([1, 1, 1, 1, 3, 0, 1, 1]),
        ),
        numeric=torch.tensor([[0.5], [-0.5]]),
        scenario=torch.tensor([0, 2]),
        labels=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        weights=torch.tensor([[1.0, 0.0], [1.0, 3.0]]),
        row=torch.tensor([10, 11]),
        rows_per_rank=2.0,
    )


def embedded(keys: list[str]) -> KeyedTensor:
    """Each feature's columns hold a number of its own."""
    widths = {"user": 8, "item": 8, "history": 8, "tags": 4}
    number = {"user": 1.0, "item": 2.0, "history": 6.0, "tags": 4.0}
    return KeyedTensor(
        keys=keys,
        length_per_key=[widths[key] for key in keys],
        values=torch.cat([torch.full((2, widths[key]), number[key]) for key in keys], dim=1),
    )


@pytest.mark.parametrize("keys", [["user", "item", "history", "tags"], ["tags", "history", "item", "user"]])
def test_columns_are_found_by_name_whatever_the_plan_made_of_their_order(keys):
    backbone = Remembering()
    Head(canonical.schema(), backbone)(embedded(keys), None, batch())
    groups = backbone.seen.groups
    assert list(groups) == ["user", "item"]
    assert groups["user"][0].tolist() == [1.0] * 8 + [2.0] * 8  # mean over a history of three
    assert groups["user"][1].tolist() == [1.0] * 8 + [6.0] * 8  # an empty one divides by nothing
    assert groups["item"][0].tolist() == [2.0] * 8 + [4.0] * 4 + [0.5]
    assert {name: tensor.size(1) for name, tensor in groups.items()} == canonical.schema().group_widths()


def side_by_side() -> FeatureSchema:
    """Features that reach the model as they come out of tables."""
    schema = canonical.schema()
    features = [feature for feature in schema.features if feature.pooling is None]
    return schema.model_copy(update={"features": tuple(features), "numerics": ()})


def test_vectors_that_are_looked_up_in_the_model_s_order_are_not_copied():
    backbone, pooled = Remembering(), embedded(["user", "item"])
    Head(side_by_side(), backbone)(pooled, None, batch())
    assert backbone.seen.joined().data_ptr() == pooled.values().data_ptr()
    Head(side_by_side(), backbone)(embedded(["item", "user"]), None, batch())
    assert torch.equal(backbone.seen.joined(), pooled.values())
    assert torch.equal(backbone.seen.groups["item"], torch.full((2, 8), 2.0))


def test_tables_stand_in_the_order_in_which_the_model_sees_them():
    schema = side_by_side()
    turned = schema.model_copy(update={"tables": schema.tables[::-1]})
    bags = Recommender(turned, Remembering(), EmbeddingsConfig()).embeddings.embedding_bag_configs()
    assert [bag.name for bag in bags] == ["users", "items_"]


def test_the_loss_weighs_labels_and_divides_by_all_rows():
    pooled = embedded(["user", "item", "history", "tags"])
    loss, predictions = Head(canonical.schema(), Remembering())(pooled, None, batch())
    assert loss.item() == pytest.approx(5 * torch.tensor(2.0).log().item() / 2)
    assert not predictions.logits.requires_grad


def test_tables_named_like_methods_of_a_module():
    assert module_name("users") == "users"
    assert module_name("items") == "items_"
    assert module_name("user.id") == "user__id"
    names = {config.name for config in _model().embeddings.embedding_bag_configs()}
    assert names == {"users", "items_", "tags"}


def _model() -> Recommender:
    return Recommender(canonical.schema(), Remembering(), EmbeddingsConfig())


def test_a_table_that_no_feature_uses_is_not_built():
    schema = canonical.schema()
    schema = schema.model_copy(update={"features": schema.features[:3]})
    names = {
        config.name
        for config in Recommender(schema, Remembering(), EmbeddingsConfig()).embeddings.embedding_bag_configs()
    }
    assert names == {"users", "items_"}


def test_widths_and_precisions_of_a_run():
    config = EmbeddingsConfig(width=12, tables={"items": TableOverride(precision="fp16")})
    schema = config.apply(canonical.schema())
    assert [(table.width, table.precision) for table in schema.tables] == [(12, "fp32"), (12, "fp16"), (12, "fp32")]
    with pytest.raises(ValueError, match="no table 'itemz' in the data; it has users, items, tags"):
        EmbeddingsConfig(tables={"itemz": TableOverride(width=8)}).apply(canonical.schema())


def attending(pooling: str = "attention") -> EmbeddingsConfig:
    return EmbeddingsConfig(features={"history": FeatureOverride(pooling=pooling)})


def test_a_history_that_attention_reads():
    schema = attending().apply(canonical.schema())
    backbone = Remembering()
    head = Head(schema, backbone)
    vectors = torch.randn(5, 8)
    lists = {
        "item": JaggedTensor(vectors[:2], lengths=torch.tensor([1, 1])),
        "history": JaggedTensor(vectors[2:], lengths=torch.tensor([3, 0])),
    }
    head(embedded(["user", "tags"]), lists, batch())
    seen = backbone.seen.behaviours["history"]
    assert torch.equal(seen.vectors[0], vectors[2:])
    assert seen.present.tolist() == [[True] * 3, [False] * 3]
    assert torch.equal(seen.target, vectors[:2])
    pooled = head.attention["history"](seen, batch().row)
    assert torch.equal(backbone.seen.groups["user"][:, 8:], pooled)
    assert pooled[0].abs().min() > 0
    assert not pooled[1].any()
    assert torch.equal(backbone.seen.groups["item"][:, :8], vectors[:2])


def test_tables_of_lists_that_attention_reads_stand_apart():
    model = Recommender(attending().apply(canonical.schema()), Remembering(), attending())
    assert {table.name for table in model.embeddings.embedding_bag_configs()} == {"users", "tags"}
    assert {table.name for table in model.sequences.embedding_configs()} == {"items_"}
    assert _model().sequences is None


def test_poolings_that_cannot_be():
    with pytest.raises(ValueError, match=r"embeddings\.features: no list 'histroy' in the data; it has history, tags"):
        EmbeddingsConfig(features={"histroy": FeatureOverride(pooling="sum")}).apply(canonical.schema())
    tags = EmbeddingsConfig(features={"tags": FeatureOverride(pooling="attention")})
    with pytest.raises(ValueError, match=r"features\.tags: pooling 'attention' needs a single-valued feature of table"):
        tags.apply(canonical.schema())


def test_vectors_for_each_scenario():
    config = EmbeddingsConfig(tables={"users": TableOverride(per_scenario=True)})
    schema = config.apply(canonical.schema())
    model = Recommender(schema, Remembering(), config)
    rows = {table.name: table.num_embeddings for table in model.embeddings.embedding_bag_configs()}
    assert rows == {"users": 3 * canonical.USERS, "items_": canonical.ITEMS, "tags": canonical.TAGS}
    assert model.reserved_rows(schema) == {"users": 3 * canonical.USERS, "items_": 1, "tags": 1}


def informed(vectors: str = "knowledge", per_scenario: bool = False) -> FeatureSchema:
    knowledge = Knowledge(folder=Path("store"), width=4, scenarios=((0.0,),) * 3, vectors=vectors)
    users = canonical.schema().table("users").model_copy(update={"per_scenario": per_scenario})
    return canonical.schema().with_tables({"users": users}).model_copy(update={"knowledge": knowledge})


@pytest.mark.parametrize("per_scenario", [False, True])
def test_what_is_known_of_a_user_reaches_the_backbone_and_no_gradient_comes_back(per_scenario):
    backbone = Remembering()
    rows = torch.tensor([[1.0, 2, 3, 4, 1, 0, 0, 0], [0.0] * 8], requires_grad=True)
    known = KeyedTensor(keys=["user"], length_per_key=[8], values=rows)
    pooled = embedded(["user", "item", "history", "tags"])
    Head(informed(per_scenario=per_scenario), backbone)(pooled, None, batch(), known)
    assert backbone.seen.knowledge.tolist() == [[1, 2, 3, 4, 1], [0] * 5]
    assert not backbone.seen.knowledge.requires_grad
    assert backbone.seen.user.tolist() == ([0, 0] if per_scenario else [1, 2])
    Head(canonical.schema(), backbone)(pooled, None, batch())
    assert backbone.seen.knowledge is backbone.seen.user is None


def test_a_trained_embedding_in_the_place_of_what_is_known():
    backbone = Remembering()
    rows = torch.tensor([[1.0, 2, 3, 4], [0.0] * 4], requires_grad=True)
    known = KeyedTensor(keys=["user"], length_per_key=[4], values=rows)
    Head(informed("trained"), backbone)(embedded(["user", "item", "history", "tags"]), None, batch(), known)
    assert backbone.seen.knowledge.tolist() == [[1, 2, 3, 4, 1], [0, 0, 0, 0, 1]]
    assert backbone.seen.knowledge.requires_grad
    Head(informed("trained"), backbone)(embedded(["user", "item", "history", "tags"]), None, batch((0, 2)), known)
    assert backbone.seen.knowledge[:, -1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("vectors", "width", "precision"),
    [("knowledge", 8, DataType.FP16), ("random", 8, DataType.FP16), ("trained", 4, DataType.FP32)],
)
def test_the_table_of_what_is_known_has_the_rows_of_the_users(vectors, width, precision):
    for per_scenario, rows in ((False, canonical.USERS), (True, 3 * canonical.USERS)):
        schema = informed(vectors, per_scenario)
        model = Recommender(schema, Remembering(), EmbeddingsConfig())
        (table,) = model.knowledge.embedding_bag_configs()
        assert (table.name, table.num_embeddings, table.feature_names) == ("knowledge", rows, ["user"])
        assert (table.embedding_dim, table.data_type) == (width, precision)
        # Uniform numbers between these have variance 1, as whitened vectors have.
        assert table.weight_init_max == -table.weight_init_min == pytest.approx(3**0.5)
        assert model.reserved_rows(schema)["knowledge"] == (rows if per_scenario else 1)
    assert _model().knowledge is None


def test_scenarios_whose_rows_nobody_counted_stand_in_as_equals():
    class OfScenario(Backbone):
        def forward(self, inputs: Inputs) -> Tensor:
            return torch.tensor([9.0, 1.0, -1.0])[inputs.scenario][:, None].expand(-1, 2)

    first, *others = canonical.schema().scenarios
    scenarios = (first.model_copy(update={"rows": 0}), *others)
    head = Head(canonical.schema().model_copy(update={"scenarios": scenarios}), OfScenario()).eval()
    logits = head(embedded(["user", "item", "history", "tags"]), None, batch())[1].logits
    torch.testing.assert_close(logits, torch.tensor([[0.0, 0.0], [-1.0, -1.0]]))


@pytest.mark.parametrize("logit", [0.0, -30.0, 30.0, 200.0, -200.0])
def test_a_stand_in_that_is_sure_is_still_a_number(logit):
    class Sure(Backbone):
        def forward(self, inputs: Inputs) -> Tensor:
            return torch.full((len(inputs.scenario), 2), logit)

    rows = (0, 333, 667)
    scenarios = [s.model_copy(update={"rows": n}) for s, n in zip(canonical.schema().scenarios, rows, strict=True)]
    schema = canonical.schema().model_copy(update={"scenarios": tuple(scenarios)})
    head = Head(schema, Sure()).eval()
    logits = head(embedded(["user", "item", "history", "tags"]), None, batch())[1].logits
    torch.testing.assert_close(logits, torch.full((2, 2), logit))
