"""The report of an evaluation as `report.json`, one page `report.html` with plots and audio players, and text.

Works on the plain values that `evaluation_framework.py` measured and on the audio beside them. The page has no outside
resources and only relative paths, so it opens from disk. Knows nothing of how a figure is measured.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from audio import read_audio, write_wav
from checkpointing import write_atomically
from speech_metrics import FEWEST_CONVERSATIONS, FRAMES_PER_CODE, METRICS, Metric

ORIGINAL, FULL, SEMANTIC = "original", "reconstruction", "semantic codebooks only"
GENERATED, REAL = "generated", "real turn through the tokenizer"
SHARES = {"wer", "wer_insertions", "wer_deletions", "wer_change", "cer", "usage", "perplexity", "ended"}  # shown in %
COLOURS = {ORIGINAL: "#4b5563", FULL: "#2563eb", SEMANTIC: "#d97706", GENERATED: "#dc2626", REAL: "#059669"}
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, sans-serif; color: #1f2937; background: #f3f4f6; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 26px; margin: 8px 0; } h2 { font-size: 20px; margin: 24px 0 8px; }
h3 { font-size: 16px; margin: 24px 0 4px; }
p.small, td.small { color: #6b7280; font-size: 13px; }
section, .card { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; }
section { padding: 4px 20px 20px; margin: 20px 0; overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; }
.card { padding: 12px 14px; }
.card b { display: block; font-size: 24px; } .card span { color: #6b7280; font-size: 13px; }
.note { background: #eff6ff; border-left: 4px solid #2563eb; padding: 10px 16px; border-radius: 6px; margin: 16px 0; }
.warn { background: #fffbeb; border-left: 4px solid #d97706; padding: 6px 16px; border-radius: 6px; margin: 16px 0; }
table { border-collapse: collapse; width: 100%; margin: 8px 0; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid #e5e7eb; vertical-align: top; }
th { font-size: 13px; color: #6b7280; font-weight: 600; }
td.num { font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; height: auto; } audio { width: 210px; height: 34px; }
code { background: #f3f4f6; padding: 1px 4px; border-radius: 4px; overflow-wrap: anywhere; }
"""


# ---- folder ---------------------------------------------------------------------------------------------------------


def reuse_or_measure(out: Path, name: str, inputs: dict, measure: Callable[[Path], dict]) -> dict:
    """The part `name` as measured from the same inputs before, or `measure(its audio folder)`, kept for the next run.

    The audio folder is named by the inputs: the report of an earlier run stays whole until the new one replaces it.
    """
    path = out / f"part-{name}.json"
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
        if part["inputs"] == inputs and all((out / wav).is_file() for wav in audio_of(part)):
            print(f"{name}: unchanged since the last run, its figures are kept")
            return part
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never measured, or a file from elsewhere: measured now and replaced
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    folder = out / "audio" / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    part = {"inputs": inputs, **measure(folder)}
    write_atomically(path, (json.dumps(part, indent=1, allow_nan=False) + "\n").encode())
    return part


def audio_of(part: dict) -> set[str]:
    """Paths of a part's wav files, relative to the report."""
    return {
        path for row in [*part.get("clips", []), *part.get("replies", [])] for path in row.get("audio", {}).values()
    }


def drop_old_audio(out: Path, report: dict) -> None:
    """Remove the audio folders of earlier reports, named as `reuse_or_measure` does."""
    used = {Path(path).parts[1] for name in ("tokenizer", "model") for path in audio_of(report[name] or {})}
    for folder in (out / "audio").iterdir():
        if re.fullmatch(r"(tokenizer|model)-[0-9a-f]{12}", folder.name) and folder.name not in used:
            shutil.rmtree(folder)


def save_audio(folder: Path, name: str, systems: dict[str, np.ndarray]) -> dict[str, str]:
    """Write one wav per system that is not empty; system -> path relative to the report."""
    paths = {}
    for system, samples in systems.items():
        if len(samples):
            path = folder / f"{name}-{system.split()[0].strip(',')}.wav"
            write_wav(path, samples)
            paths[system] = path.relative_to(folder.parents[1]).as_posix()
    return paths


# ---- text ------------------------------------------------------------------------------------------------------------


def about(report: dict, metric: str) -> Metric:
    """What a report says of one of its metrics."""
    return Metric(**report["metrics"][metric])


