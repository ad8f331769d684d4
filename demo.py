"""Talk with a trained model: python demo.py

    interactive   a terminal: what you type is spoken, /help lists the commands
    test          fixed conversations to wav files
    batch         the conversations of a JSON file to wav files; --schema prints its form
    web           a page in a browser, and OpenAI's speech endpoint, both on this machine only

Measured for each turn: its duration, the time to its first audio and the real-time factor (compute time over audio
time, below 1 is faster than speech).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from audio import at_loudness, read_audio
from checkpointing import write_atomically
from command_line import (
    EXIT_CODES_HELP,
    EXIT_DONE,
    EXIT_PARTIAL,
    MissingRequirement,
    Several,
    StopSignals,
    only_run_in,
    run,
)
from conversation_formats import SUMMARY
from generation import SHIPPED, SPEAKING, VOICES, Sampling, read_speaking
from mimi_tokenizer import HUB_NAME
from ranks import pick_device, use_threads
from run_folder import describe_environment, read_settings
from spoken_conversations import CSM_1B, DTYPES, SCHEMA, Request, Voice, Worker, answer_all, read_requests
from terminal_chat import Chat

TEST_CONVERSATIONS: dict[str, list[tuple[int, str]]] = {  # (speaker, text)
    "one-sentence": [(0, "Good morning, it is nice to hear from you.")],
    "two-friends": [
        (0, "Have you eaten yet? I was about to make some soup."),
        (1, "Not yet, and soup sounds wonderful. What kind is it?"),
        (0, "Tomato, with the bread we bought on Saturday."),
        (1, "Then I will be there in twenty minutes."),
    ],
    "good-news": [
        (0, "You will not believe it, they gave me the job!"),
        (1, "That is fantastic! When do you start?"),
    ],
}
LOCAL = ("localhost", "127.0.0.1", "::1")  # names of this machine for itself
MODES = ("interactive", "test", "batch", "web")
TURN_SECONDS = {"test": 5.0}  # defaults of --max_seconds, else 20 ...
LEAST_SECONDS = {"test": 1.5}  # ... and --min_seconds, else 0
FEW_STEPS = 1000  # of a training from scratch: below this a model of any size babbles
BABBLE = (
    "This model was trained for {steps} steps, so its voice babbles: speech-like sound without words. To read its "
    "text it needs 10 or more hours of varied speech and tens of thousands of steps; see the README, 'What to expect'."
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = " (default: %(default)s)"
    add = parser.add_argument
    add("--mode", choices=MODES, default="interactive", help="see above" + shown)
    add("--checkpoint", default=str(SHIPPED), help="folder of a trained model, or sesame/csm-1b" + shown)
    own = f"folder of its tokenizer, or {HUB_NAME} (default: tokenizer/ in the checkpoint, else runs/tokenizer; "
    own += f"of csm-1b {HUB_NAME})"
    add("--tokenizer", help=own)
    add("--out", type=Path, help="folder for wav files and summary.json (default: runs/demo, with the mode if no test)")
    add("--device", default="cpu", help="auto, cpu or cuda" + shown)
    add("--threads", type=int, default=1, help="CPU threads; one is fastest for single frames" + shown)
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the model's weights" + shown)
    add("--int8", action="store_true", help="weights of 8 bits: faster on a CPU, not the same codes")
    compile_help = "steps of the model compiled: several times as fast on a CPU, after some seconds once per machine; "
    compile_help += "needs a C++ compiler (default: on a CPU, where there is one)"
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help=compile_help)
    add("--seed", type=int, default=0, help="of the draws" + shown)

    group = parser.add_argument_group("how it speaks")
    add = group.add_argument
    told = f" (default: as the checkpoint's {SPEAKING} says, else %s)"
    add("--temperature", type=float, help="0 = likeliest code" + told % Sampling.temperature)
    add("--top_k", type=int, help="codes to draw from" + told % Sampling.top_k)
    add("--min_p", type=float, help="no codes less likely than this share of the likeliest" + told % Sampling.min_p)
    add("--codebooks", type=int, help="speak with the first so many of every frame; fewer are faster" + told % "all")
    add("--max_seconds", type=float, help="cut a turn that has not ended (default: 20, in the test 5)")
    add("--min_seconds", type=float, help="a turn does not end before (default: 0, in the test 1.5)")
    clip = "wav, flac, ogg or mp3 that speaker 0 is to sound like, in a chat or the test; needs --voice_text"
    add("--voice", type=Path, help=clip)
    add("--voice_text", help="what is said in --voice")
    add("--raw_text", action="store_true", help="speak texts as written: no words for numbers, dates and the like")

    group = parser.add_argument_group("--mode interactive, --mode web")
    data_help = f"collected data, for its voices, beside those in {VOICES}/ of the checkpoint" + shown
    group.add_argument("--data", type=Path, default=Path("data"), help=data_help)
    play = "play replies, where there are a sound device and the package sounddevice" + shown
    group.add_argument("--play", action=argparse.BooleanOptionalAction, default=True, help=play)

    group = parser.add_argument_group("--mode batch")
    add = group.add_argument
    add("--input", type=Path, metavar="JSON", help="the conversations; those that lie in --out already are kept")
    add("--schema", action="store_true", help="print the form of --input as a JSON Schema, and end")
    add("--workers", type=int, default=1, help="processes, each with a model of its own" + shown)

    group = parser.add_argument_group("--mode web")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; others than this let other machines in" + shown)
    named = "other names by which a server on 127.0.0.1 may be asked, as that of a proxy (default: none)"
    add("--names", metavar="NAME", action=Several, default=[], help=named)
    add("--port", type=int, default=8000, help="port to listen on, 0 for a free one" + shown)
    add("--speaking", type=int, default=8, help="requests that are spoken at once" + shown)
    add("--waiting", type=int, default=64, help="requests that wait; more are told to come back" + shown)
    return parser


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.voice is None) != (args.voice_text is None):
        parser.error("--voice and --voice_text go together: the clip and what is said in it")
    if args.voice is not None and args.mode in ("batch", "web"):
        parser.error(f"--voice is not for --mode {args.mode}: voices are in --input or those of --data")
    if (args.input is not None) != (args.mode == "batch") and not args.schema:
        parser.error("--mode batch and --input JSON go together")
    for name in ("threads", "workers", "speaking", "waiting"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 <= args.port < 65536:
        parser.error("--port must be from 0 to 65535")
    if args.out is None:
        args.out = Path("runs/demo") if args.mode == "test" else Path("runs/demo") / args.mode
    if args.max_seconds is None:
        args.max_seconds = TURN_SECONDS.get(args.mode, 20.0)
    if args.min_seconds is None:
        args.min_seconds = min(LEAST_SECONDS.get(args.mode, 0.0), args.max_seconds)
    return args


def voice_of(args: argparse.Namespace) -> Voice:
    """What speaks. ValueError for sampling that cannot work."""
    names = ("temperature", "top_k", "min_p", "codebooks", "max_seconds", "min_seconds")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampling = Sampling(**{**read_speaking(args.checkpoint).sampling, **given})
    voice = Voice(
        args.checkpoint,
        args.tokenizer or tokenizer_of(args.checkpoint),
        args.device,
        sampling,
        args.seed,
        args.dtype,
        args.int8,
        args.raw_text,
        args.compile,
    )
    voice.own_turns()  # what is wrong with them is told before anything is done
    return voice


def tokenizer_of(checkpoint: str) -> str:
    """Where the tokenizer of a checkpoint is, if nothing is said."""
    own = Path(checkpoint) / "tokenizer"
    if own.is_dir():
        return str(own)
    return HUB_NAME if checkpoint == CSM_1B else "runs/tokenizer"


def test_requests(args: argparse.Namespace) -> list[Request]:
    """The fixed conversations, with the voice of `--voice`."""
    voices = {} if args.voice is None else {"0": {"audio": str(args.voice.resolve()), "text": args.voice_text}}
    requests = []
    for index, (name, lines) in enumerate(TEST_CONVERSATIONS.items()):
        turns = [{"speaker": speaker, "text": text} for speaker, text in lines]
        requests.append(Request(index, name, {"voices": voices, "turns": turns}, Path()))
    return requests


def speak_all(args: argparse.Namespace) -> int:
    """The modes test and batch."""
    requests, results = read_requests(args.input) if args.mode == "batch" else (test_requests(args), [])
    worker = Worker(voice_of(args), args.out, args.threads)
    with only_run_in(args.out), StopSignals() as stop:
        start = time.perf_counter()
        bar = tqdm(total=len(requests), desc="speaking", unit="conversation")
        with bar, contextlib.closing(answer_all(requests, worker, min(args.workers, len(requests) or 1))) as answers:
            for result in answers:
                results.append(result)
                bar.update()
                if stop.received is not None:
                    break
        if stop.received is not None:
            print(f"stopped after {bar.n} of {len(requests)} conversations; the same command goes on", file=sys.stderr)
            return stop.exit_code
        results.sort(key=lambda result: result["index"])
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        summary = {
            "settings": settings,
            "environment": describe_environment(pick_device(args.device)),
            "conversations": results,
        }
        write_atomically(args.out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    print_results(results, args.max_seconds)
    note_training(args.checkpoint)
    failed = sum(result["status"] == "failed" for result in results)
    counts = f"{len(results) - failed} conversations done, {failed} failed; " if failed else ""
    print(f"{counts}wav files and summary.json in {args.out}, {time.perf_counter() - start:.0f} s")
    return EXIT_PARTIAL if failed else EXIT_DONE


def print_results(results: list[dict], max_seconds: float) -> None:
    timing = f"{'first audio':>13}{'real-time factor':>18}"
    print(f"{'conversation':14}{'turn':>5}{'speaker':>8}{'seconds':>9}{timing}{'level':>9}  end")
    for result in results:
        name = result["id"].encode("utf-8", "backslashreplace").decode()
        for number, row in enumerate(result.get("turns", ()), start=1):
            print(f"{name:14}{number:>5}{row['speaker']:>8}{describe_turn(row, max_seconds)}")
        if result["status"] != "done":
            print(f"{name:14}{result['status']:>13}  {result.get('reason', 'from an earlier run')}")
    spoken = [row for result in results for row in result.get("turns", ()) if row.get("file")]
    if spoken:
        first = statistics.median(row["seconds_to_first_audio"] for row in spoken) * 1000
        factor = statistics.median(row["real_time_factor"] for row in spoken)
        print(f"median: first audio after {first:.0f} ms, real-time factor {factor:.2f}")


def describe_turn(row: dict, max_seconds: float) -> str:
    """The columns of a turn from its duration on."""
    if "heard" in row:
        return f"{row['seconds']:>9.2f}{'heard':>13}"
    if row["file"] is None:
        return f"{'empty':>9}"
    level = f"{row['level_dbfs']:.1f} dB" if row["level_dbfs"] is not None else "silent"
    end = "by itself" if row["ended_by_itself"] else f"cut at {max_seconds:g} s"
    timing = f"{row['seconds_to_first_audio'] * 1000:>10.0f} ms{row['real_time_factor']:>18.2f}"
    return f"{row['seconds']:>9.2f}{timing}{level:>9}  {end}"


def note_training(checkpoint: str) -> None:
    """Say what the voice can, or if it was trained too little to be understood."""
    if notes := read_speaking(checkpoint).notes:
        print(notes)
    settings = read_settings(Path(checkpoint)) or {}
    steps = (settings.get("train") or {}).get("max_steps")
    if steps is not None and steps < FEW_STEPS and not settings.get("init_from"):
        print(BABBLE.format(steps=steps))


def chat(args: argparse.Namespace) -> int:
    """The mode interactive."""
    voice = voice_of(args)
    use_threads(args.threads)
    clip = at_loudness(read_audio(args.voice)[0]) if args.voice else None
    with only_run_in(args.out):
        engine = voice.load()
        engine.warm_up()
        note_training(args.checkpoint)
        talk = Chat(engine, args.out, args.data, args.play)
        if clip is not None:
            talk.use_voice(str(args.voice), clip, args.voice_text)
        print("type what speaker 0 says; /help lists the commands, /quit ends")
        return talk.run(typed_lines(talk))


def serve(args: argparse.Namespace) -> int:
    """The mode web."""
    use_threads(args.threads)  # before anything is compiled; the studio's thread does so for itself
    try:
        import uvicorn

        from speech_server import Studio, collected_voices, hide_interruptions, make_app
    except ImportError as error:
        raise MissingRequirement(
            f"--mode web needs more packages ({error}): python setup_environment.py --extras data eval web"
        ) from error
    with contextlib.closing(listen_on(args.host, args.port)) as own:
        engine = voice_of(args).load()
        engine.warm_up()
        note_training(args.checkpoint)
        voices = {}
        for folder in (Path(args.checkpoint) / VOICES, args.data):
            voices |= collected_voices(engine, folder)
        with contextlib.closing(Studio(engine, args.speaking, args.waiting, args.threads)) as studio:
            hosts = (*LOCAL, *args.names) if args.host in LOCAL else ()
            app = make_app(engine, voices, studio, Path(args.checkpoint).name, hosts)
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"http://{host}:{own.getsockname()[1]}/ with {len(voices)} voices; Ctrl-C ends", flush=True)
            hide_interruptions()
            config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
            uvicorn.Server(config).run(sockets=[own])
    return EXIT_DONE


def listen_on(host: str, port: int) -> socket.socket:
    """ValueError: the port is taken or the address is not of this machine."""
    own = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
    except OSError as error:
        own.close()
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror or error}); give another --host or --port"
        ) from error
    own.listen()  # from now on who comes waits, and is not refused while the server starts
    return own


def typed_lines(talk: Chat) -> Iterator[str]:
    """What is typed or piped in, to its end."""
    with contextlib.suppress(ImportError):  # line editing, where the system has it
        import readline  # noqa: F401 - input() uses it once it is imported
    with contextlib.suppress(AttributeError):  # where it is a stream of another kind
        sys.stdin.reconfigure(errors="replace")  # what is piped in may be anything
    warned = False  # a moment earlier Ctrl-C would only have ended the reply
    while True:
        try:
            line = input(f"{talk.speaker}> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                raise
            warned = True
            talk.say("\n/save FILE keeps the conversation, /quit ends it; so does another Ctrl-C")
            continue
        warned = False
        yield line


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    if args.schema:
        print(json.dumps(SCHEMA, indent=2))
        return EXIT_DONE
    return {"interactive": chat, "web": serve}.get(args.mode, speak_all)(args)


if __name__ == "__main__":
    raise SystemExit(run(main))
