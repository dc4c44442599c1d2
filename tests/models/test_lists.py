"""What the contract says, for every model and with a list that attention reads: through the head, as in a run."""

import io

import pytest
import torch
from backbones import KINDS, config, known, listed_schema
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from msr_dist.batch import ScenarioBatch
from msr_dist.models.base import of_whole_batch
from msr_dist.recommender import Head

pytestmark = pytest.mark.parametrize("kind", KINDS)

ROWS = 24
LENGTHS = torch.tensor([3, 0, 1, 5, 2, 1]).repeat(4)
"""Some lists are empty."""


def build(kind: str, seed: int = 0, dense_rows: int | None = None) -> Head:
    torch.manual_seed(seed)
    backbone = config(kind, dropout=0.3).build(listed_schema())
    return Head(listed_schema(), backbone, attention_widths=(6,), dense_rows=dense_rows)


def looked_up() -> dict[str, torch.Tensor]:
    """Vectors of users and items, and of the lists one after the other."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"user": (ROWS, 8), "item": (ROWS, 12), "clicks": (int(LENGTHS.sum()), 12), "numeric": (ROWS, 2)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def predict(
    head: Head, vectors: dict[str, torch.Tensor], rows: list[int], padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and logits of some rows, as a batch of their own, whose last rows may only fill it up."""
    real = torch.arange(len(rows)) < len(rows) - padding
    lengths = LENGTHS[rows]
    clicks = torch.cat([vectors["clicks"].split(LENGTHS.tolist())[row] for row in rows])
    ones = torch.ones(len(rows), dtype=torch.int64)
    batch = ScenarioBatch(
        ids=KeyedJaggedTensor(["user"], torch.arange(ROWS)[rows] // 2, lengths=ones),
        numeric=vectors["numeric"][rows],
        scenario=torch.arange(ROWS)[rows] % 7,
        labels=(torch.arange(ROWS)[rows, None] % 3 == 0).float(),
        weights=real[:, None].float(),
        row=torch.arange(ROWS)[rows].where(real, -1),
        rows_per_rank=float(len(rows)),
    )
    lists = {"item": JaggedTensor(vectors["item"][rows], lengths=ones), "clicks": JaggedTensor(clicks, lengths=lengths)}
    loss, predictions = head(KeyedTensor(["user"], [8], vectors["user"][rows]), lists, batch, known(batch))
    return loss, predictions.logits


ALL = list(range(ROWS))


def test_a_prediction_depends_on_its_row_alone(kind):
    head, vectors = build(kind).eval(), looked_up()
    together = predict(head, vectors, ALL)[1]
    alone = torch.cat([predict(head, vectors, [row])[1] for row in ALL])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)


def test_every_list_matters_and_learns(kind):
    head, vectors = build(kind), looked_up()
    for x in vectors.values():
        x.requires_grad_()
    predict(head, vectors, ALL)[0].backward()
    for name, x in vectors.items():
        assert x.grad.any(dim=1).all(), name
    for name, parameter in head.attention.named_parameters():
        assert parameter.grad.any(), name


def test_a_saved_head_predicts_the_same(kind):
    head, vectors, saved = build(kind), looked_up(), io.BytesIO()
    predict(head, vectors, ALL)
    torch.save(head.state_dict(), saved)
    saved.seek(0)
    restored = build(kind, seed=5)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(predict(restored.eval(), vectors, ALL)[1], predict(head.eval(), vectors, ALL)[1])


def trained(kind: str, dense_rows: int | None) -> dict[str, torch.Tensor]:
    """All that a training step of the dense part leaves, with 5 rows of padding."""
    head, vectors = build(kind, dense_rows=dense_rows), looked_up()
    for x in vectors.values():
        x.requires_grad_()
    loss, logits = predict(head, vectors, ALL, padding=5)
    loss.backward()
    gradients = {name: x.grad for name, x in (*vectors.items(), *head.named_parameters())}
    return {"loss": loss.detach(), "logits": logits, **gradients, **dict(head.named_buffers())}


def test_computed_in_parts_it_is_the_same_or_says_that_it_needs_the_whole_batch(kind):
    whole, parts = trained(kind, None), trained(kind, 7)
    assert list(parts) == list(whole)
    assert parts["logits"].shape == whole["logits"].shape
    same = all(torch.allclose(parts[name], x, rtol=1e-5, atol=1e-7) for name, x in whole.items())
    assert same == (not of_whole_batch(build(kind)))
    assert all(map(torch.equal, trained(kind, ROWS).values(), whole.values()))
