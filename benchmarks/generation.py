"""Time of a generated frame against transformers' CSM: python benchmarks/generation.py --model_size nano

The published architecture in the sizes asked for, the same random weights, the same prompt, all codebooks of one frame
after another, greedy on both sides, which must say the same; alternating in one process. Codec not included.

    ours             the loop of `generation.Conversation`
    ours, int8       the same with weights of 8 bits, on a CPU; with --eager also both without what is compiled
    transformers     generate() as it comes; with --static with its static caches

The same for --together conversations of the same prompt at once: ours as `speaking_together.py` does it, theirs as one
batch.

Then our preset as it is, with its additions and a codec of random weights, as one talks with it: the time to the first
audio, the real-time factor, and how much less time --together conversations take that speak at once than one after the
other. The floor is how long the memory needs to bring the weights and keys that a frame reads, at the bandwidth
measured by a product of a large matrix with a vector; weights that stay in the processor's caches can be below it.
Prints a table; the last line of --json is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from architecture import CSM, CSMCache
from command_line import EXIT_CODES_HELP, EXIT_DONE, run
from frames import Clock
from generation import Conversation, Sampling, Speaker
from inference_model import InferenceModel
from model_sizes import PRESETS, PUBLISHED, CSMConfig, frame_cost, preset
from run_folder import describe_environment
from rvq_tokenizer import PRESETS as TOKENIZERS
from rvq_tokenizer import RVQTokenizer
from speaking_together import Together
from spoken_conversations import DTYPES
from text_tokenizer import encode_turn, load_text_tokenizer
from training_pictures import memory_gib
from weight_layouts import transformers_model, transformers_version

FRAME_MS = 80.0
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while."


def prompt_of(config: CSMConfig) -> list[int]:
    """Text ids of a turn; of a vocabulary that needs a download, others in their number."""
    if config.text_tokenizer == "bytes":
        return encode_turn(load_text_tokenizer("bytes"), 0, TEXT)
    return torch.randint(0, config.text_vocab_size, (20,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.inference_mode()
def our_frames(model: InferenceModel, ids: list[int], n: int, batch: int = 1) -> tuple[Tensor, float]:
    """Greedy codes (batch, n, K) after a prompt, and milliseconds per frame of one without the prompt."""
    layout = model.config.layout
    speaker = Speaker(model, Sampling(temperature=0), torch.Generator())
    talks = [(Clock(), CSMCache(model.model)) for _ in range(batch)]
    for clock, _ in talks:
        clock.begin_turn()
    hidden = [model.hidden(layout.text_rows(ids, 1, clock).batch(), cache)[:, -1] for clock, cache in talks]
    frames: list[Tensor] = []  # (batch, K) each
    began = time.perf_counter()
    for _ in range(n):
        frames.append(speaker.first_codes(torch.cat(hidden)))
        codes = torch.stack(frames, dim=1)
        rows = [layout.audio_row(own, clock).batch() for own, (clock, _) in zip(codes, talks, strict=True)]
        hidden = [model.hidden_of_several(rows, [cache for _, cache in talks])[:, -1]]
    return torch.stack(frames, dim=1), 1000 * (time.perf_counter() - began) / (n * batch)


@torch.inference_mode()
def their_frames(twin: nn.Module, ids: list[int], n: int, static: bool, batch: int = 1) -> tuple[Tensor, float]:
    """The same by transformers; the prompt's time is that of a generation of one frame less one of its frames."""
    kind = {"cache_implementation": "static"} if static else {}
    tokens = torch.tensor([ids] * batch)
    common = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "do_sample": False, **kind}
    common |= {"depth_decoder_do_sample": False, "output_audio": False}
    began = time.perf_counter()
    twin.generate(**common, max_new_tokens=1)
    one = time.perf_counter() - began
    began = time.perf_counter()
    codes = twin.generate(**common, max_new_tokens=n + 1)
    return codes[:, :n], 1000 * (time.perf_counter() - began - one) / (n * batch)


def bandwidth() -> float:
    """Bytes per second that a product of a matrix of 256 MiB with a vector reads, the best of ten. In fp32, whose
    products are the fastest: in bf16 torch's own reads half as much."""
    matrix, vector = torch.ones(2**14, 2**12), torch.ones(2**12)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        torch.mv(matrix, vector)
        seconds.append(time.perf_counter() - began)
    return 2**28 / min(seconds)


