import json
import shutil
from threading import Event

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from msr_dist.checkpoint import STATE_FILE, Checkpoint, CheckpointConfig, Checkpoints, TrainState, newest
from msr_dist.distributed import open_world


@pytest.fixture
def world():
    with open_world() as opened:
        yield opened


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"model/weight": torch.full((3, 2), value), "optimizer/weight/exp_avg": torch.full((3, 2), value + 1)}


def save(folder, world, step: int, keep: int = 2):
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=keep), world)
    return checkpoints.save(tensors(step), TrainState(step=step, samples=10 * step))


def test_what_is_saved_is_restored_with_its_position(tmp_path, world):
    save(tmp_path, world, 7)
    found = Checkpoints(tmp_path, CheckpointConfig(), world).newest()
    assert found.state == TrainState(step=7, samples=70)
    target = tensors()
    found.restore(target)
    assert torch.equal(target["model/weight"], tensors(7)["model/weight"])
    assert torch.equal(target["optimizer/weight/exp_avg"], tensors(7)["optimizer/weight/exp_avg"])


def test_no_checkpoint_at_all(tmp_path, world):
    assert Checkpoints(tmp_path / "none", CheckpointConfig(), world).newest() is None


def test_only_the_newest_stay(tmp_path, world):
    for step in (5, 20, 100):
        save(tmp_path, world, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-0-step-000000020", "stage-0-step-000000100"]


def test_a_later_stage_is_newer_whatever_its_step(tmp_path, world):
    save(tmp_path, world, 50)
    Checkpoints(tmp_path, CheckpointConfig(), world).save(tensors(), TrainState(stage=1, step=2))
    assert newest(tmp_path).state == TrainState(stage=1, step=2)


def test_one_that_was_never_finished_does_not_count(tmp_path, world):
    done = save(tmp_path, world, 5)
    shutil.copytree(done, tmp_path / "stage-0-step-000000009.partial")
    assert newest(tmp_path).folder == done
    save(tmp_path, world, 9)  # takes the place of what the crash left
    assert newest(tmp_path).state.step == 9
    assert not list(tmp_path.glob("*.partial"))


def damage_state(folder):
    (folder / STATE_FILE).unlink()


def truncate_tensors(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])


def lose_metadata(folder):
    (folder / ".metadata").unlink()


@pytest.mark.parametrize("damage", [damage_state, truncate_tensors, lose_metadata])
def test_a_half_written_one_is_passed_over_and_named(tmp_path, world, caplog, damage):
    older = save(tmp_path, world, 5)
    damage(save(tmp_path, world, 9))
    assert newest(tmp_path).folder == older
    assert "stage-0-step-000000009" in caplog.text
    assert "going on from stage-0-step-000000005" in caplog.text


def test_a_damaged_newer_one_never_costs_a_good_one(tmp_path, world):
    save(tmp_path, world, 50, keep=1)
    damage_state(save(tmp_path, world, 100, keep=2))
    kept = save(tmp_path, world, 57, keep=1)
    assert newest(tmp_path).folder == kept
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_other_folders_are_left_alone(tmp_path, world):
    (tmp_path / "stage-0-step-50.bak").mkdir()
    saved = save(tmp_path, world, 5)
    assert newest(tmp_path).folder == saved
    assert (tmp_path / "stage-0-step-50.bak").exists()


@pytest.mark.parametrize("pattern", [".metadata", "*.distcp"])
def test_damage_that_no_size_shows_is_one_line(tmp_path, world, pattern):
    folder = save(tmp_path, world, 5)
    file = next(folder.glob(pattern))
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
    with pytest.raises(ValueError, match=r"stage-0-step-000000005 is damaged: .*; remove that folder"):
        newest(tmp_path).restore(tensors())


@pytest.mark.parametrize("damage", [damage_state, truncate_tensors, lose_metadata])
def test_when_none_is_complete_nothing_is_guessed(tmp_path, world, damage):
    damage(save(tmp_path, world, 5))
    with pytest.raises(ValueError, match=r"stage-0-step-000000005 is .*, and no older one is complete; remove .*"):
        Checkpoints(tmp_path, CheckpointConfig(), world).newest()


