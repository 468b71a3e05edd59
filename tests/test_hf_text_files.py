"""What lies in a text model's folder or repository, and what is refused."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from msq.errors import UsageError, WeightsError
from msq.extract.encoders import load_text_encoder
from msq.extract.encoders.text_families import ALIASES

_text = runpy.run_path(str(Path(__file__).with_name("text_fixtures.py")))
write_text_folder = _text["write_text_folder"]
write_modules = _text["write_modules"]
_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
WORDS = ["a dog running", "walk", "bird flying over the sea", "Feed a Dog"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    write_text_folder(tmp_path / "tiny-bert")
    return tmp_path / "tiny-bert"


@pytest.mark.parametrize(
    ("steps", "pooling", "found"),
    [
        (
            ("Pooling",),
            {"pooling_mode_max_tokens": True},
            "expected one pooling, mean or cls, found",
        ),
        (("Pooling",), {}, "mean or cls, found none; another one can be chosen with --text-pool"),
        (("Pooling", "CNN"), {"pooling_mode_cls_token": True}, "found 'sentence.*CNN' in '2_CNN'"),
    ],
)
def test_steps_that_msq_does_not_know_are_refused(
    bert: Path, steps: tuple[str, ...], pooling: dict[str, bool], found: str
) -> None:
    write_modules(bert, *steps, **pooling)
    with pytest.raises(WeightsError, match=found):
        load_text_encoder(str(bert))
    assert load_text_encoder(str(bert), pooling="cls").spec.output == "cls"


def test_missing_and_damaged_files_of_sentence_encoders_are_named(bert: Path) -> None:
    write_modules(bert, "Pooling", pooling_mode_mean_tokens=True)
    (bert / "1_Pooling" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"names 1_Pooling/config\.json, which is not there"):
        load_text_encoder(str(bert))
    for content in ("{", '["x"]', '[{"path": "../other", "type": "Transformer"}]'):
        (bert / "modules.json").write_text(content)
        with pytest.raises(WeightsError, match=r"modules\.json: expected a list of modules"):
            load_text_encoder(str(bert))


def test_weights_for_other_tasks_are_left_aside_and_others_refused(bert: Path) -> None:
    expected = load_text_encoder(str(bert))(WORDS)
    file = bert / "model.safetensors"
    state = load_file(file)
    # As bert-base-uncased lies on the hub: a prefix, heads, and old names of LayerNorm.
    old = (
        {
            f"bert.{k}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
            for k, v in state.items()
        }
        | {"bert.embeddings.position_ids": torch.arange(20)[None]}
        | {
            "cls.predictions.bias": torch.zeros(3),
            "cls.seq_relationship.weight": torch.zeros(2, 24),
        }
    )
    save_file(old, file)
    torch.testing.assert_close(load_text_encoder(str(bert))(WORDS), expected, atol=0, rtol=0)

    running = {"embeddings.position_ids": torch.arange(20)[None]}
    save_file({**state, **running}, file)
    torch.testing.assert_close(load_text_encoder(str(bert))(WORDS), expected, atol=0, rtol=0)

    def refused(state: dict[str, torch.Tensor], message: str) -> None:
        save_file(state, file)
        with pytest.raises(WeightsError, match=message):
            load_text_encoder(str(bert))

    name = "encoder.layer.1.output.dense.bias"
    refused({k: v for k, v in state.items() if k != name}, f"missing: 1: {name}")
    refused({**state, name: torch.zeros(3)}, rf"another shape: 1: {name} \(expected \[24\], found")
    refused({**state, "encoder.layer.2.output.dense.bias": torch.zeros(24)}, "unexpected: 1: enc")
    refused({**old, "bert.encoder.layer.2.x": torch.zeros(24)}, "unexpected: 1: bert.encoder.lay")
    refused({**state, name: torch.full((24,), torch.nan)}, f"not finite in 1: {name}")
    file.write_bytes(b"{}")
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        load_text_encoder(str(bert))


def test_pickled_weights_load_as_plain_tensors_only(bert: Path) -> None:
    expected = load_text_encoder(str(bert))
    state = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    found = load_text_encoder(str(bert))
    assert torch.equal(found(WORDS), expected(WORDS))
    assert found.spec.sha256 != expected.spec.sha256
    torch.save({**state, "x": Path("anything")}, bert / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="Python objects besides tensors"):
        load_text_encoder(str(bert))


def test_folders_that_are_no_text_model_say_what_is_missing(bert: Path, tmp_path: Path) -> None:
    vocabulary = bert / "vocab.txt"
    vocabulary.rename(tmp_path / "vocab.txt")
    with pytest.raises(WeightsError, match=r"expected a tokenizer beside config\.json"):
        load_text_encoder(str(bert))
    (tmp_path / "vocab.txt").rename(vocabulary)
    for settings, message in [
        ({"model_type": "no-such-model"}, "cannot build this model"),
        ({"model_type": "timesformer"}, "expected the config.json of a text model, found model_ty"),
        ({"model_type": "clip"}, "found model_type 'clip'; a CLIP is named as open_clip names it"),
        ({"model_type": "bart", "vocab_size": 9}, "cannot build this model"),
    ]:
        (bert / "config.json").write_text(json.dumps(settings))
        with pytest.raises(WeightsError, match=message):
            load_text_encoder(str(bert))
    (bert / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"cannot build this model|expected a JSON object"):
        load_text_encoder(str(bert))
    with pytest.raises(
        UsageError, match="a text model of Hugging Face is given as hf-hub:ORG/NAME"
    ):
        load_text_encoder("sentence-transformers/all-MiniLM-L6-v2")
    with pytest.raises(UsageError, match="found a file alone"):
        load_text_encoder(str(bert / "model.safetensors"))
    write_text_folder(tmp_path / "other")
    with pytest.raises(UsageError, match="expected pooler, mean, cls, found 'max'"):
        load_text_encoder(str(tmp_path / "other"), pooling="max")


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=40)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    pieces = {chr(97 + i): i for i in range(26)} | {"<|endoftext|>": 26}
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(pieces))
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(WeightsError, match="the tokenizer has no padding token"):
        load_text_encoder(str(tmp_path / "gpt2"))


def test_code_of_a_repository_is_never_run(bert: Path, tmp_path: Path) -> None:
    code = "from pathlib import Path\nPath({!r}).touch()\n".format(str(tmp_path / "ran"))
    (bert / "custom.py").write_text(code + "class Config: pass\nclass Model: pass\n")
    settings = json.loads((bert / "config.json").read_text())
    auto = {"AutoConfig": "custom.Config", "AutoModel": "custom.Model"}
    (bert / "config.json").write_text(json.dumps(settings | {"auto_map": auto}))
    assert load_text_encoder(str(bert)).spec.architecture.startswith("hf bert ")
    own = {"auto_map": auto, "model_type": "custom"}
    (bert / "config.json").write_text(json.dumps(settings | own))
    with pytest.raises(WeightsError, match="cannot build this model"):
        load_text_encoder(str(bert))
    assert not (tmp_path / "ran").exists()


def test_clips_are_told_from_text_models(bert: Path, tmp_path: Path) -> None:
    _fixtures["write_clip_folder"](tmp_path / "clip", _fixtures["TINY_CLIP"])
    for place in (f"local-dir:{tmp_path / 'clip'}", str(tmp_path / "clip")):
        clip = load_text_encoder(place, clip_output="pooler")
        assert (clip.spec.output, clip.spec.slug) == ("pooler", "clip-clip-pooler")
        assert clip.spec.architecture.startswith("clip ")
    # A CLIP that carries a config.json, too, stays one.
    shutil.copy(bert / "config.json", tmp_path / "clip")
    assert load_text_encoder(str(tmp_path / "clip")).spec.architecture.startswith("clip ")
    assert clip.too_long(["dog " * 5, "dog " * 30]) == ["dog " * 30]


def test_transformers_is_an_extra(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'msq\[text\]'"):
        load_text_encoder(str(bert))


class Hub:
    """A hub with one repository, in place of `hf_hub_download`; keeps what was asked for."""

    def __init__(self, folder: Path, reachable: bool = True) -> None:
        self.folder, self.reachable = folder, reachable
        self.asked: list[tuple[str, bool]] = []

    def __call__(
        self, repo: str, name: str, *, revision: str | None, local_files_only: bool
    ) -> str:
        assert (repo, revision) == ("google-bert/bert-base-uncased", None)
        self.asked.append((name, local_files_only))
        if (self.folder / name).is_file():
            return str(self.folder / name)
        if self.reachable:
            raise EntryNotFoundError(f"404: {name}")
        raise LocalEntryNotFoundError("offline")


def test_a_name_that_everybody_knows_stands_for_its_repository(
    bert: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = Hub(bert)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    text = load_text_encoder("bert-base-uncased")
    assert text.spec.slug == "bert-base-uncased"
    assert text.spec.weights == "hf-hub:google-bert/bert-base-uncased"
    assert text.spec.output == "pooler"
    assert ("open_clip_config.json", False) in hub.asked
    assert not caplog.records
    asked = [name for name, _ in hub.asked]
    assert len(asked) == len(set(asked))  # each file once
    write_modules(bert, "Pooling", pooling_mode_mean_tokens=True)
    assert load_text_encoder("bert-base-uncased").spec.output == "mean"
    assert set(ALIASES.values()) >= {"hf-hub:sentence-transformers/all-MiniLM-L6-v2"}


def test_without_network_the_cache_serves_and_doubt_is_said_once(
    bert: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = Hub(bert, reachable=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    assert load_text_encoder("bert-base-uncased").spec.output == "pooler"
    assert [r.message for r in caplog.records] == [
        "hf-hub:google-bert/bert-base-uncased: without network, no modules.json in the cache; if "
        "the repository has it, its settings are not used"
    ]
    assert [only_cache for _, only_cache in hub.asked].count(False) == 1  # one try, then the cache
    caplog.clear()
    absent = object()  # what the library returns for a file that it knows not to exist
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: absent)
    load_text_encoder("bert-base-uncased")
    assert not caplog.records


def test_without_network_and_cache_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"could not be fetched: .*give local-dir:PATH"):
        load_text_encoder("hf-hub:nobody/nothing-at-all")
