"""Optional listeners: real classes with random weights, as theirs cannot be shipped."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from spoken_clips import other_speaker, speech
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2PhonemeCTCTokenizer,
)

import evaluation_framework
from command_line import MissingRequirement
from listening_models import IPA, JOINED, EmotionRecognizer, PhoneRecognizer, Squim
from pronunciation import PhoneReader, Said, homographs_right, sentences
from speech_metrics import NotMeasurable


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder as the hub holds them."""
    folder = tmp_path_factory.mktemp("ser")
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=4,
        conv_dim=(16, 16, 16), conv_stride=(5, 4, 4), conv_kernel=(10, 8, 4), num_feat_extract_layers=3,
        classifier_proj_size=16, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    return folder


def test_emotions_agree_with_themselves_most(classifier):
    recognizer = EmotionRecognizer(str(classifier))
    assert recognizer.probabilities(speech(0)).sum() == pytest.approx(1, abs=1e-5)
    assert recognizer.agreement(speech(0), speech(0)) == pytest.approx(1, abs=1e-5)
    assert recognizer.agreement(speech(0), other_speaker(1)) < 0.9999


def test_what_cannot_be_heard_is_named(classifier, tmp_path):
    with pytest.raises(NotMeasurable):
        EmotionRecognizer(str(classifier)).probabilities(np.zeros(24000, np.float32))
    EmotionRecognizer(str(classifier)).probabilities(speech(0)[12000:13200])  # 50 ms
    with pytest.raises(MissingRequirement, match=f"--ser {tmp_path}"):
        EmotionRecognizer(str(tmp_path))


@pytest.fixture(scope="module")
def phoneme_model(tmp_path_factory):
    """A folder like that of facebook/wav2vec2-lv-60-espeak-cv-ft, small and with random weights."""
    folder = tmp_path_factory.mktemp("phones")
    torch.manual_seed(0)
    spelt = [ipa for ipas in {**IPA, **JOINED}.values() for ipa in ipas.split()]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *spelt]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    Wav2Vec2PhonemeCTCTokenizer(str(folder / "vocab.json"), do_phonemize=False).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=len(tokens),
        conv_dim=(16, 16, 16), conv_stride=(5, 4, 16), conv_kernel=(10, 8, 16), num_feat_extract_layers=3,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


LEAD = "He melted lead in a pot and poured it into a mold."


def test_what_a_phoneme_recogniser_writes_decides_between_two_pronunciations(phoneme_model, monkeypatch):
    listener = PhoneRecognizer(str(phoneme_model))
    reader = PhoneReader(listener.likelihoods)
    vocabulary = json.loads((phoneme_model / "vocab.json").read_text())
    monkeypatch.setattr(listener, "_model", lambda **_: SimpleNamespace(logits=logits[None]))
    for which, vowel in enumerate(("ɛ", "iː")):  # the metal, to lead; espeak writes what follows a vowel as one: oːɹ
        written = f"h iː m ɛ l t ᵻ d l {vowel} d ɪ n ɐ p ɑː t æ n d p oːɹ d ɪ ɾ ɪ n t ʊ ɐ m oʊ l d".split()
        logits = torch.zeros(3 * len(written), len(vocabulary))
        for place, ipa in enumerate(written):
            logits[3 * place + 1, vocabulary[ipa]] = 6.0
            logits[3 * place, 0] = logits[3 * place + 2, 0] = 6.0  # blank
        assert reader.heard(speech(0), LEAD) == which
        assert homographs_right([Said("a", sentences()[LEAD], reader.heard(speech(0), LEAD))]) == (which == 0)
    logits = torch.zeros(10, len(vocabulary))  # fewer frames than phones
    with pytest.raises(NotMeasurable, match="cannot be aligned"):
        reader.margin(speech(0), LEAD)


