"""Features of a teacher: on the codec's frames, kept on disk, at the right moments of a changed clip."""

import numpy as np
import pytest
import torch
from conftest import voice
from torchaudio.models import wav2vec2_model

import semantic_teacher
from audio import FRAME_SAMPLES, SAMPLE_RATE, to_pcm16
from codec_batches import Utterances
from command_line import MissingRequirement
from semantic_supervision import SemanticHeads
from semantic_teacher import frame_features, load_teacher, teacher_features


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """The architecture of HuBERT, tiny, with random weights."""
    torch.manual_seed(0)
    layers = [(8, 10, 5), *[(8, 3, 2)] * 4, (8, 2, 2), (8, 2, 2)]
    settings = [16, 0.0, 16, 4, 2, 2, 0.0, 32, 0.0, 0.0, False, 0.0, None]
    return wav2vec2_model("group_norm", layers, False, *settings).eval()


def clip(seconds: float, pitch: float = 120) -> np.ndarray:
    return to_pcm16(voice(seconds, pitch, SAMPLE_RATE))


@pytest.mark.parametrize("n", [1, FRAME_SAMPLES - 1, FRAME_SAMPLES, FRAME_SAMPLES + 1, 30_000])
def test_every_codec_frame_has_features(model, n):
    features = frame_features(model, 2, torch.from_numpy(voice(2.0, 120, SAMPLE_RATE)[:n]))
    assert features.shape == (-(-n // FRAME_SAMPLES), 16) and torch.isfinite(features).all()


def test_features_follow_the_sound_in_time(model, monkeypatch):
    """A sound that begins with codec frame 10 changes the features from about there on."""
    quiet = torch.zeros(20 * FRAME_SAMPLES)
    late = quiet.clone()
    late[10 * FRAME_SAMPLES :] = torch.from_numpy(voice(0.8, 120, SAMPLE_RATE))[: 10 * FRAME_SAMPLES]
    # the extractor alone sees 25 ms; what follows it sees everything
    extract = model.feature_extractor
    monkeypatch.setattr(model, "extract_features", lambda wave, num_layers: (extract(wave, None)[:1], None))
    change = (frame_features(model, 1, quiet) - frame_features(model, 1, late)).norm(dim=1)  # (20,)
    assert change.shape == (20,)
    assert change[:9].max() < 0.2 * change[11:].mean() and change[10] > 0.5 * change[11:].mean()


def test_features_are_computed_once(model, tmp_path, monkeypatch):
    clips = [clip(1.0), clip(1.5, 200)]
    first = teacher_features(clips, tmp_path, "HUBERT_BASE", "cpu", model, 2)
    assert [f.dtype for f in first] == [np.float16] * 2 and len(list(tmp_path.glob("*.npy"))) == 2
    monkeypatch.setattr(semantic_teacher, "frame_features", lambda *_: pytest.fail("computed again"))
    again = teacher_features(clips[::-1], tmp_path, "HUBERT_BASE", "cpu")
    assert all(np.array_equal(a, b) for a, b in zip(first, again[::-1], strict=True))


def test_features_are_computed_on_the_device_of_the_training(tmp_path, monkeypatch):
    def features(model, layer, samples):
        assert {samples.device.type, model.weight.device.type} == {"meta"}
        return torch.ones(3, 2)

    monkeypatch.setattr(semantic_teacher, "load_teacher", lambda name: (torch.nn.Linear(2, 2), 9))
    monkeypatch.setattr(semantic_teacher, "frame_features", features)
    found = teacher_features([clip(1.0)], tmp_path, "HUBERT_BASE", torch.device("meta"))
    assert found[0].tolist() == [[1.0, 1.0]] * 3


def test_weights_that_cannot_be_fetched_are_named_with_a_remedy(monkeypatch):
    def no_network(**_):
        raise OSError("no route to host")

    import torchaudio.pipelines

    monkeypatch.setattr(type(torchaudio.pipelines.WAVLM_BASE_PLUS), "get_model", lambda self, **_: no_network())
    with pytest.raises(MissingRequirement, match="teacher WAVLM_BASE_PLUS: its weights cannot be downloaded"):
        load_teacher("WAVLM_BASE_PLUS")


def test_a_faster_clip_keeps_the_features_of_its_moments():
    utterances = Utterances([("s", "a b", voice(3.0, 120, SAMPLE_RATE))])
    n_frames = -(-3 * SAMPLE_RATE // FRAME_SAMPLES)
    utterances.add_features([np.arange(n_frames, dtype=np.float16)[:, None]])  # the features tell the frame
    lengths = set()
    for step in range(30):
        batch = utterances.batch(0, step, 1)
        told, frames = batch.features[0, :, 0], int(batch.n_frames)
        speed = 3 * SAMPLE_RATE / FRAME_SAMPLES / frames
        assert told.shape == (frames,) and (told - speed * torch.arange(frames)).abs().max() <= 1.5
        lengths.add(frames)
    assert len(lengths) > 3


def test_latents_learn_what_the_teacher_tells():
    utterances = Utterances([(f"s{i}", "a b", voice(1.0 + 0.2 * i, 100, SAMPLE_RATE)) for i in range(4)])
    random = np.random.default_rng(0)
    features = [random.standard_normal((-(-len(item.pcm) // FRAME_SAMPLES), 6)) for item in utterances.items]
    utterances.add_features([f.astype(np.float16) for f in features])
    torch.manual_seed(0)
    heads = SemanticHeads(8, len(utterances.alphabet), 4, utterances.feature_width)
    batch = utterances.batch(0, 0, 4)
    latents = torch.cat([batch.features, torch.zeros(*batch.features.shape[:2], 2)], dim=2)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
    distances = []
    for _ in range(60):
        loss = heads(latents, batch).teacher
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert distances[0] > 0.5 and distances[-1] < 0.1