def random_codec(seed: int) -> RVQTokenizer:
    torch.manual_seed(seed)
    tokenizer = RVQTokenizer(TOKENIZERS["cpu"]).eval()
    for stack in (tokenizer.semantic, tokenizer.acoustic):
        for level in stack.levels:
            torch.nn.init.normal_(level.codebook)
    return tokenizer


def with_everything(
    args: argparse.Namespace,
    tokenizer: RVQTokenizer,
    int8: bool = False,
    compiled: bool | None = None,
    acoustic_delay: int | None = None,
) -> dict[str, float]:
    """Our preset as it is, speaking `--frames` frames with a codec: medians over the rounds."""
    torch.manual_seed(args.seed)
    size = tokenizer.config
    shape = {name: getattr(size, name) for name in ("n_codebooks", "n_semantic", "codebook_size")}
    config = preset(args.model_size, **shape, text_tokenizer="bytes", text_vocab_size=258)
    if acoustic_delay is not None:
        config = dataclasses.replace(config, acoustic_delay=acoustic_delay)
    model = InferenceModel(CSM(config).eval().to(DTYPES[args.dtype]), int8, compiled)
    seconds = args.frames / 12.5
    sampling = Sampling(max_seconds=seconds, min_seconds=seconds)
    first, factors = [], []
    for index in range(args.rounds + 1):
        talk = Conversation(model, tokenizer, load_text_tokenizer("bytes"), sampling=sampling, seed=index)
        reply = talk.speak(0, TEXT)
        if index:  # the first one warms up
            first.append(1000 * reply.seconds_to_first_audio)
            factors.append(reply.real_time_factor)
    found = {"first_audio_ms": statistics.median(first), "real_time_factor": statistics.median(factors)}
    if acoustic_delay is not None:
        return found

    def talks() -> list[Conversation]:
        return [
            Conversation(model, tokenizer, load_text_tokenizer("bytes"), sampling=sampling, seed=index)
            for index in range(args.together)
        ]

    began = time.perf_counter()
    for talk in talks():
        talk.speak(0, TEXT)
    alone, began, together = time.perf_counter() - began, time.perf_counter(), Together()
    for index, talk in enumerate(talks()):
        together.begin(index, talk, talk.steps(0, TEXT))
    while len(together):
        list(together.round())
    return found | {"together_ratio": alone / (time.perf_counter() - began)}


def same_frames(ours: Tensor, theirs: Tensor) -> float:
    """Share of equal frames, each (batch, n, K)."""
    return float((ours == theirs).all(dim=2).float().mean())


