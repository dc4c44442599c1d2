"""Defects of public multi-scenario code, and the tests that show that this code is free of them.

What spans models is here; `contract` is test_contract.py and stands for every model.

defect of public code                              | test here or there that would fail
---------------------------------------------------|-----------------------------------------------------------------
Scenario-Wise-Rec
1  M2M attends over the rows of the batch          | test_no_gradient_crosses_from_row_to_row,
                                                   | contract: a_prediction_depends_on_its_row_alone,
                                                   | test_m2m: no_row_attends_to_another_even_in_training
2  STAR: the main logit is never negative          | test_star: the_main_logit_has_either_sign
   STAR: no running statistics, so that            | contract: a_prediction_depends_on_its_row_alone,
   predictions depend on the rest of the batch     | test_layers: is_a_batch_norm_per_scenario
   STAR: biases start within 0 and 1               | test_biases_start_without_a_side
   STAR: weights start as a product of two draws   | test_star: every_scenario_starts_from_the_shared_network
3  PPNet: embeddings without gradient              | contract: everything_gets_a_gradient_but_...,
                                                   | test_ppnet: the_towers_start_from_the_embeddings_so_...
4  names of EPNet and PPNet swapped                | test_epnet, test_ppnet: ..._so_the_names_are_not_swapped
5  AdaSparse: pruned neurons at -1, no regulariser | test_adasparse: pruned_neurons_are_exactly_0_...,
                                                   | the_penalty_pulls_the_sparsity_towards_its_range
   AdaSparse: alpha grows in evaluation, not saved | contract: evaluation_changes_nothing,
                                                   | a_saved_model_predicts_and_trains_the_same
6  AdaptDHM: biases created but not applied        | contract: everything_gets_a_gradient_but_...
   AdaptDHM: centres lost when saved               | test_adaptdhm: centres_are_saved_not_lost_with_the_process
   AdaptDHM: fails for a batch of one row          | contract: hardly_any_rows
7  HAMUR: adapters start at rank 1                 | test_hamur: the_adapters_weights_are_not_of_rank_1_...
   HAMUR: hyper-network once per scenario          | test_hamur: the_hyper_network_runs_once_per_row_...
   HAMUR: batch statistics in evaluation           | contract: a_prediction_depends_on_its_row_alone
   M3oE: writes down which device it runs on       | test_no_model_names_a_device
8  towers normalised over all scenarios' rows      | test_rows_of_other_scenarios_change_nothing_in_training
9  SAR-Net: no attention, no fairness coefficient  | test_sarnet: follows_its_formula, weights_undo_...
10 models get unequal inputs, some no numerics     | test_every_column_of_the_input_reaches_every_model
   some get the scenario as one more feature       | test_the_head_gives_every_model_the_same
11 rows split at random though they have a time,   | data/prepare/test_prepare_table: time_split_...,
   vocabularies from test rows                     | vocabulary_and_statistics_come_from_training_rows_alone
12 no decay of the learning rate                   | test_optim: decay_falls_to_its_end,
                                                   | test_parallel: the_learning_rate_really_moves
   best weights kept only if patience runs out     | (nothing stops early here: the last weights count)
13 model names spelt differently per script        | test_a_kind_is_spelt_as_its_file_and_in_no_other_way
   scenarios in another order than documented      | test_metrics_of_more_than_ten_scenarios_keep_their_order
14 a scenario of one class breaks the metrics      | test_metrics_of_more_than_ten_scenarios_keep_their_order
   no user-grouped AUC, no calibration             | test_metrics: equals_sklearn_per_scenario_and_overall
15 every row through the towers of all scenarios   | test_a_row_costs_the_same_however_many_scenarios_there_are
TorchEasyRec
   scenarios in the order of their names as text,  | test_more_than_ten_scenarios_keep_their_parameters_apart,
   only the last scenario's predictions survive    | test_metrics_of_more_than_ten_scenarios_keep_their_order
"""

import re
from dataclasses import replace

import pytest
import torch
from backbones import FOLDER, KINDS, SCENARIOS, build, config, inputs, looked_up, mixed, pooled_groups, schema, train
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from msr_dist.config import kind_config
from msr_dist.metrics import ScenarioMetrics
from msr_dist.models.base import Backbone, Inputs
from msr_dist.recommender import Head

READ_ALL_SCENARIOS = {"hinet", "hmoe"}
"""Their mechanism reads the networks of all scenarios for each row; m3oe has a setting for it."""

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_no_gradient_crosses_from_row_to_row(kind):
    model, batch = train(build(kind, labels=2), mixed(30)), mixed(30)
    model.eval()(batch)[7].sum().backward()
    for name, x in batch.groups.items():
        assert x.grad.any(dim=1).tolist() == [i == 7 for i in range(30)], name


@every_kind
def test_rows_of_other_scenarios_change_nothing_in_training(kind):
    """A norm over all rows, as in towers that compute every row and mask afterwards, would let them."""
    if kind == "adaptdhm":
        pytest.skip("its paper routes a row by what all rows of the batch are like")
    batch = mixed(60)
    own = batch.scenario == 4
    assert own.sum() > 2
    groups = {name: torch.where(own[:, None], x, 3 * x + 1).detach() for name, x in batch.groups.items()}
    found, moved = (train(build(kind), mixed(60))(some)[own] for some in (batch, replace(batch, groups=groups)))
    torch.testing.assert_close(moved, found, atol=1e-6, rtol=0)


