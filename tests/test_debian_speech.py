"""Recorded speech of Debian packages: scripts with their traps, prompts, refusals, the command."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import voice

from collect_data import main
from command_line import EXIT_DONE, EXIT_MISSING, EXIT_PARTIAL, run
from debian_speech import ASTERISK_SOUNDS, ASTERISK_TEXTS, FILLETS_ROOT, read_dialogs, read_prompts, read_scenes
from speech_sources import read_g722
from turn_shards import read_turns

CODE = """
local function prog_init_room()
    return function()
        addm(6, "a-one")
        addv(random(10) + 5, "b-two") -- addv(0, "d-commented")
        if random(100) < 30 then
            addm(5, "a-three")
        else
            addv(5, "b-other")
        end
        switch(random(2)){
            [0] = function()
                planDialog(2, "a-silent")
                planDialog(1, "c-thing")
            end,
        }
        addm(0, "a-one")
    end
end
"""
DIALOGS = """
dialogId("a-one", "font_small", "One?")
dialogStr("Jak se \\"dneska\\" máš, kamaráde (ty rybo)?")
dialogId("b-two", "font_big", "Two, he said.")
dialogStr("Děkuji, dobře se mám.")

dialogId("a-three", "font_small", "")
dialogStr("A co budeme dělat dál?")
dialogId("b-other", "font_big", "Other")
dialogStr("Něco docela jiného.")
dialogId("c-thing", "", "Thing")
dialogStr("Já jsem jenom věc.")
dialogId("a-silent", "font_small", "Never recorded")
dialogStr("Tohle nikdo neřekl.")
dialogId("a-alone", "font_small", "Alone")
dialogStr("Tohle není v žádném rozhovoru.")
"""
SPOKEN = ("a-one", "b-two", "a-three", "b-other", "c-thing", "a-alone")


@pytest.fixture
def packages(tmp_path) -> Path:
    """Both packages as dpkg unpacks them, tiny."""
    level = tmp_path / FILLETS_ROOT / "script" / "barrel"
    sounds = tmp_path / FILLETS_ROOT / "sound" / "barrel" / "cs"
    for folder in (level, sounds, tmp_path / ASTERISK_SOUNDS / "digits", (tmp_path / ASTERISK_TEXTS).parent):
        folder.mkdir(parents=True)
    (level / "code.lua").write_text(CODE, encoding="utf-8")
    (level / "dialogs_cs.lua").write_text(DIALOGS, encoding="utf-8")
    for i, name in enumerate(SPOKEN):
        samples = voice(1.5 + 0.1 * i, 100 + 20 * i, 22_050)
        stereo = np.stack([samples, samples], axis=1) if i % 2 else samples
        soundfile.write(sounds / f"{name}.ogg", stereo, 22_050)
    lines = "; Core sounds\n\nhello: Hello, who is there?\nbeep: [a beep]\ndigits/1: Number one.\nnone: Not there.\n"
    (tmp_path / ASTERISK_TEXTS).write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def write_g722(path: Path, samples: np.ndarray) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        pcm = (samples * 32767).astype(np.int16)[None]
        for begin in range(0, pcm.shape[1], 320):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm[:, begin : begin + 320]), "s16", "mono")
            frame.rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_dialogs_have_speaker_and_text_with_quotes_and_brackets():
    dialogs = read_dialogs(DIALOGS)
    assert dialogs["a-one"] == ("small", 'Jak se "dneska" máš, kamaráde (ty rybo)?')
    assert dialogs["b-two"] == ("big", "Děkuji, dobře se mám.") and dialogs["c-thing"][0] == "other"
    assert len(dialogs) == 7


def test_scenes_follow_the_script_and_end_at_alternatives():
    scenes = read_scenes(CODE, set(SPOKEN))
    assert scenes == [["a-one", "b-two", "a-three"], ["b-other"], ["c-thing"]]


def test_fillets_are_collected_as_dialogues_split_by_level(packages, tmp_path, capsys):
    out = tmp_path / "data"
    command = ["--sources", "fillets", "--local", f"fillets={packages}", "--out", str(out), "--workers", "1"]
    assert run(main, command) == EXIT_DONE
    turns = sorted(read_turns(out, with_audio=True), key=lambda turn: (turn.conv_key, turn.turn_index))
    assert [turn.conv_key for turn in turns] == [f"fillets:cs-barrel-{i:02d}" for i in (0, 0, 0, 1, 2, 3)]
    assert [turn.speaker_id for turn in turns[:3]] == ["fillets:cs-small", "fillets:cs-big", "fillets:cs-small"]
    assert {turn.split_group for turn in turns} == {"fillets:barrel"} and {turn.lang for turn in turns} == {"cs"}
    assert {turn.license for turn in turns} == {"GPL-2.0-only"} and turns[0].origin_url == "sound/barrel/cs/a-one.ogg"
    assert all(1.2 < turn.duration_s < 2.2 and turn.sample_rate == 22_050 for turn in turns)
    assert "GPL-2.0-only" in capsys.readouterr().out


def test_prompts_without_words_are_left_out(packages):
    texts = read_prompts(packages / ASTERISK_TEXTS)
    assert texts == {"hello": "Hello, who is there?", "digits/1": "Number one.", "none": "Not there."}


def test_asterisk_prompts_are_collected_and_missing_ones_listed(packages, tmp_path, capsys):
    write_g722(packages / ASTERISK_SOUNDS / "hello.g722", voice(1.6, 180, 16_000))
    write_g722(packages / ASTERISK_SOUNDS / "digits" / "1.g722", voice(0.9, 180, 16_000))
    out = tmp_path / "data"
    command = ["--sources", "asterisk", "--local", f"asterisk={packages}", "--out", str(out), "--workers", "1"]
    assert run(main, command) == EXIT_PARTIAL
    assert "1 missing_file" in capsys.readouterr().out
    turns = {turn.text: turn for turn in read_turns(out, with_audio=True)}
    assert set(turns) == {"Hello, who is there?", "Number one."}
    hello = turns["Hello, who is there?"]
    assert hello.sample_rate == 16_000 and hello.duration_s == pytest.approx(1.6, abs=0.2)
    assert hello.license == "CC-BY-SA-3.0" and hello.speaker_sex == "female"
    assert hello.conv_key != turns["Number one."].conv_key


def test_g722_comes_back_as_it_was(tmp_path):
    samples = voice(1.0, 150, 16_000)
    write_g722(tmp_path / "a.g722", samples)
    decoded, rate = read_g722(tmp_path / "a.g722")
    assert rate == 16_000 and abs(len(decoded) - len(samples)) < 400
    n = min(len(decoded), len(samples))
    lag = max(range(60), key=lambda k: float(decoded[k:n] @ samples[: n - k]))  # the codec's filters delay
    difference = decoded[lag:n] - samples[: n - lag]
    assert np.sqrt(np.mean(difference**2)) < 0.1 * np.sqrt(np.mean(samples**2))
    (tmp_path / "empty.g722").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.g722"):
        read_g722(tmp_path / "empty.g722")
    with pytest.raises(FileNotFoundError):
        read_g722(tmp_path / "none.g722")


@pytest.mark.parametrize(
    ("source", "package"), [("fillets", "fillets-ng-data"), ("asterisk", "asterisk-core-sounds-en")]
)
def test_packages_that_are_not_there_are_named_with_a_remedy(tmp_path, capsys, source, package):
    command = ["--sources", source, "--local", f"{source}={tmp_path}", "--out", str(tmp_path / "data")]
    assert run(main, command) == EXIT_MISSING
    error = capsys.readouterr().err
    assert package in error and "dpkg-deb -x" in error and error.count("\n") == 1


def test_texts_that_are_no_gzip_are_refused(packages, tmp_path):
    (packages / ASTERISK_TEXTS).write_bytes(b"hello: Hello")
    with pytest.raises(ValueError, match="cannot be read as gzip"):
        read_prompts(packages / ASTERISK_TEXTS)