def at_once(args: argparse.Namespace, model: InferenceModel, twin: nn.Module, ids: list[int]) -> dict[str, float]:
    """`--together` conversations on both sides, alternating, in half of the rounds."""
    ours, theirs = [], []
    for _ in range(-(-args.rounds // 2)):
        codes, ms = our_frames(model, ids, args.frames, args.together)
        ours.append(ms)
        their_codes, ms = their_frames(twin, ids, args.frames, args.static, args.together)
        theirs.append(ms)
    return {
        "conversations": args.together,
        "ms_per_frame": statistics.median(ours),
        "peer_ms_per_frame": statistics.median(theirs),
        "speedup": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "equal_frames": same_frames(codes, their_codes),
    }


def measure(args: argparse.Namespace) -> dict:
    """All numbers."""
    torch.manual_seed(args.seed)
    model = CSM(preset(args.model_size, **PUBLISHED)).eval().to(DTYPES[args.dtype])
    twin = transformers_model(model).to(DTYPES[args.dtype])
    ids = prompt_of(model.config)
    sides = {"ours": InferenceModel(model), "int8": InferenceModel(model, int8=True)}
    if args.eager:
        sides["eager"] = InferenceModel(model, compiled=False)
        sides["int8_eager"] = InferenceModel(model, int8=True, compiled=False)
    for side in sides.values():
        our_frames(side, ids, 2)
    their_frames(twin, ids, 2, args.static)
    times: dict[str, list[float]] = {name: [] for name in (*sides, "theirs")}
    for _ in tqdm(range(args.rounds), desc="rounds", disable=args.json):
        codes = {}
        for name, side in sides.items():
            codes[name], ms = our_frames(side, ids, args.frames)
            times[name].append(ms)
        their_codes, ms = their_frames(twin, ids, args.frames, args.static)
        times["theirs"].append(ms)
    equal = {name: same_frames(own, their_codes) for name, own in codes.items()}
    ms = {name: statistics.median(own) for name, own in times.items()}
    found = {}
    for name, side in sides.items():
        ratio = statistics.median(theirs / own for theirs, own in zip(times["theirs"], times[name], strict=True))
        weights = {"own_weights_mib": side.depth.nbytes / 2**20} if name != "ours" else {}
        found[name] = {"ms_per_frame": ms[name], "speedup": ratio, "equal_frames": equal[name], **weights}
    together = at_once(args, sides["ours"], twin, ids)
    del twin, sides
    read = frame_cost(model.config, DTYPES[args.dtype].itemsize, len(ids) + args.frames).bytes_moved
    speed = bandwidth()
    codec = random_codec(args.seed)
    whole = {"ours": {}, "int8": {"int8": True}}
    if not PRESETS[args.model_size].zero_end_of_turn:  # csm-1b has no place for a delay
        whole |= {f"{n} acoustic frames at once": {"acoustic_delay": n} for n in (0, 8)}
    if args.eager:
        whole["eager"] = {"compiled": False}
        whole["int8 eager"] = {"int8": True, "compiled": False}
    return {
        "model_size": args.model_size,
        "dtype": args.dtype,
        "ms_per_frame": ms["ours"],
        "peer_ms_per_frame": ms["theirs"],
        "speedup": found["ours"]["speedup"],
        "real_time_factor": ms["ours"] / FRAME_MS,
        "floor_ms_per_frame": 1000 * read / speed,
        "gigabytes_per_s": speed / 1e9,
        "sides": found,
        "together": together,
        "with_additions_and_codec": {
            name: with_everything(args, codec, **how) for name, how in whole.items() if args.whole
        },
        "peak_memory_mib": 1024 * (memory_gib(torch.device("cpu")) or math.nan),
    }


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = " (default: %(default)s)"
    add = parser.add_argument
    add("--model_size", choices=list(PRESETS), default="nano", help="as in train.py" + shown)
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the weights of both sides" + shown)
    add("--static", action="store_true", help="transformers with its static caches")
    add("--eager", action="store_true", help="also ours without what is compiled")
    whole_help = "also our preset as one talks with it (default: yes)"
    add("--whole", action=argparse.BooleanOptionalAction, default=True, help=whole_help)
    add("--together", type=int, default=8, help="conversations that speak at once, for their ratio" + shown)
    add("--frames", type=int, default=8, help="of 80 ms that each side speaks in a round" + shown)
    add("--rounds", type=int, default=3, help="ours, theirs, ours, theirs, ..." + shown)
    add("--threads", type=int, default=1, help="CPU threads" + shown)
    add("--seed", type=int, default=0, help="of weights and draws" + shown)
    add("--json", action="store_true", help="no progress bar; the last line is one JSON object")
    args = parser.parse_args(argv)
    if min(args.frames, args.rounds, args.threads, args.together) < 1:
        parser.error("--frames, --rounds, --threads and --together must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    torch.set_num_threads(args.threads)
    version = transformers_version()
    found = measure(args)
    print(f"{args.model_size}, {args.dtype}, {args.threads} threads, transformers {version}, medians of {args.rounds}")
    for name, side in found["sides"].items():
        equal = f"{100 * side['equal_frames']:.0f} % of the frames as theirs"
        ms, ratio = side["ms_per_frame"], side["speedup"]
        print(f"  {name:15}{ms:8.1f} ms a frame, real-time factor {ms / FRAME_MS:.2f}, ratio {ratio:.2f}; {equal}")
    print(f"  transformers   {found['peer_ms_per_frame']:8.1f} ms a frame")
    print(f"  floor          {found['floor_ms_per_frame']:8.1f} ms a frame at {found['gigabytes_per_s']:.1f} GB/s")
    many = found["together"]
    print(
        f"  {many['conversations']} at once: ours {many['ms_per_frame']:.1f}, transformers "
        f"{many['peer_ms_per_frame']:.1f} ms a frame of one, ratio {many['speedup']:.2f}"
    )
    for side, whole in found["with_additions_and_codec"].items():
        factor, first = whole["real_time_factor"], whole["first_audio_ms"]
        print(f"  {side}, with additions and codec: real-time factor {factor:.2f}, first audio after {first:.0f} ms")
        if "together_ratio" in whole:
            print(f"    {args.together} at once {whole['together_ratio']:.2f} times as fast as one after the other")
    if args.json:
        print(json.dumps({**found, "environment": describe_environment()}))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
