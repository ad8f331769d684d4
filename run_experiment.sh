#!/usr/bin/env bash
# From a fresh clone to a spoken reply: six numbered commands, the same as in run_experiment.bat.
# Each command skips or resumes what it has already done, so this script may be stopped and started at any time.

usage() {
    cat <<'TEXT'
usage: ./run_experiment.sh [--help]
       ./run_experiment.sh full [--scale full|smoke] [--out DIR]

Runs the whole experiment on this machine, without a GPU if there is none:
  [1/6] setup_environment.py     makes .venv and installs the pinned packages
  [2/6] collect_data.py          speaks half an hour of two-speaker dialogues into data/
  [3/6] train_tokenizer.py       trains the audio tokenizer into runs/tokenizer/
  [4/6] train_minimal.py         trains a small speech model for 100 steps into runs/minimal/
  [5/6] evaluation_framework.py  measures both and writes runs/report/report.html
  [6/6] demo.py --mode test      speaks fixed conversations into runs/demo/

With "full": trains a voice that reads numbers, times, dates and prices, about an hour and a half on 2 CPU cores, by
recipes/nano_voice.py, into runs/voice/ or DIR; --scale smoke takes the same steps in minutes, into runs/smoke/.

Run it again after a stop or a failure: what is done is skipped, what was begun is resumed.
Environment variable: PYTHON, the Python (3.10 to 3.13) that makes .venv, for example
  PYTHON=python3.12 ./run_experiment.sh
Exit code: 0, or that of the step that stopped (each command's --help lists them); 2 for a wrong argument.
TEXT
}

case "${1:-}" in
    "" | full) ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        echo "error: unknown argument $1; ./run_experiment.sh --help explains" >&2
        exit 2
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")" || exit 4
setup_python="${PYTHON:-python3}"
venv_python=".venv/bin/python"
if [ "${1:-}" = full ]; then
    shift
    exec "$setup_python" recipes/nano_voice.py "$@"
fi
trap : INT # Ctrl-C ends the step under way, which saves first; its exit code then ends this script

step() { # number, what it does, command...
    local number="$1" title="$2" code=0 start="$SECONDS"
    shift 2
    printf '\n[%s/6] %s\n      $ %s\n' "$number" "$title" "$*"
    "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        echo "step $number of 6 stopped with exit code $code: $*" >&2
        echo "what is done is kept; to go on: ./run_experiment.sh" >&2
        exit "$code"
    fi
    echo "      done in $((SECONDS - start)) s"
}

step 1 "Environment: make .venv and install the pinned packages (7 GB, some minutes the first time)" \
    "$setup_python" setup_environment.py --extras data eval
step 2 "Data: speak half an hour of two-speaker dialogues with an installed voice" \
    "$venv_python" collect_data.py --sources synthetic --target_hours 0.5
step 3 "Tokenizer: learn to turn 24 kHz audio into 12.5 frames of 32 codes per second, and back" \
    "$venv_python" train_tokenizer.py
step 4 "Speech model: 100 training steps, to see the loss fall" \
    "$venv_python" train_minimal.py
step 5 "Evaluation: measure the tokenizer and the speech model on held-out dialogues" \
    "$venv_python" evaluation_framework.py
step 6 "Demo: speak fixed conversations with the trained model" \
    "$venv_python" demo.py --mode test --checkpoint runs/minimal

printf '\nDone in %d min %d s.\n' "$((SECONDS / 60))" "$((SECONDS % 60))"
echo "  spoken replies   $PWD/runs/demo/*/conversation.wav"
echo "  report           $PWD/runs/report/report.html"
echo "  TensorBoard log  $PWD/runs (to see it: .venv/bin/tensorboard --logdir runs)"
