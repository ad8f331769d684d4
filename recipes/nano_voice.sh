# A voice that reads numbers, times, dates and prices: how pretrained/nano was made, but for the tokenizer, which also
# heard 0.6 hours of `--sources sentences`. Sourced by run_experiment.sh full; uses step, venv_python, scale and out.
# About an hour and a half on 2 CPU cores. Scale smoke takes the same steps in minutes, to see that they work.

case "$scale" in
    full) hours=2 codec_steps=1600 model_steps=2400 every=300 texts=32 clips=24 longest=20 ;;
    smoke) hours=0.12 codec_steps=20 model_steps=4 every=2 texts=2 clips=2 longest=2 ;;
esac

# shellcheck disable=SC2154 # set where this is sourced
step 2 "Data: $hours hours of numbers, read by one voice" \
    "$venv_python" collect_data.py --sources numbers --voices adam --target_hours "$hours" --out "$out/data"
step 3 "Tokenizer: its semantic codebooks must tell the words (CTC)" \
    "$venv_python" train_tokenizer.py --data "$out/data" --out "$out/tokenizer" --max_steps "$codec_steps" \
    --stage_a 0.15 --stage_c 0.4 --ctc_weight 1 --content_gradient 0.3 --save_every 200
step 4 "Speech model: nano reads; what a recogniser hears of held-out texts is measured every $every steps" \
    "$venv_python" train.py --model_size nano --data "$out/data" --tokenizer "$out/tokenizer" --out "$out/nano" \
    --max_steps "$model_steps" --batch_rows 1 --joint 0 --listen 0 --text_only 0 --evict 0 --guidance_steps 800 \
    --depth_share 0.005 --semantic_share 1 --acoustic_weight 0 --shallow 0.9 --eval_every "$every" \
    --save_every "$every" --speak_every "$every" --speak_texts "$texts" --speak_codebooks 1 --speak_temperature 0.6
step 5 "Evaluation: held-out sentences" \
    "$venv_python" evaluation_framework.py --data "$out/data" --tokenizer "$out/tokenizer" \
    --checkpoint "$out/nano/best" --codebooks 1 --temperature 0 --max_clips "$clips" --max_replies "$clips" \
    --out "$out/report"
step 6 "Export: half precision, one folder" \
    "$venv_python" export_voice.py --checkpoint "$out/nano/best" --run "$out/nano" --tokenizer "$out/tokenizer" \
    --data "$out/data" --codebooks 1 --temperature 0 --float8 depth_heads --out "$out/voice"
step 7 "Demo: times, prices and dates" \
    "$venv_python" demo.py --mode batch --input corpus/spoken_numbers.json --checkpoint "$out/voice" \
    --max_seconds "$longest" --out "$out/spoken"