def collect_warnings(report: dict) -> list[str]:
    """What a reader must know before quoting a figure."""
    missing = report["missing"].items()
    found = [f"{about(report, metric).title} was not measured: {reason}." for metric, reason in missing]
    for name in ("tokenizer", "model"):
        figures = (report[name] or {"figures": {}})["figures"]
        counts = [figure["conversations"] for systems in figures.values() for figure in systems.values() if figure["n"]]
        if counts and min(counts) < FEWEST_CONVERSATIONS:
            found.append(
                f"The {name} was measured on as few as {min(counts)} held-out conversations. Below "
                f"{FEWEST_CONVERSATIONS} the intervals are too narrow and small differences say nothing."
            )
        for metric, systems in figures.items():
            reasons = dict.fromkeys(reason for figure in systems.values() for reason in figure["excluded"])
            for reason in reasons:
                counts = [figure["excluded"].get(reason, 0) for figure in systems.values()]
                found.append(
                    f"{about(report, metric).title} of the {name}: up to {max(counts)} clips left out in "
                    f"{sum(map(bool, counts))} of {len(counts)} rows ({reason})."
                )
    use = report["tokenizer"]["use"]
    enough = FRAMES_PER_CODE * use["codes"]
    if use["frames"] < enough:
        found.append(
            f"Codebook usage and perplexity come out too low: {use['frames']} held-out frames, "
            f"{enough} are needed for {use['codes']} codes."
        )
    return found


def model_note(report: dict) -> str:
    """What the numbers of the speech model mean at its stage of training."""
    part = report["model"]
    if part is None:
        return f"No speech model was measured: {report['model_absent']}."
    steps = part["inputs"]["steps"]
    model = f"The speech model after {steps} training steps" if steps else "The speech model"
    rate = part["figures"].get("wer", {}).get(GENERATED, {}).get("value")
    if rate is None:
        return f"{model}: whether its speech can be understood was not measured."
    if rate < 0.5:
        return f"{model} speaks: {rate:.0%} word errors when it runs freely."
    return (
        f"{model} babbles: {rate:.0%} word errors when it runs freely. That is what a short run gives: "
        "words take hours of data and many more steps."
    )


def show(metric: str, figure: dict, interval: bool = True) -> str:
    """'12.3 % (8.1 to 15.0)'; shares as per cent."""
    if figure["value"] is None:
        return "not measurable"
    scale, digits, unit = (100, 1, " %") if metric in SHARES else (1, 3, "")
    text = f"{scale * figure['value']:.{digits}f}{unit}"
    if interval and figure["low"] is not None:
        text += f" ({scale * figure['low']:.{digits}f} to {scale * figure['high']:.{digits}f})"
    return text


def lines_of(report: dict) -> list[tuple[str, str, str, int]]:
    """Every figure: metric, system, value with interval, sample size."""
    return [
        (about(report, metric).title, system, show(metric, figure), figure["n"])
        for name in ("tokenizer", "model")
        for metric, systems in (report[name] or {"figures": {}})["figures"].items()
        for system, figure in systems.items()
    ]


def print_summary(report: dict) -> None:
    """Every figure as one line, then what to know about them."""
    for title, system, value, n in lines_of(report):
        print(f"{title:40} {system:57} {value:28} n={n}")
    print(report["note"])
    for line in report["warnings"]:
        print(f"warning: {line}")


# ---- plots -----------------------------------------------------------------------------------------------------------


def save_plot(figure: matplotlib.figure.Figure, path: Path) -> None:
    figure.set_layout_engine("constrained")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def with_interval(axis: Axes, x: Iterable[float], figures: list[dict], colour: str, label: str | None = None) -> None:
    """A line through figures and the band of their intervals."""
    x = list(x)
    axis.plot(x, [f["value"] for f in figures], color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    if all(f["low"] is not None for f in figures):
        axis.fill_between(x, [f["low"] for f in figures], [f["high"] for f in figures], color=colour, alpha=0.18)


def plot_depth(part: dict, path: Path) -> None:
    """Paired metrics over the number of codebooks decoded."""
    curves = part["depth"]
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(curves), 3.2))
    for axis, (metric, by_depth) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        measured = {int(k): f for k, f in by_depth.items() if f["value"] is not None}
        with_interval(axis, measured, list(measured.values()), COLOURS[FULL])
        axis.axvline(part["semantic_codebooks"], color=COLOURS[SEMANTIC], linestyle="--", linewidth=1)
        axis.set(title=f"{METRICS[metric].title} (better: {METRICS[metric].better})", xlabel="codebooks decoded")
        axis.grid(alpha=0.3)
    save_plot(figure, path)