@pytest.mark.parametrize(
    ("here", "says"),
    [
        ({"model/weight": torch.zeros(4, 2)}, r"'model/weight' has shape \(3, 2\) there, \(4, 2\) here"),
        ({"model/weight": torch.zeros(3, 2), "model/bias": torch.zeros(1)}, "it has no 'model/bias'"),
        ({}, "this one has no 'model/weight'"),
    ],
)
def test_one_of_another_model_is_refused(tmp_path, world, here, says):
    found = Checkpoint.read(save(tmp_path, world, 1))
    with pytest.raises(ValueError, match=rf"is of another model: .*{says}"):
        found.restore(here)


def test_the_state_lists_the_files_with_their_sizes(tmp_path, world):
    folder = save(tmp_path, world, 1)
    record = json.loads((folder / STATE_FILE).read_text())
    assert record["files"] == {file.name: file.stat().st_size for file in folder.iterdir() if file.name != STATE_FILE}
    assert set(FileSystemReader(folder).read_metadata().state_dict_metadata) == set(tensors())


@pytest.fixture
def behind(tmp_path, world):
    """Checkpoints in the background, whose writing does not begin before the event."""
    begin = Event()
    with Checkpoints(tmp_path / "runs", CheckpointConfig(background=True), world) as checkpoints:
        checkpoints._thread.submit(begin.wait)
        yield checkpoints, begin
        begin.set()


def test_in_the_background_the_moment_of_the_call_is_written(tmp_path, behind):
    checkpoints, begin = behind
    changing = tensors(1)
    checkpoints.save(changing, TrainState(step=1))
    for tensor in changing.values():
        tensor.zero_()
    assert checkpoints.newest() is None
    begin.set()
    for step in (2, 3):
        changing["model/weight"].fill_(step)
        # The one before is complete then.
        checkpoints.save(changing, TrainState(step=step))
        assert len(list((tmp_path / "runs").glob("stage-*[0-9]"))) == step - 1
    checkpoints.finish()
    last, before = (Checkpoint.read(tmp_path / "runs" / f"stage-0-step-{step:09d}") for step in (3, 2))
    for found, expected in ((last, 3), (before, 2)):
        target = tensors(9)
        found.restore(target)
        assert target["model/weight"].unique().item() == expected
        assert target["optimizer/weight/exp_avg"].unique().item() == 0


def test_what_fails_in_the_background_is_told(tmp_path, behind):
    checkpoints, begin = behind
    (tmp_path / "runs").write_text("a file where a folder must be")
    checkpoints.save(tensors(1), TrainState(step=1))
    begin.set()
    with pytest.raises(NotADirectoryError):
        checkpoints.save(tensors(2), TrainState(step=2))
    checkpoints.finish()


def test_the_context_waits_for_what_is_being_written(tmp_path, world):
    with Checkpoints(tmp_path, CheckpointConfig(background=True), world) as checkpoints:
        checkpoints.save(tensors(1), TrainState(step=1))
    assert newest(tmp_path).state.step == 1


@pytest.mark.parametrize(
    ("background", "device", "expected"),
    [(None, "cuda", True), (None, "cpu", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_where_it_is_written_in_the_background(background, device, expected):
    assert CheckpointConfig(background=background).in_background(device) is expected


def test_without_room_for_a_copy_training_waits(tmp_path, world, caplog, monkeypatch):
    monkeypatch.setattr("msr_dist.checkpoint.free_memory", lambda: 10)
    with Checkpoints(tmp_path, CheckpointConfig(background=True), world) as checkpoints:
        checkpoints.save(tensors(1), TrainState(step=1))
        assert newest(tmp_path).state.step == 1
    assert "rank 0: no room for a copy of 0.0 GiB in main memory" in caplog.text
