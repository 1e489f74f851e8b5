#!/bin/sh
# Run a real small model (SmolLM2-135M-Instruct) on one device and on a mesh of 8, and compare with transformers.
# Makes the environment it needs (VENV, .venv by default) and converts the model once, into .cache.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
model=.cache/smollm2-135m-instruct
make --no-print-directory "$venv/oracle.stamp" VENV="$venv"
"$venv/bin/python" -m scripts.gguf_to_hf "$model"
answers=$(mktemp -d)
trap 'rm -rf "$answers"' EXIT
prompt() {
    "$venv/bin/python" -c "from scripts import real_model; print(real_model.$1)"
}
answer() { # NAME OPTIONS...: the answer, and the command that gives it
    name=$1
    shift
    echo "\$ jaxmoe generate $model --max-tokens 60 --ignore-eos --dtype float32 $*"
    "$venv/bin/jaxmoe" generate "$model" --max-tokens 60 --ignore-eos --dtype float32 --json "$@" >"$answers/$name.json"
}
for devices in "--devices 1" "--devices 8 --mesh data=2,tensor=2,pipeline=2"; do
    count=${devices#--devices }
    count=${count%% *}
    # shellcheck disable=SC2086
    answer "plain-$count" $devices --prompt "$(prompt PLAIN)"
    # shellcheck disable=SC2086
    answer "chat-$count" $devices --chat --prompt "$(prompt CHAT)"
done
"$venv/bin/python" -m scripts.real_model "$model" "$answers"/*.json