def plot_use(part: dict, path: Path) -> None:
    """Usage and perplexity of every codebook."""
    use, S = part["use"], part["semantic_codebooks"]
    figure = matplotlib.figure.Figure(figsize=(9, 2.8))
    axis = figure.subplots()
    x = np.arange(len(use["usage"]))
    colours = [COLOURS[SEMANTIC] if k < S else COLOURS[FULL] for k in x]
    axis.bar(x, use["usage"], color=colours, alpha=0.35)
    axis.bar(x, [f["value"] for f in use["perplexity"]], color=colours, width=0.45)
    axis.set(title="wide: share of codes in use; narrow: perplexity / V", xlabel="codebook", ylim=(0, 1))
    axis.grid(alpha=0.3, axis="y")
    save_plot(figure, path)


def plot_bars(rows: list[tuple[str, dict, str]], title: str, path: Path, scale: float = 1.0) -> None:
    """One horizontal bar per (name, figure, colour) with its interval."""
    rows = [row for row in rows if row[1]["value"] is not None][::-1]
    figure = matplotlib.figure.Figure(figsize=(9, 0.8 + 0.34 * len(rows)))
    axis = figure.subplots()
    for y, (_, value, colour) in enumerate(rows):
        axis.barh(y, scale * value["value"], color=colour, alpha=0.75, height=0.62)
        if value["low"] is not None:
            axis.plot([scale * value["low"], scale * value["high"]], [y, y], color="#111827", linewidth=1.5)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axis.set_title(title)
    axis.grid(alpha=0.3, axis="x")
    save_plot(figure, path)


def plot_losses(part: dict, path: Path) -> None:
    """Held-out loss of every codebook against a uniform guess."""
    figure = matplotlib.figure.Figure(figsize=(9, 3))
    axis = figure.subplots()
    with_interval(axis, range(len(part["losses"])), part["losses"], COLOURS[GENERATED], "held-out conversations")
    axis.axhline(math.log(part["codes"]), color=COLOURS[ORIGINAL], linestyle="--", linewidth=1, label="uniform guess")
    axis.set(title="Held-out loss, nats per code (better: lower)", xlabel="codebook")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    save_plot(figure, path)


def plot_spectrograms(out: Path, row: dict, path: Path) -> None:
    """The first clip and its copies."""
    figure = matplotlib.figure.Figure(figsize=(11, 2.8))
    axes = figure.subplots(1, len(row["audio"]), sharey=True, squeeze=False)[0]
    for axis, (system, wav) in zip(axes, row["audio"].items(), strict=True):
        samples, rate = read_audio(out / wav)
        axis.specgram(samples + 1e-6, NFFT=1024, Fs=rate, noverlap=768, vmin=-140, vmax=-40, cmap="magma")
        axis.set(title=system, xlabel="s")
    axes[0].set_ylabel("Hz")
    save_plot(figure, path)


def rows_of(report: dict, metric: str) -> list[tuple[str, dict, str]]:
    """(system, figure, colour) of a metric in both parts."""
    found = []
    for name in ("tokenizer", "model"):
        systems = (report[name] or {"figures": {}})["figures"].get(metric, {})
        for system, figure in systems.items():
            colour = next((c for start, c in COLOURS.items() if system.startswith(start)), COLOURS[ORIGINAL])
            found.append((system, figure, colour))
    return found


def draw_plots(out: Path, report: dict) -> dict[str, str]:
    """Every plot there is something for; name -> path relative to the page."""
    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    part, model = report["tokenizer"], report["model"]
    made = {name: f"plots/{name}.png" for name in ("use",)}
    plot_use(part, out / made["use"])
    if part["depth"]:
        made["depth"] = "plots/depth.png"
        plot_depth(part, out / made["depth"])
    for metric, scale, unit in (("wer", 100, ", %"), ("speaker_similarity", 1, "")):
        rows = rows_of(report, metric)
        if any(figure["value"] is not None for _, figure, _ in rows):
            made[metric] = f"plots/{metric}.png"
            title = f"{METRICS[metric].title}{unit} (better: {METRICS[metric].better})"
            plot_bars(rows, title, out / made[metric], scale)
    if part["clips"]:
        made["spectrograms"] = "plots/spectrograms.png"
        plot_spectrograms(out, part["clips"][0], out / made["spectrograms"])
    if model is not None:
        made["losses"] = "plots/losses.png"
        plot_losses(model, out / made["losses"])
    return made