@every_kind
def test_biases_start_without_a_side(kind):
    for name, parameter in build(kind).named_parameters():
        if "bias" in name and parameter.numel() >= 8 and parameter.any():
            assert parameter.min() < 0 < parameter.max(), name


def test_no_model_names_a_device():
    for file in FOLDER.glob("*.py"):
        assert not re.search(r"""["'](cpu|cuda|mps)\b|\.cuda\(|\.cpu\(""", file.read_text()), file.name


@every_kind
def test_every_column_of_the_input_reaches_every_model(kind):
    """Numerics stand beside embeddings, so that a model that took the embeddings alone would lose them."""
    numerics = tuple(numeric.model_copy(update={"group": "item"}) for numeric in schema().numerics)
    together = schema().model_copy(update={"numerics": numerics})
    torch.manual_seed(0)
    model, batch = config(kind).build(together), mixed(60)
    groups = {
        "user": batch.groups["user"],
        "item": torch.cat([batch.groups["item"], batch.groups["context"]], dim=1).detach().requires_grad_(),
    }
    assert {name: x.shape[1] for name, x in groups.items()} == together.group_widths()
    model(replace(batch, groups=groups)).square().sum().backward()
    for name, x in groups.items():
        assert x.grad.any(dim=0).all(), name


def test_the_head_gives_every_model_the_same():
    """The scenario comes beside the groups alone: none of their columns changes with it."""
    seen = []

    class Listening(Backbone):
        def forward(self, given: Inputs) -> Tensor:
            seen.append(given)
            return torch.zeros(len(given.scenario), 1)

    batch, pooled = looked_up(torch.tensor([0, 3, 5]))
    for scenario in (batch.scenario, batch.scenario + 1):
        Head(schema(), Listening())(pooled, None, replace(batch, scenario=scenario))
    first, second = seen
    assert torch.equal(second.scenario, first.scenario + 1)
    for name, x in pooled_groups(batch, pooled).items():
        assert torch.equal(first.groups[name], x)
        assert torch.equal(second.groups[name], x)


@every_kind
def test_a_kind_is_spelt_as_its_file_and_in_no_other_way(kind):
    assert kind_config("msr_dist.models", kind).model_fields["kind"].default == kind
    for other in (kind.upper(), kind.title(), f"{kind}s", kind.replace("_", "") + "_"):
        with pytest.raises(ValueError, match=f"unknown kind {other!r}"):
            kind_config("msr_dist.models", other)


@every_kind
def test_a_row_costs_the_same_however_many_scenarios_there_are(kind):
    def of_twice_the_rows(scenarios: int) -> int:
        """Products that 130 further rows cost: what a model computes once per scenario cancels out."""
        model, counts = build(kind, scenarios=scenarios, other_scenarios=False), []
        for rows in (130, 260):
            with FlopCounterMode(display=False) as flops:
                model(inputs(torch.arange(rows) % SCENARIOS))
            counts.append(flops.get_total_flops())
        return counts[1] - counts[0]

    # Within 1%, for one number per scenario, such as that of SAR-Net's fairness coefficient, is no tower.
    growth = of_twice_the_rows(3 * SCENARIOS) / of_twice_the_rows(SCENARIOS)
    assert (growth < 1.01) == (kind not in READ_ALL_SCENARIOS)


@every_kind
@pytest.mark.parametrize("scenario", [2, 11])
def test_more_than_ten_scenarios_keep_their_parameters_apart(kind, scenario):
    """Ordered as text, scenario 11 would stand before scenario 2."""
    model, batch = build(kind, labels=2), inputs(torch.full((60,), scenario))
    train(model, mixed(60))
    model.zero_grad()
    model(batch).square().sum().backward()
    touched = {}
    for name, parameter in model.named_parameters():
        if name.startswith("backbones."):  # of `single`, which has a whole network for each scenario
            number = int(name.split(".")[1])
            touched[number] = touched.get(number, False) or bool(parameter.grad.any())
        elif len(parameter) == SCENARIOS:
            lines = parameter.grad.flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert set(lines) <= {scenario}, name
            touched |= dict.fromkeys(lines, True)
    assert [number for number, is_touched in touched.items() if is_touched] == [scenario]


def test_metrics_of_more_than_ten_scenarios_keep_their_order():
    """Each scenario has an AUC of its own; one has positives alone, another no rows at all."""
    generator = torch.Generator().manual_seed(0)
    scenario = torch.randint(SCENARIOS, (4000,), generator=generator)
    scenario = scenario[scenario != 12]
    rows = len(scenario)
    truth = torch.randint(2, (rows, 1), generator=generator).float()
    truth[scenario == 2] = 1.0
    logits = torch.randn(rows, 1, generator=generator) + truth * scenario[:, None] / 4
    metrics = ScenarioMetrics(schema())
    metrics.update(scenario, torch.arange(rows), logits, truth, torch.ones(rows, 1))
    report = metrics.compute()
    assert list(report.scenarios) == [f"scenario{s}" for s in range(SCENARIOS)]
    for s in range(SCENARIOS):
        found, own = report.scenarios[f"scenario{s}"]["label0"], scenario == s
        assert found.rows == own.sum()
        assert found.auc == (None if s in (2, 12) else pytest.approx(roc_auc_score(truth[own], logits[own])))
    assert report.scenarios["scenario2"]["label0"].log_loss > 0
