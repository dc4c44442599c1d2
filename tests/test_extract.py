import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import encoding
import texts
import tinymodel
from msr_dist.config import dump, parse
from msr_dist.extract import KILLED, CompressConfig, ExtractConfig, Extractor, Shard, show_prompts
from msr_dist.extract import extract as extract_all
from msr_dist.launch import LaunchError
from msr_dist.llm.encode import EncoderConfig
from msr_dist.llm.history import HistoryConfig
from msr_dist.llm.prompts import PromptConfig, Templates
from msr_dist.llm.vectors import open_store, open_table
from msr_dist.schema import FeatureSchema

USERS = 38
"""With events; two of the data's forty have none."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tinymodel.llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return texts.write(tmp_path_factory.mktemp("prepared") / "data")


extract = partial(extract_all, encoder=encoding.Plain)


def config(data: Path, model: Path, out: Path, **changes) -> ExtractConfig:
    """Ten shards; prompts of some 600 tokens, each of which is a byte."""
    given = {
        "data": data,
        "out": out,
        "model": EncoderConfig(name=str(model), dtype="fp32", device="cpu", max_tokens=2000),
        "history": HistoryConfig(per_scenario=3),
        "prompts": PromptConfig(user_tokens=2000),
        "users_per_shard": 4,
        "compress": CompressConfig(width=4),
    }
    return ExtractConfig(**(given | changes))


def contents(store: Path) -> dict[str, bytes]:
    """All that a store is read for."""
    files = [*store.rglob("*.parquet"), *store.rglob("*.json")]
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


def identity(file: Path) -> tuple[int, int]:
    """Another one where the file has been written again."""
    return file.stat().st_ino, file.stat().st_mtime_ns


def vectors(store: Path) -> dict[int, np.ndarray]:
    return {row: vector for rows, found in open_store(store).batches() for row, vector in zip(rows, found, strict=True)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data, model):
    """A store that one worker made in this process."""
    out = tmp_path_factory.mktemp("stores") / "undisturbed"
    extract(config(data, model, out))
    return out


def test_what_an_extraction_makes_and_says(tmp_path, data, model):
    summary = extract_all(config(data, model, tmp_path / "store"))
    store = open_store(tmp_path / "store")
    store.verify()
    assert (store.manifest.users, store.manifest.failed, len(store.manifest.shards)) == (USERS, 0, 10)
    assert store.manifest.model["name"] == str(model)
    assert store.scenario_names() == ["home", "search", "tonight"]
    assert store.scenario_vectors().shape == (3, 16)
    assert open_table(store, 4).rows == 39
    lines = dict(zip(*(map(str, column.cells) for column in summary.table().columns), strict=True))
    assert lines["users with a vector"] == "38"
    assert lines["default vector"] == "2 without events"
    assert lines["this time"] == "0 users kept, 38 encoded"
    assert re.match(r"users/s [\d.]+, tokens/s [\d,]+, MFU [\d.]+%$", lines["speed"])
    assert "width 4 keeps " in lines["for training"]
    assert summary.done.tokens > 38 * 300
    assert not {"previous", "model"} & {file.name for file in (tmp_path / "store").iterdir()}


def test_the_same_again_does_nothing_again(tmp_path, data, model):
    asked = config(data, model, tmp_path / "store")
    extract(asked)
    before, files = contents(asked.out), {file: identity(file) for file in asked.out.glob("users/*")}
    again = extract(asked, encoder=partial(encoding.Counting, tmp_path))
    assert again.done.users == 0
    assert encoding.encoded(tmp_path) == [3]  # the scenarios, which tell what the model is
    assert contents(asked.out) == before
    assert {file: identity(file) for file in asked.out.glob("users/*")} == files


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_two_workers_one_of_which_is_killed_make_the_same_files(tmp_path, request, data, model, undisturbed, launcher):
    if launcher == "ray":
        request.getfixturevalue("ray_cluster")
    summary = extract(
        config(data, model, tmp_path / "store"), launcher, 2, encoder=partial(encoding.DiesOnce, tmp_path)
    )
    killed = int((tmp_path / "died").read_text())
    assert killed != os.getpid()
    assert not psutil.pid_exists(killed)
    assert summary.done.users == USERS
    assert contents(tmp_path / "store") == contents(undisturbed)


DRIVER = """
import sys
from functools import partial
from pathlib import Path
import encoding
from msr_dist.config import load
from msr_dist.extract import ExtractConfig, extract
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    extract(load(ExtractConfig, folder / "extract.toml"), "local", 2, encoder=partial(encoding.Slow, folder))
"""


def test_a_driver_that_is_killed_repeats_no_finished_shard(tmp_path, data, model, undisturbed):
    asked = config(data, model, tmp_path / "store")
    (tmp_path / "extract.toml").write_text(dump(asked))
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    words = [sys.executable, tmp_path / "driver.py", tmp_path]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as driver:
        begun = time.monotonic()
        while len(list(asked.out.glob("users/part-?????.parquet"))) < 3:
            assert driver.poll() is None, driver.stderr.read()
            assert time.monotonic() - begun < 120
            time.sleep(0.01)
        with pytest.raises(ValueError, match="is being written by another process"):
            extract(asked)
        workers = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(workers, timeout=20)[1]
    files = {file: identity(file) for file in asked.out.glob("*/part-?????.parquet")}
    shards = len([file for file in files if file.parent.name == "users"])
    assert 3 <= shards < 10
    assert not (asked.out / "manifest.json").exists()

    (tmp_path / "encoded").unlink()
    summary = extract(asked, encoder=partial(encoding.Counting, tmp_path))
    assert summary.done.users == USERS - 4 * shards
    assert sum(encoding.encoded(tmp_path)[1:]) == USERS - 4 * shards
    done = [file for file in files if (asked.out / "users" / file.name) in files]
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in done} == {
        file: files[file] for file in done
    }
    assert contents(asked.out) == contents(undisturbed)


@pytest.fixture
def marked(tmp_path, data):
    """The data with users that say what they are: their rows stand in their prompts."""
    copied = shutil.copytree(data, tmp_path / "marked")
    file = copied / "users.parquet"
    users = pq.read_table(file)
    names = pa.array([f"<{row}>" for row in users["row"].to_pylist()])
    pq.write_table(users.append_column("name_text", names), file)
    return copied


def marking(data: Path, model: Path, out: Path, **changes) -> ExtractConfig:
    return config(data, model, out, history=HistoryConfig(per_scenario=3, user_text=("name_text",)), **changes)


def failures(store: Path) -> dict[int, str]:
    found = open_store(store).failures()
    return dict(zip(found["row"].to_pylist(), found["reason"].to_pylist(), strict=True))


def test_a_user_whose_prompt_kills_its_worker_is_found(tmp_path, marked, model):
    asked = marking(marked, model, tmp_path / "store", users_per_shard=2)
    summary = extract(marking(marked, model, tmp_path / "whole", users_per_shard=2))
    assert summary.manifest.failed == 0
    summary = extract(asked, "local", 2, retries=0, encoder=partial(encoding.DiesOf, tmp_path, "<38>"))
    assert failures(asked.out) == {38: KILLED}
    assert summary.reasons == {KILLED: 1}
    there, fresh = vectors(asked.out), vectors(tmp_path / "whole")
    assert there.keys() == fresh.keys() - {38}
    for row, vector in there.items():
        # Batches of other shapes round differently.
        np.testing.assert_allclose(vector, fresh[row], atol=2e-3)
    # It may go well on another machine.
    summary = extract(asked, retry_failed=True)
    assert summary.done.users == 2
    assert contents(asked.out) == contents(tmp_path / "whole")
    assert extract(asked, retry_failed=True).done.users == 0


def test_several_such_users_are_found_by_halves(tmp_path, marked, model):
    asked = marking(marked, model, tmp_path / "store", users_per_shard=20)
    extract(asked, retries=1, encoder=partial(encoding.FailsAt, tmp_path, "3>"))
    assert failures(asked.out) == dict.fromkeys((3, 13, 23, 33), KILLED)
    # Once more leaves them where they are.
    (tmp_path / "encoded").unlink()
    extract(asked, encoder=partial(encoding.FailsAt, tmp_path, "3>"))
    assert encoding.encoded(tmp_path) == [3]


@pytest.mark.parametrize("accident", [(encoding.FailsAtMany,), (encoding.FailsAt, "; ")])
def test_workers_that_die_of_everything_end_the_extraction(tmp_path, data, model, accident):
    encoder, *word = accident
    with pytest.raises(LaunchError, match=r"^shard 0 was lost with its workers, at last so: .*; no single users"):
        extract(
            config(data, model, tmp_path / "store", users_per_shard=38),
            retries=0,
            encoder=partial(encoder, tmp_path, *word),
        )
    assert not (tmp_path / "store/manifest.json").exists()


def test_prompts_that_fail_are_listed_and_counted(tmp_path, data, model):
    asked = config(data, model, tmp_path / "store", prompts=PromptConfig(user_tokens=512))
    summary = extract(asked)
    manifest = open_store(asked.out).manifest
    assert 3 < manifest.failed < USERS
    assert manifest.users + manifest.failed == USERS
    found = failures(asked.out)
    assert len(found) == manifest.failed
    assert all(re.match(r"\d+ tokens with one event alone, but", reason) for reason in found.values())
    # As one reason, whatever the numbers.
    assert list(summary.reasons.values()) == [manifest.failed]
    assert not vectors(asked.out).keys() & found.keys()


def more_rows(data: Path, folder: Path, users: tuple[int, ...]) -> Path:
    """The data prepared anew, when `users` have chosen something more."""
    copied = shutil.copytree(data, folder)
    train = pq.read_table(data / "train")
    newest = max(train["time"].to_pylist())
    added = train.slice(0, len(users)).to_pydict()
    added |= {"user": list(users), "item": [7] * len(users), "like": [1] * len(users)}
    added["time"] = [newest + 100 + place for place in range(len(users))]
    pq.write_table(pa.table(added, schema=train.schema), copied / "train/part-99999.parquet")
    return copied


@pytest.fixture
def grown(tmp_path, data, model):
    """An extraction of data that have grown since."""
    before = config(data, model, tmp_path / "store")
    extract(before)
    (tmp_path / "data").symlink_to(data)
    now = config(tmp_path / "data", model, tmp_path / "store")
    # As if it had been made of what then stood in the same folder.
    (now.out / "config.toml").write_text(dump(now.absolute()))
    (tmp_path / "data").unlink()
    more_rows(data, tmp_path / "data", (3, 20))
    return now


def expect_as_fresh(store: Path, fresh: Path) -> None:
    there, wanted = vectors(store), vectors(fresh)
    assert there.keys() == wanted.keys()
    for row, vector in there.items():
        # In other batches than those of the fresh store; fp16 then rounds the last bit of fp32 to its own.
        np.testing.assert_allclose(vector, wanted[row], rtol=1e-3, atol=1e-5)
    updated, made = open_store(store), open_store(fresh)
    np.testing.assert_allclose(updated.scenario_vectors(), made.scenario_vectors(), atol=1e-2)
    assert updated.manifest.cutoff == made.manifest.cutoff
    assert updated.manifest.stamp == made.manifest.stamp
    updated.verify()


def test_only_changed_prompts_are_encoded_again(tmp_path, grown, model):
    old = vectors(grown.out)
    summary = extract(grown, encoder=partial(encoding.Counting, tmp_path))
    assert (summary.done.users, summary.done.kept) == (USERS, USERS - 2)
    assert sum(encoding.encoded(tmp_path)) == 3 + 2
    assert not (grown.out / "previous").exists()
    extract(config(grown.data, model, tmp_path / "fresh"))
    expect_as_fresh(grown.out, tmp_path / "fresh")
    new = vectors(grown.out)
    assert [row for row in old if not np.array_equal(old[row], new[row])] == [3, 20]
    assert open_table(open_store(grown.out), 4).rows == 39


def test_an_update_that_is_broken_off_loses_no_vector(tmp_path, grown, model):
    with pytest.raises(KeyboardInterrupt):
        extract(grown, encoder=partial(encoding.Interrupted, tmp_path))
    assert (grown.out / "previous").exists()
    assert not (grown.out / "manifest.json").exists()
    begun = sum(encoding.encoded(tmp_path))
    summary = extract(grown, encoder=partial(encoding.Counting, tmp_path))
    assert summary.done.users < USERS
    # The scenarios twice; at the most what was under way when it broke off is encoded twice.
    assert sum(encoding.encoded(tmp_path)) <= 3 + 3 + 2 + 1
    assert begun >= 3
    extract(config(grown.data, model, tmp_path / "fresh"))
    expect_as_fresh(grown.out, tmp_path / "fresh")


def test_a_later_cut_off_updates_a_store(tmp_path, data, model):
    early = HistoryConfig(per_scenario=3, before=texts.FIRST_TIME + 30_000)
    first = extract(config(data, model, tmp_path / "store", history=early))
    second = extract(config(data, model, tmp_path / "store"))
    assert first.manifest.cutoff == texts.FIRST_TIME + 30_000
    assert 0 < second.done.kept < second.done.users
    extract(config(data, model, tmp_path / "fresh"))
    expect_as_fresh(tmp_path / "store", tmp_path / "fresh")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"users_per_shard": 5}, "users_per_shard = 4, not 5"),
        ({"prompts": PromptConfig(user_tokens=1999)}, "prompts.user_tokens = 2000, not 1999"),
        ({"history": HistoryConfig(per_scenario=2)}, "history.per_scenario = 3, not 2"),
    ],
)
def test_a_store_of_other_settings_is_left_alone(data, model, undisturbed, changes, says):
    before = contents(undisturbed)
    with pytest.raises(ValueError, match=f"holds vectors made with {says}: choose another out=, or delete that folder"):
        extract(config(data, model, undisturbed, **changes))
    assert contents(undisturbed) == before


def test_data_and_store_may_move_together(tmp_path, data, model):
    shutil.copytree(data, tmp_path / "here/data")
    extract(config(tmp_path / "here/data", model, tmp_path / "here/store"))
    (tmp_path / "here").rename(tmp_path / "there")
    summary = extract(config(tmp_path / "there/data", model, tmp_path / "there/store"))
    assert summary.done.users == 0
    with pytest.raises(ValueError, match=r"holds vectors made with data, from out, = '\.\./data', not "):
        extract(config(data, model, tmp_path / "there/store"))


def test_a_store_of_another_model_or_template_under_the_same_name_is_left_alone(tmp_path, data, model):
    shutil.copytree(model, tmp_path / "model")
    template = tmp_path / "user.txt"
    template.write_text("In {scenarios} this was chosen:\n{user}")
    prompts = PromptConfig(user_tokens=2000, user_template=template)
    asked = config(data, tmp_path / "model", tmp_path / "store", prompts=prompts)
    extract(asked)
    before = contents(asked.out)
    template.write_text("In {scenarios} this was taken:\n{user}")
    with pytest.raises(ValueError, match="holds vectors made with other templates: choose another out="):
        extract(asked)
    template.write_text("In {scenarios} this was chosen:\n{user}")
    tinymodel.llama(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="holds vectors made with other files of the model"):
        extract(asked)
    assert contents(asked.out) == before


def test_what_changes_no_vector_may_change(data, model, undisturbed):
    asked = config(data, model, undisturbed, compress=None)
    model_config = asked.model.model_copy(update={"batch_tokens": 1000})
    assert extract(asked.model_copy(update={"model": model_config})).done.users == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path, data, model):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"something is there that is no store of vectors; choose another out="):
        extract(config(data, model, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_settings_that_came_to_nothing_bind_nobody(tmp_path, data, model):
    wrong = config(data, tmp_path / "nowhere", tmp_path / "store")
    with pytest.raises(ValueError, match="no such file or folder"):
        extract(wrong)
    assert extract(config(data, model, tmp_path / "store")).manifest.users == USERS


def test_workers_with_other_models_write_no_shard(undisturbed, data, model):
    schema = FeatureSchema.read(data)
    given = EncoderConfig(name=str(model), dtype="fp32", device="cpu", layer=1)
    prompts = PromptConfig()
    worker = Extractor(undisturbed, given, prompts, Templates.load(prompts), schema.scenarios, "histories")()
    with pytest.raises(ValueError, match=r"^workers disagree about the model"):
        worker(Shard(0, open_store(undisturbed).manifest.stamp))


def test_settings_that_do_not_go_together(data, model):
    raw = {"data": str(data), "out": "x", "model": {"name": str(model), "max_tokens": 100}}
    with pytest.raises(
        ValueError, match=r"prompts.user_tokens 512 lets prompts become longer than model.max_tokens 100"
    ):
        parse(ExtractConfig, raw, where="extract.toml")


def test_what_the_model_reads_can_be_looked_at(tmp_path, data, model):
    asked = config(data, model, tmp_path / "store")
    shown = list(show_prompts(asked))
    assert [each.title for each in shown[:3]] == ["scenario home", "scenario search", "scenario tonight"]
    assert len(shown) == 4
    extract(asked)
    user = texts.user_id(5)
    (one,) = show_prompts(asked, user=str(user))
    assert one.title == f"user {user} (row 5)"
    assert one.tokens == len(one.prompt.text.encode())
    assert one.own_tokens == len(one.prompt.text[one.prompt.own_start :].encode())
    assert one.prompt.text[one.prompt.own_start :].startswith("home: ")
    (other,) = show_prompts(asked, scenario="search")
    assert other.prompt.text == open_store(asked.out).scenario_prompts()[1]
    with pytest.raises(ValueError, match="no scenario 'serach'; the data have home, search, tonight"):
        list(show_prompts(asked, scenario="serach"))


def test_prompts_are_not_let_become_longer_than_the_model_takes(tmp_path, data, model):
    wide = EncoderConfig(name=str(model), dtype="fp32", device="cpu", max_tokens=9000)
    long = ExtractConfig(data=data, out=tmp_path / "store", model=wide, prompts=PromptConfig(user_tokens=9000))
    with pytest.raises(ValueError, match=r"^prompts\.user_tokens is 9000, but the model takes 4096 tokens at most"):
        extract(long)
