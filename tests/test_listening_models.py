"""Optional listeners: real classes with random weights, as theirs cannot be shipped."""

import json

import numpy as np
import pytest
import soundfile
import torch
from spoken_clips import other_speaker, speech
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

import evaluation_framework
from command_line import MissingRequirement
from listening_models import EmotionRecognizer, Squim
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