def test_likelihoods_of_all_readings_of_three_frames_are_one(phoneme_model):
    """Every string of at most three phones of a small alphabet, by the model as it is."""
    listener = PhoneRecognizer(str(phoneme_model))
    tokens = torch.full((3, len(listener._tokens) + 60), -math.inf)
    kept = [listener._blank, *(listener._tokens[phone][0] for phone in ("B", "D"))]
    tokens[:, kept] = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    readings = [list(each) for n in (1, 2, 3) for each in itertools.product(("B", "D"), repeat=n)]
    silent = math.exp(float(tokens[:, listener._blank].sum()))
    assert silent + sum(math.exp(-listener._loss_of(tokens, each)) for each in readings) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("written", ["m oʊ b ə l", "m oʊ b əl"])
def test_a_pair_of_phones_may_be_written_as_one_or_as_two(phoneme_model, monkeypatch, written):
    listener = PhoneRecognizer(str(phoneme_model))
    vocabulary = json.loads((phoneme_model / "vocab.json").read_text())
    logits = torch.zeros(3 * len(written.split()), len(vocabulary))
    for place, ipa in enumerate(written.split()):
        logits[3 * place + 1, vocabulary[ipa]] = logits[3 * place, 0] = logits[3 * place + 2, 0] = 8.0
    monkeypatch.setattr(listener, "_model", lambda **_: SimpleNamespace(logits=logits[None]))
    bull, bile, parted = listener.likelihoods(speech(0), [["M OW B AH L"], ["M OW B AY L"], ["M OW B AH", "L"]])
    assert bull > bile + 3
    # the last phone of a word and the first of the next stay two
    assert (parted < bull - 3) == (written == "m oʊ b əl")


def test_a_phoneme_recogniser_that_cannot_be_had_or_writes_otherwise_is_named(phoneme_model, classifier, tmp_path):
    for folder in (tmp_path, classifier):
        with pytest.raises(MissingRequirement, match=f"--phones {folder}"):
            PhoneRecognizer(str(folder))
    other = shutil.copytree(phoneme_model, tmp_path / "other")
    vocabulary = json.loads((other / "vocab.json").read_text())
    vocabulary["TH"] = vocabulary.pop("θ")
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(MissingRequirement, match="writes no TH"):
        PhoneRecognizer(str(other))
    with pytest.raises(NotMeasurable, match="silent"):
        PhoneRecognizer(str(phoneme_model)).likelihoods(np.zeros(24000, np.float32), [["B"]])


def test_squim_runs_with_the_published_architecture(monkeypatch):
    import torchaudio.models
    import torchaudio.pipelines

    class Offline:
        def get_model(self):
            raise OSError("no network")

    class Random:
        def get_model(self):
            torch.manual_seed(0)
            return torchaudio.models.squim_objective_base()

    monkeypatch.setattr(torchaudio.pipelines, "SQUIM_OBJECTIVE", Offline())
    with pytest.raises(MissingRequirement, match="--squim: its weights cannot be downloaded"):
        Squim()
    monkeypatch.setattr(torchaudio.pipelines, "SQUIM_OBJECTIVE", Random())
    stoi, pesq = Squim().stoi_pesq(speech(0))
    assert 0 <= stoi <= 1 and 1 <= pesq <= 4.7
    with pytest.raises(NotMeasurable):
        Squim().stoi_pesq(np.zeros(24000, np.float32))


def test_a_model_that_is_not_there_leaves_the_other_metrics(tmp_path, capsys):
    said = tmp_path / "said"
    said.mkdir()
    for number in range(2):
        soundfile.write(said / f"{number}.wav", speech(number), 24_000)
        (said / f"{number}.txt").write_text("Good morning.\n")
    flags = ["--systems", f"one={said}", "--ser", str(tmp_path), "--workers", "1", "--out", str(tmp_path / "out")]
    assert evaluation_framework.main(flags) == 0
    assert "emotion_agreement was not measured: --ser" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["figures"]["rate"]["one"]["value"] > 0 and "emotion_agreement" not in found["figures"]