# ---- page ------------------------------------------------------------------------------------------------------------


def tag(name: str, content: str, **attributes: str) -> str:
    """One element; `content` is HTML already, attribute values are escaped. `class_` gives class."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return f"<{name}{given}>{content}</{name}>"


def table(head: list[str], rows: Iterable[list[str]], number_columns: tuple[int, ...] = ()) -> str:
    """Rows of HTML cells."""
    top = tag("tr", "".join(tag("th", html.escape(name)) for name in head))
    body = ""
    for row in rows:
        cells = [tag("td", c, class_="num") if i in number_columns else tag("td", c) for i, c in enumerate(row)]
        body += tag("tr", "".join(cells)) + "\n"
    return tag("table", top + "\n" + body)


def image(plots: dict[str, str], name: str, text: str) -> str:
    return f'<img src="{html.escape(plots[name])}" alt="{html.escape(text)}">' if name in plots else ""


def metric_tables(report: dict, name: str) -> str:
    """A table per metric: system, value with interval, sample sizes; its definition below the title."""
    parts = []
    for metric, systems in report[name]["figures"].items():
        m = about(report, metric)
        parts.append(tag("h3", html.escape(m.title)))
        text = f"{m.unit}; better: {m.better}. {m.definition} Compare: {m.reference}."
        parts.append(tag("p", html.escape(text), class_="small"))
        rows = [
            [
                html.escape(system),
                show(metric, f),
                f"{f['n']}",
                f"{f['conversations']}",
                f"{sum(f['excluded'].values())}",
            ]
            for system, f in systems.items()
        ]
        parts.append(table(["", "value (95 % interval)", "clips", "conversations", "left out"], rows, (1, 2, 3, 4)))
    return "\n".join(parts)


def players(rows: list[dict]) -> str:
    """Text, and for every system its player and what the recogniser heard."""
    rows = [row for row in rows if row.get("audio")]
    systems = list(dict.fromkeys(system for row in rows for system in row["audio"]))
    body = []
    for row in rows:
        cells = [
            html.escape(row["text"])
            + tag("p", html.escape(f"{row['speaker']} {row.get('style') or ''}"), class_="small")
        ]
        for system in systems:
            path = row["audio"].get(system)
            cell = f'<audio controls preload="none" src="{html.escape(path)}"></audio>' if path else "no audio"
            if system in row.get("transcripts", {}):
                rate = f"{row['wer'][system]:.0%}: " if "wer" in row else ""
                cell += tag("p", rate + html.escape(row["transcripts"][system] or "(nothing heard)"), class_="small")
            cells.append(cell)
        body.append(cells)
    return table(["text", *systems], body)


def cards(report: dict) -> str:
    """The few figures to look at first."""
    wanted = [
        ("tokenizer", "wer", ORIGINAL, "word errors, originals"),
        ("tokenizer", "wer", FULL, "word errors, reconstructions"),
        ("tokenizer", "wer", SEMANTIC, "word errors, semantic codebooks only"),
        ("tokenizer", "stoi", FULL, "STOI, reconstructions"),
        ("tokenizer", "pesq_wb", FULL, "PESQ, reconstructions"),
        ("tokenizer", "distill_mos", FULL, "Distill-MOS, reconstructions"),
        ("tokenizer", "speaker_similarity", f"{FULL} to its original", "speaker similarity to the original"),
        ("model", "wer", GENERATED, "word errors, generated speech"),
        ("model", "real_time_factor", GENERATED, "real-time factor"),
    ]
    found = ""
    for part, metric, system, name in wanted:
        figure = (report[part] or {"figures": {}})["figures"].get(metric, {}).get(system)
        if figure is not None:
            found += tag("div", tag("b", show(metric, figure, interval=False)) + tag("span", name), class_="card")
    if report["model"] is not None:
        first = f"{report['model']['losses'][0]['value']:.2f}"
        found += tag("div", tag("b", first) + tag("span", "held-out loss of codebook 0, nats"), class_="card")
    return tag("div", found, class_="cards")


def tokenizer_section(report: dict, plots: dict[str, str]) -> str:
    part = report["tokenizer"]
    facts = (
        f"{len(part['clips'])} held-out clips, {sum(row['seconds'] for row in part['clips']):.0f} s. "
        f"{part['codebooks']} codebooks, the first {part['semantic_codebooks']} semantic, "
        f"{part['bits_per_second'] / 1000:.2f} kbit/s. Codebook use from {part['use']['frames']} frames of "
        f"{part['use']['conversations']} held-out conversations. The dashed line is the end of the semantic codebooks."
    )
    return tag(
        "section",
        tag("h2", "Tokenizer")
        + tag("p", facts)
        + image(plots, "depth", "metrics over the number of codebooks")
        + image(plots, "spectrograms", "spectrograms of a clip and its copies")
        + image(plots, "use", "use of every codebook")
        + metric_tables(report, "tokenizer")
        + tag("h3", "Listen")
        + players(part["clips"]),
    )


def model_section(report: dict, plots: dict[str, str]) -> str:
    part = report["model"]
    if part is None:
        return tag("section", tag("h2", "Speech model") + tag("p", html.escape(report["note"])))
    each = [[f"{k}", show("loss", figure), f"{figure['n']}"] for k, figure in enumerate(part["losses"])]
    return tag(
        "section",
        tag("h2", "Speech model")
        + tag("p", html.escape(f"{part['parameters'] / 1e6:.1f} million parameters, measured on {part['device']}."))
        + tag("p", html.escape(report["note"]), class_="note")
        + image(plots, "losses", "held-out loss of every codebook")
        + tag("p", html.escape(METRICS["loss"].definition), class_="small")
        + tag(
            "details", tag("summary", "Every codebook") + table(["codebook", "nats per code", "codes"], each, (0, 1, 2))
        )
        + metric_tables(report, "model")
        + tag("h3", "Listen")
        + players(part["replies"]),
    )


def page(report: dict, plots: dict[str, str]) -> str:
    """The whole page."""
    warn = "".join(tag("li", html.escape(line)) for line in report["warnings"])
    known = [
        [html.escape(f"{key}"), tag("code", html.escape(f"{value}"))] for key, value in report["environment"].items()
    ]
    known += [[html.escape(key), tag("code", html.escape(f"{value}"))] for key, value in report["settings"].items()]
    sources = [
        [html.escape(each) for each in (m.title, m.unit, m.better, m.source, ", ".join(m.needs))]
        for m in (about(report, metric) for metric in report["metrics"])
    ]
    body = (
        tag("h1", "Evaluation")
        + tag(
            "p", "Every interval is a 95 % bootstrap over whole conversations; shares are in per cent.", class_="small"
        )
        + cards(report)
        + tag("div", html.escape(report["note"]), class_="note")
        + (tag("div", tag("ul", warn), class_="warn") if warn else "")
        + tag(
            "section",
            tag("h2", "At a glance")
            + image(plots, "wer", "word errors")
            + image(plots, "speaker_similarity", "speakers"),
        )
        + tokenizer_section(report, plots)
        + model_section(report, plots)
        + tag(
            "section",
            tag("h2", "Sources of the metrics") + table(["metric", "unit", "better", "source", "needs"], sources),
        )
        + tag("section", tag("h2", "How this was made") + table(["", ""], known))
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += tag("title", "Evaluation") + tag("style", STYLE)
    return (
        "<!doctype html>\n" + tag("html", tag("head", head) + "\n" + tag("body", tag("main", body)), lang="en") + "\n"
    )


def markdown(report: dict) -> str:
    """The figures as a table, what to know about them, and what the metrics are."""
    rows = [f"| {title} | {system} | {value} | {n} |" for title, system, value, n in lines_of(report)]
    used = {metric for name in ("tokenizer", "model") for metric in (report[name] or {"figures": {}})["figures"]}
    known = [m for metric in report["metrics"] if metric in used for m in [about(report, metric)]]
    notes = [f"- {m.title} ({m.unit}; better: {m.better}): {m.definition} Source: {m.source}." for m in known]
    head = ["| metric | | value (95 % interval) | n |", "|---|---|---|---|"]
    warnings = [f"- {line}" for line in report["warnings"]]
    return "\n".join(["# Evaluation", "", report["note"], "", *warnings, "", *head, *rows, "", *notes]) + "\n"


def write_report(out: Path, report: dict) -> None:
    """Write plots, then `report.html`, `report.md` and `report.json`; each file appears whole or not at all."""
    plots = draw_plots(out, report)
    write_atomically(out / "report.html", page(report, plots).encode())
    write_atomically(out / "report.md", markdown(report).encode())
    write_atomically(out / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
