"""The gates of a tokenizer: that the probes tell good codes from bad, that broken streams show, and the command."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import torch
from conftest import voice
from test_mimi_tokenizer import tiny_mimi

import codec_gates
import codec_probes
from audio import FRAME_RATE, FRAME_SAMPLES, SAMPLE_RATE
from codec_gates import (
    choose_donor,
    codebook_use,
    monotone_gate,
    print_gates,
    round_trip_gates,
    speaker_gate,
    speed_gates,
    stream_gates,
    swap,
    swap_gates,
    use_gates,
    word_gates,
)
from codec_probes import (
    Coded,
    Gate,
    character_gates,
    edit_distance,
    look_up,
    predict_speakers,
    speaker_gates,
)
from command_line import EXIT_DONE, EXIT_INPUT, EXIT_PARTIAL, run
from evaluation_framework import main
from evaluation_report import FULL, ORIGINAL, SEMANTIC
from mimi_tokenizer import MimiTokenizer
from speech_metrics import Figure

V = 16
LETTERS = "abcdefgh"
TABLES = list(torch.randn(4, V, 32, generator=torch.Generator().manual_seed(0)))  # a vector per code


def clips(n: int, seed: int, speakers: int = 4, swapped: bool = False) -> list[Coded]:
    """Of 4 codebooks, two follow the letters of the text, a frame each, and two the speaker; else the codes are random.

    `swapped` puts those of the speaker first, where the semantic ones belong.
    """
    random = np.random.default_rng(seed)
    made = []
    for i in range(n):
        letters = random.integers(len(LETTERS), size=12)
        words = np.stack([letters, (letters + random.integers(2, size=12) * len(LETTERS)) % V], axis=1)
        voices = random.integers(V, size=(12, 2))
        voices[random.random((12, 2)) < 0.5] = i % speakers
        parts = [voices, words] if swapped else [words, voices]
        text = "".join(LETTERS[j] for j in letters)
        made.append(Coded(f"talk{i // 4}", f"s{i % speakers}", text, np.zeros(1), np.concatenate(parts, axis=1)))
    return made


def spoken(tokenizer, n: int, seconds: float = 1.0) -> list[Coded]:
    """Buzzing clips of two speakers and what the tokenizer makes of them."""
    made = []
    for i in range(n):
        samples = voice(seconds + 0.1 * i, pitch=110 + 60 * (i % 2), rate=SAMPLE_RATE)
        codes = tokenizer.encode(torch.from_numpy(samples)[None])[0].numpy()
        made.append(Coded(f"talk{i}", "ab"[i % 2], "some words", samples, codes))
    return made


def by_name(gates: list[Gate]) -> dict[str, Gate]:
    return {gate.name: gate for gate in gates}


# probes


@pytest.mark.parametrize("swapped", [False, True], ids=["right way round", "wrong way round"])
def test_probes_find_where_words_and_voice_are(swapped):
    fit, held_out = clips(120, 0, swapped=swapped), clips(40, 1, swapped=swapped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_probes, "PROBE_STEPS", 200)
        words = character_gates(fit, held_out, 2, TABLES, seed=0)
    voices = speaker_gates(fit, held_out, 2, V, seed=0)
    expected = [False, False] if swapped else [True, True]
    assert [words[-1].passed, voices[-1].passed] == expected
    with_words, without = (words[1], words[0]) if swapped else (words[0], words[1])
    assert with_words.value < 0.1 and without.value > 0.5 and words[-1].n == 40
    with_voice, without = (voices[0], voices[1]) if swapped else (voices[1], voices[0])
    assert with_voice.value > 0.9 and without.value < 0.5 and voices[-1].n == 40


def test_probes_give_the_same_figures_for_the_same_seed(monkeypatch):
    monkeypatch.setattr(codec_probes, "PROBE_STEPS", 20)
    fit, held_out = clips(20, 0), clips(8, 1)
    state = torch.get_rng_state()
    first, again, other = (character_gates(fit, held_out, 2, TABLES, seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert torch.equal(torch.get_rng_state(), state)


def test_speakers_that_were_not_fitted_are_left_out_and_counted():
    gates = speaker_gates(clips(40, 0, speakers=2), clips(40, 1, speakers=4), 2, V, seed=0)
    assert gates[-1].n == 20 and "20 clips of speakers" in gates[-1].note
    stranger = [clip._replace(speaker="nobody") for clip in clips(4, 1)]
    (gate,) = speaker_gates(clips(40, 0), stranger, 2, V, seed=0)
    assert gate.value is None and gate.verdict == "not measured" and "fewer than 2 speakers" in gate.note
    nameless = [[clip._replace(speaker="local:unknown") for clip in clips(n, seed)] for n, seed in ((40, 0), (4, 1))]
    (gate,) = speaker_gates(*nameless, 2, V, seed=0)  # may be one or many
    assert gate.value is None


def test_texts_that_do_not_fit_their_frames_are_not_learnt():
    short = [clip._replace(codes=clip.codes[:1], text="far too much text for one frame") for clip in clips(4, 0)]
    (gate,) = character_gates(short, clips(4, 1), 2, TABLES, seed=0)
    assert gate.passed is None and gate.value is None and "no clip" in gate.note


def test_looked_up_vectors_are_those_that_the_decoder_sums(tokenizer):
    (clip,) = spoken(tokenizer, 1)
    tables, codes = tokenizer.code_vectors(), torch.from_numpy(clip.codes)[None]
    for books, stack in ((slice(0, 2), tokenizer.semantic), (slice(2, None), tokenizer.acoustic)):
        (frames,) = look_up([clip], tables, books)
        assert torch.allclose(frames, stack.decode(codes[..., books])[0], atol=1e-6)

    mimi = MimiTokenizer(tiny_mimi())
    c = mimi.config
    codes = torch.arange(3 * c.n_codebooks).view(1, 3, -1) % c.codebook_size
    tables = mimi.code_vectors()
    assert len(tables) == c.n_codebooks and all(len(table) == c.codebook_size for table in tables)
    (frames,) = look_up([clip._replace(codes=codes[0].numpy())], tables, slice(0, c.n_semantic))
    half = mimi.quantizer.semantic_residual_vector_quantizer
    expected = half.decode(codes[..., : c.n_semantic].transpose(1, 2))  # (B, C, T)
    assert torch.allclose(half.output_proj(frames.T[None]), expected, atol=1e-6)


def test_ridge_regression_separates_what_is_separable():
    inputs = torch.eye(3).double().repeat(4, 1)
    labels = torch.arange(3).repeat(4)
    assert predict_speakers(inputs, labels, torch.eye(3).double()).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("reference", "found", "errors"), [("kitten", "sitting", 3), ("", "ab", 2), ("ab", "", 2), ("abc", "abc", 0)]
)
def test_edit_distance_known_answers(reference, found, errors):
    assert edit_distance(reference, found) == errors


# codebooks


def test_usage_and_perplexity_have_their_known_values_and_the_worst_codebook_decides():
    even = np.arange(V).repeat(4)
    codes = np.stack([even, even % 8, np.zeros_like(even)], axis=1)
    half = Coded("talk", "s", "", np.zeros(1), codes[:, :2])
    use = codebook_use([half, half._replace(conversation="other")], V)
    assert use["usage"] == [1.0, 0.5] and use["frames"] == 128 and use["conversations"] == 2
    assert [figure["value"] for figure in use["perplexity"]] == pytest.approx([1.0, 0.5])
    usage, evenness = use_gates(use)
    assert usage.passed is False and evenness.passed is True and "codebook 1" in usage.how
    assert "too few: 128 frames" in usage.note
    collapsed = codebook_use([Coded("talk", "s", "", np.zeros(1), codes)], V)
    assert [gate.passed for gate in use_gates(collapsed)] == [False, False]
    plenty = Coded("talk", "s", "", np.zeros(1), np.tile(even, 400)[:, None].repeat(2, axis=1))
    assert [(gate.passed, gate.note) for gate in use_gates(codebook_use([plenty], V))] == [(True, "")] * 2


# sound and words


def curve(*values: float | None) -> dict:
    figures = {str(k): {"value": value, "n": 3} for k, value in enumerate(values, start=1)}
    return {"depth": {"log_mel_l1": figures}}


def test_a_depth_curve_that_rises_anywhere_fails():
    assert monotone_gate(curve(0.4, 0.3, 0.2))[0].passed
    (gate,) = monotone_gate(curve(0.4, 0.2, 0.25))
    assert gate.passed is False and gate.value == pytest.approx(0.05)
    assert monotone_gate(curve(0.4, None))[0].verdict == "not measured"


def test_word_gates_compare_copies_with_originals_and_the_semantic_stack_with_the_whole():
    def figure(value):
        return Figure(value=value, low=None, high=None, n=5, conversations=1, excluded={})

    def verdicts(copies, semantic):
        wer = {ORIGINAL: figure(0.05), FULL: figure(copies), SEMANTIC: figure(semantic)}
        figures = {"wer": wer, "wer_change": {FULL: figure(copies - 0.05)}}
        return [gate.verdict for gate in word_gates(figures, 2, {})][2:]

    assert verdicts(0.07, 0.1) == ["passed", "passed"] and verdicts(0.2, 0.31) == ["FAILED", "FAILED"]
    missing = word_gates({}, 2, {"wer": "jiwer not installed: install it"})
    assert all(gate.verdict == "not measured" for gate in missing)
    assert missing[0].note == "not measured: needs jiwer: install it"


def test_a_swap_takes_words_of_one_clip_and_voice_of_another_speaker_that_is_long_enough(tokenizer):
    a, b, c, d = spoken(tokenizer, 4)
    assert choose_donor(a, [a, b, c, d]) is b and choose_donor(d, [a, b, c]) is None
    wave = swap(tokenizer, a, b)
    assert len(wave) == len(a.codes) * FRAME_SAMPLES
    own = tokenizer.decode(torch.from_numpy(a.codes)[None])[0].numpy()
    assert np.allclose(swap(tokenizer, a, a), own) and not np.allclose(wave, own)
    missing = {"wer": "jiwer not installed: x", "speaker_similarity": "resemblyzer not installed: x"}
    gates = swap_gates([a], [a, b], tokenizer, None, None, missing, seed=0)
    assert [gate.verdict for gate in gates] == ["not measured"] * 3 and "needs resemblyzer" in gates[1].note


# streams and speed


class BrokenDecoder:
    """Forgets what came before, so that every piece is decoded as if it were the first."""

    def __init__(self, stream):
        self.stream, self.delay_samples = stream, stream.delay_samples

    def push(self, codes):
        self.stream.reset()
        return self.stream.push(codes)

    def flush(self):
        return self.stream.flush()


class BrokenEncoder:
    """Loses the last, unfinished frame."""

    def __init__(self, stream):
        self.push, self.stream = stream.push, stream

    def flush(self):
        return self.stream.flush()[:, :0]


def test_a_whole_tokenizer_streams_exactly_and_broken_streams_are_found(tokenizer, monkeypatch):
    made = spoken(tokenizer, 3)
    gates = by_name(stream_gates(made, tokenizer, seed=0))
    assert [gate.passed for gate in gates.values()] == [True] * 3 and gates["streamed codes"].value == 1.0
    decoder, encoder = tokenizer.decoder_stream, tokenizer.encoder_stream
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "decoder_stream", lambda batch: BrokenDecoder(decoder(batch)))
        patch.setattr(tokenizer, "encoder_stream", lambda batch: BrokenEncoder(encoder(batch)))
        gates = by_name(stream_gates(made, tokenizer, seed=0))
    assert [gates[name].passed for name in ("streamed codes", "streamed wave", "encoded twice")] == [False, False, True]
    with monkeypatch.context() as patch:
        encode = tokenizer.encode
        patch.setattr(tokenizer, "encode", lambda wave: (encode(wave) + 1) % V)
        assert by_name(stream_gates(made, tokenizer, seed=0))["encoded twice"].value == 0.0


def test_codes_give_what_their_latents_gave_and_a_wrong_table_is_found(tokenizer):
    made = spoken(tokenizer, 2)
    assert by_name(round_trip_gates(made, tokenizer))["codes there and back"].passed
    wrong = copy.deepcopy(tokenizer)
    wrong.lookup = lambda codes: tokenizer.lookup((codes + 1) % V)
    (gate,) = round_trip_gates(made, wrong)
    assert gate.passed is False and gate.value > 1e-3
    assert round_trip_gates(made, MimiTokenizer(tiny_mimi())) == []


def test_a_sample_that_is_not_finite_fails():
    wave = torch.zeros(1, 4)
    assert codec_gates.largest_difference(wave, torch.tensor([[0.0, float("nan"), 0.0]])) == codec_gates.NOT_FINITE
    assert codec_gates.largest_difference(wave, torch.ones(1, 5)) == 1.0


def test_speed_is_measured_per_frame_at_one_thread_and_the_threads_are_put_back(tokenizer, monkeypatch):
    used = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda codes: used.append(torch.get_num_threads()) or decode(codes))
    torch.set_num_threads(2)
    try:
        streamed, offline = speed_gates(spoken(tokenizer, 2), tokenizer)
        assert torch.get_num_threads() == 2 and set(used) == {1}
    finally:
        torch.set_num_threads(1)
    assert 0 < streamed.value < 10 and streamed.n == int(2.1 * FRAME_RATE) - codec_gates.WARM_UP
    assert 0 < offline.value < 10 and offline.n == 2


# command

NAMES = {
    "codebook usage", "perplexity / V", "log10-mel distance", "PESQ wide band", "STOI", "depth curve, log10-mel",
    "WER, originals", "WER, all codebooks", "WER, copies less originals", "WER, semantic codebooks alone",
    "similarity of copies to originals",
    "CER of the probe, semantic less acoustic", "speaker probe, semantic less acoustic",
    "swap, WER to the text of A", "swap, voice to A", "swap, voice to B",
    "streamed codes", "streamed wave", "encoded twice", "codes there and back",
    "real-time factor, streamed", "real-time factor, decoder",
}  # fmt: skip


@pytest.mark.parametrize(("found", "median", "passed"), [(0.9, 0.8, True), (0.7, 0.8, False), (0.9, None, None)])
def test_a_copy_must_be_nearer_than_two_originals_of_a_speaker(found, median, passed):
    figure = Figure(value=found, low=found, high=found, n=5, conversations=2, excluded={})
    gate = speaker_gate({"speaker_similarity": {f"{FULL} to its original": figure}}, median, {})
    assert (gate.value, gate.threshold, gate.passed) == (found, median, passed)
    missing = speaker_gate({}, None, {"speaker_similarity": "resemblyzer not installed"})
    assert missing.verdict == "not measured" and "needs resemblyzer" in missing.note


def flags(data, tokenizer, out, *more: str) -> list[str]:
    sizes = ["--max_clips", "3", "--gates"]
    return ["--data", str(data), "--tokenizer", str(tokenizer), "--out", str(out), *sizes, *more]


def test_the_command_prints_a_table_and_one_json_line_without_any_optional_package(
    shared_data, tokenizer_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(codec_probes, "PROBE_STEPS", 3)
    for package in ("pystoi", "pesq", "faster_whisper", "resemblyzer"):
        monkeypatch.setitem(sys.modules, package, None)  # makes importing it fail
    values = []
    for name in ("one", "two"):
        code = main(flags(shared_data, tokenizer_folder, tmp_path / name, "--json"))
        table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
        found = json.loads(line)
        gates = {gate["name"]: gate for gate in found["gates"]}
        assert code == (EXIT_PARTIAL if any(gate["passed"] is False for gate in gates.values()) else EXIT_DONE)
        assert set(gates) >= NAMES and all(name in table for name in gates)
        values.append([gate["value"] for gate in found["gates"] if "factor" not in gate["name"]])
        assert all((tmp_path / name / picture).stat().st_size > 0 for picture in found["pictures"])
    assert values[0] == values[1]
    assert gates["STOI"]["verdict"] == "not measured" and "needs pystoi" in gates["STOI"]["note"] in table
    assert gates["streamed wave"]["passed"] is True and gates["codebook usage"]["n"] > 0
    assert gates["real-time factor, decoder"]["threshold"] == 0.02 and gates["log10-mel distance"]["passed"] is None
    assert found["settings"]["max_clips"] == 3 and set(found["part"]["depth"]["log_mel_l1"]) == {"1", "2", "3", "4"}
    assert not (tmp_path / "one" / "report.json").exists() and not (tmp_path / "one" / "audio").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--tokenizer", "nowhere"], "no rvq_tokenizer at nowhere"),
        (["--data", "nowhere"], "collect_data.py"),
        (["--max_clips", "0"], "max_clips=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(changes, words, shared_data, tokenizer_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(main, [*flags(shared_data, tokenizer_folder, tmp_path / "out"), *changes]) == EXIT_INPUT
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_table_shows_value_threshold_verdict_and_reason(capsys):
    gates = [
        Gate(name="good", value=0.9, sense=">=", threshold=0.8, low=0.85, high=0.95, n=4, how="counted"),
        Gate(name="bad", value=2e-4, sense="<=", threshold=1e-4, n=4, how="counted"),
        Gate(name="gone", value=None, n=0, how="counted", note="not measured: needs ears"),
        Gate(name="told", value=0.5, n=4, how="counted"),
    ]
    print_gates(gates, {"depth": {"stoi": {"1": {"value": 0.5}, "4": {"value": None}}}})
    printed = capsys.readouterr().out
    for words in ("0.900 (0.850 to 0.950)", ">= 0.800", "passed", "FAILED", "2e-04", "needs ears", "reported", "4: -"):
        assert words in printed
