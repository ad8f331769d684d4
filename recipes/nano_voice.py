"""A voice that reads numbers, times, dates and prices, from a fresh clone to an exported folder, in seven steps.

    ./run_experiment.sh full [--scale smoke] [--out DIR]      (run_experiment.bat full ... on Windows)

About an hour and a half on 2 CPU cores; --scale smoke takes the same steps in minutes, to see that they work. It is how
the weights of step 2,400 were made that pretrained/nano went on from, by the code as it is now: their tokenizer also
heard 0.6 hours of `--sources sentences`, its decoder learnt without `--hearing` and its codebooks did not settle, and
their attention was guided, which was worth nothing (README). Each step skips or resumes what it has already done, so
this may be stopped and started at any time. Needs no package but Python's own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import EXIT_CODES_HELP, EXIT_DONE, run_child

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    out: str
    hours: float
    codec_steps: int
    model_steps: int
    every: int  # steps between evaluations, saves and what is spoken
    texts: int  # spoken each time
    clips: int  # of the report
    longest: int  # s of what the demo says


SCALES = {
    "full": Scale("runs/voice", 2, 1600, 2400, 300, 32, 24, 20),
    "smoke": Scale("runs/smoke", 0.12, 20, 4, 2, 2, 2, 2),
}


def steps(s: Scale, out: str) -> list[tuple[str, str]]:
    """What each step after the environment does, and its command; OUT stands for the folder."""
    every = f"--eval_every {s.every} --save_every {s.every} --speak_every {s.every} --speak_texts {s.texts}"
    made = [
        (
            f"Data: {s.hours} hours of numbers, read by one voice",
            f"collect_data.py --sources numbers --voices adam --target_hours {s.hours} --out OUT/data",
        ),
        (
            "Tokenizer: its semantic codebooks must tell the words (CTC)",
            f"train_tokenizer.py --data OUT/data --out OUT/tokenizer --max_steps {s.codec_steps} --stage_a 0.15 "
            "--stage_c 0.4 --ctc_weight 1 --content_gradient 0.3 --save_every 200",
        ),
        (
            f"Speech model: nano reads; what is heard of held-out texts is measured every {s.every} steps",
            "train.py --model_size nano --data OUT/data --tokenizer OUT/tokenizer --out OUT/nano "
            f"--max_steps {s.model_steps} --batch_rows 1 --joint 0 --listen 0 --text_only 0 --evict 0 "
            "--depth_share 0.005 --semantic_share 1 --acoustic_weight 0 --shallow 0.9 "
            f"{every} --speak_codebooks 1 --speak_temperature 0.6",
        ),
        (
            "Evaluation: held-out sentences",
            "evaluation_framework.py --data OUT/data --tokenizer OUT/tokenizer --checkpoint OUT/nano/best "
            f"--codebooks 10 --temperature 0 --max_clips {s.clips} --max_replies {s.clips} --out OUT/report",
        ),
        (
            "Export: half precision, one folder",
            "export_voice.py --checkpoint OUT/nano/best --run OUT/nano --tokenizer OUT/tokenizer --data OUT/data "
            "--codebooks 10 --temperature 0 --one_sentence --float8 depth_heads --text_per_chunk 200 --out OUT/voice",
        ),
        (
            "Demo: times, prices and dates",
            "demo.py --mode batch --input corpus/spoken_numbers.json --checkpoint OUT/voice "
            f"--max_seconds {s.longest} --out OUT/spoken",
        ),
    ]
    return [(title, [word.replace("OUT", out) for word in command.split()]) for title, command in made]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="run_experiment full",
        description=__doc__,
        epilog=EXIT_CODES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much of everything (default: full)")
    parser.add_argument("--out", help="folder (default: runs/voice, with --scale smoke runs/smoke)")
    args = parser.parse_args()
    out = args.out or SCALES[args.scale].out
    folder = ROOT / ".venv" / ("Scripts" if os.name == "nt" else "bin")
    python = str(folder / ("python.exe" if os.name == "nt" else "python"))
    setup = "Environment: make .venv and install the pinned packages (7 GB, some minutes the first time)"
    done = [(setup, [sys.executable, "setup_environment.py", "--extras", "data", "eval"])]
    done += [(title, [python, *words]) for title, words in steps(SCALES[args.scale], out)]
    began = time.monotonic()
    for number, (title, command) in enumerate(done, start=1):
        print(f"\n[{number}/{len(done)}] {title}\n      $ {' '.join(command)}", flush=True)
        start = time.monotonic()
        if code := run_child(command, cwd=ROOT).returncode:  # a signal ends the step under way, which saves first
            print(f"step {number} of {len(done)} stopped with exit code {code}: {' '.join(command)}", file=sys.stderr)
            script = "run_experiment.bat" if os.name == "nt" else "./run_experiment.sh"
            print(f"what is done is kept; to go on: {' '.join([script, 'full', *sys.argv[1:]])}", file=sys.stderr)
            return code if code > 0 else 128 - code  # ended by a signal
        print(f"      done in {time.monotonic() - start:.0f} s")
    print(f"\nDone in {(time.monotonic() - began) / 60:.0f} min.")
    print(f"  speak with it    {python} demo.py --checkpoint {out}/voice")
    print(f"  report           {out}/report/report.html")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
