"""Recorded speech in Debian packages: the acted dialogues of Fish Fillets (Czech, Dutch), the prompts of Asterisk.

The packages can be had without root: `apt-get download NAME`, then `dpkg-deb -x NAME.deb DIR`. Their licences (GPL-2,
CC BY-SA 3.0) are written into every turn; the clips are never copied into this repository.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from command_line import MissingRequirement
from speech_sources import Recording, Source, units_of

FILLETS = {"cs": "fillets-ng-data-cs", "nl": "fillets-ng-data-nl"}
FILLETS_ROOT = Path("usr/share/games/fillets-ng")
FILLETS_FACTS = (
    ("license_url", "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html"),
    ("attribution", "Fish Fillets - Next Generation, ALTAR interactive and contributors"),
    ("redistributable", True),
)
ASTERISK = ("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en")
ASTERISK_SOUNDS = Path("usr/share/asterisk/sounds/en_US_f_Allison")
ASTERISK_TEXTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
ASTERISK_FACTS = (
    ("license_url", "https://creativecommons.org/licenses/by-sa/3.0/"),
    ("attribution", "Asterisk core sounds, Digium, spoken by Allison Smith"),
    ("redistributable", True),
    ("speaker_sex", "female"),
)

QUOTED = r'"((?:[^"\\]|\\.)*)"'
DIALOG = re.compile(rf"dialogId\(\s*{QUOTED}\s*,\s*{QUOTED}[^)]*?\)\s*dialogStr\(\s*{QUOTED}\s*\)")
SPOKEN = re.compile(rf"\b(?:addm|addv|planDialog)\([^\n]*?{QUOTED}\s*\)")
BRANCH = re.compile(r"\belse\b|\belseif\b|\bfunction\b")  # what follows is said instead of, not after


def unpacked(source: str, root: Path, place: Path, packages: tuple[str, ...]) -> Path:
    """`root / place`; MissingRequirement says which packages to unpack where."""
    if not (root / place).exists():
        names = " ".join(packages)
        raise MissingRequirement(
            f"{root / place} is missing: apt-get download {names}; "
            f"for f in *.deb; do dpkg-deb -x $f DIR; done; then --local {source}=DIR"
        )
    return root / place


# ---- Fish Fillets ----------------------------------------------------------------------------------------------------


def fillets_source(root: Path, seed: int, done: set[str]) -> Source:
    """All levels in both languages, those that are unpacked. MissingRequirement if none is."""
    data = unpacked("fillets", root, FILLETS_ROOT / "script", ("fillets-ng-data", *FILLETS.values())).parent
    recordings = [
        recording
        for level in sorted(path for path in (data / "script").iterdir() if (path / "code.lua").is_file())
        for language in FILLETS
        for recording in level_recordings(data, level, language)
    ]
    if not recordings:
        unpacked("fillets", root, FILLETS_ROOT / "sound", tuple(FILLETS.values()))
        raise ValueError(f"{data} holds no spoken dialogue in {' or '.join(FILLETS)}")
    return Source("fillets", "1", iter(units_of("fillets", recordings, seed, done)), endless=False)


def level_recordings(data: Path, level: Path, language: str) -> list[Recording]:
    """Turns of one level in one language: dialogues in the order of the script, then what no dialogue has."""
    script = level / f"dialogs_{language}.lua"
    sounds = data / "sound" / level.name / language
    if not script.is_file() or not sounds.is_dir():
        return []
    texts = read_dialogs(script.read_text(encoding="utf-8", errors="replace"))
    spoken = {name: told for name, told in texts.items() if (sounds / f"{name}.ogg").is_file()}
    scenes = read_scenes((level / "code.lua").read_text(encoding="utf-8", errors="replace"), set(spoken))
    told = {name for scene in scenes for name in scene}
    scenes += [[name] for name in spoken if name not in told]
    recordings = []
    for number, scene in enumerate(scenes):
        for index, name in enumerate(scene):
            speaker, text = spoken[name]
            recordings.append(
                Recording(
                    audio=sounds / f"{name}.ogg",
                    text=text,
                    speaker=f"{language}-{speaker}",
                    conversation=f"{language}-{level.name}-{number:02d}",
                    turn_index=index,
                    language=language,
                    licence="GPL-2.0-only",
                    name=f"sound/{level.name}/{language}/{name}.ogg",
                    group=level.name,
                    facts=FILLETS_FACTS,
                )
            )
    return recordings


def read_dialogs(script: str) -> dict[str, tuple[str, str]]:
    """Id -> speaker and text, of a `dialogs_<language>.lua`; the font of the subtitle names the speaker."""
    found = {}
    for name, font, text in DIALOG.findall(script):
        found[name] = (font.removeprefix("font_") or "other", re.sub(r"\\(.)", r"\1", text))
    return found


def read_scenes(code: str, known: set[str]) -> list[list[str]]:
    """Ids in the order in which `code.lua` plans them, each id once; alternatives are scenes of their own."""
    scenes: list[list[str]] = [[]]
    seen: set[str] = set()
    for line in code.splitlines():
        if BRANCH.search(line):
            scenes.append([])
        for name in SPOKEN.findall(line.split("--")[0]):
            if name in known and name not in seen:
                seen.add(name)
                scenes[-1].append(name)
    return [scene for scene in scenes if scene]


# ---- Asterisk --------------------------------------------------------------------------------------------------------


def asterisk_source(root: Path, seed: int, done: set[str]) -> Source:
    """Prompts of one English speaker, 16 kHz; each is a conversation of its own."""
    sounds = unpacked("asterisk", root, ASTERISK_SOUNDS, ASTERISK)
    texts = read_prompts(unpacked("asterisk", root, ASTERISK_TEXTS, ASTERISK))
    recordings = [
        Recording(
            audio=sounds / f"{name}.g722",
            text=text,
            speaker="allison",
            conversation=name,
            licence="CC-BY-SA-3.0",
            name=f"en_US_f_Allison/{name}.g722",
            facts=ASTERISK_FACTS,
        )
        for name, text in texts.items()
    ]
    return Source("asterisk", "1", iter(units_of("asterisk", recordings, seed, done)), endless=False)


def read_prompts(path: Path) -> dict[str, str]:
    """Name -> text of the lines `name: text`; sounds without words, such as [tones], are left out."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace").splitlines()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as gzip ({error})") from error
    pairs = [line.split(":", 1) for line in lines if ":" in line and not line.startswith(";")]
    return {name.strip(): text.strip() for name, text in pairs if re.sub(r"\[[^\]]*\]", "", text).strip()}
