import pytest
import torch
from backbones import SCENARIOS, build, config, mixed, schema, take


@pytest.mark.parametrize("kind", ["mlp", "star", "adaptdhm", "hinet"])
def test_each_scenario_has_a_model_to_itself(kind):
    model, batch = build("single", labels=2, backbone=config(kind)), mixed(60)
    logits = model(batch)
    for scenario in (0, 7, SCENARIOS - 1):
        rows = (batch.scenario == scenario).nonzero().squeeze(1)
        alone = config(kind).build(schema(labels=2, scenarios=1))
        alone.load_state_dict(build("single", labels=2, backbone=config(kind)).backbones[scenario].state_dict())
        own = take(batch, rows)
        own.scenario.zero_()
        torch.testing.assert_close(logits[rows], alone(own))


def test_every_table_gets_vectors_for_each_scenario():
    plain = schema()
    own = config("single").adapt(plain)
    assert all(table.per_scenario and own.copies(table) == SCENARIOS for table in own.tables)
    assert [plain.copies(table) for table in plain.tables] == [1, 1]


def test_a_backbone_with_an_objective_of_its_own_keeps_it():
    model, batch = build("single", backbone=config("adasparse")), mixed(60)
    penalty = model.objective(batch).penalty
    assert penalty is not None
    rows = (batch.scenario == 4).nonzero().squeeze(1)
    own = take(batch, rows)
    own.scenario.zero_()
    expected = model.backbones[4].objective(own).penalty
    torch.testing.assert_close(penalty[rows], expected)
